"""Measures a student and its teacher: every state, suite and seed; each unit's result is kept, so a killed run goes on."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from . import hf, lookup, reuse, spool, swap
from .cost import suites_of
from .evals import EvalError
from .exposure import exposed_from
from .files import write_atomically
from .load import Loaded, load_suite
from .plan import Plan, digest
from .preflight import on_selection
from .records import Result, Row
from .reuse import Surroundings
from .states import NamedState, resolve
from .steps import Evaluate


class Measured(NamedTuple):
    """What an Evaluate step found."""

    rows: tuple[Row, ...]
    items: tuple[tuple[Row, Result], ...]
    kernels: dict[str, str]


@dataclass(frozen=True)
class Evaluator:
    """The evaluations of one run. `teacher()` loads the teacher and its tokenizer."""

    loaded: Loaded
    plan: Plan
    folder: Path
    device: str
    around: Surroundings
    fresh: bool
    teacher: Callable[[], tuple[Any, Any]]

    def watched(self, model: Any, tokenizer: Any, state: str, suite: str, metric: str) -> float:
        """A suite's metric of the model as it is now, on the selection part: what a stage's validation may watch.

        The mean over the suite's rows whose metric or task has that name, oriented so that smaller is better.
        """
        assert self.plan.hybrid is not None
        named = resolve(state, self.plan.hybrid)
        found: list[float] = []
        for config in load_suite(suite, self.loaded.path).evals:
            asked = on_selection(config)
            for result in self.one(asked, model, tokenizer, named, seed=0, tasks="selection-tasks"):
                if metric in (result.metric, result.task):
                    found.append(-result.value if result.higher_is_better else result.value)
        if not found:
            raise EvalError(f"validation: suite {suite!r} has no metric or task {metric!r}")
        return sum(found) / len(found)

    def one(
        self, config: Any, model: Any, tokenizer: Any, named: NamedState, *, seed: int, tasks: str = "tasks"
    ) -> tuple[Result, ...]:
        """One evaluation of a model in a named state; the model is left as it was."""
        before = swap.state_of(model)
        if named.state is not None:
            swap.switch(model, named.state)
        was_training = model.training
        model.eval()
        try:
            module = lookup.implementation("evals", config.eval)
            results: tuple[Result, ...] = module.run(
                config,
                model=model,
                tokenizer=tokenizer,
                state=named,
                seed=seed,
                exposed_from=exposed_from(self.plan.hybrid, self.plan.reach),
                folder=self.folder / tasks,
                base=self.loaded.path.parent,
                device=self.device,
            )
            return results
        finally:
            model.train(was_training)
            if before is not None:
                swap.switch(model, before)

    def all(self, step: Evaluate, exported: Path, tokenizer: Any) -> Measured:
        """Every (state, suite, seed) on the student's folder and on the teacher; what was measured before is reused."""
        units = [
            (named, suite, config, seed)
            for named in sorted(step.states, key=lambda s: s.weights != "teacher")
            for suite in suites_of(step)
            for seed in step.seeds
            for config in suite.evals
        ]
        digests = {"student": reuse.digest_folder(exported), "teacher": self.around.digests.get("teacher", "")}
        sources = reuse.source_digest(step)
        model, words, weights, found, reused = None, None, "", [], 0
        kernels: dict[str, str] = {}
        rows: list[Row] = []
        items: list[tuple[Row, Result]] = []
        bar = tqdm(units, desc="evaluate", unit="eval", file=sys.stderr, disable=None, mininterval=1.0)
        for named, suite, config, seed in bar:
            bar.set_postfix_str(f"{named.name}: {config.eval}")
            module = lookup.implementation("evals", config.eval)
            if hasattr(module, "prepare"):
                module.prepare(config, tokenizer, seed=seed, folder=self.folder / "tasks", base=self.loaded.path.parent)
            unit = digest(
                {
                    "weights": digests[named.weights],
                    "tokenizer": spool.tokenizer_digest(tokenizer),
                    "surroundings": [
                        self.around.digests["data"],
                        self.around.device,
                        self.around.threads,
                        self.around.dtype,
                    ],
                    "versions": dict(self.around.versions),
                    "state": named.state.model_dump(mode="json") if named.state else None,
                    "config": config.model_dump(mode="json"),
                    "seed": seed,
                    "exposed_from": exposed_from(step.hybrid, self.plan.reach),
                    "sources": sources,
                }
            )[:20]
            path = reuse.home() / "evaluations" / f"{unit}.json"
            if path.is_file() and not self.fresh:
                results = tuple(Result.model_validate_json(x) for x in json.loads(path.read_text(encoding="utf-8")))
                reused += 1
            else:
                if weights != named.weights:
                    model = None
                    model, words = (
                        self.teacher()
                        if named.weights == "teacher"
                        else hf.load_student(exported, dtype=self.around.dtype, device=self.device)
                    )
                    weights = named.weights
                    if found_forms := swap.forms(model):
                        kernels["hybrid_attention"] = found_forms[0].kernel
                results = self.one(config, model, words, named, seed=seed)
                write_atomically(path, json.dumps([r.model_dump_json() for r in results]).encode())
            found.append((named, suite, seed, results))
        bar.close()
        if reused:
            print(
                f"    {reused} of {len(units)} evaluations reused from {reuse.home() / 'evaluations'}", file=sys.stderr
            )
        order = {s.name: i for i, s in enumerate(step.states)}
        for named, suite, seed, results in sorted(found, key=lambda f: order[f[0].name]):
            for result in results:
                row = Row(state=named.name, suite=suite.name, seed=seed, **result.model_dump(exclude={"items"}))
                rows.append(row)
                if result.items:
                    items.append((row, result))
        return Measured(tuple(rows), tuple(items), kernels)
