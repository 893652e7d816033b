"""Walks a Plan: the only place with state. Reuses finished steps, evaluates the exported student, writes one Record."""

import datetime
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from recipelin_kernels import kernels_ran

from . import (
    chat,
    data,
    heatmap,
    hf,
    layers,
    lolcats_checkpoint,
    memory,
    reads,
    records,
    reuse,
    spool,
    stages,
    stock,
    swap,
)
from .evaluate import Evaluator
from .kernelcheck import refuse_kernel
from .load import Loaded
from .loop import Around
from .naming import default_folder
from .plan import Plan, Planned, digest, hub_commit, hub_teacher, no_teacher, plan, teacher_folder
from .preflight import preflight
from .records import CurveRow, Record, Result, Row, StepTime
from .reuse import Store
from .selection import Selector
from .shipped import SHIPPED
from .sources import Data, Hub, Part
from .steps import Calibrate, Evaluate, Select, Swap, Switch, Transfer, Tune


class RunError(RuntimeError):
    """A run that cannot go on; the message says what to change. What was finished stays."""


def run(
    loaded: Loaded,
    *,
    out: Path | None = None,
    device: str = "auto",
    fresh: bool = False,
    allow_code: Sequence[str] = (),
) -> Path:
    """Carry out one recipe (a point of its grid) and return its folder.

    The folder holds record.json, items.jsonl.gz, table.md, model/, tasks/ and logs/; of form `native` also stock/; with the
    evaluation `usage` also usage.json.gz and its heat maps, usage.png. Finished steps of earlier runs are reused; an
    interrupted step goes on from its last checkpoint. Raises RunError, hf.TeacherError, stages.StageError, PlanError,
    SourceError, lolcats_checkpoint.PublishedError.
    """
    planned = plan(loaded, allow_code=allow_code)
    place = choose_device(device)
    refuse_kernel(loaded, planned, place)
    for source in reads.texts((p.step for p in planned.steps), loaded.path):
        spool.ready(source, loaded.path.parent, reuse.home() / "tokens")
    folder = (out or reuse.home() / default_folder(planned.name, planned.hash)).resolve()
    _refuse_other_run(folder, planned)
    published = lolcats_checkpoint.of_run(loaded, planned)
    _refuse_other_teacher(loaded, planned)
    walk = _Walk(loaded, planned, folder, place, fresh, published)
    return walk.go()


def choose_device(asked: str) -> str:
    """`auto` is the GPU where there is one. A device that is not there is an error, never a fallback."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (":" in asked and not (kind == "cuda" and index.isdecimal())):
        raise RunError(f"--device {asked!r}: expected auto, cpu or cuda, or cuda:0 and so on")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if index and int(index) >= torch.cuda.device_count():
        raise RunError(f"--device {asked}: torch sees {torch.cuda.device_count()} here, the first of them cuda:0")
    return asked


def _refuse_other_run(folder: Path, planned: Plan) -> None:
    """A folder holds one plan; another plan's record is never overwritten."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; --out names a folder")
    path = folder / "record.json"
    if path.is_file():
        known = records.read_record(path)
        if known.plan_hash != planned.hash:
            raise RunError(
                f"{folder} holds the run of another plan ({known.name}, plan {known.plan_hash[:8]}; "
                f"this is {planned.name}, plan {planned.hash[:8]}): choose another --out, or move it away"
            )


def _refuse_other_teacher(loaded: Loaded, planned: Plan) -> None:
    """A teacher that is not here, or whose numbers are not those that were planned with, before any work."""
    if loaded.recipe.model.teacher is None:
        return
    source = teacher_folder(loaded) or hub_teacher(loaded)
    if source is None:
        raise RunError(no_teacher(loaded))
    found = hf.teacher_architecture(source, revision=loaded.recipe.model.revision)
    expected = planned.architecture
    wrong = [
        f"{name}: planned {getattr(expected, name)}, found {getattr(found, name)}"
        for name in type(found).model_fields
        if name != "initializer_range" and getattr(found, name) != getattr(expected, name)
    ]
    if wrong:
        raise RunError(
            f"model.architecture is not that of model.teacher {str(loaded.recipe.model.teacher)!r}: {'; '.join(wrong)}"
        )


@dataclass
class _Walk:
    """One run under way."""

    loaded: Loaded
    plan: Plan
    folder: Path
    device: str
    fresh: bool
    published: lolcats_checkpoint.Published | None
    times: list[StepTime] = field(default_factory=list)
    results: list[tuple[Row, Result]] = field(default_factory=list)
    curves: list[CurveRow] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    ran: dict[str, set[str]] = field(default_factory=dict)
    select: Select | None = None
    kept: tuple[int, ...] | None = None

    def go(self) -> Path:
        torch.set_num_threads(reuse.threads())
        memory.tune_allocator()
        logging.disable_progress_bar()  # of loading and saving weights: ours show what takes long
        started = datetime.datetime.now(datetime.UTC)
        clock = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = "cpu" if self.device == "cpu" else torch.cuda.get_device_name(torch.device(self.device))
        self.around = reuse.surroundings(self.loaded, self.plan, name)
        self.keys = reuse.run_keys(self.plan.steps, self.around)
        self.store = Store(reuse.home())
        _say(
            f"{self.plan.name}: plan {self.plan.hash[:8]}, {self.device}, {self.around.threads} threads -> {self.folder}"
        )
        status: Literal["finished", "failed", "interrupted"] = "failed"
        try:
            self.model, self.tokenizer = self._begin()
            hf.refuse_tokens_without_row(self.tokenizer, self.plan.architecture.vocab_size)
            texts = reads.texts((p.step for p in self.plan.steps), self.loaded.path)
            chat.refuse_without_template(texts, self.tokenizer)
            if self.tokenizer.eos_token_id is None and any(not getattr(text, "chat", None) for text in texts):
                _say("the tokenizer names no EOS token: documents follow one another without one")
            preflight(self.plan, tokenizer=self.tokenizer, recipe=self.loaded.path)
            with kernels_ran() as self.ran:
                for index, planned in enumerate(self.plan.steps):
                    self._step(index, planned)
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self._write(status, started, time.monotonic() - clock)
        return self.folder

    def _begin(self) -> tuple[Any, Any]:
        """The model that the first step meets: the teacher, a new one, or none where a student is only evaluated."""
        recipe = self.loaded.recipe
        if student := reuse.student_folder(self.loaded):
            return None, hf.load_tokenizer(student)
        if recipe.model.scratch:
            tokenizer = self._tokenizer()
            scratch = recipe.model.scratch
            model = hf.new_model(scratch.architecture, tokenizer, embedding_std=scratch.embedding_std, seed=recipe.seed)
            return model.to(self.device), tokenizer
        return self._teacher()

    def _teacher(self) -> tuple[Any, Any]:
        model = self.loaded.recipe.model
        source = teacher_folder(self.loaded) or model.teacher
        assert source is not None, "a recipe has a teacher or makes a model from nothing"
        # The commit of this run, also where `main` moves meanwhile.
        revision = hub_commit(self.loaded) or model.revision
        return hf.load_teacher(source, revision=revision, dtype=model.dtype, device=self.device)

    def _tokenizer(self) -> Any:
        scratch = self.loaded.recipe.model.scratch
        assert scratch is not None
        key = digest({"data": self.around.digests["data"], "tokenizer": scratch.tokenizer.model_dump()})[:20]
        folder = reuse.home() / "tokenizers" / key
        return data.tokenizer_for(
            self.loaded.recipe.data, scratch.tokenizer.vocab_size, folder=self.loaded.path.parent, cache=folder
        )

    def _step(self, index: int, planned: Planned) -> None:
        step, key = planned.step, self.keys[index]
        number = f"[{index + 1}/{len(self.plan.steps)}] {step.step}"
        memory.reset_peak(self.device)
        clock = time.monotonic()
        if isinstance(step, (Swap, Switch)):
            if self.model is None:
                pass  # the student's folder has been swapped and switched
            elif isinstance(step, Swap):
                where = layers.converted(step.layers, self.select, self.plan.layers, self.kept)
                swap.swap(self.model, step.model_copy(update={"layers": where}), seed=self.plan.seed)
                if self.published:
                    lolcats_checkpoint.lay(self.model, self.published)
                form = swap.forms(self.model)[0]
                self.kernels[form.OPERATOR] = form.kernel
                if form.lacking:
                    _say(f"{number}: kernel {form.kernel}: {form.lacking}; the C kernels take about half of its time")
            else:
                swap.switch(self.model, step.state)
            self.times.append(
                StepTime(step=step.step, key=key, seconds=time.monotonic() - clock, peak_memory=None, reused=False)
            )
            return
        if isinstance(step, Evaluate):
            _say(f"{number}: {planned.what}")
            asked = self._evaluate(step)
            self.times.append(
                StepTime(
                    step=step.step,
                    key=key,
                    seconds=time.monotonic() - clock,
                    peak_memory=memory.peak(self.device),
                    reused=False,
                    report=asked,
                )
            )
            return
        with self.store.lock(key):
            if self.fresh:
                self.store.forget(key)
            finished = self.store.finished(key)
            if finished:
                report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
                _say(f"{number}: {planned.what}: reused {finished}")
                if not isinstance(step, Select):
                    self._load_weights(step, finished / "weights.safetensors")
            else:
                _say(f"{number}: {planned.what}")
                working = self.store.working(key)
                report = (
                    self._choose(step, working, key) if isinstance(step, Select) else self._train(step, working, key)
                )
                report |= {"seconds": time.monotonic() - clock, "peak_memory": memory.peak(self.device)}
                report |= {"recipe": self.plan.name, "what": planned.what}
                if not isinstance(step, Select):
                    self._save_weights(step, working / "weights.safetensors")
                self.store.finish(key, report)
        if isinstance(step, Select):
            self.select, self.kept = step, tuple(report["layers"])
            _say(f"    layers {', '.join(map(str, self.kept))} stay softmax")
        for point in report.pop("measured", ()):
            more = {"stage": getattr(step, "stage", step.step), "tokens": point["tokens"]}
            self.curves += [CurveRow(**row, **more) for row in point["rows"]]
        self.times.append(
            StepTime(
                step=getattr(step, "stage", step.step),
                key=key,
                seconds=report["seconds"],
                peak_memory=report["peak_memory"],
                reused=finished is not None,
                report=report,
            )
        )

    def _batches(
        self, source: Data, *, part: Part, length: int, batch: int, stage: str, accumulation: int = 1
    ) -> data.Batches:
        first_rows = source.first_rows if part == "training" else None
        follows = source.order == "first" and source.only_part is not None and part != "training"
        drawn_for = {"seed": self.plan.seed, "stage": "any" if first_rows else stage, "part": part}
        found = data.Batches(
            source,
            self.tokenizer,
            part=source.only_part or part,
            length=length,
            batch=batch,
            seed=int(digest(drawn_for)[:8], 16),
            first_rows=first_rows,
            skip=source.first_rows or 0 if follows else 0,
            accumulation=accumulation,
            folder=self.loaded.path.parent,
            cache=reuse.home() / "tokens",
        )
        for text, tokens in zip(source.mix, found.tokens, strict=True):
            if not isinstance(text, Hub) or not text.expected_tokens or part != "training":
                continue
            if abs(tokens / text.expected_tokens - 1) > 0.2:
                _say(
                    f"    {text.label}: {tokens:,} training tokens, the recipe expected about {text.expected_tokens:,}"
                )
        return found

    def _choose(self, step: Select, working: Path, key: str) -> dict[str, Any]:
        """Which layers stay softmax; the model is left as it was: made anew where students were tried in it."""
        if (known := layers.ahead(step, self.plan.layers)) is not None:
            return {"policy": step.policy, "layers": list(known)}
        assert step.data is not None
        held_out, first = step.data, [self.model]
        if step.probe:
            self.model = None

        def fresh() -> Any:
            return first.pop() if first else self._begin()[0]

        report = Selector(
            step=step,
            fresh=fresh,
            teacher=lambda: self._teacher()[0],
            rows=lambda draw: self._batches(
                held_out, part="selection", length=step.length, batch=1, stage=f"select {draw}"
            ),
            train=lambda model, each, folder, teacher: self._train(each, folder, key, model=model, teacher=teacher),
            seed=lambda draw: (
                self.plan.seed if draw == 0 else int(digest({"seed": self.plan.seed, "draw": draw})[:8], 16)
            ),
            folder=working,
            device=self.device,
        ).go()
        if step.probe:
            self.model = self._begin()[0]
        return report

    def _train(
        self, step: Calibrate | Transfer | Tune, working: Path, key: str, *, model: Any = None, teacher: Any = None
    ) -> dict[str, Any]:
        """One training step of `model` (None: the run's); `teacher`, where one is loaded already, for a divergence."""
        model = self.model if model is None else model
        if isinstance(step, Calibrate):
            rows: dict[str, Any] = {"length": step.length, "batch": step.batch, "stage": f"calibrate {step.what}"}
            batches = self._batches(step.data, part="training", **rows)
            rows["stage"] = "calibrate, held out"  # the same for every `what`: what one leaves is what the next meets
            held_out = self._batches(step.data, part="selection", **rows) if step.held_out else None
            return stages.calibrate(model, step, batches, device=self.device, held_out=held_out)
        schedule = step.schedule
        sizes: dict[str, Any] = {"length": schedule.length, "batch": schedule.batch, "stage": step.stage}
        batches = self._batches(step.data, part="training", accumulation=schedule.accumulation, **sizes)
        validation = self._batches(step.data, part="selection", **sizes) if schedule.validation else None
        around: Around = {
            "device": self.device,
            "folder": working,
            "seed": int(digest({"seed": self.plan.seed, "stage": step.stage})[:8], 16),
            "log": self.folder / "logs" / step.stage,
            "key": key,
            "validation_batches": validation,
            "evaluate": lambda *watched: self._evaluator().watched(model, self.tokenizer, *watched),
            "measure": lambda curve: self._evaluator().measured(model, self.tokenizer, curve),
        }
        if isinstance(step, Transfer):
            return stages.transfer(model, step, batches, **around)
        if step.loss.kl and teacher is None:
            teacher = self._teacher()[0]
        return stages.tune(model, step, batches, teacher=teacher, **around)

    def _named(self, step: Calibrate | Transfer | Tune) -> set[str]:
        """Names of the weights that a step may have changed."""
        names = set(self.model.state_dict())
        if isinstance(step, Tune) and step.lora is None:
            return names
        changed = set(swap.form_parameters(self.model))
        if isinstance(step, Tune) and step.lora:
            targets = tuple(f".{t}.weight" for t in step.lora.targets)
            changed |= {n for n in names if n.endswith(targets)}
        return changed & names

    def _save_weights(self, step: Calibrate | Transfer | Tune, path: Path) -> None:
        state = self.model.state_dict()
        kept = {n: state[n].detach().cpu().contiguous().clone() for n in sorted(self._named(step))}
        temporary = path.with_suffix(".partial")
        try:
            save_file(kept, temporary)
            temporary.replace(path)
        except SafetensorError as error:
            raise RunError(
                f"{path} could not be written: {error}; make room, and run the same command again"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _load_weights(self, step: Calibrate | Transfer | Tune, path: Path) -> None:
        weights = load_file(path, device=self.device)
        expected = self._named(step)
        if set(weights) != expected:
            odd = sorted(set(weights) ^ expected)[:3]
            raise RunError(f"{path} does not fit the model (first differences: {', '.join(odd)}); run with --fresh")
        with torch.no_grad():
            state = self.model.state_dict()
            for name, value in weights.items():
                state[name].copy_(value)
        if isinstance(step, Tune) and swap.forms(self.model):
            swap.mark_merged(self.model)

    def _evaluate(self, step: Evaluate) -> dict[str, object]:
        """Export the student, and measure the folder as it will be used; reports what was measured and what reused."""
        student = reuse.student_folder(self.loaded)
        exported = student or self.folder / "model"
        if student is None:
            hf.export(self.model, self.tokenizer, exported, hybrid=step.hybrid, origin=self._origin())
            if (found := swap.forms(self.model)) and found[0].config.STOCK:
                stock.export(self.model, self.tokenizer, self.folder / "stock")
        del self.model
        measured = self._evaluator().all(step, exported, self.tokenizer)
        self.results += measured.results
        return {"evaluations": measured.evaluations, "reused": measured.reused}

    def _evaluator(self) -> Evaluator:
        return Evaluator(
            loaded=self.loaded,
            plan=self.plan,
            folder=self.folder,
            device=self.device,
            around=self.around,
            fresh=self.fresh,
            teacher=self._teacher,
        )

    def _origin(self) -> dict[str, Any]:
        """The recipe and the teacher that an exported student came from, so that `diagnose` finds them again."""
        model = self.loaded.recipe.model
        found: dict[str, Any] = {"recipe": self.plan.name, "teacher": None}
        if model.teacher is not None:
            folder = teacher_folder(self.loaded)
            source = model.teacher if folder is None or model.teacher in SHIPPED else str(folder)
            revision = hub_commit(self.loaded) or model.revision
            found["teacher"] = {"source": source, "revision": revision, "digest": self.around.digests["teacher"]}
        return found

    def _write(
        self, status: Literal["finished", "failed", "interrupted"], started: datetime.datetime, seconds: float
    ) -> None:
        loaded, planned = self.loaded, self.plan
        state = planned.hybrid
        provenance = records.provenance(reuse.PACKAGE.parent)
        record = Record(
            name=planned.name,
            recipe=loaded.text,
            extends=loaded.extends_text,
            point=dict(loaded.point),
            plan=planned.model_dump(mode="json"),
            plan_hash=planned.hash,
            status=status,
            commit=provenance.commit,
            dirty=provenance.dirty,
            versions=dict(self.around.versions),
            digests=dict(self.around.digests),
            device=self.around.device,
            processor=reuse.processor(),
            threads=self.around.threads,
            dtype=self.around.dtype,
            kernels={name: ", ".join(sorted(kernels)) for name, kernels in self.ran.items()} or self.kernels,
            seed=planned.seed,
            started=started.isoformat(timespec="seconds"),
            seconds=seconds,
            peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            layers=planned.layers,
            window=state.most_keys if state else None,
            sinks=state.sinks if state else 0,
            branches=state.branches if state else (),
            margin=loaded.recipe.eval.margin,
            steps=tuple(self.times),
            rows=tuple(row for row, _ in self.results),
            curves=tuple(self.curves),
        )
        try:
            records.write_items(self.folder / "items.jsonl.gz", [(row, r) for row, r in self.results if r.items])
            if banded := [(row, r) for row, r in self.results if r.bands]:
                records.write_bands(records.bands_path(self.folder), banded)
                if why := heatmap.write(self.folder):
                    _say(why)
            else:  # of an earlier run of this plan
                for path in (records.bands_path(self.folder), records.picture_path(self.folder)):
                    path.unlink(missing_ok=True)
        finally:  # hours of work are never lost over a sidecar
            records.write_record(self.folder / "record.json", record)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
