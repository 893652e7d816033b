"""Triton kernels of the weight transfer loss that own rows: masses of rows, then loss, row terms and phi_q's gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..hybrid.gpu_forward import goes_on
from ..hybrid.gpu_parts import (
    BASE2,
    HIDDEN,
    copied,
    exp2,
    factors,
    head,
    inverse,
    join_of,
    log2,
    over,
    pairs,
    places,
    put,
    scores,
    sets,
    sink_columns,
    softmax_weights,
    take,
    weighed,
)
from .reference import LEAST as CLAMPED

CLAMP = tl.constexpr(CLAMPED)


class Bounds(NamedTuple):
    """Where pairs need no masks in rows without padding and segments, as distances."""

    teacher: int  # the teacher's window; 0: none
    near: int  # from here on no key is in the student's
    least: int  # up to here both see all keys; 0: everywhere


@triton.jit
def _summed(
    top, a_mass, b_mass, w_mass, query, phi, fq, fq_t, i, qp, qs, k, k_t, fk, fk_t, j, kp, ks, anchor, scale,
    SOFT: tl.constexpr, LINEAR: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    soft, linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], 1, anchor, o)
    if LINEAR or o.join == "replace":
        b = pairs(phi, fq, fq_t, i, qs >= 0, fk, fk_t, j, ks >= 0, o)
    if SOFT:
        key = take(k, j, k_t, ks >= 0, 0, o.width, o.width_block)
        copied(j)
        s = scores(query, key, scale, o)
        new = tl.maximum(top, tl.max(tl.where(soft, s, HIDDEN), 1))
        a_mass = a_mass * exp2(top - new) + tl.sum(softmax_weights(s, soft, new[:, None]), 1)
        top = new
        if o.join == "replace":
            w_mass += tl.sum(tl.where(soft, b, 0.0), 1)
    if LINEAR:
        b_mass += tl.sum(tl.where(linear, b, 0.0), 1)
    return top, a_mass, b_mass, w_mass


@triton.jit
def row_masses(
    q, k, fq, fk, position, segment, mass, stats,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t,
    heads, length, states, anchor, scale,
    o: tl.constexpr,
):  # fmt: skip
    """stats [4,B,H,T]: top in base 2, masses of softmax, linear and, in `replace`, the window's linear mass.

    Grid: (ceil(T / rows), B H). O(T): a stored sum of phi_k, the keys between it and the span, and the span.
    """
    q0 = tl.program_id(0) * o.rows
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    p = h // o.map_group
    q = head(q, b, h, q_b, q_h)
    fq = head(fq, b, h, fq_b, fq_h)
    k = head(k, b, h // o.group, k_b, k_h)
    fk = head(fk, b, p, fk_b, fk_h)
    position += b * length
    segment += b * length
    i = q0 + tl.arange(0, o.rows)
    qp, qs = places(position, segment, i, length, o)
    query = take(q, i, q_t, qs >= 0, 0, o.width, o.width_block)
    phi = take(fq, i, fq_t, qs >= 0, 0, o.features, o.tile)
    number = q0 // o.stored
    near = tl.maximum(q0 - o.span, 0)
    stop = tl.minimum(q0 + o.rows, length)
    top = tl.full([o.rows], HIDDEN, tl.float32)
    a_mass = tl.full([o.rows], 0.0, tl.float32)
    b_mass = tl.full([o.rows], 0.0, tl.float32)
    w_mass = tl.full([o.rows], 0.0, tl.float32)
    if o.sums:
        if number > 0:
            sees = (qs == goes_on(segment, number * o.stored, o)) & (qs >= 0)
            at = ((b * (heads // o.map_group) + p).to(tl.int64) * states + number) * o.features
            for first in range(0, o.features, o.tile):
                x = take(fq, i, fq_t, sees, first, o.features, o.tile)
                f = first + tl.arange(0, o.tile)
                held = tl.load(mass + at + f, mask=f < o.features, other=0.0)
                b_mass += tl.sum(x.to(tl.float32) * held[None, :], 1)
        for start in range(tl.maximum(number * o.stored - o.span, 0), near, o.columns):
            j = start + tl.arange(0, o.columns)
            kp, ks = places(position, segment, j, near, o)
            top, a_mass, b_mass, w_mass = _summed(
                top, a_mass, b_mass, w_mass, query, phi, fq, fq_t, i, qp, qs, k, k_t, fk, fk_t, j, kp, ks,
                anchor, scale, False, True, o,
            )  # fmt: skip
    if o.sinks > 0:
        if near > 0:
            j, kp, ks = sink_columns(position, segment, q0, near, o)
            top, a_mass, b_mass, w_mass = _summed(
                top, a_mass, b_mass, w_mass, query, phi, fq, fq_t, i, qp, qs, k, k_t, fk, fk_t, j, kp, ks,
                anchor, scale, True, False, o,
            )  # fmt: skip
    for start in range(near, stop, o.columns):
        j = start + tl.arange(0, o.columns)
        kp, ks = places(position, segment, j, stop, o)
        top, a_mass, b_mass, w_mass = _summed(
            top, a_mass, b_mass, w_mass, query, phi, fq, fq_t, i, qp, qs, k, k_t, fk, fk_t, j, kp, ks,
            anchor, scale, o.window > 0 or o.sinks > 0, True, o,
        )  # fmt: skip
    at = tl.program_id(1).to(tl.int64) * length
    plane = tl.num_programs(1).to(tl.int64) * length
    inside = i < length
    tl.store(stats + at + i, top, mask=inside)
    tl.store(stats + plane + at + i, a_mass, mask=inside)
    tl.store(stats + 2 * plane + at + i, b_mass, mask=inside)
    tl.store(stats + 3 * plane + at + i, w_mass, mask=inside)


@triton.jit
def taught_pairs(qp, qs, kp, ks, bounds: tl.constexpr):
    """The teacher's keys; shapes as of `sets`."""
    distance = qp - kp
    taught = (qs == ks) & (ks >= 0) & (distance >= 0)
    if bounds.teacher > 0:
        taught = taught & (distance < bounds.teacher)
    return taught


@triton.jit
def weights(s, x, lse, top, a_factor, b_factor, taught, soft, linear, o: tl.constexpr):
    """P, A without its clamp and the softmax side's exp of pairs; s, lse, top in base 2, the terms of rows spread out."""
    p = exp2(tl.where(taught, s - lse, HIDDEN))
    a = tl.where(linear, b_factor * x, 0.0)
    e = a * 0.0
    if o.window > 0 or o.sinks > 0:
        e = softmax_weights(s, soft, top)
        a += a_factor * e
    return p, a, e


@triton.jit
def _met(
    loss, kept, pull, total, query, phi, fq, fq_t, i, qp, qs, lse, top, a_factor, b_factor, k, k_t, fk, fk_t,
    position, segment, start, stop, first, anchor, scale,
    FULL: tl.constexpr, QUERIES: tl.constexpr, bounds: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """A block of columns: the sums of rows go on. FULL: teacher and student see all of it, and it is linear."""
    j = start + tl.arange(0, o.columns)
    kp, ks = places(position, segment, j, stop, o)
    real = ks >= 0
    key = take(k, j, k_t, real, 0, o.width, o.width_block)
    copied(j)
    s = scores(query, key, scale, o)
    if o.features <= o.tile:
        own = take(fk, j, fk_t, real, 0, o.features, o.tile)
        x = tl.dot(phi, tl.trans(own), input_precision=o.precision)
    else:
        own = take(fk, j, fk_t, real, first, o.features, o.tile)
        x = pairs(phi, fq, fq_t, i, qs >= 0, fk, fk_t, j, real, o)
    if FULL:
        p = exp2(s - lse[:, None])
        a = b_factor[:, None] * x
    else:
        soft, linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], 1, anchor, o)
        taught = taught_pairs(qp[:, None], qs[:, None], kp[None, :], ks[None, :], bounds)
        p, a, e = weights(
            s, x, lse[:, None], top[:, None], a_factor[:, None], b_factor[:, None], taught, soft, linear, o
        )
    moves = a >= CLAMP
    a = tl.maximum(a, CLAMP)
    loss -= tl.sum(p * log2(a), 1)
    p = tl.where(moves, p, 0.0)
    kept += tl.sum(p, 1)
    r = p * inverse(a)
    if not FULL:
        pull += tl.sum(e * r, 1)
        r = tl.where(linear, r, 0.0)
    if QUERIES:
        total = weighed(r, own, total, o)
    return loss, kept, pull, total


@triton.jit
def transfer_rows(
    q, k, fq, fk, lse, mix, log_scale, position, segment, mass, stats, loss_out, terms, dfq,
    q_b, q_h, q_t, k_b, k_h, k_t, fq_b, fq_h, fq_t, fk_b, fk_h, fk_t,
    heads, length, states, anchor, scale,
    TERMS: tl.constexpr, QUERIES: tl.constexpr, bounds: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """loss_out [B,H,T] in float32 and, of `rows` queries, what learns. Grid: (ceil(T / rows), B H, tiles of F).

    terms [5,B,H,T]: A and B, the factors of exp and phi.phi in A_ij; the gradient of a linear pair is B (terms[2] - P/A), to
    which `replace` adds B terms[3] in the softmax set; terms[4] is mix's or log_scale's gradient by the row.
    QUERIES: dfq, a tile of phi_q's gradient: the pairs' R = P / A times phi_k, and terms[2] times the sum of phi_k, which
    comes from the stored sums.
    """
    # The longest rows of a head first, heads after each other: what is left at the end is short.
    q0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * o.rows
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    p = h // o.map_group
    first = tl.program_id(2) * o.tile
    at = tl.program_id(1).to(tl.int64) * length
    plane = tl.num_programs(1).to(tl.int64) * length
    q = head(q, b, h, q_b, q_h)
    fq = head(fq, b, h, fq_b, fq_h)
    k = head(k, b, h // o.group, k_b, k_h)
    fk = head(fk, b, p, fk_b, fk_h)
    position += b * length
    segment += b * length
    i = q0 + tl.arange(0, o.rows)
    inside = i < length
    qp, qs = places(position, segment, i, length, o)
    real = qs >= 0
    query = take(q, i, q_t, real, 0, o.width, o.width_block)
    phi = take(fq, i, fq_t, real, 0, o.features, o.tile)
    level = tl.load(lse + at + i, mask=real, other=0.0) * BASE2
    top = tl.load(stats + at + i, mask=real, other=0.0)
    a_mass = tl.load(stats + plane + at + i, mask=real, other=0.0)
    b_mass = tl.load(stats + 2 * plane + at + i, mask=real, other=0.0)
    w_mass = tl.load(stats + 3 * plane + at + i, mask=real, other=0.0)
    g, c = join_of(mix, log_scale, h, o)
    a_factor, b_factor, den, live, _a_weight, b_weight = factors(top, a_mass, b_mass, w_mass, g, c, o)
    if o.join == "absolute":
        b_factor = tl.where(b_mass > 0.0, b_factor, 0.0)  # no logarithm of nothing, and no gradient to it

    stop = tl.minimum(q0 + o.rows, length)
    begin = q0 * 0
    if not o.plain:
        begin = q0 - tl.load(position + q0)
    if bounds.teacher > 0:
        begin = tl.maximum(begin, q0 - bounds.teacher + 1)
    begin = begin // o.columns * o.columns
    full = stop
    after = stop
    if o.plain:
        low = begin + o.sinks * 0
        if o.sinks > 0:
            low = tl.maximum(low, o.sinks)
        if bounds.least > 0:
            low = tl.maximum(low, q0 + o.rows - bounds.least)
        full = tl.minimum((low + o.columns - 1) // o.columns * o.columns, stop)
        after = tl.maximum(tl.maximum(q0 - bounds.near + 1, 0) // o.columns * o.columns, full)
    loss = tl.full([o.rows], 0.0, tl.float32)
    kept = tl.full([o.rows], 0.0, tl.float32)
    pull = tl.full([o.rows], 0.0, tl.float32)
    total = tl.full([o.rows, o.tile], 0.0, tl.float32)
    if not o.plain or o.sinks > 0 or bounds.least > 0:
        for start in range(begin, full, o.columns):
            loss, kept, pull, total = _met(
                loss, kept, pull, total, query, phi, fq, fq_t, i, qp, qs, level, top, a_factor, b_factor, k, k_t, fk, fk_t,
                position, segment, start, stop, first, anchor, scale, False, QUERIES, bounds, o,
            )  # fmt: skip
    if o.plain:
        for start in range(full, after, o.columns):
            loss, kept, pull, total = _met(
                loss, kept, pull, total, query, phi, fq, fq_t, i, qp, qs, level, top, a_factor, b_factor, k, k_t, fk, fk_t,
                position, segment, start, stop, first, anchor, scale, True, QUERIES, bounds, o,
            )  # fmt: skip
        for start in range(after, stop, o.columns):
            loss, kept, pull, total = _met(
                loss, kept, pull, total, query, phi, fq, fq_t, i, qp, qs, level, top, a_factor, b_factor, k, k_t, fk, fk_t,
                position, segment, start, stop, first, anchor, scale, False, QUERIES, bounds, o,
            )  # fmt: skip

    linear_term = live * kept
    soft_term = linear_term * a_mass - pull  # the sum over the softmax set of exp dloss / dA
    if o.join == "average":
        linear_term = live * over(kept - a_factor * pull, b_weight)
    shared = kept * 0.0
    if o.join == "replace":
        shared = over(soft_term, a_mass)
    if tl.program_id(2) == 0:
        tl.store(loss_out + at + i, loss / BASE2, mask=inside)
        if TERMS:
            learned = -soft_term * a_factor
            if o.join == "shared":
                learned = over(soft_term, den)
            tl.store(terms + at + i, a_factor, mask=inside)
            tl.store(terms + plane + at + i, b_factor, mask=inside)
            tl.store(terms + 2 * plane + at + i, linear_term, mask=inside)
            tl.store(terms + 3 * plane + at + i, shared, mask=inside)
            tl.store(terms + 4 * plane + at + i, learned, mask=inside)
    if QUERIES:
        total = -total
        number = q0 // o.stored
        near = tl.maximum(q0 - o.span, 0)
        far = near
        if o.sums:
            far = tl.maximum(number * o.stored - o.span, 0)
            if number > 0:
                sees = real & (qs == goes_on(segment, number * o.stored, o))
                f = first + tl.arange(0, o.tile)
                row = ((b * (heads // o.map_group) + p).to(tl.int64) * states + number) * o.features
                held = tl.load(mass + row + f, mask=f < o.features, other=0.0)
                total += tl.where(sees, linear_term, 0.0)[:, None] * held[None, :]
        both = stop
        if not o.near_pairs:
            both = tl.maximum(tl.minimum(q0 + o.rows - o.window, stop), near)
        if o.join == "replace" and o.sinks > 0:
            if near > 0:
                j, kp, ks = sink_columns(position, segment, q0, near, o)
                soft, _linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], 1, anchor, o)
                own = take(fk, j, fk_t, ks >= 0, first, o.features, o.tile)
                total += shared[:, None] * _counted(soft, own, o)
        for start in range(far, both, o.columns):
            j = start + tl.arange(0, o.columns)
            kp, ks = places(position, segment, j, stop, o)
            soft, linear, _hidden = sets(qp[:, None], qs[:, None], kp[None, :], ks[None, :], 1, anchor, o)
            own = take(fk, j, fk_t, ks >= 0, first, o.features, o.tile)
            copied(j)
            total += linear_term[:, None] * _counted(linear, own, o)
            if o.join == "replace":
                total += shared[:, None] * _counted(soft & (j >= near)[None, :], own, o)
        total = total * b_factor[:, None]
        put(dfq + at * o.features, i, o.features, inside, first, o.features, o.tile, total)


@triton.jit
def _counted(mask, x, o: tl.constexpr):
    """Sums of the rows of x that a mask holds: 0 and 1 are exact in every type, a term of the row would be rounded."""
    return tl.dot(tl.where(mask, 1.0, 0.0).to(x.dtype), x, input_precision=o.precision)
