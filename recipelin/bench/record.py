"""A record of all bars: when, where and with what they were measured; as a table, as Markdown and as JSON (no torch)."""

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..finding import CHECKOUT
from ..records import provenance
from ..reuse import processor, versions
from .measure import Measured


@dataclass(frozen=True)
class Record:
    """Of one run of `recipelin bench`."""

    date: str
    commit: str | None
    dirty: bool | None
    processor: str
    cores: int
    versions: dict[str, str]
    load: tuple[float, float]
    """Mean number of runnable processes over the last minute, at the start and at the end."""
    quick: bool
    bars: tuple[Measured, ...] = ()
    gpu: str = ""
    """Of bars of a GPU, its name."""

    @classmethod
    def begin(cls, *, quick: bool, gpu: str = "") -> "Record":
        source = provenance(CHECKOUT.parent)
        load = os.getloadavg()[0]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(
            now, source.commit, source.dirty, processor(), os.cpu_count() or 1, versions(("triton", "fla-core") if gpu else ()),
            (load, load), quick, gpu=gpu,
        )  # fmt: skip

    def end(self, bars: Sequence[Measured]) -> "Record":
        return replace(self, bars=tuple(bars), load=(self.load[0], os.getloadavg()[0]))


def table(record: Record) -> str:
    """The bars in Markdown: bar, reach, measured, met."""
    lines = ["| bar | what | reach | measured | quartiles | met | medians |", "|---|---|---|---|---|---|---|"]
    for m in record.bars:
        reach = "" if m.reach is None else f"{'<=' if m.at_most else '>='} {m.reach:g}"
        ratio = "" if m.ratio is None else f"{m.ratio:.2f}"
        spread = "" if m.low is None or m.rounds == 1 else f"{m.low:.2f} to {m.high:.2f}"
        met = {None: "", True: "yes", False: "**no**"}[m.met]
        values = ", ".join(f"{name} {value:.4g}" for name, value in m.values.items())
        lines.append(f"| {m.name} | {m.about} | {reach} | {ratio} | {spread} | {met} | {values} {m.unit} |")
    return "\n".join(lines)


def as_markdown(record: Record, pictures: Sequence[str] = (), *, only: str = "") -> str:
    """The page of the record: how it was measured, the bars, pictures beside it, and what bounds the bars that were missed."""
    v = record.versions
    missed = [m for m in record.bars if m.met is False]
    asked = [m for m in record.bars if m.met is not None]
    device, clock, memory = "a CPU", "CPU time of the process", "in a process of its own"
    command, file = "recipelin bench", "record.json"
    where = f"{record.processor}, one thread of {record.cores} cores"
    if record.gpu:
        device, clock, memory = (
            "a GPU",
            "time between two events of the GPU, around replays of CUDA graphs unless the row says otherwise",
            "of torch's allocator",
        )
        command, file = "recipelin bench --device cuda", "record-cuda.json"
        where = f"{record.gpu} beside {record.cores} cores of {record.processor}"
    if only:
        command, file = f"{command} --only {only}", file.replace(".json", f"-{only}.json")
    triton = f", triton {v['triton']}" if record.gpu else ""
    changed = " with changes" if record.dirty else ""
    lines = [
        f"# Speed and memory of the operators on {device}",
        "",
        f"{record.date}, commit {record.commit or 'unknown'}{changed}, {where}, load {record.load[0]:.1f} at the start, "
        f"{record.load[1]:.1f} at the end; Python {v['python']}, torch {v['torch']}{triton}. float32 where nothing else is said.",
        "",
        f"A bar is the median of the ratios of alternating rounds in one process, in {clock}; beside it the "
        "quartiles of the ratios and the median of each case. Memory is the peak of one call beyond its inputs, results "
        f"included, {memory}. A row without a ratio is recorded only. Made by `{command} --write`; the same numbers are in "
        f"`{file}`.",
        "",
        *([f"{len(asked) - len(missed)} of {len(asked)} bars are met.", ""] if asked else []),
        table(record),
    ]
    for picture in pictures:
        lines += ["", f"![{picture.partition('.')[0]}]({picture})"]
    if missed:
        lines += ["", "## What bounds the bars that were missed", ""]
        lines += [f"* **{m.name}** ({m.ratio:.2f} of {m.reach:g}): {m.bound or 'not known'}" for m in missed]
    return "\n".join(lines) + "\n"


def as_json(record: Record) -> str:
    return json.dumps(asdict(record), indent=1) + "\n"
