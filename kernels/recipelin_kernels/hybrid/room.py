"""Buffers in which decoding puts key behind key without copying what is there."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Room:
    """Places for the sinks, for the keys of a ring and for `left` more, which states that follow one another share.

    k, v [B,Hkv,sinks + n + left,D], in this order; phi [B,p,left,F]: features of the keys that have left the ring.
    used: tokens that have come. A place is written once, and a state looks at no later one: a state from which decoding goes
    on twice finds `used` ahead of it the second time, and needs a room of its own. full: no place of the ring is empty.
    """

    k: Tensor
    v: Tensor
    phi: Tensor
    full: bool
    used: int = 0

    @property
    def left(self) -> int:
        return self.phi.shape[2]

    def next_is(self, number: int) -> bool:
        """Whether the next token may be put into place `number`: it is free, and tensors of inference mode are written in it."""
        return self.used == number and (torch.is_inference_mode_enabled() or not self.k.is_inference())

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.phi))


def room_for(k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], full: bool, phi: Tensor) -> Room:
    """A room that begins with k and v (sinks, ring), for as many tokens as `phi` [B,p,left,F], which is not filled."""
    parts = []
    for sinks, ring in (k, v):
        there = sinks.shape[2] + ring.shape[2]
        whole = ring.new_empty(*ring.shape[:2], there + phi.shape[2], ring.shape[3])
        torch.cat((sinks, ring), 2, out=whole.narrow(2, 0, there))
        parts.append(whole)
    return Room(parts[0], parts[1], phi, full)
