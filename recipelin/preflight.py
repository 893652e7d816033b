"""Before the first step: what an evaluation lacks, a dataset or a text long enough, is found before hours of training."""

from pathlib import Path
from typing import Any

from . import lookup
from .cost import suites_of
from .plan import Plan
from .steps import Evaluate


def preflight(planned: Plan, *, tokenizer: Any, base: Path) -> None:
    """Ask every evaluation of a plan that has a `preflight` whether it could run. Raises its EvalError or SourceError."""
    for step in (p.step for p in planned.steps):
        if isinstance(step, Evaluate):
            for config in (e for suite in suites_of(step) for e in suite.evals):
                module = lookup.implementation("evals", config.eval)  # type: ignore[attr-defined]
                if hasattr(module, "preflight"):
                    module.preflight(config, tokenizer=tokenizer, seeds=step.seeds, base=base)
