/* The standard feature map of whole rows (hybrid/cpu_features.py), a block of tokens at a time: what the product leaves
 * is still in a core's cache when the softmax reads it. */
#include "features.h"
#include "threads.h"

#define BLOCK 32 /* tokens */

/* As class Features in hybrid/cpu_features.py. */
typedef struct {
  int64_t batch, x_heads, heads, length, width, columns;
  int64_t x_batch, x_head, x_row; /* how far apart x's rows of the batch, heads and tokens are */
  const float *x, *weight;        /* [B,h,T,D], [H,D,C] */
  float *phi;                     /* [B,H,T,2 C] */
  const float *dphi;
  float *dx, *dweight; /* [B,h,T,D], [B,H,D,C] of zeros; NULL: not wanted */
  float least;
} Features;

/* Of a row of the batch, a head. */
static void forward_head(const void *call, long index, float *u) {
  const Features *f = call;
  long row = index / f->heads, head = index % f->heads, columns = f->columns;
  const float *x = f->x + row * f->x_batch + head / (f->heads / f->x_heads) * f->x_head;
  const float *weight = f->weight + head * f->width * columns;
  float *phi = f->phi + index * f->length * 2 * columns;
  for (long t = 0; t < f->length; t += BLOCK) {
    long few = least(BLOCK, f->length - t);
    product(few, columns, f->width, x + t * f->x_row, f->x_row, 1, weight, columns, LANES, u, columns, NULL, 0);
    for (long i = 0; i < few; i++) both_softmax(columns, u + i * columns, f->least, phi + (t + i) * 2 * columns);
  }
}

int features_forward(const Features *f, long threads) {
  return deal(forward_head, f, f->batch * f->heads, BLOCK * f->columns, threads);
}

/* sum over j of p_j g_j, features at the clamp without gradient. */
INLINE float passed_sum(long columns, const float *p, const float *g, float least) {
  vec sum = (vec){0};
  for (long j = 0; j < columns; j += LANES) sum += load(p + j) * where(load(p + j) > least, load(g + j));
  return sum_of(sum);
}

/* The gradient to u of both softmaxes, of which p [2 C] is the result. */
INLINE void both_gradient(long columns, const float *p, const float *g, float least, float *du) {
  float positive = passed_sum(columns, p, g, least), negative = passed_sum(columns, p + columns, g + columns, least);
  for (long j = 0; j < columns; j += LANES) {
    vec a = load(p + j), b = load(p + columns + j);
    vec passed_a = where(a > least, load(g + j)), passed_b = where(b > least, load(g + columns + j));
    store(du + j, a * (passed_a - positive) - b * (passed_b - negative));
  }
}

/* Of a row of the batch, a head of x with the maps that read it. */
static void backward_head(const void *call, long index, float *du) {
  const Features *f = call;
  long row = index / f->x_heads, x_head = index % f->x_heads, group = f->heads / f->x_heads;
  long columns = f->columns, width = f->width, matrix = width * columns;
  const float *x = f->x + row * f->x_batch + x_head * f->x_head;
  float *turned = du + BLOCK * columns;
  for (long m = 0; m < group; m++) {
    long head = x_head * group + m, map = row * f->heads + head;
    if (f->dx) pack(width, columns, f->weight + head * matrix, columns, turned);
    for (long t = 0; t < f->length; t += BLOCK) {
      long few = least(BLOCK, f->length - t), at = (map * f->length + t) * 2 * columns;
      for (long i = 0; i < few; i++) {
        long token = at + i * 2 * columns;
        both_gradient(columns, f->phi + token, f->dphi + token, f->least, du + i * columns);
      }
      if (f->dweight)
        product(width, columns, few, x + t * f->x_row, 1, f->x_row, du, columns, LANES, f->dweight + map * matrix, columns,
                NULL, 1);
      if (f->dx)
        product(few, width, columns, du, columns, 1, turned, LANES, LANES * columns,
                f->dx + (index * f->length + t) * width, width, NULL, m > 0);
    }
  }
}

int features_backward(const Features *f, long threads) {
  return deal(backward_head, f, f->batch * f->x_heads, (BLOCK + f->width) * f->columns, threads);
}
