/* Hybrid attention in chunks of queries over a span of keys and a running state, as ../hybrid/chunked.py has it.
 *
 * A run is real tokens of one row that see each other; positions count from its first token. A unit is a head of phi_k in a
 * run, with the query heads that read it. Panels of keys stand in a ring, one slot after the other.
 */
#ifndef RECIPELIN_HYBRID
#define RECIPELIN_HYBRID
#include "joins.h"
#include "threads.h"
#include "tiles.h"

#define CHUNK 32  /* queries */
#define STRIDE 16 /* chunks whose states exist at once in backward */

/* The order is that of hybrid/cpu.py. Tensors are contiguous; NULL: not there, or not wanted. */
typedef struct {
  const float *q, *k, *v, *phi_q, *phi_k, *mix, *log_scale;
  const uint8_t *keep; /* [B,H]: 0 drops the window */
  const int64_t *runs; /* [runs][4]: row, first token, end, number of held states before */
  float *y, *window_y, *linear_y, *share, *held;
  const float *dy;
  float *dq, *dk, *dv, *dphi_q, *dphi_k, *dmix, *dlog_scale; /* the last two [runs,H]; dlog_scale needs dphi_q */
  int64_t run_count, heads, key_heads, map_heads, length, first, width, features; /* first: of the queries that q holds */
  int64_t window, terraced, anchor, sinks, cover_all, drop_covers_all, join, through;
  int64_t reach, sums_up, is_signed; /* reach: 0 is none */
  int64_t has_window, has_sinks, has_linear, shown_window, shown_sinks, shown_linear;
  float scale; /* above 0 */
} Call;

typedef struct {
  const Call *call;
  long row, start, length, run, key_head, map_head, first_head, each; /* query heads: `each` from first_head on */
  long asked;                                                         /* the first query of the run that is asked for */
  long extra, columns, slots, linear_slots;                           /* columns of sinks, all columns, panels of the rings */
  const float *k, *v, *phi_k;                                         /* of the run's first token */
} Unit;

/* Queries [t0, t1) of a chunk that begins at `begin`; keys before `gone` are in the state, and before `next` when it ends.
 * Columns: the sinks before `origin`, then the keys from `origin` on. */
typedef struct {
  long begin, t0, t1, gone, next, origin;
} Chunk;

typedef struct {
  long head, soft, all; /* soft: it has a window; all: the linear side has the window's keys too */
} Head;

INLINE long window_start(const Call *c, long t) {
  if (!c->window) return t + 1;
  long start = t - c->window + 1;
  if (c->terraced) {
    long at = t - c->anchor, block = at >= 0 ? at / c->window : -((-at + c->window - 1) / c->window);
    start = (block - 1) * c->window + c->anchor;
  }
  if (c->reach) start = most(start, t - c->reach + 1);
  return most(start, 0);
}

/* The first key that query t looks at one by one, sinks but for. */
INLINE long first_column(const Call *c, long t) {
  return least(t, c->reach ? most(0, t - c->reach + 1) : window_start(c, t));
}

INLINE long span_of(const Call *c) { return c->reach ? c->reach : c->terraced ? 2 * c->window : c->window; }
INLINE long columns_of(const Call *c) { return up(CHUNK + least(span_of(c), c->length)) + LANES; }
INLINE long extra_of(const Call *c) { return up(least(c->sinks, c->length)); }
INLINE long slots_of(const Call *c) { return (columns_of(c) / LANES + 2) & ~1L; }
/* The ring of features need not reach as far as that of keys where the window's own are not linear. */
INLINE long linear_slots_of(const Call *c) {
  if (c->cover_all || c->keep || c->reach || c->join == REPLACE) return slots_of(c);
  return (up(CHUNK + (c->terraced ? c->window : 0)) / LANES + 3) & ~1L;
}
INLINE long chunks_of(long tokens) { return (tokens + CHUNK - 1) / CHUNK; }
INLINE long groups_of(long tokens) { return (chunks_of(tokens) + STRIDE - 1) / STRIDE; }
INLINE long state_size(const Call *c) { return c->features * (c->width + 1); }

static Unit unit_of(const Call *c, long run, long map_head) {
  const int64_t *r = c->runs + 4 * run;
  long shared = c->map_heads / c->key_heads, key_head = map_head / shared;
  Unit u = {.call = c, .row = r[0], .start = r[1], .length = r[2] - r[1], .run = run, .key_head = key_head,
            .map_head = map_head, .each = c->heads / c->map_heads, .slots = slots_of(c), .linear_slots = linear_slots_of(c)};
  u.first_head = map_head * u.each;
  u.asked = most(0, c->first - u.start);
  u.extra = extra_of(c);
  u.columns = u.extra + columns_of(c);
  long keys = (u.row * c->key_heads + key_head) * c->length + u.start;
  u.k = c->k + keys * c->width;
  u.v = c->v + keys * c->width;
  u.phi_k = c->phi_k + ((u.row * c->map_heads + map_head) * c->length + u.start) * c->features;
  return u;
}

INLINE Chunk chunk_of(const Unit *u, long number) {
  Chunk h = {.begin = number * CHUNK, .t1 = least((number + 1) * CHUNK, u->length)};
  h.t0 = least(most(h.begin, u->asked), h.t1);
  h.gone = first_column(u->call, h.begin);
  h.next = first_column(u->call, h.t1);
  h.origin = down(h.gone);
  return h;
}

INLINE Head head_of(const Unit *u, long number) {
  const Call *c = u->call;
  long head = u->first_head + number;
  int dropped = c->keep && !c->keep[u->row * c->heads + head];
  return (Head){head, !dropped, c->cover_all || (dropped && c->drop_covers_all)};
}

/* Where query t of a head is, counted in rows of q. */
INLINE long query_at(const Unit *u, long head, long t) {
  const Call *c = u->call;
  return (u->row * c->heads + head) * (c->length - c->first) + u->start + t - c->first;
}

/* The first key that the state may hold: it leaves the sinks out where the linear side of all its heads does. */
INLINE long summed_from(const Unit *u) { return head_of(u, 0).all ? 0 : u->call->sinks; }

/* One past the last key that query t has on its linear side, of those that are columns. */
INLINE long linear_end(const Call *c, const Head *head, long t) { return head->all ? t + 1 : least(window_start(c, t), t + 1); }

/* One past the last column for which phi.phi is asked: `replace` weighs the window by it. */
INLINE long pairs_end(const Call *c, const Head *head, long t) {
  return c->join == REPLACE ? t + 1 : c->has_linear ? linear_end(c, head, t) : 0;
}

/* One past the last panel of phi_k that a chunk looks at; where windows are dropped, as far as any head does. */
INLINE long linear_panels(const Unit *u, const Chunk *h, const Head *head) {
  const Call *c = u->call;
  return up(c->keep ? h->t1 : pairs_end(c, head, h->t1 - 1)) / LANES;
}

/* The states of a unit that are held for backward. */
INLINE float *held_of(const Unit *u) {
  const Call *c = u->call;
  return c->held + (c->runs[4 * u->run + 3] * c->map_heads + u->map_head * groups_of(u->length)) * state_size(c);
}

/* Packs panels [from, to) of x [keys, width] into their places of a ring. */
INLINE void fill_ring(const float *x, long keys, long width, long from, long to, long slots, float *ring) {
  for (long p = from; p < to; p++)
    pack(least(LANES, keys - p * LANES), width, x + p * LANES * width, width, ring + p % slots * LANES * width);
}

/* Every whole vector of columns of a row: `sinks` of the sinks, whole vectors, then those from `extra` on. */
#define EACH_COLUMN(j, sinks, extra, end) \
  for (long j = (sinks) ? 0 : (extra); j < (end); j = j + LANES == (sinks) ? (extra) : j + LANES)

/* The key of column j. */
INLINE long key_of(const Unit *u, const Chunk *h, long j) { return j < u->extra ? j : h->origin + j - u->extra; }

/* s [rows, columns] at the columns of panels [p, p + count): rows times panels. */
INLINE void against(const Unit *u, const Chunk *h, long rows, long first_row, long p, long count, const float *x, long width,
                    const float *ring, long slots, float *s) {
  product(rows, count * LANES, width, x + first_row * width, width, 1, ring + p % slots * LANES * width, LANES, LANES * width,
          s + first_row * u->columns + u->extra + p * LANES - h->origin, u->columns, NULL, 0);
}

INLINE ivec places(long base) {
  return (ivec){COUNT} + (int32_t)base;
}

/* Which of the keys from `base` on query t sees by softmax, by its linear side among the columns. */
INLINE ivec soft_keys(const Call *c, long base, long start, long t) {
  ivec j = places(base), near = (j >= (int32_t)start) & (j <= (int32_t)t);
  if (!c->sinks) return c->has_window ? near : all_int(0);
  ivec sink = (j < (int32_t)c->sinks) & (j <= (int32_t)t);
  return (c->has_window ? near : all_int(0)) | (c->has_sinks ? sink : all_int(0));
}

INLINE ivec linear_keys(const Call *c, const Head *head, const Chunk *h, long base, long t) {
  ivec j = places(base);
  long from = head->all ? h->gone : most(h->gone, c->sinks);
  if (c->reach) from = most(from, t - c->reach + 1);
  return (j >= (int32_t)from) & (j < (int32_t)linear_end(c, head, t));
}

/* Softmax keys that do not count in the numerator. */
INLINE ivec hidden_keys(const Call *c, long base, long start, long t) {
  ivec j = places(base), near = (j >= (int32_t)start) & (j <= (int32_t)t), sink = j < (int32_t)c->sinks;
  return (c->shown_window ? all_int(0) : near & ~sink) | (c->shown_sinks ? all_int(0) : sink & ~near);
}

/* Keys and their features, turned: of the sinks, and rings of those that a chunk looks at; sink_phi: of `replace` alone. */
typedef struct {
  float *sink_k, *sink_phi, *k, *phi;
} Panels;

/* Of one head's queries: a = exp(score - row maximum) in s and b = phi.phi in l, 0 outside their sets, and each row's sums and
 * factors. All columns up to the chunk's last key are written. */
static void weigh(const Unit *u, const Chunk *h, const Head *head, const Panels *panels, const float *mass, float *s, float *l,
                  Row *rows) {
  const Call *c = u->call;
  long count = h->t1 - h->t0, last = (h->t1 + LANES - 1) / LANES, ld = u->columns;
  const float *q = c->q + query_at(u, head->head, h->t0) * c->width;
  const float *phi_q = c->phi_q + query_at(u, head->head, h->t0) * c->features;
  long sinks = least(c->sinks, h->origin), soft = head->soft && (c->has_window || c->has_sinks);
  long pairs_last = pairs_end(c, head, h->t1 - 1);
  if (soft && sinks)
    product(count, up(sinks), c->width, q, c->width, 1, panels->sink_k, LANES, LANES * c->width, s, ld, NULL, 0);
  if (soft && sinks && c->join == REPLACE)
    product(count, up(sinks), c->features, phi_q, c->features, 1, panels->sink_phi, LANES, LANES * c->features, l, ld, NULL, 0);
  for (long p = h->origin / LANES, n; p < last; p += n) {
    n = p % 2 == 0 && p + 1 < last ? 2 : 1;
    long from = least(most(0, p * LANES - h->t0), count) & ~(ROWS - 1L), to = count;
    if (soft && p * LANES >= c->sinks)
      while (to > from && window_start(c, h->t0 + to - 1) >= (p + n) * LANES) to--;
    if (soft && to > from) against(u, h, to - from, from, p, n, q, c->width, panels->k, u->slots, s);
    if (p * LANES >= pairs_last) continue;
    for (from = 0, to = count; from < count && pairs_end(c, head, h->t0 + from) <= p * LANES;) from++;
    from &= ~(ROWS - 1L);
    against(u, h, to - from, from, p, n, phi_q, c->features, panels->phi, u->linear_slots, l);
  }
  for (long r = 0; r < count; r++) {
    long t = h->t0 + r, start = window_start(c, t), end = last * LANES;
    float *a = s + r * ld, *b = l + r * ld;
    long from = c->sinks > h->origin ? h->origin : most(h->origin, down(start));
    vec top = all(-INFINITY);
    const float in_base_2 = c->scale * LOG2E;
    Row *row = rows + r;
    float highest = 0, window_mass = 0;
    row->a_mass = 0;
    if (soft) {
      for (long j = 0; j < sinks; j += LANES)
        top = larger(either(soft_keys(c, j, start, t) & (places(j) < (int32_t)sinks), load(a + j), all(-INFINITY)), top);
      for (long j = from; j <= t; j += LANES)
        top = larger(either(soft_keys(c, j, start, t), load(a + u->extra + j - h->origin), all(-INFINITY)), top);
      highest = most_of(top); /* taken away before the factor: exactly 1 is the maximum's own weight */
      if (highest == -INFINITY) highest = 0;
      vec sum = {0};
      for (long j = 0; j < sinks; j += LANES) {
        ivec set = soft_keys(c, j, start, t) & (places(j) < (int32_t)sinks);
        vec e = where(set, exp2_of((load(a + j) - highest) * in_base_2));
        sum += e;
        store(a + j, e);
      }
      for (long j = h->origin; j < end; j += LANES) {
        float *at = a + u->extra + j - h->origin;
        if (j < from || j > t) {
          store(at, all(0));
          continue;
        }
        vec e = where(soft_keys(c, j, start, t), exp2_of((load(at) - highest) * in_base_2));
        sum += e;
        store(at, e);
      }
      row->a_mass = sum_of(sum);
    } else {
      for (long j = 0; j < sinks; j += LANES) store(a + j, all(0));
      for (long j = h->origin; j < end; j += LANES) store(a + u->extra + j - h->origin, all(0));
    }
    long stop = c->has_linear ? linear_end(c, head, t) : 0;
    vec sum = {0}, held = {0};
    if (soft && c->join == REPLACE) {
      for (long j = 0; j < sinks; j += LANES)
        held += where(soft_keys(c, j, start, t) & (places(j) < (int32_t)sinks), load(b + j));
      for (long j = from; j <= t; j += LANES) held += where(soft_keys(c, j, start, t), load(b + u->extra + j - h->origin));
      window_mass = sum_of(held);
    }
    for (long j = h->origin; j < end; j += LANES) {
      float *at = b + u->extra + j - h->origin;
      vec found = j < stop ? where(linear_keys(c, head, h, j, t), load(at)) : all(0);
      sum += found;
      store(at, found);
    }
    if (h->gone && c->sums_up)
      for (long f = 0; f < c->features; f += LANES) sum += load(phi_q + r * c->features + f) * load(mass + f);
    row->b_mass = sum_of(sum);
    float strength = c->join == SHARED ? c->mix[head->head] : c->join == ABSOLUTE ? c->log_scale[head->head] : 0;
    set_factors(c->join, c->is_signed, strength, highest * c->scale, window_mass, row);
  }
}

/* Adds keys [from, to) to the state [F, D] and its mass [F]. */
static void add_to_state(const Unit *u, long from, long to, float *state) {
  const Call *c = u->call;
  from = most(from, summed_from(u));
  if (from >= to) return;
  const float *phi = u->phi_k + from * c->features;
  product(c->features, c->width, to - from, phi, 1, c->features, u->v + from * c->width, c->width, LANES, state, c->width, NULL,
          1);
  float *mass = state + c->features * c->width;
  for (long f = 0; f < c->features; f += LANES) {
    vec sum = {0}; /* of few keys first: a long row's mass is large beside one of them */
    for (long j = 0; j < to - from; j++) sum += load(phi + j * c->features + f);
    store(mass + f, load(mass + f) + sum);
  }
}

#endif
