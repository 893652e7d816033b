/* The standard feature map of one row: phi [2 columns] = [softmax(u), softmax(-u)], at least `least`. */
#ifndef RECIPELIN_FEATURES
#define RECIPELIN_FEATURES
#include "tiles.h"

/* u [columns], columns > 0 a multiple of 16. */
INLINE void both_softmax(long columns, const float *u, float least, float *phi) {
  vec top = load(u), bottom = top;
  for (long j = LANES; j < columns; j += LANES) {
    vec x = load(u + j);
    top = larger(top, x), bottom = either(x < bottom, x, bottom);
  }
  float most = most_of(top), fewest = -most_of(-bottom);
  vec sum = (vec){0}, sum_of_negative = (vec){0};
  for (long j = 0; j < columns; j += LANES) {
    vec x = load(u + j), a = exp2_of((x - most) * LOG2E), b = exp2_of((fewest - x) * LOG2E);
    store(phi + j, a), store(phi + columns + j, b);
    sum += a, sum_of_negative += b;
  }
  float scale[2] = {1 / sum_of(sum), 1 / sum_of(sum_of_negative)};
  for (int side = 0; side < 2; side++)
    for (long j = side * columns; j < (side + 1) * columns; j += LANES) {
      vec p = load(phi + j) * scale[side];
      store(phi + j, either(p < least, all(least), p)); /* NaN stays */
    }
}
#endif
