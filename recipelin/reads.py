"""Which sources the steps of a plan read, in training and in evaluation (no torch)."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from .base import Config
from .sources import Generated, Hub, LocalFile, Source, SourceError, Stdlib, text_of
from .steps import Calibrate, Evaluate, Select, Step, Transfer, Tune
from .suites import load_suite

_SOURCE: TypeAdapter[Source] = TypeAdapter(Source)


def watched(step: Step) -> list[str]:
    """Suites that a stage's validation watches."""
    if isinstance(step, (Transfer, Tune)) and step.schedule.validation:
        return sorted({w.suite for w in step.schedule.validation.watch if w.suite})
    return []


def measured(step: Step) -> list[str]:
    """Suites that are measured while a stage trains."""
    if isinstance(step, (Transfer, Tune)) and step.schedule.curve:
        return sorted(step.schedule.curve.suites)
    return []


def sources(steps: Iterable[Step], recipe: Path) -> list[Stdlib | LocalFile | Hub | Generated]:
    """Every source that the steps of a recipe's file read, those of watched suites too, in order. Raises RecipeError."""
    found: list[Stdlib | LocalFile | Hub | Generated] = []
    for step in steps:
        if isinstance(step, (Calibrate, Transfer, Tune)):
            found += step.data.mix
        if isinstance(step, Select):
            found += [*(step.data.mix if step.data else ()), *sources(step.probe, recipe)]
        suites = (
            step.suites
            if isinstance(step, Evaluate)
            else [load_suite(name, recipe) for name in (*watched(step), *measured(step))]
        )
        found += [source for suite in suites for source in of_suite(suite)]
    return found


def of_suite(suite: Config) -> list[Stdlib | LocalFile | Hub | Generated]:
    """Every source that the evaluations of a suite read."""
    return [_SOURCE.validate_python(x) for x in _named(suite.model_dump())]


def texts(steps: Iterable[Step], recipe: Path) -> list[Stdlib | LocalFile | Hub]:
    """What is read of them, each once."""
    return list(dict.fromkeys(map(text_of, sources(steps, recipe))))


def refuse_leaks(steps: Iterable[Step], recipe: Path) -> None:
    """Rows of one file or dataset are held out in one way only: else training reads what another source tests on.

    One file under two paths is one file. Raises SourceError.
    """
    known: list[LocalFile | Hub] = []
    for text in texts(steps, recipe):
        if isinstance(text, Stdlib):
            continue
        for other in known:
            if _overlap(text, other, recipe.parent) and (why := _differently(text, other, recipe.parent)):
                names = " and ".join(dict.fromkeys((other.label, text.label)))
                raise SourceError(f"{names}: {why}")
        known.append(text)


def _place(text: LocalFile | Hub, folder: Path) -> Path | None:
    """What is read on this machine, links resolved; None for the hub's."""
    if isinstance(text, LocalFile):
        return (folder / text.path).resolve()
    return (folder / text.dataset).resolve() if text.local else None


def _overlap(one: LocalFile | Hub, two: LocalFile | Hub, folder: Path) -> bool:
    """Whether both may read the same rows."""
    here, there = _place(one, folder), _place(two, folder)
    if isinstance(one, Hub) and isinstance(two, Hub) and here == there:
        of_hub = [(s.name or "default", s.split, s.revision, None if s.local else s.dataset) for s in (one, two)]
        return of_hub[0] == of_hub[1]
    if here is None or there is None:
        return False
    within = here.is_relative_to(there) if isinstance(two, Hub) else here == there
    return within or (isinstance(one, Hub) and there.is_relative_to(here))


def _differently(one: LocalFile | Hub, two: LocalFile | Hub, folder: Path) -> str:
    """What makes a row belong to another part in `one` than in `two`; empty if nothing does."""
    if _place(one, folder) != _place(two, folder) or one.source != two.source:
        return (
            "one reads rows of the other but numbers them differently, so rows held out in one would be trained on in "
            "another: read both in the same way, or move the file out of the folder"
        )
    if one.parts != two.parts:
        return "read twice with different parts: rows held out in one would be trained on in another"
    if getattr(one, "shuffle", None) != getattr(two, "shuffle", None):
        return (
            "read twice with different shuffle: rows are numbered as they are read, so rows held out in one would be "
            "trained on in another"
        )
    if isinstance(one, Hub) and isinstance(two, Hub) and one.parts is None and one.dataset != two.dataset:
        return (
            "one folder, written in two ways: without `parts` its name decides which rows are held out; write it alike"
        )
    return ""


def _named(value: object) -> Iterator[dict[str, Any]]:
    """Every source named anywhere inside a suite."""
    if isinstance(value, Mapping):
        if "source" in value:
            yield dict(value)
        for inner in value.values():
            yield from _named(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _named(inner)
