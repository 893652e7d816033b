"""The Triton kernel of the weight transfer loss that owns keys: phi_k's gradient."""

import triton
import triton.language as tl

from ..hybrid.gpu_parts import BASE2, copied, exp2, head, inverse, pairs, places, put, scores, sets, take, weighed
from .gpu_rows import CLAMP, taught_pairs, weights


@triton.jit
def _met(
    total, key, phi, j, kp, ks, q, q_t, fq, fq_t, fk, fk_t, lse, stats, terms, plane,
    position, segment, q0, length, first, anchor, scale,
    FULL: tl.constexpr, bounds: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """A block of queries; everything is [keys, queries]. FULL as in gpu_rows."""
    i = q0 + tl.arange(0, o.columns)
    qp, qs = places(position, segment, i, length, o)
    real = qs >= 0
    query = take(q, i, q_t, real, 0, o.width, o.width_block)
    copied(i)
    s = scores(key, query, scale, o)
    if o.features <= o.tile:
        own = take(fq, i, fq_t, real, 0, o.features, o.tile)
        x = tl.dot(phi, tl.trans(own), input_precision=o.precision)
    else:
        own = take(fq, i, fq_t, real, first, o.features, o.tile)
        x = pairs(phi, fk, fk_t, j, ks >= 0, fq, fq_t, i, real, o)
    level = (tl.load(lse + i, mask=real, other=0.0) * BASE2)[None, :]
    b_factor = tl.load(terms + plane + i, mask=real, other=0.0)[None, :]
    linear_term = tl.load(terms + 2 * plane + i, mask=real, other=0.0)[None, :]
    if FULL:
        p = exp2(s - level)
        a = b_factor * x
    else:
        top = tl.load(stats + i, mask=real, other=0.0)[None, :]
        a_factor = tl.load(terms + i, mask=real, other=0.0)[None, :]
        soft, linear, _hidden = sets(qp[None, :], qs[None, :], kp[:, None], ks[:, None], 1, anchor, o)
        taught = taught_pairs(qp[None, :], qs[None, :], kp[:, None], ks[:, None], bounds)
        p, a, _e = weights(s, x, level, top, a_factor, b_factor, taught, soft, linear, o)
    db = linear_term - tl.where(a >= CLAMP, p, 0.0) * inverse(tl.maximum(a, CLAMP))
    if not FULL:
        db = tl.where(linear, db, 0.0)
        if o.join == "replace":
            shared = tl.load(terms + 3 * plane + i, mask=real, other=0.0)[None, :]
            db += tl.where(soft, shared, 0.0)
    return weighed(b_factor * db, own, total, o)


@triton.jit
def transfer_keys(
    q, k, fq, fk, lse, position, segment, ends, stats, terms, dfk,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t,
    heads, batches, length, anchor, scale,
    bounds: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """A tile of phi_k's gradient, of `rows` keys, over all heads that share them. Grid: (ceil(T / rows), B maps, tiles).

    What gpu_rows calls rows is here keys, and the queries come `columns` at a time. ends [B,T] int32: where the segment of
    a token ends.
    """
    maps = heads // o.map_group
    b = tl.program_id(1) // maps
    p = tl.program_id(1) % maps
    first = tl.program_id(2) * o.tile
    j0 = tl.program_id(0) * o.rows
    j = j0 + tl.arange(0, o.rows)
    k = head(k, b, p * o.map_group // o.group, k_b, k_h)
    fk = head(fk, b, p, fk_b, fk_h)
    position += b * length
    segment += b * length
    kp, ks = places(position, segment, j, length, o)
    key = take(k, j, k_t, ks >= 0, 0, o.width, o.width_block)
    phi = take(fk, j, fk_t, ks >= 0, 0, o.features, o.tile)
    plane = tl.cast(batches * heads + 0 * b, tl.int64) * length

    end = length + j0 * 0
    if o.reach > 0:
        end = tl.minimum(end, j0 + o.rows - 1 + o.reach)
        if o.join == "replace" and o.sinks > 0:
            # A sink counts in the softmax set of all later rows.
            sink = tl.max(tl.where((ks >= 0) & (kp < o.sinks), 1, 0), 0)
            end = tl.where(sink > 0, length, end)
    full = end
    after = end
    if o.plain:
        full = (j0 + o.rows - 1 + bounds.near + o.columns - 1) // o.columns * o.columns
        if o.sinks > 0:
            full = tl.where(j0 < o.sinks, end, full)
        full = tl.minimum(full, end)
        if bounds.least > 0:
            after = tl.maximum(tl.minimum((j0 + bounds.least) // o.columns * o.columns, end), full)
    else:
        end = tl.minimum(end, tl.load(ends + b * length + tl.minimum(j0 + o.rows, length) - 1))
        full = end

    total = tl.full([o.rows, o.tile], 0.0, tl.float32)
    for one in range(0, o.map_group):
        h = p * o.map_group + one
        x = head(q, b, h, q_b, q_h)
        phi_q = head(fq, b, h, fq_b, fq_h)
        at = (b * heads + h).to(tl.int64) * length
        for q0 in range(j0, full, o.columns):
            total = _met(
                total, key, phi, j, kp, ks, x, q_t, phi_q, fq_t, fk, fk_t, lse + at, stats + at, terms + at, plane,
                position, segment, q0, length, first, anchor, scale, False, bounds, o,
            )  # fmt: skip
        if o.plain:
            for q0 in range(full, after, o.columns):
                total = _met(
                    total, key, phi, j, kp, ks, x, q_t, phi_q, fq_t, fk, fk_t, lse + at, stats + at, terms + at, plane,
                    position, segment, q0, length, first, anchor, scale, True, bounds, o,
                )  # fmt: skip
            if bounds.least > 0:
                for q0 in range(after, end, o.columns):
                    total = _met(
                        total, key, phi, j, kp, ks, x, q_t, phi_q, fq_t, fk, fk_t, lse + at, stats + at, terms + at,
                        plane, position, segment, q0, length, first, anchor, scale, False, bounds, o,
                    )  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * length
    put(dfk + row * o.features, j, o.features, j < length, first, o.features, o.tile, total)
