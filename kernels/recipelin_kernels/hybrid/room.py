"""Buffers in which decoding puts key behind key without copying what is there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Room:
    """What states that follow one another share, and places for a few tokens more.

    sums [B,p,F,D+1], sink_k, sink_v [B,Hkv,sinks,D]: as in HybridState. begin [B]: real tokens seen before the first token
    of the room. k, v [B,Hkv,sinks + n + left,D]: the sinks, the keys of a ring, and places for what comes, in this order;
    phi [B,p,left,F]: features of the keys that have left the ring.
    free: which of the `left` places nobody has taken. A place is written once, by whoever took it, and a state looks at no
    later one: a state from which decoding goes on twice finds its place taken the second time, and needs a room of its own.
    full: no place of the ring is empty. prepared: what a kernel keeps beside the room for the next token.
    """

    sums: Tensor
    sink_k: Tensor
    sink_v: Tensor
    begin: Tensor
    k: Tensor
    v: Tensor
    phi: Tensor
    full: bool
    free: set[int]
    prepared: Any = None

    def __getstate__(self) -> dict[str, object]:
        """A copy has memory of its own, of which nothing is prepared."""
        return {**vars(self), "prepared": None}

    @property
    def left(self) -> int:
        return self.phi.shape[2]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))

    def empty(self, begin: Tensor, full: bool) -> "Room":
        """A room of the same sizes that begins later, whose sums, sinks and ring the caller writes."""
        sums, k, v, phi = (torch.empty_like(x) for x in (self.sums, self.k, self.v, self.phi))
        return Room(sums, self.sink_k, self.sink_v, begin, k, v, phi, full, set(range(self.left)))

    def take(self, place: int) -> bool:
        """Whether the place is the caller's from now on. Outside inference mode nobody may write what was made in it."""
        if self.k.is_inference() and not torch.is_inference_mode_enabled():
            return False
        try:
            self.free.remove(place)  # one operation: of two threads one gets it
        except KeyError:
            return False
        return True


def in_front(sinks: Tensor, ring: Tensor, left: int) -> Tensor:
    """Sinks and ring in front of `left` places that are not filled."""
    there = sinks.shape[2] + ring.shape[2]
    whole = ring.new_empty(*ring.shape[:2], there + left, ring.shape[3])
    torch.cat((sinks, ring), 2, out=whole.narrow(2, 0, there))
    return whole
