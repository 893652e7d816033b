/* Float matrices in tiles of registers, and the few functions of vectors that attention needs.
 *
 * Vectors are of the machine's size, LANES numbers: wider ones gcc keeps in memory. Widths are multiples of 16; rows are any
 * number. A product reads its left side one number at a time, by any two strides (so also transposed), and its right side a
 * vector at a time: either rows of a matrix (step in depth: its leading dimension, from vector to vector: LANES) or panels,
 * which `pack` makes of keys: panel p holds [width][LANES], the keys LANES p .. LANES p + LANES - 1 side by side.
 */
#ifndef RECIPELIN_TILES
#define RECIPELIN_TILES
#include <math.h>
#include <stdint.h>
#include <string.h>

/* COUNT: the lanes' numbers. Of two vectors x and y, LACED_LOW is x0 y0 x1 y1 .. and LACED_HIGH goes on. */
#if defined(__AVX512F__)
#define LANES 16
#define COUNT 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define LACED_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LACED_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LANES 8
#define COUNT 0, 1, 2, 3, 4, 5, 6, 7
#define LACED_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define LACED_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#define COUNT 0, 1, 2, 3
#define LACED_LOW 0, 4, 1, 5
#define LACED_HIGH 2, 6, 3, 7
#endif
/* A tile is of ROWS rows and two vectors: half the machine's registers hold its sums. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif
_Static_assert(sizeof(long) == sizeof(int64_t), "torch's int64 and ctypes' c_long are read as long"); /* not on Windows */
#define LOG2E 1.4426950408889634f
/* Before a loop of a constant count. Clang 14 and 16 leave one rolled that is given a larger number. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* of memory that is not aligned */
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec y) { *(loose *)x = y; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE ivec all_int(int32_t x) { return x - (ivec){0}; }
INLINE vec either(ivec mask, vec x, vec y) { return (vec)((mask & (ivec)x) | (~mask & (ivec)y)); }
INLINE vec where(ivec mask, vec x) { return (vec)(mask & (ivec)x); } /* else 0, whatever x holds */
INLINE vec larger(vec x, vec y) { return either(x > y, x, y); }
INLINE long least(long x, long y) { return x < y ? x : y; }
INLINE long most(long x, long y) { return x > y ? x : y; }
INLINE long down(long x) { return x & ~(long)(LANES - 1); } /* to whole vectors, of x >= 0 */
INLINE long up(long x) { return down(x + LANES - 1); }

/* Halves, quarters, .. are joined by lacing: lanes i and i + LANES / 2 come to lie beside each other. */
INLINE vec laced(vec x, vec y, int high) {
  return high ? __builtin_shufflevector(x, y, LACED_HIGH) : __builtin_shufflevector(x, y, LACED_LOW);
}

INLINE float sum_of(vec x) {
  UNROLL
  for (int n = 1; n < LANES; n *= 2) x = laced(x, x, 0) + laced(x, x, 1);
  return x[0];
}

INLINE float most_of(vec x) {
  UNROLL
  for (int n = 1; n < LANES; n *= 2) x = larger(laced(x, x, 0), laced(x, x, 1));
  return x[0];
}

/* 2^x: Taylor's series of 2^f, |f| <= 1/2, to the seventh power (1e-7 at most beside the rounding); 0 below 2^-126; NaN of NaN. */
INLINE vec exp2_of(vec x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits */
  vec held = either(x < -126.0f, all(-126.0f), x);
  vec shifted = held + magic;
  vec f = held - (shifted - magic);
  vec p = f * 1.52527338e-5f + 1.54035304e-4f;
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  ivec power = ((ivec)shifted + 127) << 23;
  return where(~(x < -126.0f), p * (vec)power);
}

/* log2 x of normal numbers x > 0: x = 2^n m, m within sqrt(1/2) .. sqrt(2); log2 m = (m - 1) p(m - 1), p fitted for the
 * least relative error (3e-8; with the rounding 1.5e-7), also beside 1, where the logarithm is small. NaN of NaN. */
INLINE vec log2_of(vec x) {
  ivec power = ((ivec)x - 0x3f3504f3) >> 23;
  vec f = (vec)((ivec)x - (power << 23)) - 1.0f;
  vec p = f * 0.125837043f - 0.207269818f;
  p = p * f + 0.215715632f;
  p = p * f - 0.238944814f;
  p = p * f + 0.287916243f;
  p = p * f - 0.360703677f;
  p = p * f + 0.480910629f;
  p = p * f - 0.721347332f;
  p = p * f + 1.44269502f;
  /* x - x: what was done to the bits has made a number of a NaN. */
  return f * p + (__builtin_convertvector(power, vec) + (x - x));
}

/* c [rows, LANES wide] = (add ? c : 0) + scale_r (a b), all sums in registers; called with constant rows and wide. */
INLINE void tile(const int rows, const int wide, long depth, const float *a, long a_row, long a_step, const float *b,
                 long b_step, long b_wide, float *c, long c_row, const float *scale, int add) {
  vec sum[ROWS][2];
  UNROLL
  for (int r = 0; r < rows; r++)
    UNROLL
    for (int w = 0; w < wide; w++) sum[r][w] = (vec){0};
  for (long k = 0; k < depth; k++) {
    vec right[2];
    UNROLL
    for (int w = 0; w < wide; w++) right[w] = load(b + k * b_step + w * b_wide);
    UNROLL
    for (int r = 0; r < rows; r++) {
      float left = a[r * a_row + k * a_step];
      UNROLL
      for (int w = 0; w < wide; w++) sum[r][w] += left * right[w];
    }
  }
  UNROLL
  for (int r = 0; r < rows; r++)
    UNROLL
    for (int w = 0; w < wide; w++) {
      float *at = c + r * c_row + w * LANES;
      vec found = scale ? sum[r][w] * scale[r] : sum[r][w];
      store(at, add ? load(at) + found : found);
    }
}

/* c [rows, width] = (add ? c : 0) + scale_r (a [rows, depth] b [depth, width]); scale may be NULL. */
static __attribute__((noinline)) void product(long rows, long width, long depth, const float *a, long a_row, long a_step,
                                              const float *b, long b_step, long b_wide, float *c, long c_row,
                                              const float *scale, int add) {
#define TILE(n, w) \
  tile(n, w, depth, a + r * a_row, a_row, a_step, b + j / LANES * b_wide, b_step, b_wide, c + r * c_row + j, c_row, \
       scale ? scale + r : scale, add)
  long j = 0;
  for (; j + 2 * LANES <= width; j += 2 * LANES) {
    long r = 0;
#if ROWS == 8
    for (; r + 8 <= rows; r += 8) TILE(8, 2);
#endif
    for (; r + 4 <= rows; r += 4) TILE(4, 2);
    for (; r < rows; r++) TILE(1, 2);
  }
  for (; j < width; j += LANES) {
    long r = 0;
#if ROWS == 8
    for (; r + 8 <= rows; r += 8) TILE(8, 1);
#endif
    for (; r + 4 <= rows; r += 4) TILE(4, 1);
    for (; r < rows; r++) TILE(1, 1);
  }
#undef TILE
}

/* LANES rows, turned: as often as LANES can be halved, rows i and i + LANES / 2 are laced into each other. */
INLINE void turn(vec x[LANES]) {
  UNROLL
  for (int n = 1; n < LANES; n *= 2) {
    vec y[LANES];
    UNROLL
    for (int i = 0; i < LANES; i++) y[i] = laced(x[i / 2], x[i / 2 + LANES / 2], i % 2);
    UNROLL
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}

/* Panels of x [keys, width] (its rows `row` apart); keys missing in the last panel are 0. */
static inline void pack(long keys, long width, const float *x, long row, float *panels) {
  for (long p = 0; p < keys; p += LANES)
    for (long d = 0; d < width; d += LANES) {
      vec block[LANES];
      UNROLL
      for (int i = 0; i < LANES; i++) block[i] = p + i < keys ? load(x + (p + i) * row + d) : (vec){0};
      turn(block);
      UNROLL
      for (int i = 0; i < LANES; i++) store(panels + p * width + (d + i) * LANES, block[i]);
    }
}
#endif
