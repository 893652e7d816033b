"""Measures a student and its teacher: every state, suite and seed; each unit's result is kept, so a killed run goes on."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from . import hf, lookup, reuse, spool, swap
from .cost import suites_of
from .evals import EvalError
from .evals.subject import Subject
from .exposure import exposed_from
from .files import write_atomically
from .load import Loaded
from .plan import Plan, digest
from .preflight import on_selection
from .recipe import Suite
from .records import Result, Row
from .reuse import Surroundings
from .schedule import Curve
from .states import NamedState, resolve
from .steps import Evaluate
from .student_digest import digest_student
from .suites import load_suite


class Measured(NamedTuple):
    """What an Evaluate step found: the Record's rows with what belongs beside them."""

    results: tuple[tuple[Row, Result], ...]
    evaluations: dict[str, int]
    """How many were asked, by state."""
    reused: dict[str, int]
    """How many of them an earlier run had made."""


@dataclass
class _OneModel:
    """The teacher or the student, one of them in memory at a time. `load`: weights -> (model, tokenizer)."""

    load: Mapping[str, Callable[[], tuple[Any, Any]]]
    weights: str = ""
    model: Any = None
    tokenizer: Any = None

    def get(self, weights: str) -> tuple[Any, Any]:
        if self.weights != weights:
            self.model = None
            self.model, self.tokenizer = self.load[weights]()
            self.weights = weights
        return self.model, self.tokenizer


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
            made = self._reference(asked, tokenizer, self.teacher, seed=0, fresh=False)
            for result in self.one(asked, model, tokenizer, named, seed=0, tasks="selection-tasks", reference=made):
                if metric in (result.metric, result.task):
                    found.append(-result.value if result.higher_is_better else result.value)
        if not found:
            raise EvalError(f"validation: suite {suite!r} has no metric or task {metric!r}")
        return sum(found) / len(found)

    def measured(self, model: Any, tokenizer: Any, curve: Curve) -> list[dict[str, Any]]:
        """The suites of a curve of the model as it is now: a line of the Record each, without items."""
        found: list[dict[str, Any]] = []
        for name in curve.states:
            hybrid = self.plan.hybrid
            named = resolve(name, hybrid) if hybrid else NamedState(name=name, weights="student", state=None)
            for suite in curve.suites:
                loaded = load_suite(suite, self.loaded.path)
                for config in loaded.evals:
                    made = self._reference(config, tokenizer, self.teacher, seed=0, fresh=False)
                    for result in self.one(config, model, tokenizer, named, seed=0, reference=made):
                        found.append(result.row(state=name, suite=loaded.name, seed=0).model_dump(mode="json"))
        return found

    def one(
        self,
        config: Any,
        model: Any,
        tokenizer: Any,
        named: NamedState,
        *,
        seed: int,
        tasks: str = "tasks",
        reference: Any = None,
    ) -> tuple[Result, ...]:
        """One evaluation of a model in a named state; the model is left as it was. `reference`: see `_reference`."""
        before = swap.state_of(model)
        if named.state is not None:
            swap.switch(model, named.state)
        was_training = model.training
        model.eval()
        try:
            module = lookup.implementation("evals", config.eval)
            subject = Subject(
                model=model,
                tokenizer=tokenizer,
                state=named,
                seed=seed,
                exposed_from=exposed_from(self.plan.hybrid, self.plan.reach),
                folder=self.folder / tasks,
                base=self.loaded.path.parent,
                device=self.device,
                reference=reference,
            )
            results: tuple[Result, ...] = module.run(config, subject)
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
        read = {
            named.name: self.around.digests.get("teacher", "")
            if named.weights == "teacher"
            else digest_student(exported, named.state)
            for named in step.states
        }
        held = _OneModel(
            {
                "teacher": self.teacher,
                "student": lambda: hf.load_student(exported, dtype=self.around.dtype, device=self.device),
            }
        )
        paths = [
            reuse.home()
            / "evaluations"
            / self._key(
                config,
                tokenizer,
                read[named.name],
                seed=seed,
                name=named.name,
                state=named.state.model_dump(mode="json") if named.state else None,
                exposed_from=exposed_from(step.hybrid, self.plan.reach),
                reference=self._reference_key(config, tokenizer, seed),
            )
            for named, _, config, seed in units
        ]
        known = {path for path in paths if path.is_file() and not self.fresh}
        # Of the teacher, before the student takes its place.
        references = {
            which: self._reference(config, tokenizer, lambda: held.get("teacher"), seed=seed, fresh=self.fresh)
            for which, (config, seed) in {
                (config.model_dump_json(), seed): (config, seed)
                for (_, _, config, seed), path in zip(units, paths, strict=True)
                if path not in known
            }.items()
        }
        found: list[tuple[NamedState, Suite, int, tuple[Result, ...]]] = []
        reused = Counter[str]()
        bar = tqdm(
            zip(units, paths, strict=True),
            total=len(units),
            desc="evaluate",
            unit="eval",
            file=sys.stderr,
            disable=None,
            mininterval=1.0,
        )
        for (named, suite, config, seed), path in bar:
            bar.set_postfix_str(f"{named.name}: {config.eval}")
            module = lookup.implementation("evals", config.eval)
            if hasattr(module, "prepare"):
                module.prepare(config, tokenizer, seed=seed, folder=self.folder / "tasks", base=self.loaded.path.parent)
            if path in known:
                results = tuple(Result.model_validate_json(x) for x in json.loads(path.read_text(encoding="utf-8")))
                reused[named.name] += 1
            else:
                model, words = held.get(named.weights)
                made = references[config.model_dump_json(), seed]
                results = self.one(config, model, words, named, seed=seed, reference=made)
                write_atomically(path, json.dumps([r.model_dump_json() for r in results]).encode())
            found.append((named, suite, seed, results))
        bar.close()
        if reused:
            print(
                f"    {reused.total()} of {len(units)} evaluations reused from {reuse.home() / 'evaluations'}",
                file=sys.stderr,
            )
        order = {s.name: i for i, s in enumerate(step.states)}
        return Measured(
            tuple(
                (result.row(state=named.name, suite=suite.name, seed=seed), result)
                for named, suite, seed, results in sorted(found, key=lambda f: order[f[0].name])
                for result in results
            ),
            dict(Counter(named.name for named, *_ in units)),
            dict(reused),
        )

    @cached_property
    def _sources(self) -> str:
        return reuse.source_digest(next(p.step for p in self.plan.steps if isinstance(p.step, Evaluate)))

    def _key(self, config: Any, tokenizer: Any, weights: str, *, seed: int, **more: Any) -> str:
        """The file of what an evaluation finds for some weights (their digest); of one that is TIMED, on this machine."""
        around = self.around
        timed = getattr(lookup.implementation("evals", config.eval), "TIMED", False)
        facts = {
            "weights": weights,
            "tokenizer": spool.tokenizer_digest(tokenizer),
            "surroundings": [around.digests["data"], around.device, around.threads, around.dtype],
            "versions": dict(around.versions),
            "machine": reuse.machine() if timed else None,
            "config": config.model_dump(mode="json"),
            "seed": seed,
            "sources": self._sources,
        }
        return f"{digest(facts | more)[:20]}.json"

    def _reference_key(self, config: Any, tokenizer: Any, seed: int) -> str | None:
        """The file of what an evaluation needs of the teacher; None for one that needs nothing, or where there is no teacher."""
        module = lookup.implementation("evals", config.eval)
        if not hasattr(module, "reference") or self.loaded.recipe.model.teacher is None:
            return None
        return self._key(config, tokenizer, self.around.digests["teacher"], seed=seed, what="reference")

    def _reference(
        self, config: Any, tokenizer: Any, teacher: Callable[[], tuple[Any, Any]], *, seed: int, fresh: bool
    ) -> Any:
        """What `one` hands on to an evaluation whose module has a `reference`: that of the teacher (JSON), made once.

        It is kept under the digest of the teacher's weights; None as for `_reference_key`.
        """
        key = self._reference_key(config, tokenizer, seed)
        if key is None:
            return None
        path = reuse.home() / "references" / key
        if fresh or not path.is_file():
            model, words = teacher()
            base = self.loaded.path.parent
            module = lookup.implementation("evals", config.eval)
            made = module.reference(config, model=model, tokenizer=words, seed=seed, base=base, device=self.device)
            write_atomically(path, json.dumps(made).encode())
        return json.loads(path.read_text(encoding="utf-8"))
