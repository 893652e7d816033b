"""Triton kernels of hybrid attention, backward: terms of rows, gradients of states and of queries.

With dx_ij = dy_i . v_j and the terms A, B, sigma, lambda of row i (`row_terms`), the gradients of a score and of a pair
of features are

    ds_ij = a_ij A_i (dx_ij + sigma_i)        db_ij = B_i (dx_ij + lambda_i)

so that q's and k's gradients need no features, and the features' need no scores: five launches (those of keys in
`gpu_backward_keys`), each with few products and one large sum on the chip.
"""

import triton
import triton.language as tl

from .gpu_forward import goes_on
from .gpu_parts import (
    copied,
    factors,
    head,
    join_of,
    over,
    places,
    put,
    scores,
    sets,
    shown,
    sink_columns,
    softmax_weights,
    take,
    weighed,
    window_kept,
)


@triton.jit
def row_terms(
    y, y_soft, dy, mix, log_scale, q_position, q_segment, stats, terms,
    dy_b, dy_h, dy_t, heads, length,
    o: tl.constexpr,
):  # fmt: skip
    """terms [5,B,H,T]: A, B, sigma, lambda and one that depends on the join. Grid: (ceil(T / rows), B H).

    The fifth: `shared`, the gradient of mix, which times mix is the sum of ds over the row; `replace`, the gradient of
    each pair of features in the softmax set.
    """
    i = tl.program_id(0) * o.rows + tl.arange(0, o.rows)
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    at = tl.program_id(1).to(tl.int64) * length
    plane = tl.num_programs(1).to(tl.int64) * length
    _qp, qs = places(q_position + b * length, q_segment + b * length, i, length, o)
    real = qs >= 0
    dy = head(dy, b, h, dy_b, dy_h)
    d = take(dy, i, dy_t, real, 0, o.width, o.width_block).to(tl.float32)
    total = tl.sum(d * take(y + at * o.width, i, o.width, real, 0, o.width, o.width_block).to(tl.float32), 1)
    mean = total * 0.0
    if o.join != "absolute":
        soft = take(y_soft + at * o.width, i, o.width, real, 0, o.width, o.width_block).to(tl.float32)
        mean = tl.sum(d * soft, 1)
    top = tl.load(stats + at + i, mask=real, other=0.0)
    a_mass = tl.load(stats + plane + at + i, mask=real, other=0.0)
    b_mass = tl.load(stats + 2 * plane + at + i, mask=real, other=0.0)
    w_mass = tl.load(stats + 3 * plane + at + i, mask=real, other=0.0)
    g, c = join_of(mix, log_scale, h, o)
    a_factor, b_factor, den, live, a_weight, b_weight = factors(top, a_mass, b_mass, w_mass, g, c, o)
    sigma = -mean
    extra = total * 0.0
    if o.join == "average" or o.join == "sum":
        shift = over(a_weight * mean - total, b_weight) * live
        if not o.show_linear:
            shift = total * 0.0
    else:
        shift = -total * live
        if o.join == "replace":
            extra = over(mean + shift, den)
        else:
            sigma = shift
            if o.join == "shared":
                extra = over((mean + shift) * a_mass, den)
    inside = i < length
    tl.store(terms + at + i, a_factor, mask=inside)
    tl.store(terms + plane + at + i, b_factor, mask=inside)
    tl.store(terms + 2 * plane + at + i, sigma, mask=inside)
    tl.store(terms + 3 * plane + at + i, shift, mask=inside)
    tl.store(terms + 4 * plane + at + i, extra, mask=inside)


@triton.jit
def like(x, other):
    """x in bf16 beside bf16, else as it is, float32."""
    if other.dtype == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        return x


@triton.jit
def sum_queries(
    fq, dy, q_position, q_segment, terms, value, mass,
    fq_b, fq_h, fq_t, dy_b, dy_h, dy_t,
    maps, heads, batches, length, states,
    o: tl.constexpr,
):  # fmt: skip
    """The gradient of state n + 1 by the queries that read it. Grid: (states - 1, B maps, tiles); out as `sum_keys`."""
    number = tl.program_id(0) + 1
    b = tl.program_id(1) // maps
    p = tl.program_id(1) % maps
    first = tl.program_id(2) * o.tile
    segment = goes_on(q_segment + b * length, number * o.stored, o)
    plane = tl.cast(batches * heads + 0 * b, tl.int64) * length
    total = tl.full([o.tile, o.width_block], 0.0, tl.float32)
    alone = tl.full([o.tile], 0.0, tl.float32)
    for one in range(0, o.map_group):
        h = p * o.map_group + one
        x = head(fq, b, h, fq_b, fq_h)
        d = head(dy, b, h, dy_b, dy_h)
        t = terms + (b * heads + h).to(tl.int64) * length
        for q0 in range(number * o.stored, tl.minimum((number + 1) * o.stored, length), o.rows):
            i = q0 + tl.arange(0, o.rows)
            _qp, qs = places(q_position + b * length, q_segment + b * length, i, length, o)
            sees = (qs == segment) & (qs >= 0)
            phi = take(x, i, fq_t, sees, first, o.features, o.tile)
            factor = tl.load(t + plane + i, mask=sees, other=0.0)
            shift = tl.load(t + 3 * plane + i, mask=sees, other=0.0)
            alone += tl.sum(phi.to(tl.float32) * (factor * shift)[:, None], 0)
            if o.show_linear:
                out = take(d, i, dy_t, sees, 0, o.width, o.width_block)
                total = weighed(tl.trans(phi), like(out * factor[:, None], out), total, o)
    row = tl.program_id(1).to(tl.int64) * states + number
    f = first + tl.arange(0, o.tile)
    put(value + row * o.features * o.width, f, o.width, f < o.features, 0, o.width, o.width_block, total)
    tl.store(mass + row * o.features + f, alone, mask=f < o.features)


@triton.jit
def query_gradient(
    q, k, v, dy, keep, q_position, q_segment, k_position, k_segment, stats, terms, bests, mix, dq,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dy_b, dy_h, dy_t,
    heads, length, keys, lead, anchor, scale,
    o: tl.constexpr,
):  # fmt: skip
    """dq [B,H,T,D] of `rows` queries. Grid: (ceil(T / rows), B H)."""
    q0 = tl.program_id(0) * o.rows
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    at = tl.program_id(1).to(tl.int64) * length
    plane = tl.num_programs(1).to(tl.int64) * length
    q = head(q, b, h, q_b, q_h)
    dy = head(dy, b, h, dy_b, dy_h)
    k = head(k, b, h // o.group, k_b, k_h)
    v = head(v, b, h // o.group, v_b, v_h)
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = window_kept(keep, tl.program_id(1), o)
    i = q0 + tl.arange(0, o.rows)
    qp, qs = places(q_position + b * length, q_segment + b * length, i, length, o)
    real = qs >= 0
    query = take(q, i, q_t, real, 0, o.width, o.width_block)
    out = take(dy, i, dy_t, real, 0, o.width, o.width_block)
    top = tl.load(stats + at + i, mask=real, other=0.0)
    factor = tl.load(terms + at + i, mask=real, other=0.0)
    sigma = tl.load(terms + 2 * plane + at + i, mask=real, other=0.0)
    near = tl.maximum(q0 + lead - o.span, 0)
    stop = tl.minimum(q0 + o.rows, length) + lead
    total = tl.full([o.rows, o.width_block], 0.0, tl.float32)
    if o.sinks > 0 and o.has_sinks:
        if (near > 0) | (o.ahead > 0):
            j, kp, ks = sink_columns(k_position, k_segment, q0 + lead, near, o)
            total = _to_query(
                total, query, out, top, factor, sigma, qp, qs, k, k_t, v, v_t, j, kp, ks, kept, anchor, scale, o
            )
    for start in range(near, stop, o.columns):
        j = start + tl.arange(0, o.columns)
        kp, ks = places(k_position, k_segment, j, stop, o)
        total = _to_query(
            total, query, out, top, factor, sigma, qp, qs, k, k_t, v, v_t, j, kp, ks, kept, anchor, scale, o
        )
    if o.through:
        best = tl.load(bests + at + i, mask=real, other=0)
        row = tl.load(mix + h).to(tl.float32) * tl.load(terms + 4 * plane + at + i, mask=real, other=0.0)
        total -= row[:, None] * take(k, best, k_t, real & (row != 0.0), 0, o.width, o.width_block).to(tl.float32)
    put(dq + at * o.width, i, o.width, i < length, 0, o.width, o.width_block, total * scale)


@triton.jit
def _to_query(
    total, query, out, top, factor, sigma, qp, qs, k, k_t, v, v_t, j, kp, ks, kept, anchor, scale, o: tl.constexpr
):
    soft, _linear, hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
    key = take(k, j, k_t, ks >= 0, 0, o.width, o.width_block)
    values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
    copied(j)
    a = softmax_weights(scores(query, key, scale, o), soft, top[:, None])
    dx = tl.dot(out, tl.trans(values), input_precision=o.precision)
    dx = shown(dx, hidden, o)
    return weighed(a * factor[:, None] * (dx + sigma[:, None]), key, total, o)


@triton.jit
def query_features_gradient(
    v, fq, fk, dy, keep, q_position, q_segment, k_position, k_segment, value, mass, terms, dfq, d_scale,
    v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, dy_b, dy_h, dy_t,
    heads, length, keys, lead, states, anchor,
    SCALE: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """A tile of phi_q's gradient, of `rows` queries. Grid: (ceil(T / rows), B H, tiles).

    SCALE: also d_scale [tiles,B,H,T], which sums up to log_scale's: pairs are linear in phi_q, so sum db b over the row
    is phi_q . dphi_q.
    """
    q0 = tl.program_id(0) * o.rows
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    p = h // o.map_group
    first = tl.program_id(2) * o.tile
    at = tl.program_id(1).to(tl.int64) * length
    plane = tl.num_programs(1).to(tl.int64) * length
    dy = head(dy, b, h, dy_b, dy_h)
    v = head(v, b, h // o.group, v_b, v_h)
    fk = head(fk, b, p, fk_b, fk_h)
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = window_kept(keep, tl.program_id(1), o)
    i = q0 + tl.arange(0, o.rows)
    qp, qs = places(q_position + b * length, q_segment + b * length, i, length, o)
    real = qs >= 0
    out = take(dy, i, dy_t, real, 0, o.width, o.width_block)
    factor = tl.load(terms + plane + at + i, mask=real, other=0.0)
    shift = tl.load(terms + 3 * plane + at + i, mask=real, other=0.0)
    extra = tl.load(terms + 4 * plane + at + i, mask=real, other=0.0)
    total = tl.full([o.rows, o.tile], 0.0, tl.float32)
    number = q0 // o.stored
    near = tl.maximum(q0 + lead - o.span, 0)
    far = near
    if o.sums:
        far = tl.maximum(number * o.stored + lead - o.span, 0)
        if (number > 0) | o.initial:
            sees = real & (qs == goes_on(q_segment + b * length, number * o.stored, o))
            row = ((b * (heads // o.map_group) + p).to(tl.int64) * states + number) * o.features
            f = first + tl.arange(0, o.tile)
            held = tl.load(mass + row + f, mask=f < o.features, other=0.0)
            scaled = tl.where(sees, factor, 0.0)
            total += (scaled * shift)[:, None] * held[None, :]
            if o.show_linear:
                s = take(value + row * o.width, f, o.width, f < o.features, 0, o.width, o.width_block)
                total = weighed(like(out * scaled[:, None], out), tl.trans(s), total, o)
    stop = tl.minimum(q0 + o.rows, length) + lead
    both = stop
    if not o.near_pairs:
        both = tl.maximum(tl.minimum(q0 + o.rows + lead - o.window, stop), near)
    if o.join == "replace" and o.sinks > 0 and o.has_sinks:
        if (near > 0) | (o.ahead > 0):
            j, kp, ks = sink_columns(k_position, k_segment, q0 + lead, near, o)
            soft, _linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
            db = tl.where(soft, extra[:, None], 0.0)
            total = weighed(db, take(fk, j, fk_t, ks >= 0, first, o.features, o.tile), total, o)
    for start in range(far, both, o.columns):
        j = start + tl.arange(0, o.columns)
        kp, ks = places(k_position, k_segment, j, stop, o)
        soft, linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
        db = shift[:, None] + tl.full([o.rows, o.columns], 0.0, tl.float32)
        if o.show_linear:
            values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
            copied(j)
            db = tl.dot(out, tl.trans(values), db, input_precision=o.precision)
        db = tl.where(linear, factor[:, None] * db, 0.0)
        if o.join == "replace":
            db += tl.where(soft & (j >= near)[None, :], extra[:, None], 0.0)
        total = weighed(db, take(fk, j, fk_t, ks >= 0, first, o.features, o.tile), total, o)
    put(dfq + at * o.features, i, o.features, i < length, first, o.features, o.tile, total)
    if SCALE:
        fq = head(fq, b, h, fq_b, fq_h)
        phi = take(fq, i, fq_t, real, first, o.features, o.tile).to(tl.float32)
        tl.store(d_scale + tl.program_id(2) * plane + at + i, tl.sum(total * phi, 1), mask=i < length)
