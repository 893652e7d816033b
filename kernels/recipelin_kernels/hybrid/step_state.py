"""The state that the Triton decode kernel moves on in place: buffers of fixed size, positions on the device."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import Options
from .state import HybridState, check_heads, check_lead, settled

FOLD = 16  # keys that enter the sums at once: sqrt(2 D) for D = 128, see gpu_step.py


class Held(NamedTuple):
    """What the buffers depend on; of a kernel a constant.

    A key's features are made when the token `lag` positions later comes. fold: keys that enter the sums at once; 1: each in the
    step that has its features made, and its place in the ring is then the new key's. covers: the sums count sinks too.
    paired: features of all keys of the ring are kept.
    """

    span: int
    sinks: int
    lag: int
    fold: int
    covers: bool
    paired: bool

    @property
    def ring(self) -> int:
        """Places behind the pinned sinks: the span, and before it keys that wait for others."""
        return self.span + (self.fold if self.fold > 1 else 0)

    @property
    def places(self) -> int:
        return self.sinks + self.ring


def held_by(options: Options, fold: int = FOLD) -> Held:
    """What decoding with these options keeps.

    With cover `outside` a key is linear once it has left the window: features are made then, and kept until it is in the
    sums. With cover `all`, and in `replace`, they are needed from the first.
    """
    o = options
    early = o.cover == "all" or o.join == "replace"
    return Held(
        span=o.span,
        sinks=o.sinks,
        lag=0 if early else o.window,
        fold=fold,
        covers=o.cover == "all",
        paired=early or o.shape == "terraced" or o.window == 0,
    )


@dataclass(frozen=True)
class StepState:
    """As HybridState, for the Triton decode kernel: every call writes into these tensors, whose addresses stay.

    Position j stands at place j of a ring where j < sinks, else at sinks + (j - sinks) mod `held.ring`. Unused places
    may hold anything.

    ring_k, ring_v [B,Hkv,places,D]; ring_phi [B,p,places,F], p heads of phi_k (fp32), or [B,p,fold,F] with position j at
    j mod fold; leaving [B,Hkv,1,D]: the key whose features the next call needs, where it is not the call's own;
    leaving_v [B,Hkv,2,D], if no key waits for others (else [B,Hkv,0,D]): its value, of position j at j mod 2;
    value [B,p,F,D] (fp32): sum of phi_k v over the keys 0 .. folded - 1 that count; mass [B,p,n,F] (fp32): sum of phi_k;
    counts [B,p,n,2] (int32): positions seen, folded. n: programs that share a head's columns of D. Each has mass and
    counts of its own, so that none reads what another one writes; it has `columns` of D.
    """

    ring_k: Tensor
    ring_v: Tensor
    ring_phi: Tensor
    leaving: Tensor
    leaving_v: Tensor
    value: Tensor
    mass: Tensor
    counts: Tensor
    held: Held
    columns: int
    moves: list[int] = field(default_factory=lambda: [0], compare=False)
    """How often `moved` was called, of all that share these tensors: `at` of the newest of them."""
    at: int = 0

    def moved(self) -> "StepState":
        """The same tensors, which a call has moved on: what held them before is stale from here on."""
        self.moves[0] += 1
        return replace(self, at=self.moves[0])

    def check_newest(self) -> None:
        """ValueError if another one has moved these tensors on: what this one stood for is no more."""
        if self.at != self.moves[0]:
            raise ValueError(
                f"state: later tokens were written into it ({self.moves[0] - self.at}), as a GPU's decoding does: go on from the "
                "state that the last call returned, or keep a copy.deepcopy of one that is to be used again"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    @property
    def batch(self) -> int:
        return self.value.shape[0]

    @property
    def positions(self) -> Tensor:
        """[B]: real tokens seen."""
        return self.counts[:, 0, 0, 0]

    def select(self, index: Tensor) -> "StepState":
        """The rows of a batch that `index` names (beam search), in tensors of their own."""
        self.check_newest()
        index = index.to(self.value.device)
        rows: dict[str, Any] = {n: x.index_select(0, index) for n, x in self.tensors.items()}
        return StepState(**rows, held=self.held, columns=self.columns)


def _place(position: Tensor, held: Held) -> Tensor:
    """Where a ring holds position >= 0 (others: some place)."""
    return torch.where(position < held.sinks, position.clamp(min=0), held.sinks + (position - held.sinks) % held.ring)


def _pick(x: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """x [B,h,n,.] at place [B,m], zeros where not there."""
    index = place.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.where(there[:, None, :, None], x.gather(2, index), 0)


@torch.no_grad()
def stepping(
    state: HybridState,
    k: Tensor,
    phi_k_fn: Callable[[Tensor], Tensor],
    options: Options,
    held: Held,
    columns: int,
) -> StepState:
    """A state in buffers of their own, keys in the dtype of k.

    Raises ValueError for a state of other options.
    """
    check_lead(state, options)
    state = settled(state)
    seen = state.positions[:, None]
    batch, maps = state.sums.shape[:2]
    tiles = -(-state.ring_k.shape[3] // columns)
    lead = state.ring_k.shape[2]
    place = torch.arange(held.places, device=seen.device)[None]
    newest = seen - 1 - (seen - 1 - place) % held.ring  # of the positions at a place behind the sinks
    there = (place >= held.sinks) & (newest >= (seen - lead).clamp(min=held.sinks))
    rings = []
    for old, sink in ((state.ring_k, state.sink_k), (state.ring_v, state.sink_v)):
        ring = (
            _pick(old, newest - seen + lead, there)
            if lead
            else old.new_zeros(*old.shape[:2], held.places, old.shape[3])
        )
        ring[:, :, : held.sinks] = torch.where((place[:, : held.sinks] < seen)[:, None, :, None], sink, 0)
        rings.append(ring.to(k.dtype))
    phi = (
        phi_k_fn(rings[0]).float() if held.paired else state.sums.new_zeros(batch, maps, held.fold, state.sums.shape[2])
    )
    last = seen - held.lag
    sums = state.sums.float()
    folded = (seen - lead).clamp(min=0)
    return StepState(
        ring_k=rings[0],
        ring_v=rings[1],
        ring_phi=phi.contiguous(),
        leaving=_pick(rings[0], _place(last, held), (last >= 0) & (held.lag <= lead)),
        leaving_v=k.new_zeros(batch, k.shape[1], 2 if held.fold == 1 else 0, k.shape[3]),
        value=sums[..., :-1].contiguous(),
        mass=sums[:, :, None, :, -1].expand(-1, -1, tiles, -1).contiguous(),
        counts=torch.stack((seen, folded), -1)[:, :, None].int().expand(-1, maps, tiles, -1).contiguous(),
        held=held,
        columns=columns,
    )


@torch.no_grad()
def standing(state: StepState | HybridState, phi_k_fn: Callable[[Tensor], Tensor]) -> HybridState:
    """The same past as a HybridState, whose tensors no call writes into; one that is a HybridState as it is."""
    if isinstance(state, HybridState):
        return state
    held = state.held
    counts = state.counts[:, 0, 0].long()
    seen, folded = counts[:, :1], counts[:, 1:]
    lead = max(held.span - 1, 0)
    position = seen - lead + torch.arange(lead, device=seen.device)
    ring_k, ring_v = (_pick(x, _place(position, held), position >= 0) for x in (state.ring_k, state.ring_v))
    sink = torch.arange(held.sinks, device=seen.device).expand(len(seen), -1)
    sink_k, sink_v = (_pick(x, sink, sink < seen) for x in (state.ring_k, state.ring_v))

    late = folded + torch.arange(held.fold, device=seen.device)
    counted = late < seen - lead
    if not held.covers:
        counted = counted & (late >= held.sinks)
    phi = _pick(state.ring_phi, _place(late, held) if held.paired else late % held.fold, counted)
    if not held.paired:  # the newest of them has no features yet
        now = phi_k_fn(state.leaving).float()
        check_heads(state.value.shape[1], now.shape[1])
        phi = torch.where(((late == seen - held.lag) & counted)[:, None, :, None], now, phi)
    maps = phi.shape[1]
    v = _pick(state.ring_v, _place(late, held), counted).float().repeat_interleave(maps // state.ring_v.shape[1], 1)
    sums = torch.cat((state.value + phi.mT @ v, (state.mass[:, :, 0] + phi.sum(2))[..., None]), -1)
    return HybridState(
        sums=sums,
        ring_k=ring_k,
        ring_v=ring_v,
        sink_k=sink_k,
        sink_v=sink_v,
        positions=counts[:, 0],
        late_phi=sums.new_zeros(*sums.shape[:2], 0, sums.shape[2]),
        late_v=ring_v.new_zeros(*ring_v.shape[:2], 0, ring_v.shape[3]),
    )
