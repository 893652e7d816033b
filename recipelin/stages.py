"""The training loops: Transfer (layer-local), Tune (end to end) and Calibrate; one loop serves both trainings."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from .attention.captured import Captured
from .checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from .data import IGNORED, Batch
from .optimizer import Optimizers, make_optimizers, rate
from .schedule import Schedule, Validation, optimiser_steps
from .states import resolve
from .steps import Calibrate, Transfer, Tune
from .swap import form_parameters, forms, mark_merged, recording, state_of, switch

LOGIT_ROWS = 4096  # tokens whose logits are held at once; with more, each share is made again in the backward pass


class StageError(RuntimeError):
    """A stage that cannot go on: which step, why, and what is left to resume from."""


class BatchSource(Protocol):
    """What a stage reads: data.Batches, or anything as pure."""

    @property
    def rows(self) -> int: ...

    def batch(self, step: int, micro: int = 0) -> Batch: ...


Evaluate = Callable[[str, str, str], float]


def transfer(
    model: nn.Module,
    step: Transfer,
    batches: BatchSource,
    *,
    device: str,
    folder: Path,
    seed: int,
    log: Path,
    key: str = "",
    validation_batches: BatchSource | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """Layer-local distillation of `step.trains` in place; returns the report.

    One forward pass of the teacher's stream a micro-batch; each layer's loss is differentiated as soon as the stream has
    passed it, so memory holds one layer's graph. loss = mean over layers of sum over objectives of weight x loss.
    """
    found = forms(model)
    if not found:
        raise StageError("transfer: no layer of the model is swapped")
    dtype = next(model.parameters()).dtype
    if step.schedule.autocast and dtype != torch.bfloat16:
        # Autocast leaves q and k after RoPE in fp32 beside v in bf16, which the teacher's attention does not take.
        raise StageError(
            f"transfer: autocast: bfloat16 needs a teacher in bfloat16, found {str(dtype).removeprefix('torch.')}; set "
            f"model.dtype: bfloat16, or leave schedule.{step.stage}.autocast out"
        )
    own = [p for form in found for name in step.trains for p in form.groups()[name]]
    groups: dict[str, list[nn.Parameter]] = {n: [p for f in found for p in f.groups()[n]] for n in step.trains}
    model.eval()

    def losses(batch: Batch, share: float | None) -> tuple[float, dict[str, float]]:
        layers: dict[str, Tensor] = {}

        def learn(index: int, captured: Captured) -> None:
            form = next(f for f in found if f.layer_index == index)
            grad = torch.enable_grad() if share is not None else nullcontext()
            # Autocast is for the teacher's stream; the losses of a layer keep their own precision.
            with grad, torch.autocast(device.partition(":")[0], enabled=False):
                parts = form.losses(captured, step.objective)
                loss = sum(weight * parts[name] for name, weight in step.objective.items())
                if share is not None:
                    (loss * (share / len(found))).backward()
            layers[f"layer{index}"] = loss.detach()

        with torch.no_grad(), _autocast(step.schedule, device), recording(model, learn):
            _hidden(model, batch)
        values = {name: float(value) for name, value in layers.items()}
        return sum(values.values()) / len(values), values

    loop = _Loop(
        name=step.stage,
        model=model,
        schedule=step.schedule,
        parameters={id(p) for p in own},
        groups=groups,
        losses=losses,
        weigh=lambda batch: float(batch.input_ids.numel()),
        held_out=lambda batch: losses(batch, None)[0],
        batches=batches,
        validation_batches=validation_batches,
        evaluate=evaluate,
        device=device,
        folder=folder,
        seed=seed,
        log=log,
        key=key,
    )
    with _only(model, {id(p) for p in own}):
        return loop.go()


def tune(
    model: nn.Module,
    step: Tune,
    batches: BatchSource,
    *,
    device: str,
    folder: Path,
    seed: int,
    log: Path,
    key: str = "",
    validation_batches: BatchSource | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """End-to-end training in place on the next-token loss; returns the report.

    With `step.lora`, peft's adapters train in fp32 and are merged once, in fp32, at the end: `model` holds plain modules
    again. Without, all weights train. `step.trains` names parameters of the forms that train along.
    """
    found = forms(model)
    groups: dict[str, list[nn.Parameter]] = {n: [p for f in found for p in f.groups()[n]] for n in step.trains}
    adapters = None
    if step.lora:
        adapters = _adapt(model, step, seed)
        groups["lora"] = [p for n, p in model.named_parameters() if ".lora_" in n]
        own = [p for ps in groups.values() for p in ps]
    else:
        apart = {id(p) for p in form_parameters(model).values()}
        own = [p for p in model.parameters() if id(p) not in apart] + [p for ps in groups.values() for p in ps]
    schedule = step.schedule
    if schedule.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def losses(batch: Batch, share: float | None) -> tuple[float, dict[str, float]]:
        with _autocast(schedule, device), torch.enable_grad() if share is not None else torch.no_grad():
            loss = next_token_loss(model, batch)
        if share is not None:
            (loss * share).backward()
        return float(loss.detach()), {}

    loop = _Loop(
        name=step.stage,
        model=model,
        schedule=schedule,
        parameters={id(p) for p in own},
        groups=groups,
        losses=losses,
        weigh=lambda batch: float((batch.labels[:, 1:] != IGNORED).sum()),
        held_out=lambda batch: losses(batch, None)[0],
        batches=batches,
        validation_batches=validation_batches,
        evaluate=evaluate,
        device=device,
        folder=folder,
        seed=seed,
        log=log,
        key=key,
    )
    model.train()
    try:
        with _only(model, {id(p) for p in own}):
            report = loop.go()
    finally:
        model.eval()
        if schedule.gradient_checkpointing:
            model.activation_checkpointing_disable()  # type: ignore[operator]
    if adapters is not None:
        report["merge"] = _merge(model)
    if found:
        mark_merged(model)
    return report


def calibrate(model: nn.Module, step: Calibrate, batches: BatchSource, *, device: str) -> dict[str, Any]:
    """Set parameters of the forms from the teacher's activations, without gradients; returns what was set, by layer."""
    found = forms(model)
    if not found:
        raise StageError("calibrate: no layer of the model is swapped")
    made = {form.layer_index: form.calibration(step.what) for form in found}
    model.eval()
    bar = tqdm(range(step.batches), desc=f"calibrate {step.what}", unit="batch", file=sys.stderr, disable=None)
    for number in bar:
        with torch.no_grad(), recording(model, lambda index, captured: made[index].add(captured)):
            _hidden(model, batches.batch(number).to(device))
    return {"layers": {str(index): calibration.finish() for index, calibration in made.items()}}


# --- what both trainings need -----------------------------------------------------------------------------------------


def _arguments(batch: Batch) -> dict[str, Any]:
    found: dict[str, Any] = {"position_ids": batch.position_ids, "use_cache": False}
    if batch.attention_mask is not None:
        found["attention_mask"] = batch.attention_mask
    if batch.segment_ids is not None:
        found["segment_ids"] = batch.segment_ids
    return found


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    """The stream after the last layer, without logits."""
    return model.model(input_ids=batch.input_ids, **_arguments(batch)).last_hidden_state  # type: ignore[operator]


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the tokens that have a label; logits are made LOGIT_ROWS tokens at a time."""
    hidden = _hidden(model, batch)[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    scored = labels != IGNORED
    count = scored.sum()
    if not bool(count):
        return hidden.sum() * 0.0
    hidden, labels = hidden[scored], labels[scored]
    head = model.get_output_embeddings()  # type: ignore[operator]

    def part(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(_exact(head(h)), y, reduction="sum")

    shares = list(zip(hidden.split(LOGIT_ROWS), labels.split(LOGIT_ROWS), strict=True))
    if len(shares) == 1:
        return part(*shares[0]) / count
    return torch.stack([checkpoint(part, h, y, use_reentrant=False) for h, y in shares]).sum() / count


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _autocast(schedule: Schedule, device: str) -> Any:
    if schedule.autocast is None:
        return nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16)


def _adapt(model: nn.Module, step: Tune, seed: int) -> Any:
    """Put peft's adapters into the model in place, A from the seed, B zero, both in fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    assert step.lora is not None
    config = LoraConfig(
        r=step.lora.rank,
        lora_alpha=int(step.lora.alpha) if float(step.lora.alpha).is_integer() else step.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=step.lora.dropout,
        target_modules=list(step.lora.targets),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return config


@torch.no_grad()
def _merge(model: nn.Module) -> dict[str, Any]:
    """W + alpha / r B A in fp32, then back to the weight's dtype; plain Linear modules take the adapters' places.

    Reports what the weight's dtype cost: rounding = |W' - (W + change)| / |change|, Frobenius norms over all merged
    matrices. Near 0 in fp32; in bf16 it may pass 1, since a change smaller than a weight's last bit is rounded away.
    """
    from peft.tuners.lora import Linear as LoraLinear

    lost = gained = 0.0
    dtype = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                plain: Any = child.get_base_layer()
                scale = child.scaling["default"]
                a, b = (part["default"].get_parameter("weight").float() for part in (child.lora_A, child.lora_B))
                change = b @ a * scale
                exact = plain.weight.float() + change
                plain.weight.copy_(exact.to(plain.weight.dtype))
                lost += float((plain.weight.float() - exact).square().sum())
                gained += float(change.square().sum())
                dtype = str(plain.weight.dtype).removeprefix("torch.")
                setattr(parent, name, plain)
    if hasattr(model, "peft_config"):
        delattr(model, "peft_config")
    return {"dtype": dtype, "rounding": (lost / gained) ** 0.5 if gained else 0.0}


@contextmanager
def _only(model: nn.Module, trained: set[int]) -> Iterator[None]:
    """Within: exactly these parameters require gradients; afterwards none does."""
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


@dataclass
class _Loop:
    """One stage under way: optimiser steps, validation, checkpoints, logs. Resuming repeats nothing and skips nothing."""

    name: str
    model: nn.Module
    schedule: Schedule
    parameters: set[int]
    groups: Mapping[str, list[nn.Parameter]]
    losses: Callable[[Batch, float | None], tuple[float, dict[str, float]]]
    weigh: Callable[[Batch], float]
    held_out: Callable[[Batch], float]
    batches: BatchSource
    validation_batches: BatchSource | None
    evaluate: Evaluate | None
    device: str
    folder: Path
    seed: int
    log: Path
    key: str
    curve: list[tuple[int, float]] = field(default_factory=list)

    def go(self) -> dict[str, Any]:
        schedule = self.schedule
        total = optimiser_steps(schedule, self.batches.rows)
        assert total is not None
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
                if number >= total or at.stopped:
                    break
                if number % schedule.checkpoint_every == 0 and number > resumed:
                    self._save(at, optimizers)
                factor = rate(schedule.decay, number, total) * at.plateau
                optimizers.set_rates(factor)
                value, layers = self._gradients(number)
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
        tokens = number * schedule.batch * schedule.accumulation * schedule.length
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
        }

    def _due(self, at: Checkpoint, validation: Validation, total: int) -> bool:
        """Whether this step calls for a validation that has not been made."""
        called = at.step > 0 and (at.step % validation.every == 0 or at.step == total)
        return called and (not at.validation or at.validation[-1][0] < at.step)

    def _gradients(self, number: int) -> tuple[float, dict[str, float]]:
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
            loss, layers = self.losses(batch, weight / whole)
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
        values = [self._watched(watch, validation) for watch in validation.watch]
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
                (self.weigh(batch), self.held_out(batch))
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


def _writer(log: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise StageError("TensorBoard is not installed: pip install 'recipelin[run]'") from error
    return SummaryWriter(str(log))
