"""Triton kernels of hybrid attention, backward: terms of rows, gradients of states, of queries and of keys.

With dx_ij = dy_i . v_j and the terms A, B, sigma, lambda of row i (`row_terms`), the gradients of a score and of a pair
of features are

    ds_ij = a_ij A_i (dx_ij + sigma_i)        db_ij = B_i (dx_ij + lambda_i)

so that q's and k's gradients need no features, and the features' need no scores: four kernels, each with few products
and one large sum on the chip.
"""

import triton
import triton.language as tl

from .gpu_forward import enters, goes_on
from .gpu_parts import factors, over, pairs, places, put, scores, sets, sink_columns, softmax_weights, take, weighed


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
    dy += b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
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
    g = 0.0
    c = 0.0
    if o.join == "shared":
        g = tl.load(mix + h).to(tl.float32)
    if o.join == "absolute":
        c = tl.load(log_scale + h).to(tl.float32)
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
    plane = (batches * heads).to(tl.int64) * length
    total = tl.full([o.tile, o.width_block], 0.0, tl.float32)
    alone = tl.full([o.tile], 0.0, tl.float32)
    for one in range(0, o.map_group):
        h = p * o.map_group + one
        x = fq + b.to(tl.int64) * fq_b + h.to(tl.int64) * fq_h
        d = dy + b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
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
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    dy += b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
    k += b.to(tl.int64) * k_b + (h // o.group).to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + (h // o.group).to(tl.int64) * v_h
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = 1
    if o.drops:
        kept = tl.load(keep + tl.program_id(1)).to(tl.int32)
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
            total = _to_query(total, query, out, top, factor, sigma, qp, qs, k, k_t, v, v_t, j, kp, ks, kept, anchor, scale, o)
    for start in range(near, stop, o.columns):
        j = start + tl.arange(0, o.columns)
        kp, ks = places(k_position, k_segment, j, stop, o)
        total = _to_query(total, query, out, top, factor, sigma, qp, qs, k, k_t, v, v_t, j, kp, ks, kept, anchor, scale, o)
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
    a = softmax_weights(scores(query, key, scale, o), soft, top[:, None])
    dx = tl.dot(out, tl.trans(values), input_precision=o.precision)
    if not (o.show_window and o.show_sinks):
        dx = tl.where(hidden, 0.0, dx)
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
    dy += b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
    v += b.to(tl.int64) * v_b + (h // o.group).to(tl.int64) * v_h
    fk += b.to(tl.int64) * fk_b + p.to(tl.int64) * fk_h
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = 1
    if o.drops:
        kept = tl.load(keep + tl.program_id(1)).to(tl.int32)
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
            db = tl.dot(out, tl.trans(values), db, input_precision=o.precision)
        db = tl.where(linear, factor[:, None] * db, 0.0)
        if o.join == "replace":
            db += tl.where(soft & (j >= near)[None, :], extra[:, None], 0.0)
        total = weighed(db, take(fk, j, fk_t, ks >= 0, first, o.features, o.tile), total, o)
    put(dfq + at * o.features, i, o.features, i < length, first, o.features, o.tile, total)
    if SCALE:
        fq += b.to(tl.int64) * fq_b + h.to(tl.int64) * fq_h
        phi = take(fq, i, fq_t, real, first, o.features, o.tile).to(tl.float32)
        tl.store(d_scale + tl.program_id(2) * plane + at + i, tl.sum(total * phi, 1), mask=i < length)


@triton.jit
def key_gradient(
    q, k, v, fq, fk, dy, keep, q_position, q_segment, k_position, k_segment, stats, terms, bests, mix, value, dk, dv,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, dy_b, dy_h, dy_t,
    heads, batches, length, keys, lead, states, origin, anchor, scale,
    K: tl.constexpr, V: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """dk, dv [B,Hkv,Tk,D] of `columns` keys, over all heads that share them. Grid: (blocks of keys, B Hkv).

    value: gradients of the states. A block begins at `origin` + n columns, so that all its keys enter one state.
    Everything is [columns, rows]: what multiplies q and dy needs no transposing.
    """
    groups = heads // o.group
    b = tl.program_id(1) // groups
    g = tl.program_id(1) % groups
    j0 = origin + tl.program_id(0) * o.columns
    j = j0 + tl.arange(0, o.columns)
    k += b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    q_position += b * length
    q_segment += b * length
    kp, ks = places(k_position + b * (keys + o.ahead), k_segment + b * (keys + o.ahead), j, keys, o)
    real = ks >= 0
    key = take(k, j, k_t, real, 0, o.width, o.width_block)
    values = take(v, j, v_t, real, 0, o.width, o.width_block)
    plane = (batches * heads).to(tl.int64) * length
    k_total = tl.full([o.columns, o.width_block], 0.0, tl.float32)
    v_total = tl.full([o.columns, o.width_block], 0.0, tl.float32)

    first = tl.maximum(j0 - lead, 0) // o.rows * o.rows
    soft_stop = tl.minimum(j0 + o.columns - lead + o.span, length)
    soft_end = first + tl.maximum(soft_stop - first + o.rows - 1, 0) // o.rows * o.rows
    number = tl.maximum(j0 - lead + o.span, 0) // o.stored
    begin = soft_end  # of the linear set's queries
    end = soft_end
    if V and o.has_linear and o.show_linear:
        begin = first
        if not o.near_linear:
            begin = tl.minimum(tl.maximum(j0 + o.window - lead, 0) // o.rows * o.rows, soft_end)
            begin = tl.maximum(begin, first)
        if o.sums:
            end = tl.maximum(tl.minimum((number + 1) * o.stored, length), soft_end)

    for one in range(0, o.group):
        h = g * o.group + one
        x = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        d = dy + b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
        phi_q = fq + b.to(tl.int64) * fq_b + h.to(tl.int64) * fq_h
        phi_k = fk + b.to(tl.int64) * fk_b + (h // o.map_group).to(tl.int64) * fk_h
        at = (b * heads + h).to(tl.int64) * length
        phi = take(phi_k, j, fk_t, real, 0, o.features, o.tile)
        kept = 1
        if o.drops:
            kept = tl.load(keep + b * heads + h).to(tl.int32)
        g_mix = 0.0
        if o.through:
            g_mix = tl.load(mix + h).to(tl.float32)
        for q0 in range(first, begin, o.rows):
            k_total, v_total = _to_keys(
                k_total, v_total, x, q_t, d, dy_t, phi_q, fq_t, phi_k, fk_t, phi, key, values, j, kp, ks, q0,
                q_position, q_segment, stats + at, terms + at, bests, at, plane, g_mix,
                length, lead, kept, anchor, scale, True, False, K, V, o,
            )  # fmt: skip
        for q0 in range(begin, soft_end, o.rows):
            k_total, v_total = _to_keys(
                k_total, v_total, x, q_t, d, dy_t, phi_q, fq_t, phi_k, fk_t, phi, key, values, j, kp, ks, q0,
                q_position, q_segment, stats + at, terms + at, bests, at, plane, g_mix,
                length, lead, kept, anchor, scale, True, V and o.has_linear and o.show_linear, K, V, o,
            )  # fmt: skip
        for q0 in range(soft_end, end, o.rows):
            k_total, v_total = _to_keys(
                k_total, v_total, x, q_t, d, dy_t, phi_q, fq_t, phi_k, fk_t, phi, key, values, j, kp, ks, q0,
                q_position, q_segment, stats + at, terms + at, bests, at, plane, g_mix,
                length, lead, kept, anchor, scale, False, V and o.has_linear and o.show_linear, K, V, o,
            )  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * keys
    inside = (j >= 0) & (j < keys)
    if K:
        put(dk + row * o.width, j, o.width, inside, 0, o.width, o.width_block, k_total * scale)
    if V:
        if o.sums and o.show_linear:
            if number + 1 < states:
                segment = goes_on(q_segment, (number + 1) * o.stored, o)
                maps = o.group // o.map_group
                for one in range(0, maps):
                    p = g * maps + one
                    kept = 1
                    if o.drops:
                        kept = tl.load(keep + b * heads + p * o.map_group).to(tl.int32)
                    counts = enters(kp, ks, segment, kept, o)
                    at = ((b * groups * maps + p).to(tl.int64) * states + number + 1) * o.features
                    for start in range(0, o.features, o.tile):
                        f = start + tl.arange(0, o.tile)
                        phi_k = fk + b.to(tl.int64) * fk_b + p.to(tl.int64) * fk_h
                        phi = take(phi_k, j, fk_t, counts, start, o.features, o.tile)
                        s = take(value + at * o.width, f, o.width, f < o.features, 0, o.width, o.width_block)
                        v_total = weighed(phi, s, v_total, o)
        put(dv + row * o.width, j, o.width, inside, 0, o.width, o.width_block, v_total)


@triton.jit
def _to_keys(
    k_total, v_total, q, q_t, dy, dy_t, fq, fq_t, fk, fk_t, phi, key, values, j, kp, ks, q0,
    q_position, q_segment, stats, terms, bests, at, plane, mix,
    length, lead, kept, anchor, scale, SOFT: tl.constexpr, LINEAR: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    o: tl.constexpr,
):  # fmt: skip
    i = q0 + tl.arange(0, o.rows)
    qp, qs = places(q_position, q_segment, i, length, o)
    real = qs >= 0
    soft, linear, hidden = sets(qp[None, :], qs[None, :], kp[:, None], ks[:, None], kept, anchor, o)
    out = take(dy, i, dy_t, real, 0, o.width, o.width_block)
    weights = tl.full([o.columns, o.rows], 0.0, tl.float32)
    if SOFT:
        soft = soft & (j >= q0 + lead - o.span)[:, None]  # sinks farther back: `sink_gradient`
        query = take(q, i, q_t, real, 0, o.width, o.width_block)
        top = tl.load(stats + i, mask=real, other=0.0)
        factor = tl.load(terms + i, mask=real, other=0.0)
        a = softmax_weights(scores(key, query, scale, o), soft, top[None, :]) * factor[None, :]
        if K:
            sigma = tl.load(terms + 2 * plane + i, mask=real, other=0.0)
            dx = tl.dot(values, tl.trans(out), input_precision=o.precision)
            if not (o.show_window and o.show_sinks):
                dx = tl.where(hidden, 0.0, dx)
            ds = a * (dx + sigma[None, :])
            if o.through:
                best = tl.load(bests + at + i, mask=real, other=0)
                row = mix * tl.load(terms + 4 * plane + i, mask=real, other=0.0)
                ds -= tl.where(soft & (j[:, None] == best[None, :]), row[None, :], 0.0)
            k_total = weighed(ds, query, k_total, o)
        weights += a
        if not (o.show_window and o.show_sinks):
            weights = tl.where(hidden, 0.0, weights)
    if LINEAR:
        b = pairs(phi, fk, fk_t, j, ks >= 0, fq, fq_t, i, real, o)
        factor = tl.load(terms + plane + i, mask=real, other=0.0)
        weights += tl.where(linear, b * factor[None, :], 0.0)
    if V:
        v_total = weighed(weights, out, v_total, o)
    return k_total, v_total


@triton.jit
def key_features_gradient(
    v, fq, dy, keep, q_position, q_segment, k_position, k_segment, terms, value, mass, dfk,
    v_b, v_h, v_t, fq_b, fq_h, fq_t, dy_b, dy_h, dy_t,
    heads, batches, length, keys, lead, states, origin, anchor,
    o: tl.constexpr,
):  # fmt: skip
    """A tile of phi_k's gradient, of `columns` keys. Grid: (blocks of keys, B maps, tiles); blocks as in `key_gradient`."""
    maps = heads // o.map_group
    b = tl.program_id(1) // maps
    p = tl.program_id(1) % maps
    start = tl.program_id(2) * o.tile
    j0 = origin + tl.program_id(0) * o.columns
    j = j0 + tl.arange(0, o.columns)
    v += b.to(tl.int64) * v_b + (p * o.map_group // o.group).to(tl.int64) * v_h
    q_position += b * length
    q_segment += b * length
    kp, ks = places(k_position + b * (keys + o.ahead), k_segment + b * (keys + o.ahead), j, keys, o)
    values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
    plane = (batches * heads).to(tl.int64) * length
    total = tl.full([o.columns, o.tile], 0.0, tl.float32)
    number = tl.maximum(j0 - lead + o.span, 0) // o.stored
    first = tl.maximum(j0 - lead, 0) // o.rows * o.rows
    if not o.near_pairs:
        first = tl.maximum(tl.maximum(j0 + o.window - lead, 0) // o.rows * o.rows, first)
    end = tl.minimum(j0 + o.columns - lead + o.span, length)
    if o.sums:
        end = tl.maximum(end, tl.minimum((number + 1) * o.stored, length))
    for one in range(0, o.map_group):
        h = p * o.map_group + one
        d = dy + b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
        x = fq + b.to(tl.int64) * fq_b + h.to(tl.int64) * fq_h
        t = terms + (b * heads + h).to(tl.int64) * length
        kept = 1
        if o.drops:
            kept = tl.load(keep + b * heads + h).to(tl.int32)
        for q0 in range(first, end, o.rows):
            i = q0 + tl.arange(0, o.rows)
            qp, qs = places(q_position, q_segment, i, length, o)
            real = qs >= 0
            soft, linear, _hidden = sets(qp[None, :], qs[None, :], kp[:, None], ks[:, None], kept, anchor, o)
            out = take(d, i, dy_t, real, 0, o.width, o.width_block)
            factor = tl.load(t + plane + i, mask=real, other=0.0)
            shift = tl.load(t + 3 * plane + i, mask=real, other=0.0)
            db = shift[None, :] + tl.full([o.columns, o.rows], 0.0, tl.float32)
            if o.show_linear:
                db = tl.dot(values, tl.trans(out), db, input_precision=o.precision)
            db = tl.where(linear, factor[None, :] * db, 0.0)
            if o.join == "replace":
                extra = tl.load(t + 4 * plane + i, mask=real, other=0.0)
                db += tl.where(soft & (j >= q0 + lead - o.span)[:, None], extra[None, :], 0.0)
            total = weighed(db, take(x, i, fq_t, real, start, o.features, o.tile), total, o)
    if o.sums:
        if number + 1 < states:
            kept = 1
            if o.drops:
                kept = tl.load(keep + b * heads + p * o.map_group).to(tl.int32)
            counts = enters(kp, ks, goes_on(q_segment, (number + 1) * o.stored, o), kept, o)
            at = (tl.program_id(1).to(tl.int64) * states + number + 1) * o.features
            f = start + tl.arange(0, o.tile)
            held = tl.load(mass + at + f, mask=f < o.features, other=0.0)
            total += tl.where(counts[:, None], held[None, :], 0.0)
            if o.show_linear:
                s = take(value + at * o.width, f, o.width, f < o.features, 0, o.width, o.width_block)
                total = weighed(tl.where(counts[:, None], values, 0.0), tl.trans(s), total, o)
    row = tl.program_id(1).to(tl.int64) * keys
    put(dfk + row * o.features, j, o.features, (j >= 0) & (j < keys), start, o.features, o.tile, total)


@triton.jit
def sink_gradient(
    q, k, v, fq, dy, keep, q_position, q_segment, k_position, k_segment, stats, terms, bests, mix, dk, dv, dfk,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, dy_b, dy_h, dy_t,
    heads, length, keys, lead, parts, queries, anchor, scale,
    o: tl.constexpr,
):  # fmt: skip
    """What sinks before the span of `queries` queries get of them. Grid: (parts, B H, tiles: 1 but in `replace`).

    dk, dv [B,H,parts,sinks,D] and, of `replace`, dfk [B,H,parts,sinks,F], in float32.
    """
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    first = tl.program_id(2) * o.tile
    at = tl.program_id(1).to(tl.int64) * length
    plane = tl.num_programs(1).to(tl.int64) * length
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    fq += b.to(tl.int64) * fq_b + h.to(tl.int64) * fq_h
    dy += b.to(tl.int64) * dy_b + h.to(tl.int64) * dy_h
    k += b.to(tl.int64) * k_b + (h // o.group).to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + (h // o.group).to(tl.int64) * v_h
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = 1
    if o.drops:
        kept = tl.load(keep + tl.program_id(1)).to(tl.int32)
    k_total = tl.full([o.sink_block, o.width_block], 0.0, tl.float32)
    v_total = tl.full([o.sink_block, o.width_block], 0.0, tl.float32)
    f_total = tl.full([o.sink_block, o.tile], 0.0, tl.float32)
    begin = tl.program_id(0) * queries
    for q0 in range(begin, tl.minimum(begin + queries, length), o.rows):
        near = tl.maximum(q0 + lead - o.span, 0)
        j, kp, ks = sink_columns(k_position, k_segment, q0 + lead, near, o)
        i = q0 + tl.arange(0, o.rows)
        qp, qs = places(q_position + b * length, q_segment + b * length, i, length, o)
        real = qs >= 0
        soft, _linear, hidden = sets(qp[None, :], qs[None, :], kp[:, None], ks[:, None], kept, anchor, o)
        query = take(q, i, q_t, real, 0, o.width, o.width_block)
        out = take(dy, i, dy_t, real, 0, o.width, o.width_block)
        key = take(k, j, k_t, ks >= 0, 0, o.width, o.width_block)
        values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
        top = tl.load(stats + at + i, mask=real, other=0.0)
        factor = tl.load(terms + at + i, mask=real, other=0.0)
        sigma = tl.load(terms + 2 * plane + at + i, mask=real, other=0.0)
        extra = tl.load(terms + 4 * plane + at + i, mask=real, other=0.0)
        a = softmax_weights(scores(key, query, scale, o), soft, top[None, :]) * factor[None, :]
        dx = tl.dot(values, tl.trans(out), input_precision=o.precision)
        if not (o.show_window and o.show_sinks):
            dx = tl.where(hidden, 0.0, dx)
        ds = a * (dx + sigma[None, :])
        if o.through:
            best = tl.load(bests + at + i, mask=real, other=0)
            row = tl.load(mix + h).to(tl.float32) * extra
            ds -= tl.where(soft & (j[:, None] == best[None, :]), row[None, :], 0.0)
        k_total = weighed(ds, query, k_total, o)
        if not (o.show_window and o.show_sinks):
            a = tl.where(hidden, 0.0, a)
        v_total = weighed(a, out, v_total, o)
        if o.join == "replace":
            phi = take(fq, i, fq_t, real, first, o.features, o.tile)
            f_total = weighed(tl.where(soft, extra[None, :], 0.0), phi, f_total, o)
    n = tl.arange(0, o.sink_block)
    row = (tl.program_id(1).to(tl.int64) * parts + tl.program_id(0)) * o.sinks
    if tl.program_id(2) == 0:
        put(dk + row * o.width, n, o.width, n < o.sinks, 0, o.width, o.width_block, k_total * scale)
        put(dv + row * o.width, n, o.width, n < o.sinks, 0, o.width, o.width_block, v_total)
    if o.join == "replace":
        put(dfk + row * o.features, n, o.features, n < o.sinks, first, o.features, o.tile, f_total)
