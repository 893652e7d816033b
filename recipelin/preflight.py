"""Before the first step: what an evaluation lacks, a row that cannot be read or a text long enough, is found before hours of
training."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import data, lookup, spool
from .base import Config
from .cost import suites_of
from .files import home
from .plan import Plan
from .reads import measured, watched
from .sources import Data, Part, Source
from .steps import Calibrate, Evaluate, Select, Step, Transfer, Tune
from .suites import load_suite


def preflight(planned: Plan, *, tokenizer: Any, recipe: Path) -> None:
    """Write one row of every source that a stage reads, at the stage's length, and ask every evaluation that has a `preflight`
    whether it could run, those that a stage asks while it trains too. Raises its EvalError or SourceError.

    What is read is tokenised for it as a whole, with every row, of a stream as many tokens as are kept: a stage then finds
    it on disk.
    """
    where: dict[str, Any] = {"folder": recipe.parent, "cache": home() / "tokens"}
    steps = [p.step for p in planned.steps]
    for source, separate, part, length in dict.fromkeys(_trained_on(steps)):
        mix = Data(mix=(source,), separate=separate)
        data.Batches(mix, tokenizer, part=part, length=length, batch=1, seed=0, **where).batch(0)
    for config, seeds in _asked(planned, recipe):
        module = lookup.implementation("evals", config.eval)  # type: ignore[attr-defined]
        if hasattr(module, "preflight"):
            module.preflight(config, tokenizer=tokenizer, seeds=seeds, base=recipe.parent)
        elif hasattr(config, "text"):
            spool.stream(config.text, tokenizer, part=config.part, **where)  # type: ignore[attr-defined]


def _trained_on(steps: Iterable[Step]) -> Iterator[tuple[Source, bool, Part, int]]:
    """(source, whether its documents are apart, part, tokens of a row) of every stage, and of what chooses layers."""
    for step in steps:
        if isinstance(step, Select):
            yield from _trained_on(step.probe)
            if step.scored:
                yield from _parts(step.data, ("selection",), step.length)
        elif isinstance(step, Calibrate):
            yield from _parts(step.data, ("training", "selection") if step.held_out else ("training",), step.length)
        elif isinstance(step, Transfer | Tune):
            parts: tuple[Part, ...] = ("training", "selection") if step.schedule.validation else ("training",)
            yield from _parts(step.data, parts, step.schedule.length)


def _parts(read: Data | None, parts: Iterable[Part], length: int) -> Iterator[tuple[Source, bool, Part, int]]:
    if read is not None:
        yield from ((source, read.separate, read.only_part or part, length) for part in parts for source in read.mix)


def _asked(planned: Plan, recipe: Path) -> Iterator[tuple[Config, Sequence[int]]]:
    """(evaluation, draws of its items), as the steps ask for them."""
    for step in (p.step for p in planned.steps):
        for name in watched(step):
            yield from ((on_selection(config), (0,)) for config in load_suite(name, recipe).evals)
        for name in measured(step):
            yield from ((config, (0,)) for config in load_suite(name, recipe).evals)
        if isinstance(step, Evaluate):
            yield from ((config, step.seeds) for suite in suites_of(step) for config in suite.evals)


def on_selection(config: Config) -> Config:
    """An evaluation with every `part`, however deep, on the selection part: validation never sees test items."""
    return type(config).model_validate(_on_selection(config.model_dump()))


def _on_selection(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "selection" if k == "part" else _on_selection(v) for k, v in value.items()}
    return tuple(map(_on_selection, value)) if isinstance(value, tuple) else value
