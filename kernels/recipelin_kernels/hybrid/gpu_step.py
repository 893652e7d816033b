"""One more token of every row by one Triton kernel that moves the state on in place: for decoding under a CUDA graph.

Nothing is read by the host, positions are counted on the device, and shapes and addresses stay from call to call. A
program has one head of phi_k and some columns of D: it reads its columns of the sums as a whole, so that there is nothing
to merge, and scores anew what its neighbours score too (a window's keys are 16 KB, and lie in L2).

Bytes, Llama-3.1-8B's layer (32:8 heads, d = F = 128, window 64, bf16, sums in fp32), a row of the batch: the sums are
2.10 MB. To add each leaving key at once reads and writes them: 4.19 MB. Kept back until there are n, keys cost a read of
n / 2 of their features (n / 2 x 16 KB) and a write of the sums every n tokens (2.10 MB / n): least at n = sqrt(2 D) = 16
with 0.13 + 0.13 MB, 2.36 MB in all; n = 64 has 0.56, 2.65 MB. With ring (0.27 MB) and q, k, v, y: 4.5 against 2.65 MB.
The ratio is the same for every batch, and the write is the keys': 1 row at 3 TB/s 1.5 against 0.9 us, 32 rows 48 against
28 us. Hence `FOLD` = 16. (Feature maps come on top: 2.1 MB in fp32, once for the batch.)

Given both maps (softmax_map.py) the launch makes the features too, of the queries and of the leaving key, each program those
that it reads: in scratch memory of its own, which lies in L1 or L2. So a token is one launch and not three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_call import Blocks, Compiled, cdiv, make_form, power
from .gpu_parts import BASE2, HIDDEN, LEAST, factors, head, sets, shown, softmax_of, softmax_weights
from .gpu_support import interpreted
from .rows import Options
from .softmax_map import SoftmaxMap
from .state import HybridState, check_heads
from .step_state import FOLD, StepState, held_by, standing, stepping


class Tiles(NamedTuple):
    """What a program has at once: columns of D, features (fewer where it writes), keys of the window, late keys; powers of 2.

    map_columns: of W, by which it makes features, of which it has `map_block` and `map_depth` rows at once; 0: they are given.
    """

    columns: int
    features: int
    written: int
    near: int
    late: int
    map_columns: int = 0
    map_block: int = 0
    map_depth: int = 0


@dataclass(frozen=True)
class StepBlocks:
    """Elements of a tile of the sums, and of keys and values together; programs: so many at least, if columns of D can be
    shared by that."""

    sums: int = 4096  # 32 registers a thread in 4 warps
    keys: int = 10240
    programs: int = 96  # of an H100's 132 multiprocessors
    fold: int = FOLD
    maps: int = 8192  # of W: 64 registers a thread


INTERPRETED = StepBlocks(256, 256, 8, 2, 256)  # so that short rows have several of each


def columns_of(blocks: StepBlocks, heads: int, width: int) -> int:
    """Columns of D that a program has. heads: of phi_k in the batch."""
    columns = power(width)
    while columns > 16 and heads * cdiv(width, columns) < blocks.programs:
        columns //= 2
    return columns


def tiles_of(blocks: StepBlocks, columns: int, width: int, features: int, window: int, map_columns: int = 0) -> Tiles:
    near = 16
    while near < window and 2 * near * (power(width) + columns) <= blocks.keys:
        near *= 2
    read, written = (min(power(features), max(16, n // columns)) for n in (blocks.sums, blocks.sums // 2))
    block = power(map_columns)
    depth = min(power(width), max(16, blocks.maps // block))
    return Tiles(columns, read, written, near, 16, map_columns, block, depth)


@triton.jit
def place_of(j, s: tl.constexpr):
    """Where a ring holds position j >= 0."""
    if s.sinks > 0:
        return tl.where(j < s.sinks, j, s.sinks + (j - s.sinks) % s.ring)
    else:
        return j % s.ring


@triton.jit
def feature_place(j, s: tl.constexpr):
    """Where a ring holds the features of position j >= 0."""
    if s.paired:
        return place_of(j, s)
    else:
        return j % s.fold


@triton.jit
def held_or_new(ring, new, place, j, newest, there, first, count: tl.constexpr, size: tl.constexpr):
    """Columns first .. first + size - 1 of positions j in float32: `newest` is not in the ring yet; 0 where not there."""
    column = first + tl.arange(0, size)
    inside = column < count
    mask = (there & (j != newest))[:, None] & inside[None, :]
    old = tl.load(ring + place[:, None] * count + column[None, :], mask=mask, other=0.0).to(tl.float32)
    fresh = tl.load(new + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where((there & (j == newest))[:, None], fresh[None, :], old)


@triton.jit
def products(fq, ring_phi, fk, j, newest, there, t: tl.constexpr, s: tl.constexpr, o: tl.constexpr):
    """phi_q . phi_k of positions j."""
    total = j * 0.0
    for first in range(0, o.features, t.features):
        f = first + tl.arange(0, t.features)
        x = tl.load(fq + f, mask=f < o.features, other=0.0).to(tl.float32)
        place = feature_place(j, s)
        phi = held_or_new(ring_phi, fk, place, j, newest, there, first, o.features, t.features)
        total += tl.sum(phi * x[None, :], 1)
    return total


@triton.jit
def make_features(x, there, weight, clamp, to, t: tl.constexpr, o: tl.constexpr):
    """[softmax(x W), softmax(-x W)] of one row x [D], at least clamp, stored in float32."""
    c = tl.arange(0, t.map_block)
    inside = (c < t.map_columns)[None, :]
    u = tl.full([t.map_block], 0.0, tl.float32)
    for first in range(0, o.width, t.map_depth):
        d = first + tl.arange(0, t.map_depth)
        real = d < o.width
        a = tl.load(x + d, mask=real & there, other=0.0).to(tl.float32)
        w = tl.load(weight + d[:, None] * t.map_columns + c[None, :], mask=real[:, None] & inside, other=0.0)
        u += tl.sum(a[:, None] * w, 0)
    tl.store(to + c[None, :], softmax_of(u[None, :], inside, clamp), mask=inside)
    tl.store(to + t.map_columns + c[None, :], softmax_of(-u[None, :], inside, clamp), mask=inside)


@triton.jit
def soft_keys(
    top, a_mass, w_mass, a_sum, query, fq, ring_k, k, ring_v, v, ring_phi, fk, j, there, at, first, scale,
    t: tl.constexpr, s: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """The softmax set goes on by positions j. top, a_mass, w_mass [1]; a_sum [columns]."""
    soft, _linear, hidden = sets(at, 0, j, tl.where(there, 0, -1), 1, 0, o)
    place = place_of(j, s)
    key = held_or_new(ring_k, k, place, j, at, there, 0, o.width, o.width_block)
    score = tl.where(soft, tl.sum(key * query[None, :], 1) * (scale * BASE2), HIDDEN)
    new = tl.maximum(top, tl.max(score, 0))
    a = softmax_weights(score, soft, new)
    shrink = tl.exp2(tl.maximum(top - new, LEAST))
    a_mass = a_mass * shrink + tl.sum(a, 0)
    a = shown(a, hidden, o)
    values = held_or_new(ring_v, v, place, j, at, there, first, o.width, t.columns)
    a_sum = a_sum * shrink + tl.sum(a[:, None] * values, 0)
    if o.join == "replace":
        b = products(fq, ring_phi, fk, j, at - s.lag, there, t, s, o)
        w_mass += tl.sum(tl.where(soft, b, 0.0), 0)
    return new, a_mass, w_mass, a_sum


@triton.jit
def step(
    q, k, v, fq, fk, mix, log_scale, real, ring_k, ring_v, ring_phi, leaving, value, mass, counts, y,
    map_q, map_k, clamp_q, clamp_k, scratch,
    q_b, q_h, k_b, k_h, v_b, v_h, fq_b, fq_h, fk_b, fk_h, maps, scale,
    MASKED: tl.constexpr, t: tl.constexpr, s: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """y [B,H,1,D], and the state (step_state.py) moved on. Grid: (B maps, ceil(D / columns)).

    First all is read, for one query head after the other; then, behind a barrier, all is written. No program reads what
    another one writes in the same launch: places of a new key and of new features are those of none that counts. Rows
    whose token is not real (`real` [B]) have y 0, and their state stays.

    map_q [H,D,C], map_k [maps,D,C] in float32: features are made, in `scratch` [programs, 1 + H / maps, F]; else fq, fk are read.
    """
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(0) // maps
    p = tl.program_id(0) % maps
    kv = p * o.map_group // o.group
    heads = maps * o.map_group
    first = part * t.columns
    own = (b * (heads // o.group) + kv).to(tl.int64) * s.places * o.width
    ring_k += own
    ring_v += own
    if s.paired:
        ring_phi += row * s.places * o.features
    else:
        ring_phi += row * s.fold * o.features
    mine = row * tl.num_programs(1) + part
    mass += mine * o.features
    value += row * o.features * o.width
    k = head(k, b, kv, k_b, k_h)
    v = head(v, b, kv, v_b, v_h)
    if t.map_columns > 0:
        scratch += mine * (1 + o.map_group) * o.features
    else:
        fk = head(fk, b, p, fk_b, fk_h)

    at = tl.load(counts + 2 * mine)
    folded = tl.load(counts + 2 * mine + 1)
    known = at - s.lag  # the position whose features the call brings
    here = 1
    if MASKED:
        here = tl.load(real + b).to(tl.int32)
    begin = (
        tl.maximum((at // o.window - 1) * o.window, 0)
        if o.terraced and o.window > 0
        else tl.maximum(at - o.window + 1, 0)
    )
    stop = begin  # of keys that may be linear
    if o.cover_all:
        stop = at + 1
    column = first + tl.arange(0, t.columns)
    inside = column < o.width
    wide = tl.arange(0, o.width_block)

    if t.map_columns > 0:
        size = o.width * t.map_columns
        if s.lag > 0:  # the leaving key, in the place that it has until its features are in the sums
            oldest = ring_k + place_of(tl.maximum(known, 0), s) * o.width
            make_features(oldest, known >= 0, map_k + p * size, clamp_k, scratch, t, o)
        else:
            make_features(k, known >= 0, map_k + p * size, clamp_k, scratch, t, o)
        for g in range(0, o.map_group):
            h = p * o.map_group + g
            to = scratch + (1 + g) * o.features
            make_features(head(q, b, h, q_b, q_h), at >= 0, map_q + h * size, clamp_q, to, t, o)
        fk = scratch
        tl.debug_barrier()

    for g in range(0, o.map_group):
        h = p * o.map_group + g
        query = tl.load(head(q, b, h, q_b, q_h) + wide, mask=wide < o.width, other=0.0).to(tl.float32)
        x = scratch + (1 + g) * o.features if t.map_columns > 0 else head(fq, b, h, fq_b, fq_h)
        top = tl.full([1], HIDDEN, tl.float32)
        a_mass = tl.full([1], 0.0, tl.float32)
        b_mass = tl.full([1], 0.0, tl.float32)
        w_mass = tl.full([1], 0.0, tl.float32)
        a_sum = tl.full([t.columns], 0.0, tl.float32)
        b_sum = tl.full([t.columns], 0.0, tl.float32)
        if o.has_linear:
            for start in range(0, o.features, t.features):
                f = start + tl.arange(0, t.features)
                phi = tl.load(x + f, mask=f < o.features, other=0.0).to(tl.float32)
                b_mass += tl.sum(phi * tl.load(mass + f, mask=f < o.features, other=0.0), 0)
                if o.show_linear:
                    mask = (f < o.features)[:, None] & inside[None, :]
                    held = tl.load(value + f[:, None] * o.width + column[None, :], mask=mask, other=0.0)
                    b_sum += tl.sum(phi[:, None] * held, 0)
        if o.has_window or (o.has_sinks and o.sinks > 0):
            for start in range(begin, at + 1, t.near):
                j = start + tl.arange(0, t.near)
                top, a_mass, w_mass, a_sum = soft_keys(
                    top, a_mass, w_mass, a_sum, query, x, ring_k, k, ring_v, v, ring_phi, fk, j, j <= at, at, first,
                    scale, t, s, o,
                )  # fmt: skip
        if o.has_sinks and o.sinks > 0:
            j = tl.arange(0, o.sink_block)
            top, a_mass, w_mass, a_sum = soft_keys(
                top, a_mass, w_mass, a_sum, query, x, ring_k, k, ring_v, v, ring_phi, fk, j, (j < o.sinks) & (j < begin),
                at, first, scale, t, s, o,
            )  # fmt: skip
        if o.has_linear:
            for start in range(folded, stop, t.late):
                j = start + tl.arange(0, t.late)
                there = j < stop
                _soft, linear, _hidden = sets(at, 0, j, tl.where(there, 0, -1), 1, 0, o)
                weights = tl.where(linear, products(x, ring_phi, fk, j, known, there, t, s, o), 0.0)
                b_mass += tl.sum(weights, 0)
                if o.show_linear:
                    values = held_or_new(ring_v, v, place_of(j, s), j, at, there, first, o.width, t.columns)
                    b_sum += tl.sum(weights[:, None] * values, 0)

        level = 0.0
        if o.join == "shared":
            level = tl.load(mix + h).to(tl.float32)
        shift = 0.0
        if o.join == "absolute":
            shift = tl.load(log_scale + h).to(tl.float32)
        a_factor, b_factor, _den, _live, _a, _b = factors(top, a_mass, b_mass, w_mass, level, shift, o)
        total = tl.where(here != 0, a_factor * a_sum + b_factor * b_sum, 0.0)
        out = (b * heads + h).to(tl.int64) * o.width
        tl.store(y + out + column, total.to(y.dtype.element_ty), mask=inside)

    tl.debug_barrier()
    if here != 0:
        limit = tl.maximum(at - o.span + 1, 0)
        if limit - folded >= s.fold:
            for start in range(0, o.features, t.written):
                f = start + tl.arange(0, t.written)
                mask = (f < o.features)[:, None] & inside[None, :]
                to = value + f[:, None] * o.width + column[None, :]
                total = tl.load(to, mask=mask, other=0.0)
                alone = tl.load(mass + f, mask=f < o.features, other=0.0)
                for at_once in range(folded, limit, t.late):
                    j = at_once + tl.arange(0, t.late)
                    counted = j < limit
                    if not s.covers:
                        counted = counted & (j >= s.sinks)
                    place = feature_place(j, s)
                    phi = held_or_new(ring_phi, fk, place, j, known, counted, start, o.features, t.written)
                    values = held_or_new(ring_v, v, place_of(j, s), j, at, counted, first, o.width, t.columns)
                    total = tl.dot(tl.trans(phi), values, total, input_precision="tf32x3")
                    alone += tl.sum(phi, 0)
                tl.store(to, total, mask=mask)
                tl.store(mass + f, alone, mask=f < o.features)
            folded = limit
        new_key = tl.load(k + column, mask=inside, other=0.0)
        if p % (maps // (heads // o.group)) == 0:  # one head of phi_k for each key head
            to = place_of(at, s) * o.width
            tl.store(ring_k + to + column, new_key.to(ring_k.dtype.element_ty), mask=inside)
            tl.store(
                ring_v + to + column,
                tl.load(v + column, mask=inside, other=0.0).to(ring_v.dtype.element_ty),
                mask=inside,
            )
            if s.lag > 0:
                following = tl.maximum(known + 1, 0)
                key = new_key.to(ring_k.dtype.element_ty)
                if s.lag > 1:
                    key = tl.load(ring_k + place_of(following, s) * o.width + column, mask=inside, other=0.0)
                to = (b * (heads // o.group) + kv).to(tl.int64) * o.width
                tl.store(leaving + to + column, key, mask=inside)
        if (part == 0) & (known >= 0):
            to = feature_place(known, s) * o.features
            for start in range(0, o.features, t.features):
                f = start + tl.arange(0, t.features)
                phi = tl.load(fk + f, mask=f < o.features, other=0.0)
                tl.store(ring_phi + to + f, phi.to(tl.float32), mask=f < o.features)
        tl.store(counts + 2 * mine, at + 1)
        tl.store(counts + 2 * mine + 1, folded)


@torch.no_grad()
def hybrid_attention_step_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    phi_k_fn: Callable[[Tensor], Tensor],
    options: Options,
    key_mask: Tensor | None,
    state: HybridState | StepState,
    *,
    maps: tuple[SoftmaxMap, SoftmaxMap] | None = None,
    blocks: StepBlocks | None = None,
) -> tuple[Tensor, StepState]:
    """(y [B,H,1,D], the state) of q [B,H,1,D], k, v [B,Hkv,1,D], phi_q [B,H,1,F]; key_mask [B,1].

    maps: of queries and keys, by which features are made; of phi_q only the shape is then read.

    A HybridState is copied into buffers, which later calls, given the StepState, move on in place: those may be captured
    in a CUDA graph, if `phi_k_fn` may. Sums and products are fp32, whatever the inputs' dtype.
    """
    blocks = blocks or (INTERPRETED if interpreted() else StepBlocks())
    batch, heads, _, width = q.shape
    held = held_by(options, blocks.fold)
    features = phi_q.shape[-1]
    if isinstance(state, StepState) and state.held != held:
        state = standing(state, phi_k_fn)
    if isinstance(state, HybridState):
        columns = columns_of(blocks, batch * state.sums.shape[1], width)
        state = stepping(state, k, phi_k_fn, options, held, columns)
    _check_sizes(state, batch, heads, k.shape[1], width, features)
    own, programs = state.counts.shape[1:3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    phi: list[Tensor | None] = [None, None]
    made: list[Any] = [None, None, 0.0, 0.0, None]
    if maps:
        maps[1].check(own, width, features)
        scratch = q.new_empty(batch * own * programs, 1 + heads // own, features, dtype=torch.float32)
        made = [*(x.weight.float().contiguous() for x in maps), *(x.clamp for x in maps), scratch]
    else:
        phi_k = phi_k_fn(state.leaving.to(k.dtype) if held.lag else k)
        check_heads(own, phi_k)
        if phi_k.untyped_storage().data_ptr() == state.leaving.untyped_storage().data_ptr():
            phi_k = phi_k.clone()  # the kernel writes there
        phi = [x if x.stride(-1) == 1 else x.contiguous() for x in (phi_q, phi_k)]
    tiles = tiles_of(blocks, state.columns, width, features, options.window, maps[0].columns if maps else 0)
    numbers = [None if x is None else x.float().contiguous() for x in (mix, log_scale)]
    real = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    form = make_form(
        options, Blocks(), heads=heads, key_heads=k.shape[1], maps=own, width=width, features=features, dtype=q.dtype
    )
    Compiled(form, 1, 4).launch(
        step, (batch * own, programs),
        q, k, v, *phi, *numbers, real, *state.tensors.values(), y, *made,
        *[n for x in (q, k, v, *phi) for n in ((0, 0) if x is None else x.stride()[:2])], own, options.scale,
        MASKED=real is not None, t=tiles, s=held,
    )  # fmt: skip
    return y, state


def _check_sizes(state: StepState, batch: int, heads: int, key_heads: int, width: int, features: int) -> None:
    """ValueError for inputs that are not of the state's sizes: the kernel would read beyond its buffers."""
    maps = state.value.shape[1]
    found = (*state.value.shape[::2], state.ring_k.shape[1], state.value.shape[3])
    expected = (batch, features, key_heads, width)
    if found != expected or maps not in (heads, key_heads):
        names = ("batch", "features", "key heads", "head_dim")
        said = ", ".join(f"{n} {a} (the call's: {b})" for n, a, b in zip(names, found, expected, strict=True))
        raise ValueError(f"state: {said}, {maps} heads of phi_k: it was made by other calls")
