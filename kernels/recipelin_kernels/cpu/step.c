/* One more token of every row of hybrid attention (hybrid/cpu_step.py): the past is read once, and nothing is copied. */
#include "features.h"
#include "joins.h"
#include "threads.h"

#define STRIP 8   /* vectors of sums in registers */
#define AT_ONCE 4 /* queries that read keys and values together */

/* As class Token in hybrid/cpu_step.py. Places of a room: sinks, late keys, ring, the token's own. */
typedef struct {
  long batch, heads, key_heads, map_heads, width, features, sinks, ring, left, join, is_signed, threads;
  long late;           /* keys that have left the ring and are not in the sums, before this token */
  long begin, end;     /* of which late keys features are made now */
  float scale;         /* of scores, for powers of two */
  float clamp_q, clamp_k;
  const float *q, *k, *v; /* [B,H,D], [B,Hkv,D] */
  const float *phi_q;     /* [B,H,F], or NULL: made by weight_q */
  const float *weight_q, *weight_k; /* [H,D,F/2], [p,D,F/2] */
  const float *strength;  /* [H]: mix, or log_scale */
  const float *sums;      /* [B,p,F,D+1] */
  /* Where the room is full now, else NULL: the sums with its late keys, and the next room's sinks and ring. */
  float *next_sums, *next_k, *next_v;
  float *room_k, *room_v; /* [B,Hkv,sinks + ring + left,D] */
  float *room_phi;        /* [B,p,left,F] */
  const int64_t *positions; /* [B]: before the room's first token */
  float *y; /* [B,H,D] */
} Token;

INLINE void add_row(const int wide, const int beside, float left, const float *x, vec *sum, float *after) {
  UNROLL
  for (int w = 0; w < wide; w++) sum[w] += left * load(x + w * LANES);
  if (beside) *after += left * x[wide * LANES];
}

/* A strip of `sum_rows`: deep sets of sums, so that more than one addition is under way; beside: the column after it too. */
INLINE float strip(const int wide, const int deep, const int beside, long rows, const float *a, const float *b, long row,
                   float *y) {
  vec sum[STRIP][STRIP];
  float after[STRIP] = {0};
  UNROLL
  for (int r = 0; r < deep; r++)
    UNROLL
    for (int w = 0; w < wide; w++) sum[r][w] = (vec){0};
  long i = 0;
  for (; i + deep <= rows; i += deep)
    UNROLL
    for (int r = 0; r < deep; r++) add_row(wide, beside, a[i + r], b + (i + r) * row, sum[r], after + r);
  for (; i < rows; i++) add_row(wide, beside, a[i], b + i * row, sum[0], after);
  UNROLL
  for (int r = 1; r < deep; r++) {
    UNROLL
    for (int w = 0; w < wide; w++) sum[0][w] += sum[r][w];
    after[0] += after[r];
  }
  UNROLL
  for (int w = 0; w < wide; w++) store(y + w * LANES, sum[0][w]);
  return after[0];
}

/* y [width] = sum over r of a_r b_r, rows of b `row` apart; beside: returns the same sum of the column after the last. */
INLINE float sum_rows(const int beside, long rows, long width, const float *a, const float *b, long row, float *y) {
  long j = 0;
  float found = 0;
#define EACH(n, deep) \
  for (; j + n * LANES <= width; j += n * LANES) found = strip(n, deep, beside, rows, a, b + j, row, y + j);
  EACH(8, 1) EACH(4, 2) EACH(2, 4) EACH(1, 8)
#undef EACH
  return found;
}

/* y [few, wide vectors] += a [few, rows] b, rows of b and y `width` apart. */
INLINE void values_strip(const int few, const int wide, long rows, long width, const float *a, long a_row, const float *b,
                         float *y) {
  vec sum[AT_ONCE][ROWS];
  UNROLL
  for (int h = 0; h < few; h++)
    UNROLL
    for (int w = 0; w < wide; w++) sum[h][w] = load(y + h * width + w * LANES);
  for (long i = 0; i < rows; i++) {
    vec right[ROWS];
    UNROLL
    for (int w = 0; w < wide; w++) right[w] = load(b + i * width + w * LANES);
    UNROLL
    for (int h = 0; h < few; h++)
      UNROLL
      for (int w = 0; w < wide; w++) sum[h][w] += a[h * a_row + i] * right[w];
  }
  UNROLL
  for (int h = 0; h < few; h++)
    UNROLL
    for (int w = 0; w < wide; w++) store(y + h * width + w * LANES, sum[h][w]);
}

/* y [queries, width] += a [queries, rows] b [rows, width]: several queries read b together. */
static void values(long queries, long rows, long width, const float *a, long a_row, const float *b, float *y) {
  long h = 0;
#define EACH(few, wide) \
  for (; h + few <= queries; h += few) { \
    long j = 0; \
    for (; j + wide * LANES <= width; j += wide * LANES) \
      values_strip(few, wide, rows, width, a + h * a_row, a_row, b + j, y + h * width + j); \
    for (; j < width; j += LANES) values_strip(few, 1, rows, width, a + h * a_row, a_row, b + j, y + h * width + j); \
  }
  EACH(4, ROWS / 2) EACH(2, ROWS / 2) EACH(1, ROWS)
#undef EACH
}

/* Of LANES vectors the sums over their lanes, each in its place. */
INLINE vec sums_of(vec x[LANES]) {
  UNROLL
  for (int n = LANES / 2; n; n /= 2)
    UNROLL
    for (int i = 0; i < n; i++) x[i] = laced(x[i], x[i + n], 0) + laced(x[i], x[i + n], 1);
  return x[0];
}

/* Of `few` queries and LANES keys, of which `there` are there. */
INLINE void scores_block(const int few, long there, long width, const float *q, const float *k, float *s, long s_row) {
  const int wide = 8 / few < LANES ? 8 / few : LANES; /* keys whose sums are in registers together */
  vec part[AT_ONCE][LANES];
  for (int i = 0; i < LANES; i += wide) {
    const float *key[8];
    vec sum[AT_ONCE][8];
    UNROLL
    for (int w = 0; w < wide; w++) key[w] = k + least(i + w, there - 1) * width;
    UNROLL
    for (int h = 0; h < few; h++)
      UNROLL
      for (int w = 0; w < wide; w++) sum[h][w] = (vec){0};
    for (long d = 0; d < width; d += LANES) {
      vec right[8];
      UNROLL
      for (int w = 0; w < wide; w++) right[w] = load(key[w] + d);
      UNROLL
      for (int h = 0; h < few; h++) {
        vec left = load(q + h * width + d);
        UNROLL
        for (int w = 0; w < wide; w++) sum[h][w] += left * right[w];
      }
    }
    UNROLL
    for (int h = 0; h < few; h++)
      UNROLL
      for (int w = 0; w < wide; w++) part[h][i + w] = sum[h][w];
  }
  UNROLL
  for (int h = 0; h < few; h++) store(s + h * s_row, sums_of(part[h]));
}

/* s [queries, keys] = q k^T; of each row whole vectors are written. */
static void scores(long queries, long keys, long width, const float *q, const float *k, float *s, long s_row) {
  for (long p = 0; p < keys; p += LANES) {
    long h = 0;
#define EACH(few) \
  for (; h + few <= queries; h += few) \
    scores_block(few, least(LANES, keys - p), width, q + h * width, k + p * width, s + h * s_row + p, s_row);
    EACH(4) EACH(2) EACH(1)
#undef EACH
  }
}

static const ivec LANE = {COUNT};

INLINE float top_of(long n, const float *x, float top) {
  vec found = all(top);
  for (long j = 0; j < n; j += LANES) found = larger(either(LANE < (int32_t)(n - j), load(x + j), found), found);
  return most_of(found);
}

/* x_j to 2^(x_j - top); returns their sum. */
INLINE float powers(long n, float *x, float top) {
  vec sum = (vec){0};
  for (long j = 0; j < n; j += LANES) {
    ivec here = LANE < (int32_t)(n - j);
    vec old = load(x + j), power = where(here, exp2_of(old - top));
    store(x + j, either(here, power, old));
    sum += power;
  }
  return sum_of(sum);
}

INLINE float sum_over(long n, const float *x) {
  vec sum = (vec){0};
  for (long j = 0; j < n; j += LANES) sum += where(LANE < (int32_t)(n - j), load(x + j));
  return sum_of(sum);
}

/* By both, one after the other: their product may be too large. */
INLINE void scaled(long n, float *x, float factor, float inverse) {
  for (long j = 0; j < n; j++) x[j] = x[j] * factor * inverse;
}

/* Features of late keys from .. to of a map head; of rows whose ring is not full yet, zeros for its empty places. */
static void late_features(const Token *t, long row, const float *keys, const float *weight, float *phi, float *u) {
  long n = t->end - t->begin, columns = t->features / 2, empty = t->ring - t->positions[row];
  product(n, columns, t->width, keys + t->begin * t->width, t->width, 1, weight, columns, LANES, u, columns, NULL, 0);
  for (long i = 0; i < n; i++) {
    float *made = phi + (t->begin + i) * t->features;
    if (t->begin + i < empty)
      memset(made, 0, t->features * sizeof(float));
    else
      both_softmax(columns, u + i * columns, t->clamp_k, made);
  }
}

/* A strip of `fold`. */
INLINE void fold_strip(const int wide, const int rows, long late, long count, long width, const float *sums, const float *phi,
                       const float *v, float *next) {
  vec sum[ROWS / 4][STRIP];
  UNROLL
  for (int r = 0; r < rows; r++)
    UNROLL
    for (int w = 0; w < wide; w++) sum[r][w] = load(sums + r * (width + 1) + w * LANES);
  for (long j = 0; j < late; j++)
    UNROLL
    for (int w = 0; w < wide; w++) {
      vec right = load(v + j * width + w * LANES);
      UNROLL
      for (int r = 0; r < rows; r++) sum[r][w] += phi[j * count + r] * right;
    }
  UNROLL
  for (int r = 0; r < rows; r++)
    UNROLL
    for (int w = 0; w < wide; w++) store(next + r * (width + 1) + w * LANES, sum[r][w]);
}

/* next [F,D+1] = sums + phi^T [v, 1], phi [late,F], v [late,D]: row after row, as memory is read. */
static void fold(long late, long count, long width, const float *sums, const float *phi, const float *v, float *next) {
  enum { FEW_ROWS = ROWS / 4 };
  long row = width + 1;
  vec mass = (vec){0};
  for (long f = 0; f < count; f += FEW_ROWS) {
    long j = 0;
    if (f % LANES == 0) {
      mass = (vec){0};
      for (long i = 0; i < late; i++) mass += load(phi + i * count + f);
    }
#define EACH(n) \
  for (; j + n * LANES <= width; j += n * LANES) \
    fold_strip(n, FEW_ROWS, late, count, width, sums + f * row + j, phi + f, v + j, next + f * row + j);
    EACH(8) EACH(4) EACH(2) EACH(1)
#undef EACH
    for (long r = f; r < f + FEW_ROWS; r++) next[r * row + width] = sums[r * row + width] + mass[r % LANES];
  }
}

typedef struct {
  long queries, places, row; /* query heads of a key head; places of a room; of weights, one a place */
  size_t q, phi, weights, size; /* in a thread's memory; before q: what one product makes */
} Plan;

static Plan plan_of(const Token *t) {
  Plan p = {t->heads / t->key_heads, t->sinks + t->ring + t->left, 0, 0, 0, 0, 0};
  p.row = up(p.places) + LANES;
  p.q = up(most(t->left * t->features / 2, most(t->width, t->features / 2)));
  p.phi = p.q + p.queries * t->width;
  p.weights = p.phi + p.queries * t->features;
  p.size = p.weights + p.queries * p.row;
  return p;
}

/* Sinks and ring of a key head, after the token, to where the next room has them. */
static void move_on(const Token *t, long oldest, const float *from, float *to) {
  memcpy(to, from, t->sinks * t->width * sizeof(float));
  memcpy(to + t->sinks * t->width, from + (oldest + 1) * t->width, t->ring * t->width * sizeof(float));
}

/* A key head of a row, with its query heads. */
static void token_head(const void *call, long index, float *room) {
  const Token *t = call;
  Plan p = plan_of(t);
  long row = index / t->key_heads, head = index % t->key_heads, width = t->width, count = t->features;
  long oldest = t->sinks + t->late, newest = oldest + t->ring, per_key = t->map_heads / t->key_heads;
  long first = oldest + most(0, t->ring - t->late - t->positions[row]); /* of the window that is there */
  float *k = t->room_k + index * p.places * width, *v = t->room_v + index * p.places * width;
  float *q = room + p.q, *made = room + p.phi, *w = room + p.weights;
  memcpy(k + newest * width, t->k + index * width, width * sizeof(float));
  memcpy(v + newest * width, t->v + index * width, width * sizeof(float));

  long query = row * t->heads + head * p.queries, map = row * t->map_heads + head * per_key;
  const float *given = t->q + query * width, *phi = t->phi_q ? t->phi_q + query * count : made;
  for (long i = 0; i < p.queries * width; i++) q[i] = given[i] * t->scale;
  if (!t->phi_q)
    for (long h = 0; h < p.queries; h++) {
      const float *weight = t->weight_q + (head * p.queries + h) * width * (count / 2);
      sum_rows(0, width, count / 2, given + h * width, weight, count / 2, room);
      both_softmax(count / 2, room, t->clamp_q, made + h * count);
    }
  /* A block of scores fills whole vectors, and what comes after it is written after it. */
  scores(p.queries, t->sinks, width, q, k, w, p.row);
  for (long m = 0; m < per_key; m++) {
    long shared = p.queries / per_key;
    float *late = t->room_phi + (map + m) * t->left * count;
    scores(shared, t->late, count, phi + m * shared * count, late, w + m * shared * p.row + t->sinks, p.row);
  }
  for (long h = 0; h < p.queries; h++) memset(w + h * p.row + oldest, 0, (first - oldest) * sizeof(float));
  scores(p.queries, newest + 1 - first, width, q, k + first * width, w + first, p.row);

  for (long h = 0; h < p.queries; h++) {
    float *own = w + h * p.row, *y = t->y + (query + h) * width, *window = own + first;
    const float *sums = t->sums + (map + h * per_key / p.queries) * count * (width + 1);
    long seen = newest + 1 - first;
    float top = top_of(seen, window, top_of(t->sinks, own, -INFINITY));
    Row r = {.a_mass = powers(t->sinks, own, top) + powers(seen, window, top)};
    r.b_mass = sum_rows(1, count, width, phi + h * count, sums, width + 1, y) + sum_over(t->late, own + t->sinks);
    set_factors(t->join, t->is_signed, t->strength ? t->strength[head * p.queries + h] : 0, top / LOG2E, 0, &r);
    scaled(t->sinks, own, r.a_factor, r.inverse), scaled(seen, window, r.a_factor, r.inverse);
    scaled(t->late, own + t->sinks, r.b_factor, r.inverse), scaled(width, y, r.b_factor, r.inverse);
  }
  values(p.queries, newest + 1, width, w, p.row, v, t->y + query * width);
  for (long m = 0; m < per_key; m++) {
    float *late = t->room_phi + (map + m) * t->left * count;
    long sums = (map + m) * count * (width + 1);
    if (t->begin < t->end)
      late_features(t, row, k + t->sinks * width, t->weight_k + (head * per_key + m) * width * (count / 2), late, room);
    if (t->next_sums) fold(t->late + 1, count, width, t->sums + sums, late, v + t->sinks * width, t->next_sums + sums);
  }
  if (t->next_sums) {
    move_on(t, oldest, k, t->next_k + index * p.places * width);
    move_on(t, oldest, v, t->next_v + index * p.places * width);
  }
}

int step_token(const Token *t) {
  return deal(token_head, t, t->batch * t->key_heads, plan_of(t).size, t->threads);
}
