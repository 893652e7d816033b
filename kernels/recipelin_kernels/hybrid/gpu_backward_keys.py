"""Triton kernels of hybrid attention, backward: gradients of keys, values and their features (formulas: gpu_backward)."""

import triton
import triton.language as tl

from .gpu_forward import enters, goes_on
from .gpu_parts import (
    FAR,
    copied,
    head,
    pairs,
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
def key_gradient(
    q, k, v, fq, fk, dy, keep, q_position, q_segment, k_position, k_segment, stats, terms, bests, mix, value, out,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t, dy_b, dy_h, dy_t,
    heads, batches, length, keys, lead, states, origin, anchor, scale,
    K: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """dk (K) or dv [B,Hkv,Tk,D] of `columns` keys, over all heads that share them. Grid: (blocks of keys, B Hkv).

    value: gradients of the states. A block begins at `origin` + n columns, so that all its keys enter one state.
    Everything is [columns, rows]: what multiplies q and dy needs no transposing.
    """
    groups = heads // o.group
    b = tl.program_id(1) // groups
    g = tl.program_id(1) % groups
    j0 = origin + tl.program_id(0) * o.columns
    j = j0 + tl.arange(0, o.columns)
    k = head(k, b, g, k_b, k_h)
    v = head(v, b, g, v_b, v_h)
    q_position += b * length
    q_segment += b * length
    kp, ks = places(k_position + b * (keys + o.ahead), k_segment + b * (keys + o.ahead), j, keys, o)
    real = ks >= 0
    kp = tl.where(real, kp, FAR)
    key = take(k, j, k_t, real, 0, o.width, o.width_block)
    values = key
    if K:
        values = take(v, j, v_t, real, 0, o.width, o.width_block)
    plane = tl.cast(batches * heads + 0 * b, tl.int64) * length
    total = tl.full([o.columns, o.width_block], 0.0, tl.float32)

    first = tl.maximum(j0 - lead, 0) // o.rows * o.rows
    soft_stop = tl.minimum(j0 + o.columns - lead + o.span, length)
    soft_end = first + tl.maximum(soft_stop - first + o.rows - 1, 0) // o.rows * o.rows
    number = tl.maximum(j0 - lead + o.span, 0) // o.stored
    begin = soft_end  # of the linear set's queries
    end = soft_end
    if not K and o.has_linear and o.show_linear:
        begin = first
        if not o.near_linear:
            begin = tl.minimum(tl.maximum(j0 + o.window - lead, 0) // o.rows * o.rows, soft_end)
            begin = tl.maximum(begin, first)
        if o.sums:
            end = tl.maximum(tl.minimum((number + 1) * o.stored, length), soft_end)

    for one in range(0, o.group):
        h = g * o.group + one
        x = head(q, b, h, q_b, q_h)
        d = head(dy, b, h, dy_b, dy_h)
        phi_q = head(fq, b, h, fq_b, fq_h)
        phi_k = head(fk, b, h // o.map_group, fk_b, fk_h)
        at = (b * heads + h).to(tl.int64) * length
        kept = window_kept(keep, b * heads + h, o)
        g_mix = 0.0
        if K and o.through:
            g_mix = tl.load(mix + h).to(tl.float32)
        phi = key
        if not K and o.has_linear and o.show_linear:
            phi = take(phi_k, j, fk_t, real, 0, o.features, o.tile)
        if o.has_soft:
            for q0 in range(first, soft_end, o.rows):
                total = _to_keys(
                    total, x, q_t, d, dy_t, phi_q, fq_t, phi_k, fk_t, phi, key, values, j, kp, ks, q0,
                    q_position, q_segment, stats + at, terms + at, bests, at, plane, g_mix,
                    length, lead, kept, anchor, scale, True, K, o,
                )  # fmt: skip
        if not K and o.has_linear and o.show_linear:
            for q0 in range(begin, end, o.rows):
                total = _to_keys(
                    total, x, q_t, d, dy_t, phi_q, fq_t, phi_k, fk_t, phi, key, values, j, kp, ks, q0,
                    q_position, q_segment, stats + at, terms + at, bests, at, plane, g_mix,
                    length, lead, kept, anchor, scale, False, K, o,
                )  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * keys
    inside = (j >= 0) & (j < keys)
    if K:
        total = total * scale
    elif o.sums and o.show_linear:
        if number + 1 < states:
            segment = goes_on(q_segment, (number + 1) * o.stored, o)
            maps = o.group // o.map_group
            for one in range(0, maps):
                p = g * maps + one
                kept = window_kept(keep, b * heads + p * o.map_group, o)
                counts = enters(kp, ks, segment, kept, o)
                at = ((b * groups * maps + p).to(tl.int64) * states + number + 1) * o.features
                for start in range(0, o.features, o.tile):
                    f = start + tl.arange(0, o.tile)
                    phi = take(head(fk, b, p, fk_b, fk_h), j, fk_t, counts, start, o.features, o.tile)
                    s = take(value + at * o.width, f, o.width, f < o.features, 0, o.width, o.width_block)
                    copied(f)
                    total = weighed(phi, s, total, o)
    put(out + row * o.width, j, o.width, inside, 0, o.width, o.width_block, total)


@triton.jit
def _to_keys(
    total, q, q_t, dy, dy_t, fq, fq_t, fk, fk_t, phi, key, values, j, kp, ks, q0,
    q_position, q_segment, stats, terms, bests, at, plane, mix,
    length, lead, kept, anchor, scale, SOFT: tl.constexpr, K: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """A block of queries, of whose softmax set (SOFT) or linear set the keys are."""
    i = q0 + tl.arange(0, o.rows)
    qp, qs = places(q_position, q_segment, i, length, o)
    real = qs >= 0
    soft, linear, hidden = sets(qp[None, :], qs[None, :], kp[:, None], ks[:, None], kept, anchor, o)
    out = take(dy, i, dy_t, real, 0, o.width, o.width_block)
    if SOFT:
        if o.sinks > 0:
            soft = soft & (j >= q0 + lead - o.span)[:, None]  # sinks farther back: `sink_gradient`
        query = take(q, i, q_t, real, 0, o.width, o.width_block)
        top = tl.load(stats + i, mask=real, other=0.0)
        factor = tl.load(terms + i, mask=real, other=0.0)
        copied(i)
        a = softmax_weights(scores(key, query, scale, o), soft, top[None, :]) * factor[None, :]
        if K:
            sigma = tl.load(terms + 2 * plane + i, mask=real, other=0.0)
            dx = shown(tl.dot(values, tl.trans(out), input_precision=o.precision), hidden, o)
            ds = a * (dx + sigma[None, :])
            if o.through:
                best = tl.load(bests + at + i, mask=real, other=0)
                row = mix * tl.load(terms + 4 * plane + i, mask=real, other=0.0)  # 0 where a row has no softmax set
                own = tl.where(j >= q0 + lead - o.span, j, FAR)  # sinks of a state are below 0
                ds -= tl.where(own[:, None] == best[None, :], row[None, :], 0.0)
            return weighed(ds, query, total, o)
        else:
            return weighed(shown(a, hidden, o), out, total, o)
    else:
        b = pairs(phi, fk, fk_t, j, ks >= 0, fq, fq_t, i, real, o)
        factor = tl.load(terms + plane + i, mask=real, other=0.0)
        return weighed(tl.where(linear, b * factor[None, :], 0.0), out, total, o)


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
    v = head(v, b, p * o.map_group // o.group, v_b, v_h)
    q_position += b * length
    q_segment += b * length
    kp, ks = places(k_position + b * (keys + o.ahead), k_segment + b * (keys + o.ahead), j, keys, o)
    kp = tl.where(ks >= 0, kp, FAR)
    values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
    plane = tl.cast(batches * heads + 0 * b, tl.int64) * length
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
        d = head(dy, b, h, dy_b, dy_h)
        x = head(fq, b, h, fq_b, fq_h)
        t = terms + (b * heads + h).to(tl.int64) * length
        kept = window_kept(keep, b * heads + h, o)
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
                copied(i)
                db = tl.dot(values, tl.trans(out), db, input_precision=o.precision)
            db = tl.where(linear, factor[None, :] * db, 0.0)
            if o.join == "replace":
                extra = tl.load(t + 4 * plane + i, mask=real, other=0.0)
                db += tl.where(soft & (j >= q0 + lead - o.span)[:, None], extra[None, :], 0.0)
            total = weighed(db, take(x, i, fq_t, real, start, o.features, o.tile), total, o)
    if o.sums:
        if number + 1 < states:
            kept = window_kept(keep, b * heads + p * o.map_group, o)
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
    q = head(q, b, h, q_b, q_h)
    fq = head(fq, b, h, fq_b, fq_h)
    dy = head(dy, b, h, dy_b, dy_h)
    k = head(k, b, h // o.group, k_b, k_h)
    v = head(v, b, h // o.group, v_b, v_h)
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = window_kept(keep, tl.program_id(1), o)
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
        dx = shown(dx, hidden, o)
        ds = a * (dx + sigma[None, :])
        if o.through:
            best = tl.load(bests + at + i, mask=real, other=0)
            row = tl.load(mix + h).to(tl.float32) * extra
            ds -= tl.where(soft & (j[:, None] == best[None, :]), row[None, :], 0.0)
        k_total = weighed(ds, query, k_total, o)
        a = shown(a, hidden, o)
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
