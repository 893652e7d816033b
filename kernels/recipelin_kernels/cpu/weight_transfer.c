/* The cross-entropy between a teacher's attention weights and a student's, with its gradients in the same pass.
 *
 * The formulas, and J, N, A, P, u and `kept`, are those of weight_transfer/chunked.py; what differs is the order. Of a block
 * of queries, most keys are seen by every query, by the linear side alone: there J = scale X, and with c = scale / N
 *
 *     dloss / dX = kept c - u P / X = (c - u P / X) + (kept - 1) c
 *
 * The last term is the same for all these keys of a query: it needs no product of pairs but sums of phi_k and of phi_q over
 * a panel of keys at a time. So does the linear mass, phi_q . sum phi_k, which is thus known before the pass begins, and
 * `kept`, which only ends with it, is not needed within. kept = 1 wherever the teacher's weights add up to 1 and none is
 * clamped: what is left for the sums is rounding. The other keys (the diagonal, the window, the sinks, the edges of what is
 * cut) stand in `edge` columns, a row's scores and pairs of which are held until `kept` is known.
 */
#include <float.h>

#include "joins.h"
#include "threads.h"

#define QUERIES 128
#define KEYS 128
#define EDGE 32 /* keys of the edges at a time: beside the diagonal, each time fewer queries see them */
#define LEAST 1e-12f /* of reference.py */

enum { LINEAR = -1 }; /* beside the joins: target linear */

typedef struct {
  const float *at;
  long row, head, token; /* strides; those of a token's numbers are 1 */
} Given;

typedef struct {
  Given q, k, phi_q, phi_k;
  const float *lse, *mix, *log_scale;           /* [B,H,T], [H], [H] */
  const long *runs;                             /* [n,3]: row, first token, tokens */
  float *grad_phi_q, *grad_phi_k;               /* as phi_q and phi_k without gaps, zeros; NULL: not wanted */
  double *loss, *grad_mix, *grad_log_scale;     /* [n,H] */
  long run_count, heads, key_heads, feature_heads, length; /* length: T; feature_heads: of phi_k */
  long width, features, longest;                /* longest: the tokens of the longest run */
  long join, is_signed, window, terraced, anchor, sinks, cover_all, reach, teacher_window;
  float scale;
} Call;

typedef struct {
  long from, to; /* from .. to - 1 */
} Range;

typedef struct {
  Range taught, linear, near; /* of a query: the teacher's keys, the linear side's, the window's */
  long sinks;                 /* keys 0 .. sinks - 1, beside the window */
} Seen;

/* A query: what of its row is known before the whole keys are met. lse, top: times log2 e, top relative to lse. mass, weight,
 * scale, inverse: of e; of a = weight e; of b = scale X; 1 / N. live: 0 where N, of signed features, stands at its floor. */
typedef struct {
  Seen seen;
  float lse, top, mass, weight, scale, inverse, live, pull;
  int present; /* whether the softmax side has any key */
} Query;

/* A query head of a run, with the memory of its thread. */
typedef struct {
  const Call *call;
  long tokens;
  const float *q, *phi_q, *phi_k, *lse;
  float mix, log_scale;
  float *grad_phi_q, *grad_phi_k;
  float *k_panels, *phi_panels;
  float *sums, *turned; /* [panels, F]: of phi_k over the panel's keys; of phi_q times its row's last term over queries */
  float *scores, *pairs; /* [QUERIES, columns] */
  int32_t *keys;         /* of each vector of edge columns, the first key */
  double loss, grad_mix, grad_log_scale;
} Head;

typedef struct {
  long first, rows, columns; /* columns: at the edges */
  Range whole, edges[3];
  vec kept[QUERIES], loss[QUERIES];
  Query query[QUERIES];
} Block;

static const float one = 1.0f;

INLINE long floor_to(long x, long step) { return x - (x % step + step) % step; }

static Seen seen_by(const Call *call, long at) {
  long window = call->window, stop = at + 1;
  long near = window && call->terraced ? floor_to(at - call->anchor, window) - window + call->anchor : stop - window;
  long far = most(0, stop - call->reach);
  near = most(near, far);
  long sinks = least(call->sinks, near);
  Range linear = call->cover_all ? (Range){far, stop} : (Range){most(far, sinks), near};
  return (Seen){{most(0, stop - call->teacher_window), stop}, linear, {near, stop}, sinks};
}

INLINE ivec inside(Range range, ivec keys) {
  return (keys >= all_int((int32_t)range.from)) & (keys < all_int((int32_t)range.to));
}

INLINE ivec softmax_side(const Seen *seen, ivec keys) {
  return inside(seen->near, keys) | (keys < all_int((int32_t)seen->sinks));
}

INLINE ivec keys_from(int32_t first) {
  return first + (ivec){COUNT};
}

/* Which keys are whole, and which stand in columns: every bound of Seen grows with the query, so the first and last tell. */
static void lay_out(const Head *head, Block *block) {
  const Seen *low = &block->query[0].seen, *high = &block->query[block->rows - 1].seen;
  long sinks = up(high->sinks), stop = up(block->first + block->rows);
  long first = most(sinks, down(least(low->taught.from, least(low->linear.from, low->near.from))));
  Range whole = {up(most(high->taught.from, most(high->linear.from, high->sinks))),
                 down(least(low->taught.to, least(low->linear.to, low->near.from)))};
  if (whole.from >= whole.to) whole = (Range){stop, stop};
  block->whole = whole;
  block->edges[0] = (Range){0, sinks};
  block->edges[1] = (Range){first, whole.from};
  block->edges[2] = (Range){whole.to, stop};
  block->columns = 0;
  for (int i = 0; i < 3; i++)
    for (long key = block->edges[i].from; key < block->edges[i].to; key += LANES, block->columns += LANES)
      head->keys[block->columns / LANES] = (int32_t)key;
}

/* Scores times log2 e, and pairs X, of some keys and the queries that are not before them all; rows lie `row` apart. */
static void multiply(const Head *head, const Block *block, Range keys, float *scores, float *pairs, long row) {
  const Call *call = head->call;
  long first = most(block->first, keys.from), skipped = first - block->first, rows = block->rows - skipped;
  long count = keys.to - keys.from, width = call->width, features = call->features;
  float scale[QUERIES];
  for (long r = 0; r < rows; r++) scale[r] = call->scale * LOG2E;
  product(rows, count, width, head->q + first * call->q.token, call->q.token, 1, head->k_panels + keys.from * width, LANES,
          LANES * width, scores + skipped * row, row, scale, 0);
  product(rows, count, features, head->phi_q + first * call->phi_q.token, call->phi_q.token, 1,
          head->phi_panels + keys.from * features, LANES, LANES * features, pairs + skipped * row, row, NULL, 0);
}

/* Gradients of phi_q and phi_k from those of the same pairs. */
static void spread(const Head *head, const Block *block, Range keys, const float *grads, long row) {
  const Call *call = head->call;
  long first = most(block->first, keys.from), skipped = first - block->first, rows = block->rows - skipped;
  long count = least(keys.to, head->tokens) - keys.from, features = call->features;
  grads += skipped * row;
  if (head->grad_phi_q)
    product(rows, features, count, grads, row, 1, head->phi_k + keys.from * call->phi_k.token, call->phi_k.token, LANES,
            head->grad_phi_q + first * features, features, NULL, 1);
  if (head->grad_phi_k)
    product(count, features, rows, grads, 1, row, head->phi_q + first * call->phi_q.token, call->phi_q.token, LANES,
            head->grad_phi_k + keys.from * features, features, NULL, 1);
}

/* Either of both at all edges. */
static void at_edges(const Head *head, const Block *block, int backward) {
  long at = 0;
  for (int i = 0; i < 3; i++)
    for (long key = block->edges[i].from; key < block->edges[i].to; key += EDGE) {
      Range keys = {key, least(key + EDGE, block->edges[i].to)};
      if (backward)
        spread(head, block, keys, head->pairs + at, block->columns);
      else
        multiply(head, block, keys, head->scores + at, head->pairs + at, block->columns);
      at += keys.to - keys.from;
    }
}

/* How much the sides of a row weigh: `student` of chunked.py. linear: sum of X; held: the same over the softmax side. */
static void weigh(const Head *head, Query *query, float linear, float held) {
  float mass = query->present ? query->mass : 1.0f, lse = query->lse / LOG2E, total;
  long join = head->call->join, is_signed = head->call->is_signed;
  query->weight = 0.0f;
  query->scale = 1.0f;
  if (join >= AVERAGE) {
    float size = floored(is_signed, linear, &query->live);
    query->scale = fabsf(linear) >= FEW;
    query->weight = query->scale > 0 ? size / mass : 1.0f;
    total = query->scale > 0 ? size * (query->present ? 2.0f : 1.0f) : query->mass;
  } else {
    total = linear;
    if (join == ABSOLUTE) {
      float unit = head->log_scale - lse, soft = query->present ? query->top / LOG2E : -INFINITY;
      float other = linear > 0 ? unit + logf(fmaxf(linear, FEW)) : -INFINITY;
      float largest = fmaxf(fmaxf(soft, other), -FLT_MAX); /* log_scale may be -infinite */
      query->weight = query->present ? expf(soft - largest) : 0.0f;
      query->scale = linear > 0 ? expf(unit - largest) : 0.0f;
      total *= query->scale;
    } else if (join != LINEAR)
      query->weight = join == SHARED ? head->mix : held / mass;
    total = floored(is_signed, query->weight * query->mass + total, &query->live);
  }
  query->inverse = total != 0 ? 1.0f / total : 0.0f;
}

/* The row of a query: its softmax side, its masses, its weights. Takes the teacher's log-sum-exp off its scores. */
static void know(const Head *head, const Block *block, long r, Query *query, const float *sums) {
  const Call *call = head->call;
  float *scores = head->scores + r * block->columns, *pairs = head->pairs + r * block->columns;
  const float *phi = head->phi_q + (block->first + r) * call->phi_q.token;
  vec top = all(-INFINITY), linear = {0}, held = {0}, mass = {0};
  for (long i = 0; i < call->features; i += LANES) linear += load(phi + i) * load(sums + i);
  for (long i = 0; i < block->columns; i += LANES) {
    ivec keys = keys_from(head->keys[i / LANES]), soft = softmax_side(&query->seen, keys);
    vec score = load(scores + i) - query->lse, x = load(pairs + i);
    store(scores + i, score);
    top = larger(top, either(soft, score, all(-INFINITY)));
    linear += where(inside(query->seen.linear, keys), x);
    held += where(soft, x);
  }
  query->top = most_of(top);
  query->present = query->top > -INFINITY;
  for (long i = 0; i < block->columns && query->present; i += LANES) {
    ivec soft = softmax_side(&query->seen, keys_from(head->keys[i / LANES]));
    mass += where(soft, exp2_of(load(scores + i) - query->top));
  }
  query->mass = sum_of(mass);
  weigh(head, query, sum_of(linear), sum_of(held));
}

/* Loss and `kept` of a query's edge columns; pairs become u P / A, and pull sum e (1 - u P / A). */
static void meet_edges(const Head *head, Block *block, long r) {
  Query *query = &block->query[r];
  float *scores = head->scores + r * block->columns, *pairs = head->pairs + r * block->columns;
  vec kept = {0}, loss = {0}, pull = {0};
  for (long i = 0; i < block->columns; i += LANES) {
    ivec keys = keys_from(head->keys[i / LANES]);
    vec score = load(scores + i), e = {0};
    if (query->present) e = where(softmax_side(&query->seen, keys), exp2_of(score - query->top));
    vec x = where(inside(query->seen.linear, keys), load(pairs + i));
    vec a = (query->weight * e + query->scale * x) * query->inverse;
    vec p = where(inside(query->seen.taught, keys), exp2_of(score));
    ivec clamped = a < LEAST;
    loss -= p * log2_of(either(clamped, all(LEAST), a));
    p = where(~clamped, p);
    kept += p;
    vec ratio = p / either(clamped, all(1.0f), a);
    pull += e * (1.0f - ratio);
    store(pairs + i, ratio);
  }
  block->kept[r] = kept;
  block->loss[r] = loss;
  query->pull = sum_of(pull);
}

/* Loss and `kept` of whole keys; pairs become c - u P / X. */
static void meet_whole(Block *block, long count, const float *scores, float *pairs) {
  for (long r = 0; r < block->rows; r++) {
    const Query *query = &block->query[r];
    vec kept = block->kept[r], loss = block->loss[r], lse = all(query->lse), c = all(query->scale * query->inverse);
    for (long i = r * KEYS; i < r * KEYS + count; i += LANES) {
      vec p = exp2_of(load(scores + i) - lse), x = load(pairs + i), a = x * c;
      ivec clamped = a < LEAST;
      loss -= p * log2_of(either(clamped, all(LEAST), a));
      p = where(~clamped, p);
      kept += p;
      store(pairs + i, c - p / either(clamped, all(1.0f), x));
    }
    block->kept[r] = kept;
    block->loss[r] = loss;
  }
}

/* What needs `kept`: gradients of mix and log_scale, those of the edges' pairs, and (last) the whole keys' last terms. */
static void finish(Head *head, Block *block, float *last) {
  long join = head->call->join;
  for (long r = 0; r < block->rows; r++) {
    Query *query = &block->query[r];
    float kept = query->live * sum_of(block->kept[r]), pull = query->pull + (kept - 1.0f) * query->mass;
    head->loss += (double)sum_of(block->loss[r]) / LOG2E;
    head->grad_mix += (double)(pull * query->inverse);
    head->grad_log_scale -= (double)(pull * query->inverse * query->weight);
    /* Where the softmax side's weight is a linear mass, of the linear side or of the window, its pull is theirs. */
    float shared = query->present ? pull / query->mass : pull, c = query->scale * query->inverse;
    if (join >= AVERAGE) kept += query->live * shared;
    last[r] = (kept - 1.0f) * c;
    float *pairs = head->pairs + r * block->columns;
    for (long i = 0; i < block->columns; i += LANES) {
      ivec keys = keys_from(head->keys[i / LANES]);
      vec grad = where(inside(query->seen.linear, keys), kept - load(pairs + i));
      if (join == REPLACE) grad += where(softmax_side(&query->seen, keys), all(shared));
      store(pairs + i, grad * c);
    }
  }
}

/* The last terms: a number for each query, the same for all its whole keys. */
static void spread_last(const Head *head, const Block *block, const float *last, const float *sums, float *turned) {
  long features = head->call->features, panels = (block->whole.to - block->whole.from) / LANES;
  if (head->grad_phi_q)
    product(block->rows, features, 1, last, 1, 0, sums, 0, LANES, head->grad_phi_q + block->first * features, features,
            NULL, 1);
  if (!head->grad_phi_k) return;
  product(1, features, block->rows, last, 0, 1, head->phi_q + block->first * head->call->phi_q.token,
          head->call->phi_q.token, LANES, turned, features, NULL, 0);
  product(panels, features, 1, &one, 0, 0, turned, 0, LANES, head->turned + block->whole.from / LANES * features,
          features, NULL, 1);
}

/* room: 2 F + 2 QUERIES KEYS numbers. */
static void meet(Head *head, long first, float *room) {
  const Call *call = head->call;
  long features = call->features;
  float *sums = room, *turned = sums + features, *scores = turned + features, *pairs = scores + QUERIES * KEYS;
  float last[QUERIES];
  Block block = {.first = first, .rows = least(QUERIES, head->tokens - first)};
  for (long r = 0; r < block.rows; r++)
    block.query[r] = (Query){.seen = seen_by(call, first + r), .lse = head->lse[first + r] * LOG2E};
  lay_out(head, &block);
  Range whole = block.whole;
  product(1, features, (whole.to - whole.from) / LANES, &one, 0, 0, head->sums + whole.from / LANES * features, features,
          LANES, sums, features, NULL, 0);
  at_edges(head, &block, 0);
  for (long r = 0; r < block.rows; r++) {
    know(head, &block, r, &block.query[r], sums);
    meet_edges(head, &block, r);
  }
  for (long key = whole.from; key < whole.to; key += KEYS) {
    Range keys = {key, least(key + KEYS, whole.to)};
    multiply(head, &block, keys, scores, pairs, KEYS);
    meet_whole(&block, keys.to - keys.from, scores, pairs);
    spread(head, &block, keys, pairs, KEYS);
  }
  finish(head, &block, last);
  at_edges(head, &block, 1);
  spread_last(head, &block, last, sums, turned);
}

INLINE const float *tokens_of(const Given *given, const long *run, long head) {
  return given->at + run[0] * given->row + head * given->head + run[1] * given->token;
}

static size_t room_of(const Call *call) {
  size_t keys = up(call->longest), panels = keys / LANES, width = call->width, features = call->features;
  return keys * (width + features) + 2 * panels * features + 2 * QUERIES * keys + up(panels) + 2 * features +
         2 * QUERIES * KEYS;
}

/* A key head of a run, and all query heads that share it. */
static void work(const void *given, long index, float *room) {
  const Call *call = given;
  const long *run = call->runs + index / call->key_heads * 3;
  long key_head = index % call->key_heads, group = call->heads / call->key_heads, features = call->features;
  long keys = up(run[2]), panels = keys / LANES, each = call->feature_heads / call->key_heads;
  Head head = {.call = call, .tokens = run[2], .k_panels = room};
  head.phi_panels = head.k_panels + keys * call->width;
  head.sums = head.phi_panels + keys * features;
  head.turned = head.sums + panels * features;
  head.scores = head.turned + panels * features;
  head.pairs = head.scores + QUERIES * keys;
  head.keys = (int32_t *)(head.pairs + QUERIES * keys);
  float *rest = head.pairs + QUERIES * keys + up(panels);
  pack(run[2], call->width, tokens_of(&call->k, run, key_head), call->k.token, head.k_panels);
  for (long h = 0; h < group; h++) {
    long at = key_head * group + h, feature_head = key_head * each + h * each / group;
    if (h * each % group == 0) {
      head.phi_k = tokens_of(&call->phi_k, run, feature_head);
      if (call->grad_phi_k)
        head.grad_phi_k =
            call->grad_phi_k + ((run[0] * call->feature_heads + feature_head) * call->length + run[1]) * features;
      pack(run[2], features, head.phi_k, call->phi_k.token, head.phi_panels);
      memset(head.turned, 0, panels * features * sizeof(float));
      for (long p = 0; p < panels; p++)
        product(1, features, least(LANES, run[2] - p * LANES), &one, 0, 0, head.phi_k + p * LANES * call->phi_k.token,
                call->phi_k.token, LANES, head.sums + p * features, features, NULL, 0);
    }
    head.q = tokens_of(&call->q, run, at);
    head.phi_q = tokens_of(&call->phi_q, run, at);
    head.lse = call->lse + (run[0] * call->heads + at) * call->length + run[1];
    if (call->grad_phi_q)
      head.grad_phi_q = call->grad_phi_q + ((run[0] * call->heads + at) * call->length + run[1]) * features;
    head.mix = call->join == SHARED ? call->mix[at] : 0.0f;
    head.log_scale = call->join == ABSOLUTE ? call->log_scale[at] : 0.0f;
    head.loss = head.grad_mix = head.grad_log_scale = 0.0;
    for (long first = 0; first < run[2]; first += QUERIES) meet(&head, first, rest);
    long result = index / call->key_heads * call->heads + at;
    call->loss[result] = head.loss;
    call->grad_mix[result] = head.grad_mix;
    call->grad_log_scale[result] = head.grad_log_scale;
    if (head.grad_phi_k && (h + 1) * each % group == 0)
      for (long p = 0; p < panels; p++)
        product(least(LANES, run[2] - p * LANES), features, 1, &one, 0, 0, head.turned + p * features, 0, LANES,
                head.grad_phi_k + p * LANES * features, features, NULL, 1);
  }
}

/* Returns 0, or 1 where memory is lacking. */
int weight_transfer(const Call *call, long threads) {
  return deal(work, call, call->run_count * call->key_heads, room_of(call), threads);
}
