"""What calls of the C kernels share: float32 in whole vectors, runs of real tokens, and how they are run."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu
from ..hybrid.rows import PlainRows, Rows

VECTOR = 16  # widths are multiples of it (tiles.h)


def run(name: str, call: ctypes.Structure) -> None:
    """A function of the library, on as many threads as torch has. Raises MemoryError where none of them finds room."""
    if getattr(cpu.library(), name)(ctypes.byref(call), ctypes.c_long(torch.get_num_threads())):
        raise MemoryError(f"{name}: no memory for a thread of the C kernels")


def check_device(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Raises RuntimeError for a tensor that is not where x is: what would be read is an address."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(f"{name}: a tensor is on {x.device}, another tensor on {other.device}")


def is_traced() -> bool:
    """Whether torch.compile, torch.jit.trace or a dispatch mode (make_fx) looks on: none can look into the C kernels."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


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
