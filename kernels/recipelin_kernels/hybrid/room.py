"""Buffers in which decoding puts key behind key without copying what is there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Room:
    """Places for the sinks, for the keys of a ring and for a few tokens more, which states that follow one another share.

    k, v [B,Hkv,sinks + n + left,D], in this order; phi [B,p,left,F]: features of the keys that have left the ring.
    free: which of the `left` places nobody has taken. A place is written once, by whoever took it, and a state looks at no
    later one: a state from which decoding goes on twice finds its place taken the second time, and needs a room of its own.
    full: no place of the ring is empty. prepared: what a kernel keeps beside the room for the next token.
    """

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
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.phi))

    def take(self, place: int) -> bool:
        """Whether the place is the caller's from now on. Outside inference mode nobody may write what was made in it."""
        if self.k.is_inference() and not torch.is_inference_mode_enabled():
            return False
        try:
            self.free.remove(place)  # one operation: of two threads one gets it
        except KeyError:
            return False
        return True


def room_for(k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], full: bool, phi: Tensor) -> Room:
    """A room that begins with k and v (sinks, ring), for as many tokens as `phi` [B,p,left,F], which is not filled."""
    parts = []
    for sinks, ring in (k, v):
        there = sinks.shape[2] + ring.shape[2]
        whole = ring.new_empty(*ring.shape[:2], there + phi.shape[2], ring.shape[3])
        torch.cat((sinks, ring), 2, out=whole.narrow(2, 0, there))
        parts.append(whole)
    return Room(parts[0], parts[1], phi, full, set(range(phi.shape[2])))
