"""One more token of every row by one Triton kernel that moves the state on in place: for decoding under a CUDA graph.

Nothing is read by the host, positions are counted on the device, and shapes and addresses stay from call to call. A
program has one head of phi_k and some columns of D: it reads its columns of the sums as a whole, so that there is nothing
to merge, and scores anew what its neighbours score too (a window's keys are 16 KB, and lie in L2).

Few rows wait rather than read: a trip to memory is 0.6 to 0.8 us. So most loads of a program come first, in one trip, and none
waits for another: a ring is read place by place, and which position a place holds is known when `counts` have come. What
depends on a position follows. Then instructions count, at about six cycles each (ncu, an H200, 8 warps). So a program has its
columns of the sums in one tile, unless features of the ring's keys are kept (`whole`): the key whose features came enters them
there, they are written back, and no key waits for others. No late keys are read then, and the new key takes the place of the one
that enters: a window of 64 without sinks is a tile of 64 places.

Many rows are read faster than a row is worked on: programs take turns, and what counts is how many instructions a row takes. A
program is one warp then: sums over features and head_dim stay in it, and where four warps met 71 times and took 11,500
instructions for a head and row (counted in the machine code and, by ncu, on an H200), one takes 5,900.

Bytes, Llama-3.1-8B's layer (32:8 heads, d = F = 128, window 64, bf16, sums in fp32), a row of the batch: the sums are
2.10 MB. To add each leaving key at once reads and writes them: 4.19 MB. Kept back until there are n, keys cost a read of
n / 2 of their features (n / 2 x 16 KB) and a write of the sums every n tokens (2.10 MB / n): least at n = sqrt(2 D) = 16
with 0.13 + 0.13 MB, 2.36 MB in all; n = 64 has 0.56, 2.65 MB. With ring (0.27 MB) and q, k, v, y: 4.5 against 2.65 MB.
The ratio is the same for every batch, and the write is the keys': 1 row at 3 TB/s 1.5 against 0.9 us, 32 rows 48 against
28 us. Hence `FOLD` = 16 for many rows. (Feature maps come on top: 2.1 MB in fp32, once for the batch.)

Given both maps (softmax_map.py) a launch before this one makes the features, of the queries and of the leaving key
(`token_features`). Each of the two begins while the one ahead ends (programmatic dependent launch), and this one reads, and makes
the window's softmax where that asks for no features (of one query head for each phi_k), before it waits for them. For each
program to make those that it reads was slower: W of a head is 64 KB, and for one row takes as many instructions as all the rest.
What the first reads, and of a row or two the state that the second reads, is asked for while the launch ahead ends, so that it
comes from L2.

One row of that layer on an H200 (ncu, probes of 2026-11-27, decoding only): 8.8 us a layer with features made in this launch;
7.8 with a launch of their own; 6.7 when that no longer makes them as 16 rows by tensor cores, and no key waits for others; 6.3
asked for ahead, 4 warps; 5.6 with 64 places for 65. Scores by tensor cores took 7.8 for 6.7: keys have to pass shared memory.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gpu_launch
from .gpu_call import Blocks, Compiled, cdiv, make_form, power
from .gpu_features import features_of_token, taken_over
from .gpu_parts import BASE2, FAR, HIDDEN, Form, exp2, factors, head, sets, shown, softmax_weights
from .gpu_step_parts import (
    counts_now,
    feature_places,
    fresh,
    given_features,
    inner,
    late_keys,
    late_places,
    late_values,
    of_head,
    of_row,
    piece,
    place_of,
    position_at,
    products,
    read_ahead,
    ring_tile,
    sums_tile,
    with_key,
)
from .gpu_support import interpreted
from .rows import Options
from .softmax_map import SoftmaxMap
from .state import HybridState, check_heads
from .step_state import FOLD, Held, StepState, held_by, standing, stepping


class Tiles(NamedTuple):
    """What a program has at once, in powers of 2. If it reads ahead, what fits into one tile is read before a wait."""

    columns: int  # of D
    features: int  # of a tile of the sums where it is read
    written: int  # and where it is written
    near: int  # places of the ring
    late: int  # keys that are not yet in the sums
    pairs: int  # features of such keys
    block: int  # features of a row
    near_tiles: int  # of the ring
    ahead: bool  # loads come first, before a barrier
    whole: bool  # the sums are one tile, which each key enters in the step that needs its features first
    overlap: bool  # it begins while the launch that makes its features ends (programmatic dependent launch)


@dataclass(frozen=True)
class StepBlocks:
    """How much of everything a program has at once."""

    sums: int  # elements of a tile of the sums
    keys: int  # bytes of keys and values together
    pairs: int  # features of keys
    programs: int  # at least so many, if columns of D can be shared by that
    warps: int
    ahead: bool = True  # all that is one tile is read before anything is waited for
    room: int = 98304  # bytes of that which `warps` hold without a spill
    registers: int = 0  # a thread's at most; 0: what it takes
    fold: int = FOLD  # two or more keys that enter the sums at once, where those are not one tile
    overlap: bool = True  # it and the launch that makes its features begin while the one ahead ends, on a GPU that can

    def __post_init__(self) -> None:
        if self.fold < 2:
            raise ValueError(
                f"fold: two or more keys, found {self.fold}; one where the sums are one tile (`held_with`)"
            )

    def holds(self, features: int, columns: int) -> bool:
        """Whether the sums of all features are one tile."""
        return power(features) * columns <= self.sums

    def options(self, overlap: bool) -> tuple[tuple[str, int], ...]:
        """As Triton has them."""
        return (("maxnreg", self.registers),) * bool(self.registers) + (("launch_pdl", True),) * overlap


# All of a row at once: a program of each of an H100's 132 multiprocessors.
FEW = StepBlocks(16384, 65536, 4096, programs=96, warps=4)
# One warp waits for no other: with 4, a head took three times the instructions that go through shared memory, and 71 barriers.
MANY = StepBlocks(4096, 8192, 512, programs=96, warps=1, ahead=False)
WIDE = replace(MANY, sums=8192, keys=16384, pairs=2048, warps=2)  # of head_dim above 128: a thread has as much
ENOUGH = 320  # rows times heads for MANY: 7 rows of Llama's layer take 15.4 us by FEW, 18.6 by MANY; 16 rows 28 by MANY
SOON = 4 << 20  # bytes of sums that are asked for ahead: one row is faster by it, eight are slower
# So that short rows have several of each.
INTERPRETED = [StepBlocks(256, 256, 256, programs=8, warps=8, fold=2, ahead=ahead) for ahead in (True, False)]


def blocks_for(heads: int, width: int) -> StepBlocks:
    """heads: of phi_k in the batch; width: head_dim."""
    if interpreted():
        return INTERPRETED[heads >= ENOUGH]
    if heads < ENOUGH:
        return FEW
    return MANY if width <= 128 else WIDE


def columns_of(blocks: StepBlocks, heads: int, width: int, features: int) -> int:
    """Columns of D that a program has. heads: of phi_k in the batch."""
    columns = power(width)
    while columns > 16 and (
        heads * cdiv(width, columns) < blocks.programs or (blocks.ahead and not blocks.holds(features, columns))
    ):
        columns //= 2
    return columns


def held_with(options: Options, blocks: StepBlocks, columns: int, features: int) -> Held:
    """What decoding keeps, `columns` of the sums being a program's: if it has those in one tile, no key waits for others."""
    held = held_by(options, blocks.fold)
    whole = blocks.ahead and options.has("linear") and not held.paired and blocks.holds(features, columns)
    return held._replace(fold=1) if whole else held


@functools.lru_cache(1024)  # as `make_form`
def tiles_of(blocks: StepBlocks, columns: int, form: Form, held: Held, size: int, overlap: bool) -> Tiles:
    """size: bytes of an element of the ring."""
    wide, near, late = power(form.width), 16, power(held.fold)
    while near < held.places and 2 * near * (wide + columns) * size <= blocks.keys:
        near *= 2
    block = power(form.features)
    read, written = (min(block, max(16, n // columns)) for n in (blocks.sums, blocks.sums // 2))
    pairs = min(block, max(16, blocks.pairs // (near if held.paired else late)))
    tiles, whole = cdiv(held.places, near), held.fold == 1
    return Tiles(columns, read, written, near, late, pairs, block, tiles, blocks.ahead, whole, overlap)


def warps_of(blocks: StepBlocks, tiles: Tiles, form: Form, size: int) -> int:
    """Twice as many where a thread would not have room for what is read ahead: keys, values, and the sums, which also stay from
    one query head to the next."""
    if not tiles.whole:
        return blocks.warps
    room = 4 * tiles.block * tiles.columns + tiles.near * (power(form.width) + tiles.columns) * size
    return blocks.warps * (2 if room > (blocks.room if form.map_group == 1 else blocks.room // 2) else 1)


@triton.jit
def step(
    q, k, v, fq, fk, mix, log_scale, real, ring_k, ring_v, ring_phi, leaving, leaving_v, value, mass, counts, y,
    q_b, q_h, k_b, k_h, v_b, v_h, fq_b, fq_h, fk_b, fk_h, scale,
    MASKED: tl.constexpr, t: tl.constexpr, s: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """y [B,H,1,D], and the state (step_state.py) moved on. Grid: (maps, ceil(D / columns), B).

    Of a row first all is read, for one query head after the other; then, behind a barrier, all is written. What another program
    writes in the same launch may be read, but never counts: places of a new key and of new features are those of none that does.
    Rows whose token is not real (`real` [B]) have y 0, and their state stays.
    """
    p, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    maps = tl.num_programs(0)
    kv = p * o.map_group // o.group
    heads = maps * o.map_group
    key_heads = heads // o.group
    first = part * t.columns
    column = first + tl.arange(0, t.columns)
    inside = column < o.width
    # Whether features are read before the window's softmax is made: a launch makes them meanwhile.
    EARLY: tl.constexpr = s.paired or (t.whole and o.map_group > 1)
    RING_READ: tl.constexpr = t.ahead and t.near_tiles == 1

    keys, values, held, summed, at, folded, here, new_k, new_v, key, query, own_level, own_shift = read_ahead(
        q, k, v, mix, log_scale, real, ring_k, ring_v, ring_phi, value, mass, counts, q_b, q_h, k_b, k_h, v_b, v_h,
        b, p, kv, maps, key_heads, MASKED, t, s, o,
    )  # fmt: skip
    keys_of, values_of, phi_of, value_of, mass_of, counts_of = of_row(
        ring_k, ring_v, ring_phi, value, mass, counts, b, p, kv, maps, key_heads, s, o
    )
    if t.whole:  # the value of `known`, whose place in the ring is the new key's, and of the one after
        spot = leaving_v + (b * key_heads + kv).to(tl.int64) * (2 * o.width) + column
        even, odd = fresh(spot, inside), fresh(spot + o.width, inside)
    if t.ahead:
        tl.debug_barrier()
        # Where a row is, is read once more behind a barrier: ptxas would wait for it before the loads above.
        at, folded = counts_now(counts_of)
    known = at - s.lag  # the position whose features come with this token
    if s.lag > 1:  # the one whose features come with the next
        after = fresh(keys_of + place_of(tl.maximum(known + 1, 0), s) * o.width + column, inside)
    late_j, late_place = late_places(at, folded, t, s, o)
    if t.whole:
        latest_v = tl.where(known % 2 == 0, even, odd)
        if s.lag > 1:
            after_v = fresh(values_of + place_of(tl.maximum(known + 1, 0), s) * o.width + column, inside)
    phi_k = tl.full([t.block], 0.0, tl.float32)
    if EARLY:
        if t.overlap:
            taken_over()
        phi_k = given_features(head(fk, b, p, fk_b, fk_h), t, o)
        if t.whole:
            held, summed = with_key(held, summed, phi_k, latest_v, known, folded, s)

    for g in range(0, o.map_group):
        h = p * o.map_group + g
        if o.map_group > 1:
            asks, level, shift = of_head(q, mix, log_scale, b, h, q_b, q_h, o)
        else:
            asks, level, shift = query, own_level, own_shift
        if EARLY:
            phi_q = given_features(head(fq, b, h, fq_b, fq_h), t, o)

        # The new key, which is in no ring yet.
        a_new, b_new, hidden_new = sets(at, 0, at + tl.zeros([1], tl.int32), 0, 1, 0, o)
        top = tl.where(a_new, inner(new_k, asks) * (scale * BASE2), HIDDEN)
        a_mass = tl.where(a_new, 1.0, 0.0)
        a_sum = shown(a_mass, hidden_new, o) * new_v
        w_mass = a_mass * 0.0
        b_mass = w_mass
        b_sum = new_v * 0.0
        if s.paired:
            latest = inner(phi_q, phi_k)  # phi_q . phi_k of `known`
            w_mass = tl.where(a_new & (known == at), latest, 0.0)
            b_mass = tl.where(b_new & (known == at), latest, 0.0)
            b_sum = b_mass * new_v

        if o.has_soft or (s.paired and o.has_linear):
            for n in range(0, t.near_tiles):
                place = n * t.near + tl.arange(0, t.near)
                j = position_at(place, at - 1, s)
                soft, linear, hidden = sets(at, 0, tl.where(j >= 0, j, FAR), 0, 1, 0, o)
                linear = linear & (j >= folded)
                counted = soft
                if s.paired:
                    counted = soft | linear
                if RING_READ:
                    near_v = tl.where(counted[:, None], values.to(tl.float32), 0.0)
                else:
                    near_v = ring_tile(values_of, place, counted, first, t.columns, o).to(tl.float32)
                if o.has_soft:
                    tile_k = keys if RING_READ else ring_tile(keys_of, place, soft, 0, o.width_block, o)
                    score = tl.sum(tile_k.to(tl.float32) * asks[None, :], 1) * (scale * BASE2)
                    score = tl.where(soft, score, HIDDEN)
                    new = tl.maximum(top, tl.max(score, 0))
                    a = softmax_weights(score, soft, new)
                    shrink = exp2(top - new)
                    top = new
                    a_mass = a_mass * shrink + tl.sum(a, 0)
                    a = shown(a, hidden, o)
                    a_sum = a_sum * shrink + tl.sum(a[:, None] * near_v, 0)
                if s.paired:
                    wanted = linear
                    if o.join == "replace":
                        wanted = counted
                    weights = products(phi_q, phi_of, place, wanted, t, o)
                    weights = tl.where(wanted & (j == known), latest, weights)
                    w_mass += tl.sum(tl.where(soft, weights, 0.0), 0)
                    weights = tl.where(linear, weights, 0.0)
                    b_mass += tl.sum(weights, 0)
                    if o.show_linear:
                        b_sum += tl.sum(weights[:, None] * near_v, 0)
        if not EARLY:
            if t.overlap:
                taken_over()
            phi_q = given_features(head(fq, b, h, fq_b, fq_h), t, o)
            phi_k = given_features(head(fk, b, p, fk_b, fk_h), t, o)
            if t.whole:
                held, summed = with_key(held, summed, phi_k, latest_v, known, folded, s)
        if o.has_linear:
            if not s.paired and not t.whole:
                latest = inner(phi_q, phi_k)
                late_v = late_values(values_of, late_j, t, s, o)
                _soft, linear, _hidden = sets(at, 0, tl.where(late_j >= 0, late_j, FAR), 0, 1, 0, o)
                weights = products(phi_q, phi_of, late_place, linear & (late_j != known), t, o)
                weights = tl.where(linear, tl.where(late_j == known, latest, weights), 0.0)
                b_mass += tl.sum(weights[None, :], 1)
                if o.show_linear:
                    b_sum += tl.sum(weights[:, None] * late_v.to(tl.float32), 0)
            b_mass += inner(phi_q, summed)
            if o.show_linear:
                for start in range(0, t.block, t.features):
                    tile = held
                    if not t.ahead or t.features < t.block:
                        tile = sums_tile(value_of, start, t.features, first, t, o)
                    b_sum += tl.sum(piece(phi_q, start // t.features, t.features)[:, None] * tile, 0)
        if not o.show_linear:
            b_sum = b_sum * 0.0

        a_factor, b_factor, _den, _live, _a, _b = factors(top, a_mass, b_mass, w_mass, level, shift, o)
        total = tl.where(here != 0, a_factor * a_sum + b_factor * b_sum, 0.0)
        out = (b * heads + h).to(tl.int64) * o.width
        tl.store(y + out + column, total.to(y.dtype.element_ty), mask=inside)

    tl.debug_barrier()
    if here != 0:
        limit = tl.maximum(at - o.span + 1, 0)
        if limit - folded >= s.fold:
            if t.whole:
                f, there = feature_places(0, t.block, o)
                mask = there[:, None] & inside[None, :]
                tl.store(value_of + f[:, None] * o.width + column[None, :], held, mask=mask)
                tl.store(mass_of + f, summed, mask=there)
            else:
                j, place = late_keys(folded, t, s)
                counted = (j >= 0) & (j < limit)
                if not s.covers:
                    counted = counted & (j >= s.sinks)
                old = counted & (j != at)
                late = ring_tile(values_of, place_of(tl.maximum(j, 0), s), old, first, t.columns, o).to(tl.float32)
                late = tl.where((counted & (j == at))[:, None], new_v[None, :], late)
                for start in range(0, t.block, t.written):
                    f, there = feature_places(start, t.written, o)
                    total = sums_tile(value_of, start, t.written, first, t, o)
                    phi = fresh(
                        phi_of + place[:, None] * o.features + f[None, :],
                        (counted & (j != known))[:, None] & there[None, :],
                    )
                    latest_phi = piece(phi_k, start // t.written, t.written)
                    phi = tl.where((counted & (j == known))[:, None], latest_phi[None, :], phi)
                    total = tl.dot(tl.trans(phi), late, total, input_precision="tf32x3")
                    mask = there[:, None] & inside[None, :]
                    tl.store(value_of + f[:, None] * o.width + column[None, :], total, mask=mask)
                    mass_then = fresh(mass_of + f, there)
                    tl.store(mass_of + f, mass_then + tl.sum(phi, 0), mask=there)
            folded = limit
        if p % (o.group // o.map_group) == 0:  # one head of phi_k for each key head
            to = place_of(at, s) * o.width + column
            tl.store(keys_of + to, key.to(ring_k.dtype.element_ty), mask=inside)
            tl.store(values_of + to, new_v.to(ring_v.dtype.element_ty), mask=inside)
            if s.lag > 0:
                place = leaving + (b * key_heads + kv).to(tl.int64) * o.width + column
                tl.store(place, after if s.lag > 1 else key.to(ring_k.dtype.element_ty), mask=inside)
            if t.whole:
                other = spot + tl.where(known % 2 == 0, o.width, 0)
                tl.store(other, after_v if s.lag > 1 else new_v.to(ring_v.dtype.element_ty), mask=inside)
        if (part == 0) & (known >= 0) & (not t.whole):
            f, there = feature_places(0, t.block, o)
            place = known % s.fold
            if s.paired:
                place = place_of(known, s)
            tl.store(phi_of + place * o.features + f, phi_k, mask=there)
        tl.store(counts_of, at + 1)
        tl.store(counts_of + 1, folded)


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
    """(y [B,H,1,D], the state) of q [B,H,1,D], k, v [B,Hkv,1,D], phi_q [B,H,1,F]; key_mask [B,1]. B up to `MOST_ROWS`.

    maps: of queries and keys, by which features are made, `phi_k_fn` being that of keys; of phi_q only the shape is then read.

    A HybridState is copied into buffers, which later calls, given the StepState, move on in place: those may be captured
    in a CUDA graph, if `phi_k_fn` may. A StepState made for a batch of another size (`select`) may need other buffers: it is then
    copied too, by the first call, which is not to be captured. Sums and products are fp32, whatever the inputs' dtype.
    """
    batch, heads, _, width = q.shape
    all_maps = batch * (state.value if isinstance(state, StepState) else state.sums).shape[1]
    blocks = blocks or blocks_for(all_maps, width)
    features = phi_q.shape[-1]
    columns = columns_of(blocks, all_maps, width, features)
    held = held_with(options, blocks, columns, features)
    if isinstance(state, StepState) and (state.held, state.columns) != (held, columns):
        state = standing(state, phi_k_fn)
    if isinstance(state, HybridState):
        state = stepping(state, k, phi_k_fn, options, held, columns)
    _check_sizes(state, batch, heads, k.shape[1], width, features)
    own, programs = state.counts.shape[1:3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    numbers = [None if x is None else x.float().contiguous() for x in (mix, log_scale)]
    real = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    overlap = False
    if maps:
        maps[1].check(own, width, features)
        # The launch before this one waits for what is ahead of it: what else this one reads is there when it begins.
        overlap = blocks.overlap and gpu_launch.overlaps(q.device.index)
        soon = state if overlap and blocks.ahead and state.value.nbytes <= SOON else None
        leaving = state.leaving.to(k.dtype) if held.lag else k
        phi = [*features_of_token(q, leaving, *maps, overlapped=overlap, soon=soon)]
    else:
        phi_k = phi_k_fn(state.leaving.to(k.dtype) if held.lag else k)
        check_heads(own, phi_k.shape[1])
        if phi_k.shape[2:] != (1, features):
            raise ValueError(f"phi_k_fn: expected {features} features of a key, found a tensor {tuple(phi_k.shape)}")
        if phi_k.untyped_storage().data_ptr() == state.leaving.untyped_storage().data_ptr():
            phi_k = phi_k.clone()  # the kernel writes there
        phi = [x if x.stride(-1) == 1 else x.contiguous() for x in (phi_q, phi_k)]
    form = make_form(
        options, Blocks(), heads=heads, key_heads=k.shape[1], maps=own, width=width, features=features, dtype=q.dtype
    )
    size = state.ring_k.element_size()
    tiles = tiles_of(blocks, columns, form, held, size, overlap)
    Compiled(form, 1, warps_of(blocks, tiles, form, size), more=blocks.options(overlap)).launch(
        step, (own, programs, batch),
        q, k, v, *phi, *numbers, real, *state.tensors.values(), y,
        *[n for x in (q, k, v, *phi) for n in x.stride()[:2]], options.scale,
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
