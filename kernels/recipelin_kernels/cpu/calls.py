"""What calls of the C kernels share: float32 in whole vectors, and runs of real tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hybrid.rows import PlainRows, Rows

VECTOR = 16  # widths are multiples of it (tiles.h)


def dense(x: Tensor) -> Tensor:
    """x as its memory has it: without gaps, and without a sign that is still to be taken (`Tensor.is_neg`)."""
    return (x.resolve_neg() if x.is_neg() else x).contiguous()


def whole_vectors(x: Tensor) -> Tensor:
    """x in float32, its last dimension without gaps and filled up with zeros to whole vectors."""
    x, missing = x.float().resolve_neg(), -x.shape[-1] % VECTOR
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(-1) == 1 else x.contiguous()


def runs_of(rows: Rows, batch: int) -> Tensor:
    """(row, first token, end) of every run of real tokens of one segment, [n,3] int64."""
    length = rows.segment.shape[1]
    if isinstance(rows, PlainRows):
        row = torch.arange(batch, device=rows.device)
        return torch.stack((row, torch.zeros_like(row), torch.full_like(row, length)), 1)
    segment = F.pad(rows.segment, (1, 1), value=-1)
    edge = segment[:, 1:] != segment[:, :-1]
    begins, ends = (edge & (segment[:, s] >= 0) for s in (slice(1, None), slice(None, -1)))
    row, first = begins.nonzero().unbind(1)
    return torch.stack((row, first, ends.nonzero()[:, 1]), 1)
