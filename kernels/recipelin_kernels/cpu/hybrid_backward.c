#include "hybrid.h"

/* What backward holds of a unit beside its rings. */
typedef struct {
  float *s, *l, *dx, *scaled; /* scaled: dy of the linear side, [CHUNK, D] */
  Panels panels;
  float *v, *sink_v, *turned, *states, *d_state;
} Room;

static size_t room_of(const Call *c, float *room, Room *found) {
  long columns = extra_of(c) + columns_of(c), ring = slots_of(c) * LANES, size = state_size(c);
  const long sizes[] = {CHUNK * columns, CHUNK * columns, CHUNK * columns, CHUNK * c->width,
                        extra_of(c) * c->width, extra_of(c) * c->features, ring * c->width,
                        linear_slots_of(c) * LANES * c->features, ring * c->width, extra_of(c) * c->width, size,
                        STRIDE * size, size};
  float **parts = (float **)found;
  size_t at = 0;
  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    if (found) parts[i] = room + at;
    at += sizes[i];
  }
  return at;
}

/* dy.v of columns j of a row, 0 where softmax keys do not count in the numerator. */
INLINE vec shown_part(const Unit *u, const Chunk *h, long j, long t, vec x) {
  const Call *c = u->call;
  if (c->shown_window && c->shown_sinks) return x;
  return where(~hidden_keys(c, key_of(u, h, j), window_start(c, t), t), x);
}

/* Turns, row by row, a into the gradient of q k^T, b into that of phi.phi, and dx = dy.v into the weights that y had.
 * shift [rows]: what dy.v of a linear key is compared with. */
static void through_rows(const Unit *u, const Chunk *h, const Head *head, const Room *m, const Row *rows, const float *dyy,
                         float *shift) {
  const Call *c = u->call;
  long ld = u->columns, sinks = up(least(c->sinks, h->origin)), end = u->extra + up(h->t1 - h->origin);
  for (long r = 0; r < h->t1 - h->t0; r++) {
    const Row *row = rows + r;
    float *a = m->s + r * ld, *b = m->l + r * ld, *dx = m->dx + r * ld;
    long t = h->t0 + r, start = window_start(c, t), soft = head->soft; /* a weight of 0 may be a key's far below the maximum */
    float soft_shift = dyy[r];
    shift[r] = dyy[r];
    if (c->join >= REPLACE) { /* softmax has a denominator of its own */
      vec sum = {0};
      EACH_COLUMN(j, sinks, u->extra, end) sum += where(load(a + j) != 0.0f, load(a + j) * shown_part(u, h, j, t, load(dx + j)));
      soft_shift = row->a_mass > 0 ? sum_of(sum) / row->a_mass : 0;
    }
    if (c->join >= AVERAGE) shift[r] = row->b_weight > 0 ? (dyy[r] - row->a_weight * soft_shift) / row->b_weight : 0;
    if (!row->live) { /* the denominator does not follow the weights */
      shift[r] = 0;
      if (c->join < REPLACE) soft_shift = 0;
    }
    if (c->join >= AVERAGE && !c->shown_linear) shift[r] = 0;
    float soft_by = row->a_factor * row->inverse, linear_by = row->b_factor * row->inverse, to_top = 0;
    if (c->dmix || c->through) {
      vec total = {0}, tops = {0};
      EACH_COLUMN(j, sinks, u->extra, end) {
        vec e = load(a + j);
        total += where(e != 0.0f, e * (shown_part(u, h, j, t, load(dx + j)) - soft_shift));
        tops += where(e == 1.0f, all(1));
      }
      float sum = sum_of(total), equal = sum_of(tops);
      if (c->dmix) c->dmix[u->run * c->heads + head->head] += sum * row->inverse;
      /* A shared denominator does not cancel the row's maximum; keys that are equally large share its gradient. */
      if (c->through && equal > 0) to_top = sum / equal;
    }
    float by = soft_by * c->scale, to_window = (soft_shift - shift[r]) * linear_by;
    EACH_COLUMN(j, sinks, u->extra, end) {
      vec e = load(a + j), x = load(dx + j), d = shown_part(u, h, j, t, x), weight = shown_part(u, h, j, t, e * soft_by);
      if (j >= u->extra) {
        if (c->shown_linear) weight += load(b + j) * linear_by;
        ivec set = c->has_linear ? linear_keys(c, head, h, key_of(u, h, j), t) : all_int(0);
        vec db = where(set, ((c->shown_linear ? x : all(0)) - shift[r]) * linear_by);
        if (c->join == REPLACE) db += where(soft ? soft_keys(c, key_of(u, h, j), start, t) : all_int(0), all(to_window));
        store(b + j, db);
      } else if (c->join == REPLACE) {
        store(b + j, where(soft ? soft_keys(c, j, start, t) & (places(j) < (int32_t)sinks) : all_int(0), all(to_window)));
      }
      store(dx + j, weight);
      store(a + j, by * (where(e != 0.0f, e * (d - soft_shift)) - where(e == 1.0f, all(to_top))));
    }
  }
}

/* Adds one head's gradients of a chunk; `state`: before it. */
static void chunk_backward(const Unit *u, const Chunk *h, const Head *head, const Room *m, const float *state) {
  const Call *c = u->call;
  long count = h->t1 - h->t0, ld = u->columns, width = c->width, features = c->features, at = query_at(u, head->head, h->t0);
  long sinks = least(c->sinks, h->origin), last = (h->t1 + LANES - 1) / LANES;
  const float *q = c->q + at * width, *phi_q = c->phi_q + at * features, *dy = c->dy + at * width, *y = c->y + at * width;
  const float *mass = state + features * width;
  float dyy[CHUNK], shift[CHUNK];
  Row rows[CHUNK];
  weigh(u, h, head, &m->panels, mass, m->s, m->l, rows);
  if (sinks) product(count, up(sinks), width, dy, width, 1, m->sink_v, LANES, LANES * width, m->dx, ld, NULL, 0);
  for (long p = h->origin / LANES, n; p < last; p += n) {
    n = p % 2 == 0 && p + 1 < last ? 2 : 1;
    long from = least(most(0, p * LANES - h->t0), count) & ~(ROWS - 1L);
    against(u, h, count - from, from, p, n, dy, width, m->v, u->slots, m->dx);
  }
  for (long r = 0; r < count; r++) {
    float by = c->shown_linear ? rows[r].b_factor * rows[r].inverse : 0;
    vec sum = {0};
    for (long d = r * width; d < (r + 1) * width; d += LANES) {
      sum += load(dy + d) * load(y + d);
      store(m->scaled + d, load(dy + d) * by);
    }
    dyy[r] = sum_of(sum);
  }
  through_rows(u, h, head, m, rows, dyy, shift);

  long keys = h->t1 - h->origin, key = (u->row * c->key_heads + u->key_head) * c->length + u->start;
  const float *span = m->s + u->extra, *weights = m->dx + u->extra, *db = m->l + u->extra;
  if (c->dv) {
    float *dv = c->dv + key * width;
    product(keys, width, count, weights, 1, ld, dy, width, LANES, dv + h->origin * width, width, NULL, 1);
    if (sinks) product(sinks, width, count, m->dx, 1, ld, dy, width, LANES, dv, width, NULL, 1);
  }
  if (c->dk) {
    float *dk = c->dk + key * width;
    product(keys, width, count, span, 1, ld, q, width, LANES, dk + h->origin * width, width, NULL, 1);
    if (sinks) product(sinks, width, count, m->s, 1, ld, q, width, LANES, dk, width, NULL, 1);
  }
  long pairs = most(0, pairs_end(c, head, h->t1 - 1) - h->origin), pair_sinks = c->join == REPLACE ? sinks : 0;
  int past = h->gone && c->sums_up;
  if (c->dq) {
    float *dq = c->dq + at * width;
    for (long r = 0; r < count; r += ROWS) {
      long n = least(ROWS, count - r);
      product(n, width, h->t0 + r + n - h->origin, span + r * ld, ld, 1, u->k + h->origin * width, width, LANES, dq + r * width,
              width, NULL, 0);
    }
    if (sinks) product(count, width, sinks, m->s, ld, 1, u->k, width, LANES, dq, width, NULL, 1);
  }
  if (c->dphi_q) {
    float *dphi_q = c->dphi_q + at * features;
    if (past) product(count, features, width, m->scaled, width, 1, m->turned, LANES, LANES * width, dphi_q, features, NULL, 0);
    for (long r = 0; r < count; r += ROWS) {
      long n = least(ROWS, count - r), some = most(0, pairs_end(c, head, h->t0 + r + n - 1) - h->origin);
      product(n, features, some, db + r * ld, ld, 1, u->phi_k + h->origin * features, features, LANES, dphi_q + r * features,
              features, NULL, past);
    }
    if (pair_sinks) product(count, features, sinks, m->l, ld, 1, u->phi_k, features, LANES, dphi_q, features, NULL, 1);
    for (long r = 0; past && r < count; r++) {
      float by = rows[r].b_factor * rows[r].inverse * shift[r];
      for (long f = 0; f < features; f += LANES) {
        float *to = dphi_q + r * features + f;
        store(to, load(to) - by * load(mass + f));
      }
    }
    if (c->dlog_scale) { /* the linear side is as linear in phi_q as in exp(log_scale) */
      vec sum = {0};
      for (long f = 0; f < count * features; f += LANES) sum += load(phi_q + f) * load(dphi_q + f);
      c->dlog_scale[u->run * c->heads + head->head] += sum_of(sum);
    }
  }
  if (c->dphi_k) {
    float *dphi_k = c->dphi_k + ((u->row * c->map_heads + u->map_head) * c->length + u->start) * features;
    product(pairs, features, count, db, 1, ld, phi_q, features, LANES, dphi_k + h->origin * features, features, NULL, 1);
    if (pair_sinks) product(sinks, features, count, m->l, 1, ld, phi_q, features, LANES, dphi_k, features, NULL, 1);
  }
  if (past && (c->dphi_k || c->dv)) {
    product(features, width, count, phi_q, 1, features, m->scaled, width, LANES, m->d_state, width, NULL, 1);
    float *d_mass = m->d_state + features * width;
    for (long r = 0; r < count; r++) {
      float by = rows[r].b_factor * rows[r].inverse * shift[r];
      for (long f = 0; f < features; f += LANES) store(d_mass + f, load(d_mass + f) - by * load(phi_q + r * features + f));
    }
  }
}

/* Adds the gradients of keys [from, to), which entered the state, from that of the state. */
static void leave_state(const Unit *u, long from, long to, const Room *m) {
  const Call *c = u->call;
  long width = c->width, features = c->features;
  from = most(from, summed_from(u));
  if (from >= to) return;
  if (c->dphi_k) {
    float *dphi_k = c->dphi_k + ((u->row * c->map_heads + u->map_head) * c->length + u->start + from) * features;
    pack(features, width, m->d_state, width, m->turned);
    product(to - from, features, width, u->v + from * width, width, 1, m->turned, LANES, LANES * width, dphi_k, features, NULL, 1);
    for (long j = 0; j < to - from; j++)
      for (long f = 0; f < features; f += LANES) {
        float *at = dphi_k + j * features + f;
        store(at, load(at) + load(m->d_state + features * width + f));
      }
  }
  if (c->dv) {
    float *dv = c->dv + ((u->row * c->key_heads + u->key_head) * c->length + u->start + from) * width;
    product(to - from, width, features, u->phi_k + from * features, features, 1, m->d_state, width, LANES, dv, width, NULL, 1);
  }
}

static void unit_backward(const Unit *u, const Room *m) {
  const Call *c = u->call;
  long size = state_size(c), chunks = chunks_of(u->length), groups = groups_of(u->length), width = c->width;
  long packed = u->length, packed_phi = u->length; /* panels from there on are in the rings */
  const float *held = held_of(u);
  memset(m->d_state, 0, size * sizeof(float));
  if (c->sinks) {
    pack(least(c->sinks, u->length), width, u->k, width, m->panels.sink_k);
    pack(least(c->sinks, u->length), width, u->v, width, m->sink_v);
    pack(least(c->sinks, u->length), c->features, u->phi_k, c->features, m->panels.sink_phi);
  }
  for (long group = groups; group-- > 0;) {
    long first = group * STRIDE, stop = least(first + STRIDE, chunks);
    memcpy(m->states, held + group * size, size * sizeof(float));
    for (long number = first; number + 1 < stop; number++) {
      Chunk h = chunk_of(u, number);
      float *next = m->states + (number + 1 - first) * size;
      memcpy(next, next - size, size * sizeof(float));
      if (c->sums_up) add_to_state(u, h.gone, h.next, next);
    }
    for (long number = stop; number-- > first;) {
      Chunk h = chunk_of(u, number);
      const float *state = m->states + (number - first) * size;
      if (number + 1 < chunks && c->sums_up && (c->dphi_k || c->dv)) leave_state(u, h.gone, h.next, m);
      if (h.t0 == h.t1) continue;
      long from = h.origin / LANES, to = up(h.t1) / LANES;
      fill_ring(u->k, u->length, width, from, least(to, packed), u->slots, m->panels.k);
      fill_ring(u->v, u->length, width, from, least(to, packed), u->slots, m->v);
      packed = least(packed, from);
      if (h.gone && c->sums_up && c->dphi_q) pack(c->features, width, state, width, m->turned);
      for (long i = 0; i < u->each; i++) {
        Head head = head_of(u, i);
        long linear = linear_panels(u, &h, &head);
        fill_ring(u->phi_k, u->length, c->features, from, least(linear, packed_phi), u->linear_slots, m->panels.phi);
        packed_phi = least(packed_phi, from);
        chunk_backward(u, &h, &head, m, state);
      }
    }
  }
}

static void backward_key_head(const void *given, long index, float *memory) {
  const Call *c = given;
  long shared = c->map_heads / c->key_heads;
  Room room;
  room_of(c, memory, &room);
  for (long i = 0; i < shared; i++) {
    Unit u = unit_of(c, index / c->key_heads, index % c->key_heads * shared + i);
    unit_backward(&u, &room);
  }
}

/* Adds to dk, dv, dphi_k, dmix and dlog_scale, writes dq and dphi_q; 0, or 1 where memory is lacking. */
int hybrid_backward(const Call *c, long threads) {
  return deal(backward_key_head, c, c->run_count * c->key_heads, room_of(c, NULL, NULL), threads);
}
