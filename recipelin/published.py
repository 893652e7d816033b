"""Published Records, found by recipe: what fills the rows of a table or speaks about a claim (no torch)."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .measures import Measure, measures
from .naming import but_seed, file_name
from .plan import hashed
from .records import Items, Record, read_items, read_record
from .tablespec import Measured


class TableError(ValueError):
    """A table that cannot be made; the message says what to change."""


class Published(NamedTuple):
    """A Record with its items, and its file."""

    record: Record
    items: Items
    place: Path


class Source(NamedTuple):
    """What fills the rows of one recipe: Records of its seeds, in their order, and their measures."""

    chosen: tuple[Published, ...]
    left_out: int
    measures: tuple[Measure, ...]


def read_published(folder: Path, recipes: Collection[str]) -> tuple[Published, ...]:
    """The published Records under `folder` of these recipes, every seed of each. Raises RecordError."""
    starts = tuple({file_name(but_seed(name)[0]) for name in recipes})
    wanted = run_of(recipes)
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(starts):
            record = read_record(path)
            if wanted(record.name):
                found.append(Published(record, read_items(path), path))
    return tuple(found)


def run_of(recipes: Collection[str]) -> Callable[[str], bool]:
    """Whether a run's name is one of these recipes, or that of another seed."""
    wanted = {but_seed(name) for name in recipes}
    return lambda name: but_seed(name) in wanted


def source_of(names: Sequence[str], records: Sequence[Published], *, limit: int | None = None) -> Source:
    """The newest Record of each seed, of those that ran the newest Record's steps on its teacher.

    A name without a seed stands for every seed of the recipe's grid. `limit`: where recall near ends (`measures`).
    """
    wanted = {but_seed(name) for name in names if not _has_seed(name)}
    mine = [p for p in records if p.record.name in names or but_seed(p.record.name) in wanted]
    mine = sorted((p for p in mine if p.record.status == "finished"), key=lambda p: p.record.started, reverse=True)
    chosen: dict[int, Published] = {}
    newest = _work(mine[0].record) if mine else ""
    for each in mine:
        if _work(each.record) == newest:
            chosen.setdefault(each.record.seed, each)
    kept = tuple(chosen[seed] for seed in sorted(chosen))
    found = measures([p.record for p in kept], [p.items for p in kept], limit=limit) if kept else ()
    return Source(kept, len(mine) - len(kept), found)


def _has_seed(name: str) -> bool:
    return any(part.startswith("seed=") for part in name.rpartition("/")[2].split(","))


def _work(record: Record) -> str:
    """What ran, but for the seed: fields that came after the Record, at what was always done, do not part it from others."""
    steps = record.plan.get("steps")
    work = [hashed(s["step"]) for s in steps] if isinstance(steps, list) else record.plan_hash
    return json.dumps([work, record.digests.get("teacher")], sort_keys=True)


def find(asked: Measured, found: Sequence[Measure], *, where: str) -> Measure | None:
    """The measure of a task or recall column; None if the Record has none. Raises TableError if there are several.

    A recall task (`recall@96`) is the part of its measure at one distance.
    """

    def fits(measure: Measure) -> bool:
        if asked.suite is not None and measure.suite != asked.suite:
            return False
        if asked.metric is not None and measure.metric != asked.metric:
            return False
        if asked.recall is not None:
            what = measure.recalled
            names = (None, what.format, f"{what.format}@{what.length}") if what else ()
            return what is not None and what.part == asked.recall and asked.of in names
        return asked.task in measure.tasks

    fitting = [m for m in found if fits(m)]
    if len(fitting) > 1:
        each = ", ".join(f"{m.label} of {m.suite} ({m.metric})" for m in fitting)
        raise TableError(f"{where} fits {len(fitting)} measures: {each}; say which by suite, metric or, for recall, of")
    if not fitting or fitting[0].kind != "recall" or asked.task is None:
        return fitting[0] if fitting else None
    return fitting[0].at(asked.task)


def to_run(missing: Iterable[str]) -> tuple[str, ...]:
    """What must still be run, as the commands to type; the points of a grid are one command."""
    names = dict.fromkeys(name.rpartition("/")[0] if "=" in name else name for name in missing)
    return tuple(f"still to run: recipelin run {name}, then recipelin publish with its folder" for name in names)


def provenance(name: str, source: Source) -> list[str]:
    """The Records behind a recipe, one line for each device and commit."""
    lines: dict[tuple[str, str], list[Published]] = {}
    for each in source.chosen:
        record = each.record
        commit = (record.commit or "unknown")[:10] + (" + uncommitted changes" if record.dirty else "")
        lines.setdefault((record.device, commit), []).append(each)
    found = []
    for (device, commit), members in lines.items():
        seeds = ", ".join(str(p.record.seed) for p in members)
        files = ", ".join(p.place.name for p in members)
        found.append(f"{name}, seed{'s' if len(members) > 1 else ''} {seeds}: {device}, commit {commit}, {files}")
    if source.left_out:
        found.append(f"{name}: {source.left_out} older Records (other plans, same seed) are left out.")
    return found
