"""Memory of this process: its allocator, and the peak of a step."""

import ctypes
import sys
from pathlib import Path

import torch


def tune_allocator() -> None:
    """Keep large buffers on the heap: glibc otherwise returns and refaults them each step (facts/pocket.md, trap 4)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt parameters of glibc's malloc.h
    for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
        libc.mallopt(parameter, value)


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
