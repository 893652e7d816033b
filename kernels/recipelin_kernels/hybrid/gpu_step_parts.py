"""What a program of the Triton decode kernel (gpu_step.py) reads, and what it makes of it first."""

import triton
import triton.language as tl

from .gpu_parts import head, join_of


@triton.jit
def place_of(j, s: tl.constexpr):
    """Where a ring holds position j >= 0."""
    if s.sinks > 0:
        return tl.where(j < s.sinks, j, s.sinks + (j - s.sinks) % s.ring)
    else:
        return j % s.ring


@triton.jit
def position_at(place, at, s: tl.constexpr):
    """The newest position <= at that stands at a place; -1: none."""
    newest = place_of(at, s)
    j = at - newest + place - tl.where(place > newest, s.ring, 0)
    if s.sinks > 0:
        j = tl.where(place < s.sinks, place, tl.where(j < s.sinks, -1, j))
    return tl.where((place < s.places) & (j >= 0) & (j <= at), j, -1)


@triton.jit
def late_keys(folded, t: tl.constexpr, s: tl.constexpr):
    """Positions folded .. folded + fold - 1 in the order in which a ring of features holds them, and those places; where there
    are fewer, -1."""
    n = tl.arange(0, t.late)
    if s.paired:
        j = folded + n
        place = place_of(j, s)
    else:
        j = folded + (n + s.fold - folded % s.fold) % s.fold
        place = n
    return tl.where(n < s.fold, j, -1), place


@triton.jit
def feature_places(first, size: tl.constexpr, o: tl.constexpr):
    """Features first .. first + size - 1 of a row, and whether they are there."""
    f = first + tl.arange(0, size)
    return f, f < o.features


@triton.jit
def row_of(x, index):
    """x[index] of x [n, columns]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == index, x, 0.0), 0)


@triton.jit
def piece(x, index, size: tl.constexpr):
    """The index-th `size` numbers of x."""
    if x.shape[0] == size:
        return x
    else:
        n: tl.constexpr = x.shape[0] // size
        return row_of(tl.reshape(x, (n, size)), index)


@triton.jit
def fresh(at, there):
    """What stands there in L2, 0 where not there. An older launch has written it, and this one may begin before it waits for the
    launch ahead: nothing says that L1 holds no older numbers then."""
    return tl.load(at, mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def counts_now(counts):
    """Positions seen, and those in the sums."""
    return tl.load(counts, cache_modifier=".cg"), tl.load(counts + 1, cache_modifier=".cg")


@triton.jit
def ring_tile(ring, place, there, first, columns: tl.constexpr, o: tl.constexpr):
    """Of places of a ring columns from `first` on; 0 where not there."""
    column = first + tl.arange(0, columns)
    mask = there[:, None] & (column < o.width)[None, :]
    return fresh(ring + place[:, None] * o.width + column[None, :], mask)


@triton.jit
def sums_tile(value, start, size: tl.constexpr, first, t: tl.constexpr, o: tl.constexpr):
    """Features start .. start + size - 1 of the sums, columns of D from `first` on."""
    f, real = feature_places(start, size, o)
    column = first + tl.arange(0, t.columns)
    mask = real[:, None] & (column < o.width)[None, :]
    return fresh(value + f[:, None] * o.width + column[None, :], mask)


@triton.jit
def phi_tile(ring_phi, place, there, start, t: tl.constexpr, o: tl.constexpr):
    """Features of keys at places."""
    f, real = feature_places(start, t.pairs, o)
    return fresh(ring_phi + place[:, None] * o.features + f[None, :], there[:, None] & real[None, :])


@triton.jit
def products(phi_q, ring_phi, place, there, t: tl.constexpr, o: tl.constexpr):
    """phi_q . phi_k of keys at places."""
    total = place * 0.0
    for start in range(0, t.block, t.pairs):
        x = piece(phi_q, start // t.pairs, t.pairs)
        total += tl.sum(phi_tile(ring_phi, place, there, start, t, o) * x[None, :], 1)
    return total


@triton.jit
def given_features(x, t: tl.constexpr, o: tl.constexpr):
    f = tl.arange(0, t.block)
    return tl.load(x + f, mask=f < o.features, other=0.0).to(tl.float32)


@triton.jit
def inner(x, y):
    """x . y [1]: in one row, so that no warp waits for another."""
    return tl.sum(x[None, :] * y[None, :], 1)


@triton.jit
def with_key(held, summed, phi, v, position, folded, s: tl.constexpr):
    """The sums of a program's columns [F,columns] and of phi_k [F] with the key at a position, unless it is in them already, or a
    sink. v [columns]."""
    there = position >= tl.maximum(folded, s.sinks)
    phi = tl.where(there, phi, 0.0)
    return held + phi[:, None] * tl.where(there, v.to(tl.float32), 0.0)[None, :], summed + phi


@triton.jit
def of_row(ring_k, ring_v, ring_phi, value, mass, counts, b, p, kv, maps, key_heads, s: tl.constexpr, o: tl.constexpr):
    """Where what a program has of row b begins."""
    row = (b * maps + p).to(tl.int64)
    ring = (b * key_heads + kv).to(tl.int64) * s.places * o.width
    phi = row * (s.places if s.paired else s.fold) * o.features
    mine = row * tl.num_programs(1) + tl.program_id(1)
    return (
        ring_k + ring, ring_v + ring, ring_phi + phi, value + row * o.features * o.width, mass + mine * o.features,
        counts + 2 * mine,
    )  # fmt: skip


@triton.jit
def of_token(k, v, real, counts, b, kv, k_b, k_h, v_b, v_h, MASKED: tl.constexpr, t: tl.constexpr, o: tl.constexpr):
    """Positions seen, those in the sums, whether the token is real, its key, a program's columns of its value and of its key."""
    column = tl.program_id(1) * t.columns + tl.arange(0, t.columns)
    wide = tl.arange(0, o.width_block)
    here = 1
    if MASKED:
        here = fresh(real + b, True).to(tl.int32)
    new_k = fresh(head(k, b, kv, k_b, k_h) + wide, wide < o.width).to(tl.float32)
    new_v = fresh(head(v, b, kv, v_b, v_h) + column, column < o.width).to(tl.float32)
    key = fresh(head(k, b, kv, k_b, k_h) + column, column < o.width)
    at, folded = counts_now(counts)
    return at, folded, here, new_k, new_v, key


@triton.jit
def late_places(at, folded, t: tl.constexpr, s: tl.constexpr, o: tl.constexpr):
    """Positions of the late keys that have left the window (-1: none), the places of their features."""
    stop = at + 1
    if not o.cover_all:
        stop = tl.maximum(at - o.window + 1, 0)
        if o.terraced and o.window > 0:
            stop = tl.maximum((at // o.window - 1) * o.window, 0)
    j, place = late_keys(folded, t, s)
    return tl.where(j < stop, j, -1), place


@triton.jit
def late_values(ring_v, j, t: tl.constexpr, s: tl.constexpr, o: tl.constexpr):
    """A program's columns of the values of late keys; of a ring with features of all its keys nothing."""
    if o.show_linear and not s.paired:
        return ring_tile(ring_v, place_of(tl.maximum(j, 0), s), j >= 0, tl.program_id(1) * t.columns, t.columns, o)
    else:
        return 0.0


@triton.jit
def of_head(q, mix, log_scale, b, h, q_b, q_h, o: tl.constexpr):
    """A query, and what its head's join depends on."""
    wide = tl.arange(0, o.width_block)
    query = fresh(head(q, b, h, q_b, q_h) + wide, wide < o.width).to(tl.float32)
    level, shift = join_of(mix, log_scale, h, o)
    return query, level, shift


@triton.jit
def read_ahead(
    q, k, v, mix, log_scale, real, ring_k, ring_v, ring_phi, value, mass, counts, q_b, q_h, k_b, k_h, v_b, v_h,
    b, p, kv, maps, key_heads, MASKED: tl.constexpr, t: tl.constexpr, s: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """What a row's work begins with, and of what it reads later all that is one tile only (else 0).

    None of these loads depends on another, nor on where the row is: a ring is read place by place, whatever stands there.
    """
    first = tl.program_id(1) * t.columns
    ring_k, ring_v, ring_phi, value, mass, counts = of_row(
        ring_k, ring_v, ring_phi, value, mass, counts, b, p, kv, maps, key_heads, s, o
    )
    seen, folded, here, new_k, new_v, key = of_token(k, v, real, counts, b, kv, k_b, k_h, v_b, v_h, MASKED, t, o)
    query = 0.0
    level = 0.0
    shift = 0.0
    if o.map_group == 1:
        query, level, shift = of_head(q, mix, log_scale, b, p, q_b, q_h, o)
    keys = 0.0
    values = 0.0
    held = 0.0
    summed = 0.0
    if t.ahead and t.near_tiles == 1:
        place = tl.arange(0, t.near)
        if o.has_soft:
            keys = ring_tile(ring_k, place, place < s.places, 0, o.width_block, o)
        values = ring_tile(ring_v, place, place < s.places, first, t.columns, o)
    if o.has_linear:
        f, real = feature_places(0, t.block, o)
        summed = fresh(mass + f, real)
        if t.ahead and t.features == t.block:
            held = sums_tile(value, 0, t.features, first, t, o)
    return keys, values, held, summed, seen, folded, here, new_k, new_v, key, query, level, shift
