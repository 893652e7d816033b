"""Triton kernels of hybrid attention, forward: sums of blocks of keys, states out of them, then the output."""

import triton
import triton.language as tl

from .gpu_parts import (
    HIDDEN,
    ON_CHIP,
    copied,
    exp2,
    factors,
    features_of,
    floored,
    head,
    join_of,
    over,
    pairs,
    places,
    put,
    scores,
    sets,
    settled,
    shown,
    sink_columns,
    take,
    weighed,
    window_factor,
    window_kept,
)

TOGETHER = tl.constexpr(8 if ON_CHIP.value else 2)  # states


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

    value [B maps, states, F, D] or None and mass [B maps, states, F] (float32), of which this fills 1 .. states - 1.
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
    # Masses as a product with ones, which is exact: a sum over rows goes through shared memory.
    ones = tl.full([o.columns, 16], 1.0, fk.dtype.element_ty)
    alone = tl.full([o.tile, 16], 0.0, tl.float32)
    for at in range(start, stop, o.columns):
        j = at + tl.arange(0, o.columns)
        kp, ks = places(k_position, k_segment, j, stop, o)
        counts = enters(kp, ks, segment, kept, o)
        phi = take(fk, j, fk_t, counts, first, o.features, o.tile)
        if o.show_linear:
            values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
        copied(j)
        if o.show_linear:
            total = weighed(tl.trans(phi), values, total, o)
        alone = tl.dot(tl.trans(phi), ones, alone, input_precision="tf32x3")
    row = tl.program_id(1).to(tl.int64) * states + number
    f = first + tl.arange(0, o.tile)
    if value is not None:
        put(value + row * o.features * o.width, f, o.width, f < o.features, 0, o.width, o.width_block, total)
    tl.store(mass + row * o.features + f, tl.max(alone, 1), mask=f < o.features)


@triton.jit
def scan(
    parts, masses, q_segment, maps, length, states, size, features,
    backward: tl.constexpr, block: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """x[n] += x[n - 1] (backward: x[n + 1]) where the segment goes on, of parts and of masses, in their place.

    parts [B maps, states, size] or None, masses [B maps, states, features]; summed in float32. State 0 is none of the sums' but a
    call's that goes on from a state. Grid: (B maps, blocks of `size`, and then those of `features`).
    """
    segments = q_segment + tl.program_id(0) // maps * length
    row = tl.program_id(0).to(tl.int64) * states
    ahead = 0
    if parts is not None:
        ahead = tl.cdiv(size, block)
        if tl.program_id(1) < ahead:
            column = tl.program_id(1) * block + tl.arange(0, block)
            _running(parts, segments, row, column, states, size, backward, block, o)
    if tl.program_id(1) >= ahead:
        column = (tl.program_id(1) - ahead) * block + tl.arange(0, block)
        _running(masses, segments, row, column, states, features, backward, block, o)


@triton.jit
def _state_at(step, row, column, states, size, backward: tl.constexpr, o: tl.constexpr):
    """Where columns of the state that is `step`-th in the sum stand, whether they do, and whether it is of the sum."""
    number = step
    if backward:
        number = states - 1 - step
    there = (column < size) & (step < states)
    return (row + number) * size + column, there, there & (number > 0) if backward or not o.initial else there


@triton.jit
def _running(x, segments, row, column, states, size, backward: tl.constexpr, block: tl.constexpr, o: tl.constexpr):
    total = tl.full([block], 0.0, tl.float32)
    if o.plain:
        # Several are read at once, as a load for each alone would be a wait for each; a thread sums what it has read.
        for first in range(0, states, TOGETHER):
            read = ()
            for step in tl.static_range(TOGETHER):
                at, there, counts = _state_at(first + step, row, column, states, size, backward, o)
                read += (tl.load(x + at, mask=there & counts, other=0.0),)  # type: ignore[assignment]
            for step in tl.static_range(TOGETHER):
                at, there, counts = _state_at(first + step, row, column, states, size, backward, o)
                total += read[step].to(tl.float32)
                tl.store(x + at, total.to(x.dtype.element_ty), mask=there)
    else:
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
            part = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
            carried = (step > 0) & (now == before) & (now >= 0)
            total = tl.where(carried, total, 0.0) + part
            tl.store(x + at, total.to(x.dtype.element_ty), mask=column < size)
            before = now + 0


@triton.jit
def _softmax_columns(
    top, best, a_mass, w_mass, a_sum, query, phi, fq, fq_t, i, qp, qs, k, k_t, v, v_t, fk, fk_t, j, kp, ks,
    kept, anchor, scale, BEST: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """One block of columns: the softmax set goes on. best: the column of the row maximum."""
    real = ks >= 0
    key = take(k, j, k_t, real, 0, o.width, o.width_block)
    values = take(v, j, v_t, real, 0, o.width, o.width_block)  # here, so that both are under way at once
    copied(j)
    s = scores(query, key, scale, o)
    soft, _linear, hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
    s = tl.where(soft, s, HIDDEN)
    new = tl.maximum(top, tl.max(s, 1))
    if BEST:
        least = tl.min(tl.where(s == new[:, None], j[None, :] + 0 * i[:, None], 2147483647), 1)
        best = tl.where(new > top, least, best)
    # Of a row that sees nothing yet all is 0.
    a = exp2(s - tl.where(new == HIDDEN, 0.0, new)[:, None])
    shrink = exp2(top - new)
    a_mass = a_mass * shrink + tl.sum(a, 1)
    a_sum = weighed(shown(a, hidden, o), values, a_sum * shrink[:, None], o)
    if o.join == "replace":
        b = pairs(phi, fq, fq_t, i, qs >= 0, fk, fk_t, j, real, o)
        w_mass += tl.sum(tl.where(soft, b, 0.0), 1)
    return new, best, a_mass, w_mass, a_sum


@triton.jit
def _linear_columns(
    b_mass, b_sum, phi, fq, fq_t, i, qp, qs, v, v_t, fk, fk_t, j, kp, ks, kept, anchor,
    FULL: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """One block of columns: the linear set goes on. FULL: it holds all of them."""
    if o.show_linear:
        values = take(v, j, v_t, ks >= 0, 0, o.width, o.width_block)
    b = pairs(phi, fq, fq_t, i, qs >= 0, fk, fk_t, j, ks >= 0, o)
    if not FULL:
        _soft, linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], kept, anchor, o)
        b = tl.where(linear, b, 0.0)
    b_mass += tl.sum(b, 1)
    if o.show_linear:
        b_sum = weighed(b, values, b_sum, o)
    return b_mass, b_sum


@triton.jit
def _features(q, q_t, fq, fq_t, i, real, weight, h, clamp, o: tl.constexpr):
    """phi_q of the rows, or its first tile: made or read, where it is first needed."""
    if o.map_columns > 0:
        return features_of(q, i, q_t, real, weight + h.to(tl.int64) * o.width * o.map_columns, clamp, 64, o)
    else:
        return take(fq, i, fq_t, real, 0, o.features, o.tile)


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

    On the chip, d = 128, rows = columns = 64: one sum in float32 32 KiB, scores or pairs 16 KiB, in 4 warps 96 registers a
    thread; a state is read in tiles of 64 to 128 features and never held as a whole. Where the window's factor waits for the
    linear mass, or components are asked for, the window's y is kept beside it, 16 KiB.
    """
    JOINED: tl.constexpr = (o.join == "shared" or o.join == "replace") and not COMPONENTS
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
    phi = query
    if o.join == "replace":
        phi = _features(q, q_t, fq, fq_t, i, qs >= 0, weight, h, clamp, o)
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
    g, c = join_of(mix, log_scale, h, o)
    if SOFT_OUT:
        mean = total * over(1.0, a_mass)[:, None]
        put(y_soft + out * o.width, i, o.width, inside, 0, o.width, o.width_block, mean)
    if JOINED:
        total = total * window_factor(a_mass, w_mass, g, o)[:, None]
    else:
        # Rounded as y will be, so that it takes half the registers while the linear set is summed.
        y_window = settled(total * over(1.0, a_mass)[:, None], y.dtype.element_ty)
        total = tl.full([o.rows, o.width_block], 0.0, tl.float32)
    if o.has_linear:
        if o.join != "replace":
            phi = _features(q, q_t, fq, fq_t, i, qs >= 0, weight, h, clamp, o)
        far = near
        if o.sums:
            far = tl.maximum(number * o.stored + lead - o.span, 0)
            if (number > 0) | o.initial:
                sees = qs == goes_on(q_segment, number * o.stored, o)
                begin = ((b * (heads // o.map_group) + p).to(tl.int64) * states + number) * o.features
                for first in range(0, o.features, o.tile):
                    f = first + tl.arange(0, o.tile)
                    held = tl.load(mass + begin + f, mask=f < o.features, other=0.0)
                    if o.show_linear:
                        s = take(value + begin * o.width, f, o.width, f < o.features, 0, o.width, o.width_block)
                    if o.plain and o.features <= o.tile:
                        x = phi
                    elif o.map_columns > 0:
                        x = tl.where((sees & (qs >= 0))[:, None], phi, tl.zeros_like(phi))
                    else:
                        x = take(fq, i, fq_t, sees & (qs >= 0), first, o.features, o.tile)
                    if o.show_linear:
                        copied(f)
                        total = weighed(x, s, total, o)
                    b_mass += tl.sum(x.to(tl.float32) * held[None, :], 1)
        last = stop
        if not o.near_linear:
            last = tl.maximum(tl.minimum(q0 + o.rows + lead - o.window, stop), near)
        masked = far
        if o.sums and o.plain:
            # What lies between state and span is linear as a whole, but for sinks.
            if far >= o.sinks:
                masked = far + (near - far) // o.columns * o.columns
            for at in range(far, masked, o.columns):
                j = at + tl.arange(0, o.columns)
                b_mass, total = _linear_columns(
                    b_mass, total, phi, fq, fq_t, i, qp, qs, v, v_t, fk, fk_t, j, j, j, kept, anchor, True, o
                )
        for at in range(masked, last, o.columns):
            j = at + tl.arange(0, o.columns)
            kp, ks = places(k_position, k_segment, j, last, o)
            b_mass, total = _linear_columns(
                b_mass, total, phi, fq, fq_t, i, qp, qs, v, v_t, fk, fk_t, j, kp, ks, kept, anchor, False, o
            )

    a_factor, b_factor, _den, _live, a_weight, b_weight = factors(top, a_mass, b_mass, w_mass, g, c, o)
    if COMPONENTS:
        linear, _live = floored(b_mass, o)
        alone = over(1.0, linear)
        put(y_linear + out * o.width, i, o.width, inside, 0, o.width, o.width_block, total * alone[:, None])
        part = b_factor * b_mass
        if o.join == "average" or o.join == "sum":
            part = b_weight / tl.maximum(a_weight + b_weight, 0.5)
        tl.store(share + out + i, part, mask=inside)
    total = b_factor[:, None] * total
    if not JOINED:
        total += (a_factor * a_mass)[:, None] * y_window.to(tl.float32)
    put(y + out * o.width, i, o.width, inside, 0, o.width, o.width_block, total)
    if STATS:
        plane = tl.num_programs(1).to(tl.int64) * length
        tl.store(stats + out + i, top, mask=inside)
        tl.store(stats + plane + out + i, a_mass, mask=inside)
        tl.store(stats + 2 * plane + out + i, b_mass, mask=inside)
        tl.store(stats + 3 * plane + out + i, w_mass, mask=inside)
        if BEST:
            tl.store(bests + out + i, best, mask=inside)
