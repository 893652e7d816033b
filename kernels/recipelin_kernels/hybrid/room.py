"""Buffers in which decoding puts key behind key without copying what is there."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Room:
    """Places for the keys of a ring and for `left` more, which states that follow one another share.

    k, v [B,Hkv,n + left,D], the ring's n keys first; phi [B,p,left,F]: features of the keys that have left the ring.
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

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.k, self.v, self.phi))


def room_for(ring_k: Tensor, ring_v: Tensor, sums: Tensor, positions: Tensor, left: int) -> Room:
    """A room for `left` tokens behind a ring; sums [B,p,F,D+1] say of which features."""
    keys = ring_k.shape[2]
    k, v = (x.new_empty(*x.shape[:2], keys + left, x.shape[3]) for x in (ring_k, ring_v))
    k[:, :, :keys], v[:, :, :keys] = ring_k, ring_v
    phi = sums.new_empty(*sums.shape[:2], left, sums.shape[2])
    return Room(k, v, phi, bool((positions >= keys).all()))
