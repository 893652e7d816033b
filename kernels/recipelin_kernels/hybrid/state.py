"""The state of hybrid attention between calls: made, gone on from, and moved on."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from .block import Past, repeat
from .room import Room
from .rows import Options, Rows, span_of

LATE_SHARE = 8


def late_most(width: int) -> int:
    """How many late keys go into the sums at once: their features are then an eighth of the sums or less."""
    return max(1, width // LATE_SHARE)


@dataclass(frozen=True)
class HybridState:
    """What decoding needs of the past, without gradient. Its bytes do not grow, once it has a `room`.

    p heads of phi_k, H or Hkv. sums [B,p,F,D+1]: sum of phi(k) [v, 1] over the keys that have left the ring (fp32; fp64
    for fp64 inputs), with cover `outside` but for the sinks; zeros under `reach`. ring_k, ring_v [B,Hkv,n,D]: the last
    keys and values after RoPE, the newest last; unused places are zeros. n is window - 1, terraced 2 window - 1, with
    `reach` and a linear branch reach - 1.
    sink_k, sink_v [B,Hkv,sinks,D]: the first keys of the row. positions [B]: real tokens seen.
    late_phi [B,p,m,F], late_v [B,Hkv,m,D]: features (as the sums) and values (as the ring) of keys that have left the ring and
    are not yet in the sums, m < D / 8: the sums are most of the bytes, and so are mostly read; late keys add an eighth of
    them at most. room: the buffers in which ring and late keys lie while tokens come one by one; only there are late keys.
    """

    sums: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    positions: Tensor
    late_phi: Tensor
    late_v: Tensor
    room: Room | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    @property
    def bytes(self) -> int:
        if self.room is not None:
            return self.room.bytes
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    @property
    def batch(self) -> int:
        return self.sums.shape[0]

    def select(self, index: Tensor) -> "HybridState":
        """The rows of a batch that `index` names (beam search), in tensors of their own."""
        index = index.to(self.sums.device)
        own = settled(self)
        return HybridState(**{n: x.index_select(0, index) for n, x in own.tensors.items()}, room=None)


class RoomState(HybridState):
    """A state in a room, after `late` keys have left its ring; what it holds is made when it is looked at.

    Decoding does not look: it would make five tensors for each token.
    """

    room: Room
    late: int

    def __init__(self, room: Room, late: int) -> None:
        vars(self).update(room=room, late=late)

    @property
    def sums(self) -> Tensor:
        return self.room.sums

    @property
    def sink_k(self) -> Tensor:
        return self.room.sink_k

    @property
    def sink_v(self) -> Tensor:
        return self.room.sink_v

    @cached_property
    def positions(self) -> Tensor:
        return self.room.begin + self.late

    @property
    def ring(self) -> int:
        return self.room.k.shape[2] - self.sink_k.shape[2] - self.room.left

    @cached_property
    def ring_k(self) -> Tensor:
        return self.room.k.narrow(2, self.sink_k.shape[2] + self.late, self.ring)

    @cached_property
    def ring_v(self) -> Tensor:
        return self.room.v.narrow(2, self.sink_k.shape[2] + self.late, self.ring)

    @cached_property
    def late_phi(self) -> Tensor:
        return self.room.phi.narrow(2, 0, self.late)

    @cached_property
    def late_v(self) -> Tensor:
        return self.room.v.narrow(2, self.sink_k.shape[2], self.late)


def empty_state(
    batch: int,
    map_heads: int,
    key_heads: int,
    width: int,
    features: int,
    *,
    window: int,
    sinks: int,
    like: Tensor,
    shape: str = "sliding",
    reach: int | None = None,
    linear: bool = True,
) -> HybridState:
    """The state before the first token, on the device and in the dtype of `like`.

    map_heads: of phi_k. Of the options of `hybrid_attention`; linear: whether its linear branch has mass, which matters under
    `reach` alone.
    """
    ring = max(span_of(window, shape, reach, linear=linear) - 1, 0)
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return HybridState(
        sums=like.new_zeros(batch, map_heads, features, width + 1, dtype=exact),
        ring_k=like.new_zeros(batch, key_heads, ring, width),
        ring_v=like.new_zeros(batch, key_heads, ring, width),
        sink_k=like.new_zeros(batch, key_heads, sinks, width),
        sink_v=like.new_zeros(batch, key_heads, sinks, width),
        positions=torch.zeros(batch, dtype=torch.long, device=like.device),
        late_phi=like.new_zeros(batch, map_heads, 0, features, dtype=exact),
        late_v=like.new_zeros(batch, key_heads, 0, width),
    )


def check_lead(state: HybridState, options: Options) -> None:
    """Raises ValueError for a state of other options."""
    lead, needed = state.ring_k.shape[2], max(options.span - 1, 0)
    if lead != needed or state.sink_k.shape[2] != options.sinks:
        reach = "" if options.reach is None else f", reach {options.reach}"
        raise ValueError(
            f"state: holds the last {lead} keys and {state.sink_k.shape[2]} sinks; the {options.shape} window "
            f"{options.window}{reach} needs {needed} and {options.sinks}: it was made with other options"
        )


def check_heads(held: int, found: int) -> None:
    """Raises ValueError for features of other heads than the `held` ones that a state sums up."""
    if found != held:
        raise ValueError(f"state: sums the features of {held} heads, phi_k has {found}: it was made by other calls")


def check_state(state: HybridState, own: Rows, options: Options) -> None:
    """`check_lead`, and the same for padding on the left of a row that has begun."""
    check_lead(state, options)
    padded_front = (own.segment[:, 0] < 0) & (own.segment >= 0).any(1)
    if bool((padded_front & (state.positions > 0)).any()):
        raise ValueError("state: a row that has begun cannot be padded on its left")


def settled(state: HybridState) -> HybridState:
    """The state with its late keys in the sums, in tensors of its own."""
    if state.room is None:
        return state
    return HybridState(
        sums=whole_sums(state),
        sink_k=state.sink_k,
        sink_v=state.sink_v,
        positions=state.positions,
        ring_k=state.ring_k.clone(),
        ring_v=state.ring_v.clone(),
        late_phi=state.late_phi.new_empty(*state.late_phi.shape[:2], 0, state.late_phi.shape[3]),
        late_v=state.late_v.new_empty(*state.late_v.shape[:2], 0, state.late_v.shape[3]),
    )


def whole_sums(state: HybridState) -> Tensor:
    """The sums with the late keys in them."""
    if not state.late_phi.shape[2]:
        return state.sums
    return added(state.sums, state.late_phi, state.late_v.to(state.sums))


def _and_one(v: Tensor) -> Tensor:
    """[v, 1]: what the sums hold of a key."""
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def added(sums: Tensor, features: Tensor, v: Tensor) -> Tensor:
    """sums [B,p,F,D+1] and keys more: features [B,p,n,F], v [B,Hkv,n,D]."""
    product = torch.baddbmm(sums.flatten(0, 1), features.flatten(0, 1).mT, repeat(_and_one(v), sums.shape[1]))
    return product.view_as(sums)


def filled(state: HybridState) -> HybridState:
    """The state without places of the ring that no row has filled: a ring of `reach` may be mostly empty."""
    empty = state.ring_k.shape[2] - min(int(state.positions.max()), state.ring_k.shape[2])
    return replace(state, ring_k=state.ring_k[:, :, empty:], ring_v=state.ring_v[:, :, empty:])


def state_rows(state: HybridState, own: Rows) -> tuple[Rows, Rows, Rows]:
    """Positions that go on from a state: of a call's queries, of ring and call's keys, of the sinks before the ring."""
    seen, lead, device = state.positions[:, None], state.ring_k.shape[2], state.positions.device
    own = Rows(own.position + seen, own.segment)
    ring = seen - lead + torch.arange(lead, device=device)
    # A row that begins behind padding in this call has nothing in the ring.
    k_rows = Rows(torch.cat((ring, own.position), 1), torch.cat((torch.where(ring >= 0, 0, -1), own.segment), 1))
    sink = torch.arange(state.sink_k.shape[2], device=device).expand(seen.shape[0], -1)
    return own, k_rows, Rows(sink, torch.where(sink < seen - lead, 0, -1))


def continued(
    state: HybridState,
    own: Rows,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    phi_k_fn: Callable[[Tensor], Tensor],
) -> tuple[Rows, Rows, Tensor, Tensor, Tensor, Past]:
    """The ring in front of the call's keys, positions that go on, and the state's sinks as extra columns."""
    lead = state.ring_k.shape[2]
    own, k_rows, sink_rows = state_rows(state, own)
    past = Past(
        sums=state.sums,
        sink_k=state.sink_k.to(k.dtype),
        sink_v=state.sink_v.to(v.dtype),
        sink_phi=sink_features(state, phi_k_fn, k.dtype) if state.sink_k.shape[2] else phi_k[:, :, :0],
        sink_rows=sink_rows,
        lead=lead,
    )
    if lead:
        phi_k = torch.cat((phi_k_fn(state.ring_k.to(k.dtype)), phi_k), 2)
        k, v = torch.cat((state.ring_k.to(k.dtype), k), 2), torch.cat((state.ring_v.to(v.dtype), v), 2)
    return own, k_rows, k, v, phi_k, past


@torch.no_grad()
def sink_features(state: HybridState, phi_k_fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    return phi_k_fn(state.sink_k.to(dtype))


def dropping(phi_k: Tensor, past: Past | None, keep: Tensor | None, options: Options) -> tuple[Tensor, Past | None]:
    """phi_k and the past beside keep [B,H], as kernels take them: whether sums hold the sinks depends on the query head then."""
    if keep is None or not options.sinks:
        return phi_k, past
    group = keep.shape[1] // phi_k.shape[1]
    return _each(phi_k, group), None if past is None else with_dropped(past, group, keep, options)


@torch.no_grad()
def with_dropped(past: Past, group: int, keep: Tensor, options: Options) -> Past:
    """The past with a head of phi_k for each query head; where the linear side of a dropped one covers the sinks, with those in
    its sums. A state's own never hold them with cover `outside`: which windows are dropped may change from call to call."""
    sums, sink_phi = _each(past.sums, group), _each(past.sink_phi, group)
    if options.drops_onto_sinks:
        enters = ~keep[:, :, None] & (past.sink_rows.segment >= 0)[:, None]
        sums = added(sums, (sink_phi * enters[..., None]).to(sums), past.sink_v.to(sums))
    return replace(past, sums=sums, sink_phi=sink_phi)


def _each(x: Tensor, group: int) -> Tensor:
    """[B,p,...] -> [B,p group,...]."""
    return x if group == 1 else x.repeat_interleave(group, 1)


def final_sums(
    v: Tensor,
    phi_k: Tensor,
    options: Options,
    k_rows: Rows,
    past: Past | None,
    keep: int,
    alive: Tensor,
    last: Tensor,
    chunk: int = 1024,
) -> Tensor:
    """The state's sums after a call: keys of segment `alive` [B,1] but the `keep` up to position `last` [B,1].

    Zeros under `reach`: its keys are in the ring.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    sums = v.new_zeros(*phi_k.shape[:2], phi_k.shape[-1], v.shape[-1] + 1, dtype=dtype)
    if options.reach is not None:
        return sums
    counted = (k_rows.segment == alive) & (last - k_rows.position >= keep)
    if options.cover == "outside":
        counted = counted & (k_rows.position >= options.sinks)
    if past is not None:
        # Keys of the ring are in k: a call with a state holds one segment, which goes on.
        sums = sums + past.sums
    for start in range(0, v.shape[2], chunk):
        cut = slice(start, start + chunk)
        features = (phi_k[:, :, cut] * counted[:, None, cut, None]).to(dtype)
        values = _and_one(v[:, :, cut]).to(dtype)
        sums += torch.bmm(features.flatten(0, 1).mT, repeat(values, features.shape[1])).view_as(sums)
    return sums


@torch.no_grad()
def next_state(
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    options: Options,
    k_rows: Rows,
    past: Past | None,
    state: HybridState | None,
) -> HybridState:
    batch, key_heads, length, width = k.shape
    k_rows = Rows(k_rows.position.expand(batch, -1), k_rows.segment.expand(batch, -1))
    # The last real token of a row; a row of padding alone has none, and keeps an empty state.
    real = k_rows.segment >= 0
    end = torch.where(real, torch.arange(length, device=k.device), -1).amax(1, keepdim=True)
    begun = end >= 0
    alive = torch.where(begun, k_rows.segment.gather(1, end.clamp(min=0)), -2)
    last = torch.where(begun, k_rows.position.gather(1, end.clamp(min=0)), -1)
    keep = max(options.span - 1, 0)
    sums = final_sums(v, phi_k, options, k_rows, past, keep, alive, last)

    def take(x: Tensor, index: Tensor, real: Tensor) -> Tensor:
        picked = x.gather(2, index.clamp(0, length - 1)[:, None, :, None].expand(-1, key_heads, -1, width))
        return torch.where(real[:, None, :, None], picked, 0)

    ring = end + torch.arange(1 - keep, 1, device=k.device)
    ring_real = (ring >= 0) & (k_rows.segment.gather(1, ring.clamp(min=0)) == alive)
    sink_position = torch.arange(options.sinks, device=k.device).expand(batch, options.sinks)
    sink_index = end - last + sink_position
    sink_here = (sink_index >= 0) & (sink_position <= last)
    sink_k, sink_v = (take(x, sink_index, sink_here) for x in (k, v))
    if state is not None:
        known = (sink_position < state.positions[:, None])[:, None, :, None]
        sink_k, sink_v = (
            torch.where(known, state.sink_k.to(k.dtype), sink_k),
            torch.where(known, state.sink_v.to(v.dtype), sink_v),
        )
    positions = last[:, 0] + 1
    if state is not None:
        positions = torch.where(begun[:, 0], positions, state.positions)  # nothing new, and no ring to count from
    return HybridState(
        sums=sums,
        ring_k=take(k, ring, ring_real),
        ring_v=take(v, ring, ring_real),
        sink_k=sink_k,
        sink_v=sink_v,
        positions=positions,
        late_phi=sums.new_zeros(*phi_k.shape[:2], 0, phi_k.shape[-1]),
        late_v=v.new_zeros(batch, key_heads, 0, width),
    )
