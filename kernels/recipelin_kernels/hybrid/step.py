"""One more token of every row, without gradient.

In general the sinks, the ring and the new key are the columns of one small chunk; rows without padding and a sliding
window take a path of few operations.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .block import Block, Chunk, Past
from .chunk import HIDDEN, Inputs, Sums, dot, factors, fold, forward, weigh
from .room import Room, in_front
from .rows import LOG2E, Options, Rows
from .state import (
    HybridState,
    RoomState,
    added,
    check_heads,
    filled,
    late_most,
    settled,
    sink_features,
    state_rows,
    whole_sums,
    with_dropped,
)
from .step_state import StepState


def is_plain(options: Options, keep: Tensor | None, state: HybridState | StepState) -> bool:
    """Whether `plain_token` computes this, of rows without padding: with sinks, once they are behind every row's window."""
    o = options
    simple = o.shape == "sliding" and o.cover == "outside" and o.join != "replace" and not o.ablate
    if not simple or o.window == 0 or o.reach is not None or keep is not None:
        return False
    begun = isinstance(state, RoomState)  # positions only grow
    return not o.sinks or begun or int(state.positions.min()) >= o.sinks + o.window - 1


@torch.no_grad()
def plain_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    phi_k_fn: Callable[[Tensor], Tensor],
    options: Options,
    state: HybridState,
) -> tuple[Tensor, HybridState]:
    """`one_token` where `is_plain`: features are computed for the key that leaves the window alone."""
    dtype, (batch, heads, _, width), map_heads = state.sums.dtype, q.shape, state.sums.shape[1]
    state = placed(state)
    room, sinks, late, ring = state.room, options.sinks, state.late, options.window - 1
    oldest = sinks + late  # of the window
    newest = oldest + ring
    room.k.narrow(2, newest, 1).copy_(k)
    room.v.narrow(2, newest, 1).copy_(v)

    begin = 0 if sinks else oldest  # late keys between sinks and window are looked at for nothing
    a = dot(q.to(dtype) * (options.scale * LOG2E), room.k.narrow(2, begin, newest + 1 - begin).to(dtype))
    if sinks and late:
        a = torch.cat((a[..., :sinks], a[..., oldest:]), -1)
    if not room.full:  # of some row the window is still short
        places = torch.arange(-ring, 1, device=q.device)
        a.masked_fill_((places + state.positions[:, None] < 0)[:, None, None], HIDDEN)
    top = a.amax(-1, keepdim=True)
    a.sub_(top).exp2_()
    a_mass = a.sum(-1, keepdim=True)
    fq = phi_q.to(dtype)
    held = torch.bmm(fold(fq, map_heads), state.sums.flatten(0, 1)).view(batch, heads, 1, width + 1)
    b_mass = held[..., -1:]
    if late:
        b = dot(fq, state.late_phi)
        b_mass = b_mass + b.sum(-1, keepdim=True)
    mix, log_scale = (None if x is None else x.to(dtype) for x in (mix, log_scale))
    a_factor, b_factor, den, _ = factors(options, mix, log_scale, Sums(top, a_mass, b_mass))
    weights = a.mul_(a_factor)
    if late:
        b = b if b_factor is None else b.mul_(b_factor)
        weights = torch.cat((weights[..., :sinks], b, weights[..., sinks:]) if sinks else (b, weights), -1)
    values = room.v.narrow(2, 0, newest + 1)
    y = torch.bmm(fold(weights, k.shape[1]), values.flatten(0, 1).to(dtype)).view(batch, heads, 1, width)
    past = held[..., :-1]
    y.add_(past if b_factor is None else past * b_factor).div_(den)
    map_leaving(state, phi_k_fn, k.dtype)
    return y.to(q.dtype), moved(state)


def placed(state: HybridState) -> RoomState:
    """The state in a room whose next place is the caller's."""
    if not isinstance(state, RoomState) or not state.room.take(state.late):
        state = _in_room(state, whole_sums(state))
        state.room.take(0)
    return state


@torch.no_grad()
def map_leaving(state: RoomState, phi_k_fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Puts the features of the key that leaves the window into the room, zeros where a row's window is still short."""
    room, late = state.room, state.late
    features = phi_k_fn(room.k.narrow(2, state.sink_k.shape[2] + late, 1).to(dtype))
    check_heads(state.sums.shape[1], features.shape[1])
    room.phi.narrow(2, late, 1).copy_(features)
    if not room.full:
        room.phi.narrow(2, late, 1).mul_((state.positions >= state.ring)[:, None, None, None])


def moved(state: RoomState) -> RoomState:
    """The state after a token, whose key and value are in the room as are the features of the key that leaves."""
    following = RoomState(state.room, state.late + 1)
    return following if following.late < state.room.left else _in_room(following, whole_sums(following))


def _in_room(state: HybridState, sums: Tensor) -> RoomState:
    """The state in a room of its own; sums: with its late keys."""
    sums = sums.contiguous()
    batch, map_heads, features, width = sums.shape
    left = late_most(width - 1)
    full = bool((state.positions >= state.ring_k.shape[2]).all())
    phi = sums.new_empty(batch, map_heads, left, features)
    k, v = in_front(state.sink_k, state.ring_k, left), in_front(state.sink_v, state.ring_v, left)
    begin = state.positions.long().contiguous()  # read by its address
    room = Room(sums, state.sink_k, state.sink_v, begin, k, v, phi, full, set(range(left)))
    return RoomState(room, 0)


@torch.no_grad()
def one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    phi_k_fn: Callable[[Tensor], Tensor],
    keep: Tensor | None,
    options: Options,
    state: HybridState,
    own: Rows,
) -> tuple[Tensor, HybridState]:
    """(y [B,H,1,D], the next state) of q [B,H,1,D], k, v [B,Hkv,1,D] and their features.

    own [B,1]: segment -1 is padding. Features are computed for the keys of the ring that may be linear (with cover
    `outside`: none of a sliding window, half of a terraced ring; else all) and for the key that leaves the ring.
    """
    dtype = state.sums.dtype
    whole = state = settled(state)
    if options.reach is not None:
        state = filled(state)
    own, k_rows, sink_rows = state_rows(state, own)
    lead, sinks = state.ring_k.shape[2], options.sinks
    needs_sinks = keep is not None and options.drops_onto_sinks
    sink_phi = sink_features(state, phi_k_fn, k.dtype) if needs_sinks else phi_k[:, :, :0]
    past = Past(state.sums, state.sink_k, state.sink_v, sink_phi, sink_rows, lead)
    group = 1
    if keep is not None and sinks:
        group = q.shape[1] // phi_k.shape[1]
        past = with_dropped(past, group, keep, options)
    block = Block(options, own, k_rows, keep, past, False, 1, 0, dtype, {})
    masks = block.masks(Chunk(0, 0, 1, 0, lead + 1, 0), None)

    all_k, all_v = (torch.cat(parts, 2).to(dtype) for parts in _columns(state, k, v))
    wanted = all_k[:, :, masks.first : min(masks.stop, sinks + lead)]  # all but the new key
    fk = phi_k_fn(wanted.to(k.dtype)) if wanted.shape[2] else phi_k[:, :, :0]
    if masks.stop > sinks + lead:
        fk = torch.cat((fk, phi_k.to(fk.dtype)), 2)
    fk = fk if group == 1 else fk.repeat_interleave(group, 1)
    numbers = [None if x is None else x.to(dtype) for x in (mix, log_scale)]
    inputs = Inputs(q.to(dtype), all_k, all_v, phi_q.to(dtype), fk.to(dtype), *numbers)
    before = block.first_state
    weights = weigh(inputs, before, masks, options)
    y = torch.empty_like(inputs.q)
    forward(weights, inputs, before, masks, options, (y,), spend=True)
    y = y.to(q.dtype)

    real = own.segment[:, :1] >= 0
    sums = state.sums
    if options.reach is None:
        # The key that leaves the ring: its oldest, or the new one where there is no ring.
        features = phi_k_fn(state.ring_k[:, :, :1].to(k.dtype)) if lead else phi_k
        counts = (k_rows.segment[:, :1] >= 0) & real
        if options.cover == "outside":
            counts = counts & (k_rows.position[:, :1] >= sinks)
        sums = added(sums, features.to(dtype) * counts[:, None, :, None], all_v[:, :, sinks : sinks + 1])
    goes_on = real[:, :, None, None]
    ring_k, ring_v = (
        torch.where(goes_on, torch.cat((ring, new.to(ring.dtype)), 2)[:, :, 1:], ring)
        for ring, new in ((whole.ring_k, k), (whole.ring_v, v))
    )
    here = (torch.arange(sinks, device=k.device) == state.positions[:, None])[:, None, :, None] & goes_on
    sink_k, sink_v = (torch.where(here, new.to(old.dtype), old) for old, new in ((state.sink_k, k), (state.sink_v, v)))
    moved = replace(whole, sums=sums, ring_k=ring_k, ring_v=ring_v, sink_k=sink_k, sink_v=sink_v)
    return y, replace(moved, positions=state.positions + real[:, 0])


def _columns(state: HybridState, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (
        (state.sink_k.to(k.dtype), state.ring_k.to(k.dtype), k),
        (state.sink_v.to(v.dtype), state.ring_v.to(v.dtype), v),
    )
