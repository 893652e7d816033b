"""How a bar is measured on a GPU: CUDA events around alternating rounds in one process; peak memory by torch's allocator."""

from collections.abc import Callable, Mapping
from typing import Any

LEAST_SECONDS = 0.01  # a shorter call is repeated until a round takes that long
SETTLE = 3  # calls that are not counted: kernels are compiled, and the clock goes up


def missing() -> str:
    """Why nothing can be measured here; empty where it can."""
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device found by torch (torch.cuda.is_available() is False)"


def name() -> str:
    """The GPU's name."""
    import torch

    return str(torch.cuda.get_device_name())


def times(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each case in every round, all of them alternating, between two events of the GPU."""
    repeats = {}
    for case, call in calls.items():
        for _ in range(SETTLE):
            call()
        repeats[case] = max(1, round(LEAST_SECONDS / max(_timed(call, 1), 1e-6)))
    found: dict[str, list[float]] = {case: [] for case in calls}
    for _ in range(rounds):
        for case, call in calls.items():
            found[case].append(_timed(call, repeats[case]))
    return found


def _timed(call: Callable[[], object], repeats: int) -> float:
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def peak(case: Any) -> float:
    """MiB at the peak of one call beyond its inputs, results included."""
    import torch

    call = case.make()
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20
