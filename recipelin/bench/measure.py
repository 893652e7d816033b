"""How a bar is measured: alternating rounds in one process, one thread; peak memory in a process of its own.

Bars of a GPU: cuda.py.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .. import lookup
from . import cuda

Unit = Literal["ms", "us", "MiB"]
Device = Literal["cpu", "cuda"]
SCALE = {"ms": 1e3, "us": 1e6}
LEAST_SECONDS = (
    0.02  # a shorter call is repeated until a round takes that long: the process clock ticks in microseconds
)


class Case(Protocol):
    """A frozen dataclass of numbers and names; `make` draws its inputs and returns the call that is measured.

    A call does `steps` equal steps, and it is a step whose time is shown. `length` is what a peak's warm-up shortens.
    """

    @property
    def steps(self) -> int: ...

    def make(self) -> Callable[[], object]: ...


@dataclass(frozen=True)
class Bar:
    """A ratio of two cases and how far it shall reach.

    ratio: (numerator, denominator), names of `cases`. reach: at least that much, or `at_most`; None: recorded only.
    bound: what keeps it from more, for the record where it is missed. `peak` compares memory instead of time.
    floors: seconds that a ratio may name in place of a case. needs: a package without which it is not measured.
    eager: of a GPU, calls that cannot be captured in a CUDA graph: the host launches each of them.
    """

    name: str
    about: str
    cases: Mapping[str, Case]
    ratio: tuple[str, str]
    reach: float | None
    at_most: bool = False
    peak: bool = False
    unit: Unit = "ms"
    bound: str = ""
    slow: bool = False  # a round takes seconds: fewer of them
    device: Device = "cpu"
    floors: Mapping[str, float] = field(default_factory=dict)
    needs: str = ""
    eager: bool = False


@dataclass(frozen=True)
class Fact:
    """A number without a ratio, recorded beside the bars: `find` returns it in words and as numbers."""

    name: str
    about: str
    find: Callable[[bool], Mapping[str, float]]
    device: Device = "cpu"


@dataclass(frozen=True)
class Measured:
    """What was found: the median of the rounds' ratios, their quartiles, and the median of each case."""

    name: str
    about: str
    reach: float | None = None
    at_most: bool = False
    unit: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 1
    bound: str = ""

    @property
    def met(self) -> bool | None:
        if self.reach is None or self.ratio is None:
            return None
        return self.ratio <= self.reach if self.at_most else self.ratio >= self.reach


def find_bars(only: str = "") -> list[Bar | Fact]:
    """Every bar of recipelin/bars, in the order of its files; `only` FILE or FILE/...: of that file, if there is one."""
    names = lookup.names("bars")
    one = only.partition("/")[0]
    return [bar for name in ((one,) if one in names else names) for bar in lookup.implementation("bars", name).BARS]


def figures(found: Sequence[Measured]) -> dict[str, bytes]:
    """The pictures that files of bars draw of their own bars, by the names of their files: `FIGURES`."""
    made: dict[str, bytes] = {}
    for name in lookup.names("bars"):
        if own := [m for m in found if m.name.startswith(f"{name}/")]:
            drawn = getattr(lookup.implementation("bars", name), "FIGURES", {})
            made |= {file: draw(own) for file, draw in drawn.items()}
    return made


def measure(bar: Bar | Fact, *, quick: bool = False) -> Measured:
    """One bar. quick: three rounds, where a record takes eleven (five where a round is slow)."""
    if isinstance(bar, Fact):
        return Measured(bar.name, bar.about, values=dict(bar.find(quick)))
    if bar.needs and importlib.util.find_spec(bar.needs) is None:
        return Measured(bar.name, f"{bar.about} (not measured: {bar.needs} is not installed)", bar.reach, bar.at_most)
    on_cuda = bar.device == "cuda"
    if bar.peak:
        values = {name: (cuda.peak if on_cuda else peak)(case) for name, case in bar.cases.items()}
        ratios, rounds = [values[bar.ratio[0]] / values[bar.ratio[1]]], 1
    else:
        rounds = 3 if quick else (5 if bar.slow else 11)
        calls = {n: c.make() for n, c in bar.cases.items()}
        seconds = cuda.times(calls, rounds, eager=bar.eager) if on_cuda else times(calls, rounds)
        seconds = {n: [s / bar.cases[n].steps for s in found] for n, found in seconds.items()}
        seconds |= {name: [floor] * rounds for name, floor in bar.floors.items()}
        values = {name: statistics.median(found) * SCALE[bar.unit] for name, found in seconds.items()}
        pairs = zip(*(seconds[name] for name in bar.ratio), strict=True)
        ratios = sorted(one / other for one, other in pairs)
    low, ratio, high = (ratios[round((len(ratios) - 1) * q)] for q in (0.25, 0.5, 0.75))
    return Measured(
        bar.name, bar.about, bar.reach, bar.at_most, "MiB" if bar.peak else bar.unit, ratio, low, high, values, rounds,
        bar.bound,
    )  # fmt: skip


def times(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one call of each case in every round, all of them alternating, after one that is not counted."""
    with on_one_thread():
        repeats = {}
        for name, call in calls.items():
            call()
            repeats[name] = max(1, round(LEAST_SECONDS / max(seconds_of(call)[1], 1e-6)))
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.process_time()
                for _ in range(repeats[name]):
                    call()
                found[name].append((time.process_time() - start) / repeats[name])
        return found


def seconds_of(call: Callable[[], Any]) -> tuple[Any, float]:
    """(what a call gives, its seconds in CPU time of the process)."""
    start = time.process_time()
    found = call()
    return found, time.process_time() - start


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Within: torch computes on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(case: Any) -> float:
    """MiB at the peak of one call beyond its inputs, results included (VmHWM of a fresh process; Linux)."""
    kind = type(case)
    # A fixed threshold: freed blocks go back to the system at once and are not counted for free later.
    return float(_process("peak", [kind.__module__, kind.__qualname__, asdict(case)], MALLOC_MMAP_THRESHOLD_="65536"))


# --- a process of its own ---------------------------------------------------------------------------------------------


def apart(file: str, function: str, given: Mapping[str, Any]) -> dict[str, float]:
    """What a function of a file of bars finds, as numbers, in a process with one thread and the allocator of a run."""
    found: dict[str, float] = json.loads(_process("apart", [file, function, dict(given)]))
    return found


def _process(module: str, given: Sequence[Any], **environment: str) -> str:
    """The last line of `python -m recipelin.bench.<module> <given>`. Raises RuntimeError with its last words where it fails."""
    paths = os.pathsep.join(p for p in (*_roots(), os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, "-m", f"recipelin.bench.{module}", json.dumps(given)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths, **environment}
    )
    if ran.returncode:
        raise RuntimeError(f"bench: {module} {json.dumps(given)} ended with {ran.returncode}: {ran.stderr[-2000:]}")
    return ran.stdout.splitlines()[-1]


def _roots() -> list[str]:
    """Where recipelin and its operators were found: also in a checkout that is not installed."""
    import recipelin_kernels

    return [str(Path(file).parents[1]) for file in (__file__.replace("/bench/", "/"), recipelin_kernels.__file__)]
