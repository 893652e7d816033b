"""One more token of every row: the sinks, the ring and the new key as the columns of one small chunk. No gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from .chunk import Inputs, forward
from .chunked import Block, Chunk, Past, repeat
from .rows import Options, Rows
from .state import HybridState, filled, state_rows


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
    whole = state
    if options.reach is not None:
        state = filled(state)
    own, k_rows, sink_rows = state_rows(state, own)
    lead, sinks = state.ring_k.shape[2], options.sinks
    past = Past(state.sums, state.sink_k, state.sink_v, phi_k[:, :, :0], sink_rows, lead)
    block = Block(options, own, k_rows, keep, past, False, 1, dtype, {})
    masks = block.masks(Chunk(0, 1, 0, lead + 1, 0), None)

    all_k, all_v = (torch.cat(parts, 2).to(dtype) for parts in _columns(state, k, v))
    wanted = all_k[:, :, masks.first : min(masks.stop, sinks + lead)]  # all but the new key
    fk = phi_k_fn(wanted.to(k.dtype)) if wanted.shape[2] else phi_k[:, :, :0]
    if masks.stop > sinks + lead:
        fk = torch.cat((fk, phi_k.to(fk.dtype)), 2)
    if keep is not None and sinks and fk.shape[1] < q.shape[1]:
        fk = fk.repeat_interleave(q.shape[1] // fk.shape[1], 1)
    numbers = [None if x is None else x.to(dtype) for x in (mix, log_scale)]
    inputs = Inputs(q.to(dtype), all_k, all_v, phi_q.to(dtype), fk.to(dtype), *numbers)
    y = forward(inputs, block.first_state(fk.shape[1]), masks, options, False)[0].to(q.dtype)

    real = own.segment[:, :1] >= 0
    sums = state.sums
    if options.reach is None:
        # The key that leaves the ring: its oldest, or the new one where there is no ring.
        features = phi_k_fn(state.ring_k[:, :, :1].to(k.dtype)) if lead else phi_k
        counts = (k_rows.segment[:, :1] >= 0) & real
        if options.cover == "outside":
            counts = counts & (k_rows.position[:, :1] >= sinks)
        sums = _add(sums, features.to(dtype) * counts[:, None, :, None], all_v[:, :, sinks : sinks + 1])
    goes_on = real[:, :, None, None]
    ring_k, ring_v = (
        torch.where(goes_on, torch.cat((ring, new.to(ring.dtype)), 2)[:, :, 1:], ring)
        for ring, new in ((whole.ring_k, k), (whole.ring_v, v))
    )
    here = (torch.arange(sinks, device=k.device) == state.positions[:, None])[:, None, :, None] & goes_on
    sink_k, sink_v = (torch.where(here, new.to(old.dtype), old) for old, new in ((state.sink_k, k), (state.sink_v, v)))
    return y, HybridState(sums, ring_k, ring_v, sink_k, sink_v, state.positions + real[:, 0])


def _add(sums: Tensor, features: Tensor, v: Tensor) -> Tensor:
    """sums [B,H,F,D+1] and one key more: features [B,h,1,F], v [B,Hkv,1,D]."""
    heads, group = sums.shape[1], features.shape[1]
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if group < heads:
        features = features.repeat_interleave(heads // group, 1)
    product = torch.baddbmm(sums.flatten(0, 1), features.flatten(0, 1).transpose(1, 2), repeat(values, heads))
    return product.view_as(sums)


def _columns(state: HybridState, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (
        (state.sink_k.to(k.dtype), state.ring_k.to(k.dtype), k),
        (state.sink_v.to(v.dtype), state.ring_v.to(v.dtype), v),
    )
