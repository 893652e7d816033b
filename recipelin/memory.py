"""Memory of this process: its allocator, and the peak of a step."""

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

HEAP = 2**30  # bytes of address space whose pages are huge: more than the stages of a small model take
HUGE_PAGE = 2**21


@cache
def tune_allocator() -> None:
    """Keep large buffers on the heap: glibc otherwise returns and refaults them each step (facts/pocket.md, trap 4).

    The heap is grown once, untouched, and the kernel asked for huge pages there: tensors of some MiB spare address look-ups,
    4 % of the CPU time of a stage. Where it has none, or the address space is limited, nothing changes.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt parameters of glibc's malloc.h
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        libc.mallopt(parameter, value)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.malloc.argtypes, libc.malloc.restype = (size,), address
    libc.free.argtypes = (address,)
    libc.madvise.argtypes = (address, size, ctypes.c_int)
    hugepage = 14  # MADV_HUGEPAGE of Linux's mman.h
    if grown := libc.malloc(HEAP):
        begin = -(-grown // HUGE_PAGE) * HUGE_PAGE
        libc.madvise(begin, (grown + HEAP - begin) // HUGE_PAGE * HUGE_PAGE, hugepage)
        libc.free(grown)


def reset_peak(device: str) -> None:
    """Begin to look for a peak anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # 5: reset the high-water mark of resident memory


def peak(device: str) -> int | None:
    """Bytes at the peak since `reset_peak`: of the GPU's tensors, or resident on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def resident(field: str = "VmRSS") -> int | None:
    """Bytes of this process that are resident now, or were at most (VmHWM); None where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
