"""How a bar is measured on a GPU: events around replays of graphs, in alternating rounds; peak memory by torch's allocator."""

import time
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


def times(calls: Mapping[str, Callable[[], object]], rounds: int, *, eager: bool = False) -> dict[str, list[float]]:
    """Seconds of one call of each case in every round, all of them alternating, between two events of the GPU.

    A call is captured in a CUDA graph, and its replays are timed: what the host takes to launch is not in it (`host_seconds`).
    eager: it is launched anew each time.
    """
    ready = {}
    for case, call in calls.items():
        for _ in range(SETTLE):
            call()
        again = call if eager else captured(call)
        ready[case] = again, max(1, round(LEAST_SECONDS / max(timed(again, 1), 1e-6)))
    found: dict[str, list[float]] = {case: [] for case in calls}
    for _ in range(rounds):
        for case, (again, repeats) in ready.items():
            found[case].append(timed(again, repeats))
    return found


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A replay of a call, which must read nothing back to the host."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def again() -> object:
        graph.replay()
        return results

    return again


def host_seconds(call: Callable[[], object], calls: int = 50) -> float:
    """Seconds that the host takes to launch a call, the GPU being idle when it begins."""
    import torch

    for _ in range(SETTLE):
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - begun
    torch.cuda.synchronize()
    return spent / calls


def timed(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one of `repeats` calls after each other, between two events of the GPU."""
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
