"""What the Triton kernels of hybrid attention share: tiles, who sees whom, pairs of features, factors of a row.

Imported only where a kernel runs: triton need not be installed for anything else.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .gpu_support import interpreted
from .rows import LOG2E, SIGNED_FLOOR

ON_CHIP = tl.constexpr(not interpreted())  # the interpreter knows no PTX
FAR = tl.constexpr(2**30)  # the position, in plain rows, of a key that is not there: after every query's
HIDDEN = tl.constexpr(-1e30)  # the score of a key outside the softmax set; never an argument of exp2
LEAST = tl.constexpr(-122.0)  # 2^-122 = exp(-85): below it a weight is 0 beside the row's largest, which is 1
MOST = tl.constexpr(69.0)  # no factor of `absolute` is larger than exp(69)
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32
FLOOR = tl.constexpr(SIGNED_FLOOR)
BASE2 = tl.constexpr(LOG2E)


class Form(NamedTuple):
    """What a kernel is compiled for. Sizes of blocks are powers of two; a state is stored every `stored` queries."""

    join: str
    signed: bool
    through: bool  # the row maximum carries gradient (`shared`)
    terraced: bool
    window: int
    sinks: int
    reach: int  # 0: none
    span: int  # keys that are looked at one by one for softmax's sake, as in `Options.span`
    cover_all: bool
    drops: bool  # window_keep is given
    drop_covers: bool  # where it is False, the linear set covers all keys
    has_window: bool
    has_sinks: bool
    has_linear: bool
    has_soft: bool  # some row may have a softmax set
    show_window: bool
    show_sinks: bool
    show_linear: bool
    sums: bool  # keys before the span go on to count, in states
    initial: bool  # the first state is not zero
    ahead: int  # columns before column 0: the sinks of the state that the call goes on from
    plain: bool  # no padding, no segments, no state: position is index
    width: int
    features: int
    width_block: int
    tile: int  # features at once
    group: int  # query heads of a key head
    map_group: int  # query heads of a head of phi_k
    rows: int
    columns: int
    stored: int
    sink_block: int
    precision: str  # of products whose inputs are float32
    near_linear: bool  # the linear set may hold keys of the window
    near_pairs: bool  # the same, or `replace` asks for their features
    map_columns: int  # of W, by which phi_q is made; 0: phi_q is read


@triton.jit
def _unit(x, instruction: tl.constexpr):
    """One instruction of the special function unit on each element of float32."""
    return tl.inline_asm_elementwise(instruction, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    """2^x of float32 by the special function unit alone, 2 ulp; 0 below 2^-126. (tl.exp2: four more instructions for those.)"""
    if ON_CHIP:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def log2(x):
    """log2 of normal float32 by the special function unit, off by 2^-22 at most or of its value. (tl.log2: 25 instructions.)"""
    if ON_CHIP:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def inverse(x):
    """1 / x of normal float32 by the special function unit, 1 ulp. (A division guards numbers beyond 2^126.)"""
    if ON_CHIP:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def copied(i):
    """Before a product of what a pipeline has copied. Tensor cores read shared memory by a way of their own, which a fence must
    join to that of the copies; where a loop copies ahead, Triton 3.6 has one before the loop alone, 3.7 in it."""
    if ON_CHIP:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def head(base, b, h, stride_b, stride_h):
    """Where head h of row b begins; a tensor may hold 2^31 elements and more."""
    return base + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def window_kept(keep, index, o: tl.constexpr):
    """window_keep of a row's head; 1 where none is given."""
    if o.drops:
        return tl.load(keep + index).to(tl.int32)
    else:
        return 1


@triton.jit
def take(base, index, stride, real, first, count: tl.constexpr, size: tl.constexpr):
    """Columns first .. first + size - 1 of the rows `index`; 0 where a row is not real or a column not below `count`."""
    column = first + tl.arange(0, size)
    if count % size == 0:
        return tl.load(base + index[:, None] * stride + column[None, :], mask=real[:, None], other=0.0)
    mask = real[:, None] & (column < count)[None, :]
    return tl.load(base + index[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def put(base, index, stride, real, first, count: tl.constexpr, size: tl.constexpr, x):
    """`take` the other way round."""
    column = first + tl.arange(0, size)
    mask = real[:, None] & (column < count)[None, :]
    tl.store(base + index[:, None] * stride + column[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def places(position, segment, index, count, o: tl.constexpr):
    """Positions and segments of `index`; segment -1: padding, or not in 0 .. count - 1."""
    inside = (index >= 0) & (index < count)
    if o.plain:
        return index, tl.where(inside, 0, -1)
    else:
        return tl.load(position + index, mask=inside, other=0), tl.load(segment + index, mask=inside, other=-1)


@triton.jit
def sink_columns(position, segment, first, before, o: tl.constexpr):
    """Of the segment of key `first`: index, position and segment of its sinks that lie before column `before`."""
    n = tl.arange(0, o.sink_block)
    if o.plain:
        there = (n < o.sinks) & (n < before)
        return n, tl.where(there, n, FAR), tl.where(there, 0, -1)
    else:
        index = first - tl.load(position + first) + n
        there = (n < o.sinks) & (index >= 0) & (index < before)
        if o.ahead > 0:
            earlier = (n < o.sinks) & (index < 0)
            index = tl.where(earlier, n - o.sinks, index)
            there = there | earlier
        index = tl.where(there, index, 0)
        return (
            index,
            tl.load(position + index, mask=there, other=0),
            tl.load(segment + index, mask=there, other=-1),
        )


@triton.jit
def sets(qp, qs, kp, ks, kept, anchor, o: tl.constexpr):
    """The softmax set, the linear set and what of the softmax set is not shown.

    qp, qs: positions and segments of queries, [rows, 1] or [1, rows]; kp, ks of keys the other way round. In plain rows positions
    say all: keys from the end on are after every query, what else is not there is FAR, and queries that are not there have
    factors of 0 and are not written.
    """
    distance = qp - kp
    none = distance != distance
    seen = distance >= 0
    if not o.plain:
        seen = seen & (qs == ks) & (ks >= 0)
    if o.terraced and o.window > 0:
        # anchor < window: with one block more, nothing that is divided is negative.
        q_block = (qp - anchor + o.window) // o.window
        k_block = (kp - anchor + o.window) // o.window
        near = seen & (q_block - k_block <= 1)
    elif o.plain:
        near = distance.to(tl.uint32, bitcast=True) < o.window  # both bounds in one comparison
    else:
        near = seen & (distance < o.window)
    reached = seen
    if o.reach > 0:
        near = near & (distance < o.reach)
        reached = seen & (distance < o.reach)
    sink = none
    if o.sinks > 0:
        sink = seen & (kp < o.sinks)
    far_sink = sink & (near == 0)
    soft = none
    if o.has_window:
        soft = near
    if o.has_sinks:
        soft = soft | sink
    linear = reached
    if not o.cover_all:
        linear = reached & (near == 0) & (far_sink == 0)
    if o.drops:
        dropped = kept + 0 * distance == 0
        if o.drop_covers:
            linear = linear | (reached & dropped)
        soft = soft & (dropped == 0)
    if not o.has_linear:
        linear = none
    hidden = none
    if not o.show_window:
        hidden = hidden | (near & (sink == 0))
    if not o.show_sinks:
        hidden = hidden | far_sink
    return soft, linear, hidden


@triton.jit
def shown(x, hidden, o: tl.constexpr):
    """x without what an ablation of the output hides."""
    if o.show_window and o.show_sinks:
        return x
    else:
        return tl.where(hidden, 0.0, x)


@triton.jit
def softmax_weights(s, soft, top):
    """2^(s - top), of the softmax set; s and top in base 2. Outside the set s - top may be anything."""
    return exp2(tl.where(soft, s - top, HIDDEN))


@triton.jit
def scores(query, key, scale, o: tl.constexpr):
    """query . key in base 2, [rows, columns]."""
    return tl.dot(query, tl.trans(key), input_precision=o.precision) * (scale * BASE2)


@triton.jit
def weighed(weights, x, total, o: tl.constexpr):
    """total + weights @ x in float32. bf16 x: weights rounded to bf16; fp16, which could overflow: both in tf32."""
    if x.dtype == tl.float16:
        return tl.dot(weights.to(tl.float32), x.to(tl.float32), total, input_precision=o.precision)
    else:
        return tl.dot(weights.to(x.dtype), x, total, input_precision=o.precision)


@triton.jit
def pairs(phi, fq, fq_t, i, i_real, fk, fk_t, j, j_real, o: tl.constexpr):
    """phi_q . phi_k, [rows, columns] in float32. phi: the first tile of phi_q's rows, which stays on the chip.

    With both sides exchanged: [columns, rows].
    """
    x = take(fk, j, fk_t, j_real, 0, o.features, o.tile)
    copied(j)
    b = tl.dot(phi, tl.trans(x), input_precision=o.precision)
    for first in range(o.tile, o.features, o.tile):
        x = take(fk, j, fk_t, j_real, first, o.features, o.tile)
        more = take(fq, i, fq_t, i_real, first, o.features, o.tile)
        copied(j)
        b = tl.dot(more, tl.trans(x), b, input_precision=o.precision)
    return b


@triton.jit
def softmax_of(u, columns: tl.constexpr, clamp):
    """max(softmax(u), clamp) of rows, over the first `columns`."""
    if columns < u.shape[1]:
        u = tl.where((tl.arange(0, u.shape[1]) < columns)[None, :], u, HIDDEN)
    e = exp2((u - tl.max(u, 1)[:, None]) * BASE2)
    return tl.maximum(e * (1.0 / tl.sum(e, 1))[:, None], clamp)


@triton.jit
def mapped(x, weight, u, COARSE: tl.constexpr):
    """u + x W in float32, W [width, columns] in float32, of three products of tf32. COARSE, of x in bf16: of two of bf16, which
    take 16 bits of W; each has half the steps, and x is not taken apart."""
    if COARSE and x.dtype == tl.bfloat16:
        part = weight.to(tl.bfloat16)
        fine = (weight - part.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(x, part, tl.dot(x, fine, u))
    else:
        return tl.dot(x.to(tl.float32), weight, u, input_precision="tf32x3")


@triton.jit
def features_of(x, index, stride, real, weight, clamp, DEPTH: tl.constexpr, o: tl.constexpr):
    """[softmax(x W), softmax(-x W)] of the rows `index` of x, at least clamp: [rows, tile] in the dtype of x. DEPTH of head_dim
    at once: W as a whole would take 64 registers a thread."""
    c = tl.arange(0, o.map_columns)
    u = tl.full([index.shape[0], o.map_columns], 0.0, tl.float32)
    for first in range(0, o.width, DEPTH):
        d = first + tl.arange(0, DEPTH)
        w = tl.load(weight + d[:, None] * o.map_columns + c[None, :], mask=(d < o.width)[:, None], other=0.0)
        u = mapped(take(x, index, stride, real, first, o.width, DEPTH), w, u, True)
    both = tl.join(softmax_of(u, o.map_columns, clamp), softmax_of(-u, o.map_columns, clamp))  # [rows, columns, 2]
    return tl.reshape(tl.permute(both, (0, 2, 1)), (index.shape[0], o.tile)).to(x.dtype.element_ty)


@triton.jit
def settled(x, kind: tl.constexpr):
    """x rounded to `kind` here: a rounding to bf16 would else be put off to where it is read, and x keep its registers."""
    if ON_CHIP and kind == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=False, pack=2
        )
    else:
        return x.to(kind)


@triton.jit
def over(x, y):
    """x / y, and 0 where y is 0."""
    empty = y == 0.0
    return tl.where(empty, 0.0, x / tl.where(empty, 1.0, y))


@triton.jit
def floored(x, o: tl.constexpr):
    """The divisor of a row: of signed features at least 1e-6 away from 0 (0 stays 0); 1 where that changes nothing."""
    if o.signed:
        size = tl.abs(x)
        held = tl.where(x < 0.0, -1.0, 1.0) * tl.maximum(size, FLOOR)
        return tl.where(size > 0.0, held, x), tl.where(size >= FLOOR, 1.0, 0.0)
    else:
        return x, x * 0.0 + 1.0


@triton.jit
def join_of(mix, log_scale, h, o: tl.constexpr):
    """What a head's join depends on: mix of `shared` and log_scale of `absolute`, else 0."""
    g = 0.0
    c = 0.0
    if o.join == "shared":
        g = tl.load(mix + h).to(tl.float32)
    if o.join == "absolute":
        c = tl.load(log_scale + h).to(tl.float32)
    return g, c


@triton.jit
def window_factor(a_mass, w_mass, mix, o: tl.constexpr):
    """A of `shared` and `replace` before the denominator: it does not wait for the linear mass."""
    if o.join == "shared":
        return a_mass * 0.0 + mix
    else:
        return over(w_mass, a_mass)


@triton.jit
def factors(top, a_mass, b_mass, w_mass, mix, log_scale, o: tl.constexpr):
    """A, B, den, live, weights of rows: y = A sum a v + B sum b v, A and B with the denominator in them.

    top: in base 2. live: 0 where a signed denominator is held at its floor. The last two are the branches' weights in
    `average` and `sum`, else 1.
    """
    one = a_mass * 0.0 + 1.0
    if o.join == "average" or o.join == "sum":
        a = tl.where(tl.abs(a_mass) >= TINY, 1.0, 0.0)
        b = tl.where(tl.abs(b_mass) >= TINY, 1.0, 0.0)
        a_weight = a
        b_weight = b
        if o.join == "average":
            a_weight = a / (1.0 + b)
            b_weight = b / (1.0 + a)
        linear, live = floored(b_mass, o)
        # Where a weight is 0 the mass may be, but need not be, 0.
        a_factor = tl.where(a_weight > 0.0, over(a_weight, a_mass), 0.0)
        b_factor = tl.where(b_weight > 0.0, over(b_weight, linear), 0.0)
        return a_factor, b_factor, one, live, a_weight, b_weight
    else:
        b_factor = one
        if o.join == "shared" or o.join == "replace":
            a_factor = window_factor(a_mass, w_mass, mix, o)
        else:
            natural = top / BASE2
            soft = tl.where(a_mass > 0.0, natural, HIDDEN)
            size = tl.abs(b_mass)
            linear = tl.where(size > 0.0, log_scale + tl.log(tl.maximum(size, TINY)), HIDDEN)
            level = tl.maximum(soft, linear)
            level = tl.where(level == HIDDEN, 0.0, level)
            a_factor = tl.exp(tl.minimum(tl.maximum(natural - level, LEAST / BASE2), 0.0))
            b_factor = tl.exp(tl.minimum(log_scale - level, MOST))
        den, live = floored(a_factor * a_mass + b_factor * b_mass, o)
        return over(a_factor, den), over(b_factor, den), den, live, one, one
