#include "hybrid.h"

/* Writes y of one head and chunk: rows times the state, then weights times v. */
static void outputs(const Unit *u, const Chunk *h, const Head *head, const float *state, float *s, float *l, Row *rows) {
  const Call *c = u->call;
  long count = h->t1 - h->t0, ld = u->columns, width = c->width, at = query_at(u, head->head, h->t0);
  long sinks = least(c->sinks, h->origin), end = up(h->t1 - h->origin);
  const float *phi_q = c->phi_q + at * c->features, *v = u->v + h->origin * width;
  float *y = c->y + at * width, *linear_y = c->linear_y ? c->linear_y + at * width : y;
  int hides = !(c->shown_window && c->shown_sinks);
  for (long r = 0; hides && r < count; r++) {
    long t = h->t0 + r, start = window_start(c, t);
    EACH_COLUMN(j, up(sinks), u->extra, u->extra + end) {
      float *a = s + r * ld + j;
      store(a, where(~hidden_keys(c, key_of(u, h, j), start, t), load(a)));
    }
  }
  float linear_scale[CHUNK], window_scale[CHUNK];
  for (long r = 0; r < count; r++) {
    const Row *row = rows + r;
    float a = row->a_factor * row->inverse, b = c->shown_linear ? row->b_factor * row->inverse : 0;
    linear_scale[r] = b;
    if (c->linear_y) { /* each branch divided by its own mass */
      float live, mass = floored(c->is_signed, row->b_mass, &live);
      linear_scale[r] = c->shown_linear && mass != 0 ? 1 / mass : 0;
      window_scale[r] = row->a_mass != 0 ? 1 / row->a_mass : 0;
      continue;
    }
    float *to = s + r * ld, *from = l + r * ld + u->extra;
    for (long j = 0; j < sinks; j += LANES) store(to + j, load(to + j) * a);
    to += u->extra;
    for (long j = 0; j < end; j += LANES) store(to + j, load(to + j) * a + load(from + j) * b);
  }
  int past = h->gone && c->sums_up && c->shown_linear;
  if (past)
    product(count, width, c->features, phi_q, c->features, 1, state, width, LANES, linear_y, width, linear_scale, 0);
  else
    memset(linear_y, 0, count * width * sizeof(float));
  if (!c->linear_y) {
    if (sinks) product(count, width, sinks, s, ld, 1, u->v, width, LANES, y, width, NULL, 1);
    for (long r = 0; r < count; r += ROWS) {
      long n = least(ROWS, count - r), keys = h->t0 + r + n - h->origin;
      product(n, width, keys, s + r * ld + u->extra, ld, 1, v, width, LANES, y + r * width, width, NULL, 1);
    }
    return;
  }
  float *window_y = c->window_y + at * width;
  if (sinks) product(count, width, sinks, s, ld, 1, u->v, width, LANES, window_y, width, window_scale, 0);
  for (long r = 0; r < count; r += ROWS) {
    long n = least(ROWS, count - r), keys = h->t0 + r + n - h->origin;
    long from = c->sinks > h->origin ? 0 : most(0, window_start(c, h->t0 + r) - h->origin);
    long linear = most(0, linear_end(c, head, h->t0 + r + n - 1) - h->origin);
    product(n, width, most(0, keys - from), s + r * ld + u->extra + from, ld, 1, v + from * width, width, LANES,
            window_y + r * width, width, window_scale + r, sinks > 0);
    if (c->has_linear && c->shown_linear)
      product(n, width, linear, l + r * ld + u->extra, ld, 1, v, width, LANES, linear_y + r * width, width, linear_scale + r, 1);
  }
  for (long r = 0; r < count; r++) {
    const Row *row = rows + r;
    float live, a = row->a_factor * row->inverse * row->a_mass, b = row->b_factor * row->inverse;
    float linear = b * floored(c->is_signed, row->b_mass, &live);
    for (long d = r * width; d < (r + 1) * width; d += LANES) store(y + d, a * load(window_y + d) + linear * load(linear_y + d));
    float weights = row->a_weight + row->b_weight;
    c->share[at + r] = c->join >= AVERAGE ? row->b_weight / fmaxf(weights, 0.5f) : b * row->b_mass;
  }
}

static size_t forward_room(const Call *c) {
  long columns = extra_of(c) + columns_of(c);
  return 2 * CHUNK * columns + (extra_of(c) + slots_of(c) * LANES) * c->width +
         (extra_of(c) + linear_slots_of(c) * LANES) * c->features + state_size(c);
}

static void forward_unit(const void *given, long index, float *room) {
  const Call *c = given;
  Unit u = unit_of(c, index / c->map_heads, index % c->map_heads);
  long size = state_size(c), chunks = chunks_of(u.length), packed = 0, packed_phi = 0;
  float *s = room, *l = s + CHUNK * u.columns;
  Panels panels = {.sink_k = l + CHUNK * u.columns};
  panels.sink_phi = panels.sink_k + u.extra * c->width;
  panels.k = panels.sink_phi + u.extra * c->features;
  panels.phi = panels.k + u.slots * LANES * c->width;
  float *state = panels.phi + u.linear_slots * LANES * c->features;
  float *held = c->held ? held_of(&u) : NULL;
  memset(state, 0, size * sizeof(float));
  if (c->sinks) pack(least(c->sinks, u.length), c->width, u.k, c->width, panels.sink_k);
  if (c->sinks) pack(least(c->sinks, u.length), c->features, u.phi_k, c->features, panels.sink_phi);
  for (long number = 0; number < chunks; number++) {
    Chunk h = chunk_of(&u, number);
    if (held && number % STRIDE == 0) memcpy(held + number / STRIDE * size, state, size * sizeof(float));
    if (h.t0 < h.t1) {
      long from = h.origin / LANES, to = up(h.t1) / LANES; /* panels before `packed` are there */
      fill_ring(u.k, u.length, c->width, most(packed, from), to, u.slots, panels.k);
      packed = most(packed, to);
      for (long i = 0; i < u.each; i++) {
        Head head = head_of(&u, i);
        Row rows[CHUNK];
        long linear = linear_panels(&u, &h, &head);
        fill_ring(u.phi_k, u.length, c->features, most(packed_phi, from), linear, u.linear_slots, panels.phi);
        packed_phi = most(packed_phi, linear);
        weigh(&u, &h, &head, &panels, state + c->features * c->width, s, l, rows);
        outputs(&u, &h, &head, state, s, l, rows);
      }
    }
    if (c->sums_up && number + 1 < chunks) add_to_state(&u, h.gone, h.next, state);
  }
}

/* 0, or 1 where memory is lacking. */
int hybrid_forward(const Call *c, long threads) {
  return deal(forward_unit, c, c->run_count * c->map_heads, forward_room(c), threads);
}

/* Numbers of a state that is held for backward, and tokens between two of them. */
void hybrid_held(const Call *c, int64_t *sizes) {
  sizes[0] = state_size(c);
  sizes[1] = STRIDE * CHUNK;
}
