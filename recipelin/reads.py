"""Which sources the steps of a plan read, in training and in evaluation (no torch)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter

from .sources import Hub, LocalFile, Recall, Rows, Source, SourceError, Stdlib
from .steps import Calibrate, Evaluate, Step, Transfer, Tune


def sources(steps: Iterable[Step]) -> list[Stdlib | LocalFile | Hub | Recall]:
    """Every source that the steps read, in order."""
    found: list[Stdlib | LocalFile | Hub | Recall] = []
    for step in steps:
        if isinstance(step, (Calibrate, Transfer, Tune)):
            found += step.data.mix
        if isinstance(step, Evaluate):
            found += [TypeAdapter(Source).validate_python(x) for s in step.suites for x in _named(s.model_dump())]
    return found


def texts(steps: Iterable[Step]) -> list[Stdlib | LocalFile | Hub]:
    """What is read of them, each once."""
    return list(dict.fromkeys(s.text if isinstance(s, Recall) else s for s in sources(steps)))


def refuse_leaks(steps: Iterable[Step]) -> None:
    """Rows of one file or dataset are held out in one way only: else training reads what another source tests on.

    Raises SourceError.
    """
    known: dict[tuple[str | None, ...], Rows] = {}
    for text in texts(steps):
        if not isinstance(text, (LocalFile, Hub)):
            continue
        same = (text.path,) if isinstance(text, LocalFile) else (text.dataset, text.revision, text.name, text.split)
        other = known.setdefault(same, text)
        name = text.path if isinstance(text, LocalFile) else text.label
        if text.parts != other.parts:
            raise SourceError(
                f"{name}: read twice with different parts: rows held out in one would be trained on in another"
            )
        if getattr(text, "shuffle", None) != getattr(other, "shuffle", None):
            raise SourceError(
                f"{name}: read twice with different shuffle: rows are numbered as they are read, so rows held out in one "
                "would be trained on in another"
            )


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
