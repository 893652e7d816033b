/* What the softmax and the linear weights of a row are multiplied by: `factors` of ../hybrid/chunk.py. */
#ifndef RECIPELIN_JOINS
#define RECIPELIN_JOINS
#include "tiles.h"

#define LOG_TINY -69.0f     /* as in chunk.py */
#define FEW 1.17549435e-38f /* a mass below is none */
#define SIGNED_FLOOR 1e-6f  /* as in rows.py */

enum { SHARED, ABSOLUTE, REPLACE, AVERAGE, SUM }; /* from AVERAGE on each side has a denominator of its own */

typedef struct {
  float a_factor, b_factor, inverse; /* y = inverse (a_factor sum a v + b_factor sum b v) */
  float a_mass, b_mass, a_weight, b_weight, live; /* live: 0 where a signed denominator stands at its floor */
} Row;

/* x kept away from 0 where it is signed. */
INLINE float floored(long is_signed, float x, float *live) {
  *live = !is_signed || !(fabsf(x) < SIGNED_FLOOR); /* NaN stays NaN */
  return *live || x == 0 ? x : copysignf(SIGNED_FLOOR, x);
}

/* strength: mix or log_scale of the head; top: the largest score; window_mass: of `replace`, the sum of phi.phi over the
 * window. */
static inline void set_factors(long join, long is_signed, float strength, float top, float window_mass, Row *r) {
  float a_mass = r->a_mass, b_mass = r->b_mass;
  r->a_weight = r->b_weight = 0;
  if (join >= AVERAGE) {
    int a = a_mass >= FEW, b = fabsf(b_mass) >= FEW;
    r->a_weight = join == SUM ? a : (float)a / (1 + b);
    r->b_weight = join == SUM ? b : (float)b / (1 + a);
    r->a_factor = a ? r->a_weight / a_mass : 0;
    r->b_factor = b ? r->b_weight / floored(is_signed, b_mass, &r->live) : 0;
    if (!b) r->live = !is_signed;
    r->inverse = 1;
    return;
  }
  r->a_factor = join == SHARED ? strength : join == REPLACE && a_mass != 0 ? window_mass / a_mass : 0;
  r->b_factor = 1;
  if (join == ABSOLUTE) {
    float level = -INFINITY;
    if (a_mass > 0) level = top;
    if (b_mass != 0) level = fmaxf(level, strength + logf(fmaxf(fabsf(b_mass), FEW)));
    if (level == -INFINITY) level = 0;
    r->a_factor = expf(fminf(top - level, 0));
    r->b_factor = expf(fminf(strength - level, -LOG_TINY));
  }
  float den = floored(is_signed, r->a_factor * a_mass + r->b_factor * b_mass, &r->live);
  r->inverse = den == 0 ? 0 : 1 / den;
}
#endif
