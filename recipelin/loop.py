"""The one training loop: optimiser steps, validation, checkpoints, logs. Resuming repeats nothing and skips nothing."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, Required, TypedDict

import torch
from torch import nn
from tqdm import tqdm

from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .data import Batch
from .files import write_atomically
from .optimizer import Optimizers, make_optimizers, rate
from .schedule import Curve, Schedule, Validation, optimiser_steps
from .states import resolve
from .swap import state_of, switch


class StageError(RuntimeError):
    """A stage that cannot go on: which step, why, and what is left to resume from."""


@dataclass(frozen=True)
class Part:
    """One micro-batch of one optimiser step (both from 0) of `total` steps, and its share of the step's loss."""

    step: int
    micro: int
    total: int
    share: float


class BatchSource(Protocol):
    """What a stage reads: data.Batches, or anything as pure."""

    @property
    def rows(self) -> int: ...

    def batch(self, step: int, micro: int = 0) -> Batch: ...


Evaluate = Callable[[str, str, str], float]
Measure = Callable[[Curve], list[dict[str, Any]]]
"""Of the model as it stands: {state, suite, seed, and what a Result says} of each row, as JSON."""


class Around(TypedDict, total=False):
    """What a stage is given beside its model, step and batches, and hands on to its Loop.

    `folder`: of checkpoints; `key`: whose they are. `validation_batches`: held-out rows; `evaluate`, `measure`: suites, for
    what watches or measures them.
    """

    device: Required[str]
    folder: Required[Path]
    seed: Required[int]
    log: Required[Path]
    key: str
    validation_batches: BatchSource | None
    evaluate: Evaluate | None
    measure: Measure | None


@dataclass
class Loop:
    """One stage under way: optimiser steps, validation, checkpoints, logs. Resuming repeats nothing and skips nothing."""

    name: str
    model: nn.Module
    schedule: Schedule
    parameters: set[int]
    groups: Mapping[str, list[nn.Parameter]]
    losses: Callable[[Batch, Part | None], tuple[float, dict[str, float]]]
    """Of a batch: its loss, and by layer where the stage has it. With a Part it learns, without (held out) it does not."""
    weigh: Callable[[Batch], float]
    batches: BatchSource
    device: str
    folder: Path
    seed: int
    log: Path
    key: str = ""
    validation_batches: BatchSource | None = None
    evaluate: Evaluate | None = None
    measure: Measure | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)

    def go(self) -> dict[str, Any]:
        schedule = self.schedule
        total = total_steps(schedule, self.batches)
        points = schedule.measured_at
        if points and max(points) > total:  # found out before, unless the length of the stage hangs on its data
            text = f"curve.tokens: {max(points.values())}; the stage reads {total * schedule.tokens_a_step}"
            raise StageError(f"{self.name}: {text} tokens")
        self.trained = {n: p for n, p in self.model.named_parameters() if id(p) in self.parameters}
        optimizers = make_optimizers(schedule.optimizer, self.trained, self.groups)
        known = read_checkpoint(self.folder, self.key)
        at = Checkpoint() if known is None else known
        if known is not None:
            self._take_up(known, optimizers)
        self.curve = list(at.curve)
        resumed = at.step
        writer = _writer(self.log)
        started, seconds = time.monotonic(), at.seconds
        bar = tqdm(
            total=total, initial=at.step, desc=self.name, unit="step", file=sys.stderr, disable=None, mininterval=1.0
        )
        number, moving = at.step, False
        try:
            while True:
                # First of all, so that a stage interrupted within a validation takes it up again.
                validation = schedule.validation
                if validation and self._due(at, validation, total):
                    at = self._validate(at, validation, writer)
                if number in points:
                    self._measured(number)
                if number >= total or at.stopped:
                    break
                if number % schedule.checkpoint_every == 0 and number > resumed:
                    self._save(at, optimizers)
                factor = rate(schedule.decay, number, total) * at.plateau
                optimizers.set_rates(factor)
                value, layers = self._gradients(number, total)
                moving = True
                optimizers.step()
                number += 1
                self.curve.append((number, value))
                at = at.after(number, seconds + time.monotonic() - started, self.curve)
                moving = False
                bar.update()
                if number % schedule.log_every == 0 or number == total:
                    bar.set_postfix_str(f"loss {value:.4g}")
                    writer.add_scalar(f"{self.name}/loss", value, number)
                    writer.add_scalar(f"{self.name}/rate", factor, number)
                    for name, loss in layers.items():
                        writer.add_scalar(f"{self.name}/loss/{name}", loss, number)
        except KeyboardInterrupt:
            # Between two steps the state is whole; in the midst of an update only the checkpoint before it is.
            if at.step and not moving:
                self._save(at, optimizers)
            raise
        finally:
            bar.close()
            writer.close()
        if schedule.validation and schedule.validation.keep_best and at.best is not None:
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(at.best[name])
        seconds = seconds + time.monotonic() - started
        values = [v for _, v in self.curve]
        tokens = number * schedule.tokens_a_step
        measured = {"measured": [self._measured(step) for step in points if step <= number]} if points else {}
        return {
            "steps": number,
            "tokens": tokens,
            "loss_first": values[0],
            "loss_last": values[-1],
            "loss_mean_of_last_tenth": sum(values[-max(1, len(values) // 10) :]) / max(1, len(values) // 10),
            "curve": [[n, round(v, 5)] for n, v in self.curve[:: max(1, len(self.curve) // 50)]],
            "validation": [[n, v] for n, v in at.validation],
            "best_step": at.best_step,
            "stopped_early": at.stopped,
            "training_seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "resumed_from": resumed or None,
            "trained_parameters": sum(p.numel() for p in self.trained.values()),
            **measured,
        }

    def _due(self, at: Checkpoint, validation: Validation, total: int) -> bool:
        """Whether this step calls for a validation that has not been made."""
        called = at.step > 0 and (at.step % validation.every == 0 or at.step == total)
        return called and (not at.validation or at.validation[-1][0] < at.step)

    def _measured(self, step: int) -> dict[str, Any]:
        """What the curve asks for after a step; kept in a file, so that a stage that goes on does not ask again."""
        path = self.folder / f"curve-{step}.json"
        if not path.is_file():
            assert self.schedule.curve is not None
            if self.measure is None:
                raise StageError(f"{self.name}: a curve measures suites, which needs a run")
            rows = self.measure(self.schedule.curve)
            found = {"step": step, "tokens": step * self.schedule.tokens_a_step, "rows": rows}
            write_atomically(path, json.dumps(found).encode())
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known

    def _gradients(self, number: int, total: int) -> tuple[float, dict[str, float]]:
        """Gradients of one optimiser step, clipped; gives the loss, and by layer where the stage has it."""
        schedule = self.schedule
        found = [self.batches.batch(number, micro).to(self.device) for micro in range(schedule.accumulation)]
        weights = [self.weigh(batch) for batch in found]
        whole = sum(weights)
        if whole == 0:
            raise StageError(f"{self.name}: step {number + 1}: no token of the batch carries loss")
        value, layers = 0.0, dict[str, float]()
        for micro, (batch, weight) in enumerate(zip(found, weights, strict=True)):
            # Dropout is a pure function of (seed, step, micro-batch): accumulation and resuming cannot change it.
            torch.manual_seed((self.seed * 1_000_003 + number) * 4096 + micro)
            loss, layers = self.losses(batch, Part(number, micro, total, weight / whole))
            if not math.isfinite(loss):
                where = next((f" in {name}" for name, value in layers.items() if not math.isfinite(value)), "")
                self._refuse(f"the loss is {loss} at step {number + 1}{where}")
            value += loss * weight / whole
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        if not bool(norm.isfinite()):
            # A finite loss can have such a gradient; taken, it would spoil the weights and the next checkpoint.
            where = next((n for n, g in gradients.items() if not bool(g.isfinite().all())), "all parameters")
            self._refuse(f"the gradient of {where} is not finite at step {number + 1}")
        if schedule.clip is not None:
            nn.utils.clip_grads_with_norm_(list(self.trained.values()), schedule.clip, norm)
        return value, layers

    def _refuse(self, what: str) -> NoReturn:
        last = read_checkpoint(self.folder, self.key)
        rest = (
            f"the last good checkpoint is step {last.step} in {self.folder}" if last else "there is no checkpoint yet"
        )
        raise StageError(f"{self.name}: {what}; {rest}. Lower schedule.{self.name}.optimizer.lr, or set clip")

    def _validate(self, at: Checkpoint, validation: Validation, writer: Any) -> Checkpoint:
        """The watched value (mean over the entries, smaller is better), and what follows from it."""
        values = [watch.weight * self._watched(watch, validation) for watch in validation.watch]
        value = sum(values) / len(values)
        writer.add_scalar(f"{self.name}/validation", value, at.step)
        decay = self.schedule.decay
        better = not at.validation or value < min(v for _, v in at.validation)
        best = {n: p.detach().clone() for n, p in self.trained.items()} if better and validation.keep_best else None
        waited = 0 if better else at.waited + 1
        plateau, since = at.plateau, 0 if better else at.since_drop + 1
        if decay.name == "plateau" and since > decay.patience:
            lowest = min(plateau, decay.floor / self.schedule.optimizer.lr)  # a rate below the floor stays
            plateau, since = max(plateau * decay.factor, lowest), 0
        return at.validated(
            value=value,
            best=best,
            waited=waited,
            plateau=plateau,
            since_drop=since,
            stopped=validation.patience is not None and waited >= validation.patience,
        )

    def _watched(self, watch: Validation.Watch, validation: Validation) -> float:
        if watch.suite is not None:
            if self.evaluate is None:
                raise StageError(f"{self.name}: validation watches the suite {watch.suite!r}, which needs a run")
            return self.evaluate(watch.state, watch.suite, watch.metric)
        if self.validation_batches is None:
            raise StageError(f"{self.name}: validation needs held-out batches")
        before = state_of(self.model)
        if watch.state != "transfer" and before is not None:
            state = resolve(watch.state, before).state
            assert state is not None
            switch(self.model, state)
        training = self.model.training
        self.model.eval()
        try:
            found = [
                (self.weigh(batch), self.losses(batch, None)[0])
                for number in range(validation.batches)
                for batch in [self.validation_batches.batch(number).to(self.device)]
            ]
        finally:
            self.model.train(training)
            if before is not None:
                switch(self.model, before)
        return sum(w * v for w, v in found) / sum(w for w, _ in found)

    def _save(self, at: Checkpoint, optimizers: Optimizers) -> None:
        try:
            write_checkpoint(self.folder, self.key, at, self.trained, optimizers)
        except OSError as error:
            last = read_checkpoint(self.folder, self.key)
            rest = f"the checkpoint of step {last.step} is whole" if last else "there is no checkpoint yet"
            raise StageError(
                f"{self.name}: the checkpoint of step {at.step} could not be written to {self.folder}: {error.strerror}; "
                f"{rest}. Make room there, or set RECIPELIN_HOME to another disk; the same command goes on"
            ) from error

    def _take_up(self, known: Checkpoint, optimizers: Optimizers) -> None:
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(known.weights[name])
        optimizers.load(known.optimizer, known.optimizer_steps)
        print(f"    {self.name}: goes on from step {known.step} ({self.folder})", file=sys.stderr)


def total_steps(schedule: Schedule, batches: BatchSource) -> int:
    """Optimiser steps of the stage."""
    total = optimiser_steps(schedule, batches.rows)
    assert total is not None
    return total


def _writer(log: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise StageError("TensorBoard is not installed: pip install 'recipelin[run]'") from error
    return SummaryWriter(str(log))
