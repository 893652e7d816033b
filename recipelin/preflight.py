"""Before the first step: what an evaluation or generated rows lack, a dataset or a text long enough, is found before hours of
training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import data, lookup
from .base import Config
from .cost import suites_of
from .files import home
from .plan import Plan
from .reads import measured, watched
from .sources import Data, Generated
from .steps import Calibrate, Evaluate, Transfer, Tune
from .suites import load_suite


def preflight(planned: Plan, *, tokenizer: Any, recipe: Path) -> None:
    """Write one row of every generated source at the length its stage reads, and ask every evaluation that has a `preflight`
    whether it could run, those that a stage asks while it trains too. Raises its EvalError or SourceError.
    """
    for source, length in dict.fromkeys(_generated(planned)):
        data.Batches(
            Data(mix=(source,)),
            tokenizer,
            part="training",
            length=length,
            batch=1,
            seed=0,
            folder=recipe.parent,
            cache=home() / "tokens",
        ).batch(0)
    for config, seeds in _asked(planned, recipe):
        module = lookup.implementation("evals", config.eval)  # type: ignore[attr-defined]
        if hasattr(module, "preflight"):
            module.preflight(config, tokenizer=tokenizer, seeds=seeds, base=recipe.parent)


def _generated(planned: Plan) -> Iterator[tuple[Any, int]]:
    """(source, tokens of a row) of every stage."""
    for step in (p.step for p in planned.steps):
        if isinstance(step, Calibrate | Transfer | Tune):
            length = step.length if isinstance(step, Calibrate) else step.schedule.length
            yield from ((source, length) for source in step.data.mix if isinstance(source, Generated))


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
