"""One more token of every row, without gradient.

In general the sinks, the ring and the new key are the columns of one small chunk; rows without padding and a sliding
window without sinks take a path of few operations.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .block import Block, Chunk, Past
from .chunk import HIDDEN, Inputs, absolute_level, dot, floored, fold, forward, weigh
from .rows import LOG2E, SEPARATE, Options, Rows, branch_weights
from .state import HybridState, added, check_heads, filled, late_most, settled, state_rows


def is_plain(options: Options, keep: Tensor | None) -> bool:
    """Whether `plain_token` computes this; of rows without padding."""
    o = options
    simple = o.shape == "sliding" and o.cover == "outside" and o.join != "replace" and not o.ablate
    return simple and o.window > 0 and o.sinks == 0 and o.reach is None and keep is None


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
    ring_k, ring_v = torch.cat((state.ring_k, k.to(state.ring_k)), 2), torch.cat((state.ring_v, v.to(state.ring_v)), 2)
    places = torch.arange(1 - options.window, 1, device=q.device)
    empty = (places + state.positions[:, None] < 0)[:, None, None]  # of the window, where the row is still short
    a = dot(q.to(dtype) * (options.scale * LOG2E), ring_k.to(dtype)).masked_fill_(empty, HIDDEN)
    top = a.amax(-1, keepdim=True)
    a.sub_(top).exp2_()
    a_mass = a.sum(-1, keepdim=True)
    a_value = torch.bmm(fold(a, k.shape[1]), ring_v.flatten(0, 1).to(dtype)).view(batch, heads, 1, width)

    fq = phi_q.to(dtype)
    both = torch.bmm(fold(fq, map_heads), state.sums.flatten(0, 1)).view(batch, heads, 1, width + 1)
    b_value, b_mass = both[..., :-1], both[..., -1:]
    if state.late_phi.shape[2]:
        b = dot(fq, state.late_phi)
        b_mass = b_mass + b.sum(-1, keepdim=True)
        b_value = b_value + torch.bmm(fold(b, k.shape[1]), state.late_v.flatten(0, 1)).view_as(b_value)
    y = _joined(options, mix, log_scale, top / LOG2E, a_value, a_mass, b_value, b_mass).to(q.dtype)

    features = phi_k_fn(ring_k[:, :, :1].to(k.dtype)).to(dtype)
    check_heads(map_heads, features)
    features = features * (state.positions >= options.window - 1)[:, None, None, None]
    late = features if not state.late_phi.shape[2] else torch.cat((state.late_phi, features), 2)
    late_v = torch.cat((state.late_v, ring_v[:, :, :1].to(dtype)), 2)
    moved = replace(
        state,
        ring_k=ring_k[:, :, 1:],
        ring_v=ring_v[:, :, 1:],
        positions=state.positions + 1,
        late_phi=late,
        late_v=late_v,
    )
    return y, settled(moved) if late.shape[2] >= late_most(width) else moved


def _joined(
    o: Options,
    mix: Tensor | None,
    log_scale: Tensor | None,
    top: Tensor,
    a_value: Tensor,
    a_mass: Tensor,
    b_value: Tensor,
    b_mass: Tensor,
) -> Tensor:
    """y from both branches' unnormalised values [B,H,1,D] and masses [B,H,1,1]; every row has its own key in its window."""
    if o.join in SEPARATE:
        a_weight, b_weight = branch_weights(o.join, a_mass, b_mass)
        size = floored(b_mass)[0] if o.signed else b_mass
        return a_weight / a_mass * a_value + b_weight / size.masked_fill(b_weight == 0, torch.inf) * b_value
    if o.join == "absolute":
        assert log_scale is not None
        c = log_scale.to(a_mass.dtype)[:, None, None]
        level = absolute_level(top, a_mass, b_mass, c)
        a_factor, b_factor = (top - level).clamp(max=0.0).exp(), (c - level).clamp(max=69.0).exp()
        numerator, den = a_factor * a_value + b_factor * b_value, a_factor * a_mass + b_factor * b_mass
    else:
        assert mix is not None
        g = mix.to(a_mass.dtype)[:, None, None]
        numerator, den = g * a_value + b_value, g * a_mass + b_mass
    return numerator / (floored(den)[0] if o.signed else den)


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
    past = Past(state.sums, state.sink_k, state.sink_v, phi_k[:, :, :0], sink_rows, lead)
    # Whether a sink is linear depends on the query head where windows are dropped.
    group = q.shape[1] // phi_k.shape[1] if keep is not None and sinks else 1
    past = past if group == 1 else past.repeated(group)
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
    moved = {"sums": sums, "ring_k": ring_k, "ring_v": ring_v, "sink_k": sink_k, "sink_v": sink_v}
    return y, replace(whole, **moved, positions=state.positions + real[:, 0])


def _columns(state: HybridState, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (
        (state.sink_k.to(k.dtype), state.ring_k.to(k.dtype), k),
        (state.sink_v.to(v.dtype), state.ring_v.to(v.dtype), v),
    )
