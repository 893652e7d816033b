"""Triton kernels of hybrid attention, forward: sums of blocks of keys, states out of them, then the output."""

import triton
import triton.language as tl

from .gpu_parts import (
    HIDDEN,
    LEAST,
    factors,
    features_of,
    floored,
    head,
    over,
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
def enters(kp, ks, segment, kept, o: tl.constexpr):
    """Which keys the states count: of the segment that goes on; sinks only where the linear set covers them."""
    counts = (ks == segment) & (ks >= 0)
    if o.sinks > 0 and not o.cover_all:
        later = kp >= o.sinks
        if o.drops and o.drop_covers:
            later = later | (kept + 0 * kp == 0)  # the interpreter of Triton 3.9 cannot spread a truth value
        counts = counts & later
    return counts


@triton.jit
def goes_on(q_segment, index, o: tl.constexpr):
    """The segment of the query at which a state is stored."""
    if o.plain:
        return 0
    else:
        return tl.load(q_segment + index)


@triton.jit
def sum_keys(
    fk, v, keep, q_segment, k_position, k_segment, value, mass,
    fk_b, fk_h, fk_t, v_b, v_h, v_t,
    maps, length, keys, lead, states,
    o: tl.constexpr,
):  # fmt: skip
    """sum phi_k [v, 1] over the keys that state n + 1 has and state n has not. Grid: (states - 1, B maps, tiles).

    value [B maps, states, F, D] or None and mass [B maps, states, F] in float32, of which this fills 1 .. states - 1.
    """
    number = tl.program_id(0) + 1
    b = tl.program_id(1) // maps
    p = tl.program_id(1) % maps
    first = tl.program_id(2) * o.tile
    start = tl.maximum((number - 1) * o.stored + lead - o.span, 0)
    stop = tl.maximum(number * o.stored + lead - o.span, 0)
    fk = head(fk, b, p, fk_b, fk_h)
    v = head(v, b, p * o.map_group // o.group, v_b, v_h)
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    segment = goes_on(q_segment + b * length, number * o.stored, o)
    kept = window_kept(keep, tl.program_id(1), o)  # then phi_k is of query heads, if it matters
    total = tl.full([o.tile, o.width_block], 0.0, tl.float32)
    alone = tl.full([o.tile], 0.0, tl.float32)
    for at in range(start, stop, o.columns):
        j = at + tl.arange(0, o.columns)
        kp, ks = places(k_position, k_segment, j, stop, o)
        counts = enters(kp, ks, segment, kept, o)
        phi = take(fk, j, fk_t, counts, first, o.features, o.tile)
        alone += tl.sum(phi.to(tl.float32), 0)
        if o.show_linear:
            total = weighed(tl.trans(phi), take(v, j, v_t, ks >= 0, 0, o.width, o.width_block), total, o)
    row = tl.program_id(1).to(tl.int64) * states + number
    f = first + tl.arange(0, o.tile)
    if value is not None:
        put(value + row * o.features * o.width, f, o.width, f < o.features, 0, o.width, o.width_block, total)
    tl.store(mass + row * o.features + f, alone, mask=f < o.features)


@triton.jit
def scan(
    parts, masses, out, out_mass, q_segment, maps, length, states, size, features,
    backward: tl.constexpr, block: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """out[n] = parts[n] + out[n - 1] (backward: out[n + 1]) where the segment goes on, and of masses the same.

    parts, out [B maps, states, size] or None, masses, out_mass [B maps, states, features]; what is summed is in float32. State 0
    is none of the sums' but a call's that goes on from a state. Grid: (B maps, blocks of `size`, and then those of `features`).
    """
    segments = q_segment + tl.program_id(0) // maps * length
    row = tl.program_id(0).to(tl.int64) * states
    ahead = 0
    if parts is not None:
        ahead = tl.cdiv(size, block)
        if tl.program_id(1) < ahead:
            column = tl.program_id(1) * block + tl.arange(0, block)
            _running(parts, out, segments, row, column, states, size, backward, block, o)
    if tl.program_id(1) >= ahead:
        column = (tl.program_id(1) - ahead) * block + tl.arange(0, block)
        _running(masses, out_mass, segments, row, column, states, features, backward, block, o)


@triton.jit
def _running(
    parts, out, segments, row, column, states, size, backward: tl.constexpr, block: tl.constexpr, o: tl.constexpr
):
    total = tl.full([block], 0.0, tl.float32)
    before = -1
    for step in range(0, states):
        number = step
        if backward:
            number = states - 1 - step
        now = goes_on(segments, number * o.stored, o)
        at = (row + number) * size + column
        there = column < size
        if backward or not o.initial:
            there = there & (number > 0)
        part = tl.load(parts + at, mask=there, other=0.0)
        carried = (step > 0) & (now == before) & (now >= 0)
        total = tl.where(carried, total, 0.0) + part
        tl.store(out + at, total.to(out.dtype.element_ty), mask=column < size)
        before = now + 0


@triton.jit
def _softmax_columns(
    top, best, a_mass, w_mass, a_sum, query, phi, fq, fq_t, i, qp, qs, k, k_t, v, v_t, fk, fk_t, j, kp, ks,
    kept, anchor, scale, BEST: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """One block of columns: the softmax set goes on. best: the column of the row maximum."""
    soft, _linear, hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
    real = ks >= 0
    key = take(k, j, k_t, real, 0, o.width, o.width_block)
    s = tl.where(soft, scores(query, key, scale, o), HIDDEN)
    new = tl.maximum(top, tl.max(s, 1))
    if BEST:
        least = tl.min(tl.where(soft & (s == new[:, None]), j[None, :] + 0 * i[:, None], 2147483647), 1)
        best = tl.where(new > top, least, best)
    a = softmax_weights(s, soft, new[:, None])
    shrink = tl.exp2(tl.maximum(top - new, LEAST))
    a_mass = a_mass * shrink + tl.sum(a, 1)
    values = take(v, j, v_t, real, 0, o.width, o.width_block)
    a_sum = weighed(shown(a, hidden, o), values, a_sum * shrink[:, None], o)
    if o.join == "replace":
        b = pairs(phi, fq, fq_t, i, qs >= 0, fk, fk_t, j, real, o)
        w_mass += tl.sum(tl.where(soft, b, 0.0), 1)
    return new, best, a_mass, w_mass, a_sum


@triton.jit
def _linear_columns(
    b_mass, b_sum, phi, fq, fq_t, i, qp, qs, v, v_t, fk, fk_t, j, kp, ks, kept, anchor, o: tl.constexpr
):
    """One block of columns: the linear set goes on."""
    _soft, linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
    b = tl.where(linear, pairs(phi, fq, fq_t, i, qs >= 0, fk, fk_t, j, ks >= 0, o), 0.0)
    b_mass += tl.sum(b, 1)
    if o.show_linear:
        b_sum = weighed(b, take(v, j, v_t, ks >= 0, 0, o.width, o.width_block), b_sum, o)
    return b_mass, b_sum


@triton.jit
def output(
    q, k, v, fq, fk, mix, log_scale, keep, q_position, q_segment, k_position, k_segment, value, mass, weight, clamp,
    y, y_soft, y_linear, share, stats, bests,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t,
    heads, length, keys, lead, states, anchor, scale,
    COMPONENTS: tl.constexpr, SOFT_OUT: tl.constexpr, STATS: tl.constexpr, BEST: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """y of `rows` queries of one head. Grid: (ceil(T / rows), B H).

    First the softmax set, the sinks before the span and the span; then the linear set, the stored state, the keys between it
    and the span, and what of the span it holds. y, y_soft, y_linear [B,H,T,D], share [B,H,T], stats [4,B,H,T] (top in base 2,
    masses of softmax, linear and, in `replace`, the window's linear mass), bests [B,H,T] int32. With `weight` phi_q is made here.

    On the chip, d = 128, rows = columns = 64: one sum in float32 32 KiB, the window's y 16 KiB, scores or pairs 16 KiB, in 4
    warps 128 registers a thread; a state is read in tiles of 64 to 128 features and never held as a whole.
    """
    q0 = tl.program_id(0) * o.rows
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    row = tl.program_id(1).to(tl.int64)
    p = h // o.map_group
    q = head(q, b, h, q_b, q_h)
    fq = head(fq, b, h, fq_b, fq_h)
    k = head(k, b, h // o.group, k_b, k_h)
    v = head(v, b, h // o.group, v_b, v_h)
    fk = head(fk, b, p, fk_b, fk_h)
    q_position += b * length
    q_segment += b * length
    k_position += b * (keys + o.ahead)
    k_segment += b * (keys + o.ahead)
    kept = window_kept(keep, tl.program_id(1), o)

    i = q0 + tl.arange(0, o.rows)
    qp, qs = places(q_position, q_segment, i, length, o)
    query = take(q, i, q_t, qs >= 0, 0, o.width, o.width_block)
    if o.map_columns > 0:
        phi = features_of(query, weight + h.to(tl.int64) * o.width * o.map_columns, clamp, o)
    else:
        phi = take(fq, i, fq_t, qs >= 0, 0, o.features, o.tile)
    number = q0 // o.stored
    near = tl.maximum(q0 + lead - o.span, 0)
    stop = tl.minimum(q0 + o.rows, length) + lead

    top = tl.full([o.rows], HIDDEN, tl.float32)
    best = tl.full([o.rows], 0, tl.int32)
    a_mass = tl.full([o.rows], 0.0, tl.float32)
    b_mass = tl.full([o.rows], 0.0, tl.float32)
    w_mass = tl.full([o.rows], 0.0, tl.float32)
    total = tl.full([o.rows, o.width_block], 0.0, tl.float32)
    if o.sinks > 0 and o.has_sinks:
        if (near > 0) | (o.ahead > 0):
            j, kp, ks = sink_columns(k_position, k_segment, q0 + lead, near, o)
            top, best, a_mass, w_mass, total = _softmax_columns(
                top, best, a_mass, w_mass, total, query, phi, fq, fq_t, i, qp, qs, k, k_t, v, v_t, fk, fk_t, j, kp, ks,
                kept, anchor, scale, BEST, o,
            )  # fmt: skip
    if o.has_soft:
        for at in range(near, stop, o.columns):
            j = at + tl.arange(0, o.columns)
            kp, ks = places(k_position, k_segment, j, stop, o)
            top, best, a_mass, w_mass, total = _softmax_columns(
                top, best, a_mass, w_mass, total, query, phi, fq, fq_t, i, qp, qs, k, k_t, v, v_t, fk, fk_t, j, kp, ks,
                kept, anchor, scale, BEST, o,
            )  # fmt: skip
    inside = i < length
    out = row * length
    total = total * over(1.0, a_mass)[:, None]
    if SOFT_OUT:
        put(y_soft + out * o.width, i, o.width, inside, 0, o.width, o.width_block, total)
    # Rounded as y will be, so that it takes half the registers while the linear set is summed.
    y_window = total.to(y.dtype.element_ty)

    total = tl.full([o.rows, o.width_block], 0.0, tl.float32)
    if o.has_linear:
        far = near
        if o.sums:
            far = tl.maximum(number * o.stored + lead - o.span, 0)
            if (number > 0) | o.initial:
                sees = qs == goes_on(q_segment, number * o.stored, o)
                begin = ((b * (heads // o.map_group) + p).to(tl.int64) * states + number) * o.features
                for first in range(0, o.features, o.tile):
                    if o.map_columns > 0:
                        x = tl.where((sees & (qs >= 0))[:, None], phi, tl.zeros_like(phi))
                    else:
                        x = take(fq, i, fq_t, sees & (qs >= 0), first, o.features, o.tile)
                    f = first + tl.arange(0, o.tile)
                    held = tl.load(mass + begin + f, mask=f < o.features, other=0.0)
                    b_mass += tl.sum(x.to(tl.float32) * held[None, :], 1)
                    if o.show_linear:
                        s = take(value + begin * o.width, f, o.width, f < o.features, 0, o.width, o.width_block)
                        total = weighed(x, s, total, o)
        last = stop
        if not o.near_linear:
            last = tl.maximum(tl.minimum(q0 + o.rows + lead - o.window, stop), near)
        for at in range(far, last, o.columns):
            j = at + tl.arange(0, o.columns)
            kp, ks = places(k_position, k_segment, j, last, o)
            b_mass, total = _linear_columns(
                b_mass, total, phi, fq, fq_t, i, qp, qs, v, v_t, fk, fk_t, j, kp, ks, kept, anchor, o
            )

    g = 0.0
    c = 0.0
    if o.join == "shared":
        g = tl.load(mix + h).to(tl.float32)
    if o.join == "absolute":
        c = tl.load(log_scale + h).to(tl.float32)
    a_factor, b_factor, _den, _live, a_weight, b_weight = factors(top, a_mass, b_mass, w_mass, g, c, o)
    if COMPONENTS:
        linear, _live = floored(b_mass, o)
        alone = over(1.0, linear)
        put(y_linear + out * o.width, i, o.width, inside, 0, o.width, o.width_block, total * alone[:, None])
        part = b_factor * b_mass
        if o.join == "average" or o.join == "sum":
            part = b_weight / tl.maximum(a_weight + b_weight, 0.5)
        tl.store(share + out + i, part, mask=inside)
    total = (a_factor * a_mass)[:, None] * y_window.to(tl.float32) + b_factor[:, None] * total
    put(y + out * o.width, i, o.width, inside, 0, o.width, o.width_block, total)
    if STATS:
        plane = tl.num_programs(1).to(tl.int64) * length
        tl.store(stats + out + i, top, mask=inside)
        tl.store(stats + plane + out + i, a_mass, mask=inside)
        tl.store(stats + 2 * plane + out + i, b_mass, mask=inside)
        tl.store(stats + 3 * plane + out + i, w_mass, mask=inside)
        if BEST:
            tl.store(bests + out + i, best, mask=inside)
