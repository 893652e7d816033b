"""The training stages: Transfer (layer-local), Tune (end to end) and Calibrate; one loop serves both trainings."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .adapters import adapt, merge
from .attention.captured import Captured, Drop
from .branches import BranchSchedule, kept, window_at
from .data import IGNORED, Batch
from .loop import Around, BatchSource, Loop, Part, StageError, total_steps
from .losses import token_loss
from .schedule import Schedule
from .steps import Calibrate, Transfer, Tune
from .swap import form_parameters, forms, mark_merged
from .teacher_stream import show_teacher


def transfer(model: nn.Module, step: Transfer, batches: BatchSource, **around: Unpack[Around]) -> dict[str, Any]:
    """Layer-local distillation of `step.trains` in place; returns the report.

    One forward pass of the teacher's stream a micro-batch, up to the last layer that learns; each layer's loss is
    differentiated as soon as the stream has passed it, so memory holds one layer's graph. loss = mean over layers of sum
    over objectives of weight x loss.
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
    groups = _groups(found, step.trains)
    device = around["device"]
    model.eval()

    def losses(batch: Batch, part: Part | None) -> tuple[float, dict[str, float]]:
        layers: dict[str, Tensor] = {}

        def learn(index: int, captured: Captured) -> None:
            form = next(f for f in found if f.layer_index == index)
            grad = torch.enable_grad() if part is not None else nullcontext()
            # Autocast is for the teacher's stream; the losses of a layer keep their own precision.
            with grad, torch.autocast(device.partition(":")[0], enabled=False):
                parts = form.losses(captured, step.objective, step.block_loss)
                loss = sum(weight * parts[name] for name, weight in step.objective.items())
                if part is not None:
                    (loss * (part.share / len(found))).backward()
            layers[f"layer{index}"] = loss.detach()

        with torch.no_grad(), _autocast(step.schedule, device):
            show_teacher(model, batch, learn)
        values = {name: float(value) for name, value in layers.items()}
        return sum(values.values()) / len(values), values

    loop = Loop(
        name=step.stage,
        model=model,
        schedule=step.schedule,
        parameters={id(p) for ps in groups.values() for p in ps},
        groups=groups,
        losses=losses,
        weigh=lambda batch: float(batch.input_ids.numel()),
        batches=batches,
        **around,
    )
    with _only(model, loop.parameters):
        return loop.go()


def tune(
    model: nn.Module,
    step: Tune,
    batches: BatchSource,
    *,
    teacher: nn.Module | None = None,
    **around: Unpack[Around],
) -> dict[str, Any]:
    """End-to-end training in place on `step.loss`; returns the report. `teacher`: needed for its `kl`.

    With `step.lora`, peft's adapters train in fp32 and are merged once, in fp32, at the end: `model` holds plain modules
    again. Without, all weights train. `step.trains` names parameters of the forms that train along. `step.branches`
    drops or changes the window while the stage trains; afterwards, and in validation, the state is as before.
    """
    found, device, seed = forms(model), around["device"], around["seed"]
    if step.loss.kl and teacher is None:
        raise StageError(f"{step.stage}: loss.kl needs the teacher")
    if step.branches and not found:
        raise StageError(f"{step.stage}: branches: no layer of the model is swapped")
    groups = _groups(found, step.trains)
    if step.lora:
        adapt(model, step, seed)
        groups["lora"] = [p for n, p in model.named_parameters() if ".lora_" in n]
        own = [p for ps in groups.values() for p in ps]
    else:
        apart = {id(p) for p in form_parameters(model, projections=False).values()}
        own = [p for p in model.parameters() if id(p) not in apart] + [p for ps in groups.values() for p in ps]
        mine = {id(p) for p in own}
        for name, part in (("attention_norms", ".input_layernorm."), ("attention", ".self_attn.")):
            # First, so that a group of the form's own that has a rate comes after them.
            groups = {name: [p for n, p in model.named_parameters() if part in n and id(p) in mine], **groups}
    schedule = step.schedule
    if schedule.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def losses(batch: Batch, part: Part | None) -> tuple[float, dict[str, float]]:
        if part is None:
            with _autocast(schedule, device), torch.no_grad():
                return float(token_loss(model, batch, step.loss, teacher)), {}
        # Around the backward pass too: gradient checkpointing computes the layers again.
        with _branches(found, step.branches, part, batch, seed):
            with _autocast(schedule, device), torch.enable_grad():
                loss = token_loss(model, batch, step.loss, teacher)
            (loss * part.share).backward()
        return float(loss.detach()), {}

    loop = Loop(
        name=step.stage,
        model=model,
        schedule=schedule,
        parameters={id(p) for p in own},
        groups=groups,
        losses=losses,
        weigh=lambda batch: float((batch.labels[:, 1:] != IGNORED).sum()),
        batches=batches,
        **around,
    )
    model.train()
    try:
        with _only(model, loop.parameters):
            report = loop.go()
    finally:
        model.eval()
        if schedule.gradient_checkpointing:
            model.activation_checkpointing_disable()  # type: ignore[operator]
    if step.lora:
        report["merge"] = merge(model)
    if step.branches:
        report["window_on"] = _window_on(
            step.branches, found, schedule, seed, report["steps"], total_steps(schedule, batches)
        )
    if found:
        mark_merged(model)
    return report


def calibrate(
    model: nn.Module, step: Calibrate, batches: BatchSource, *, device: str, held_out: BatchSource | None = None
) -> dict[str, Any]:
    """Set parameters of the forms from the teacher's activations, without gradients; returns what was set, by layer.

    With `step.held_out`, also how near each layer is to the teacher's `before` and `after`, on that many batches of `held_out`.
    """
    found = forms(model)
    if not found:
        raise StageError("calibrate: no layer of the model is swapped")
    made = {form.layer_index: form.calibration(step.what, step.rule) for form in found}
    model.eval()

    def show(to: Mapping[int, Any], source: BatchSource, count: int, what: str) -> dict[int, Any]:
        """What each layer's `to` makes of the teacher's stream."""
        for number in tqdm(range(count), desc=what, unit="batch", file=sys.stderr, disable=None):
            with torch.no_grad():
                show_teacher(model, source.batch(number).to(device), lambda index, captured: to[index].add(captured))
        return {index: each.finish() for index, each in to.items()}

    def fits(when: str) -> dict[int, Any]:
        assert held_out is not None, "a step with held-out batches gets them"
        return show({f.layer_index: f.fit() for f in found}, held_out, step.held_out, f"held out, {when} {step.what}")

    before = fits("before") if step.held_out else {}
    done = show(made, batches, step.batches, f"calibrate {step.what}")
    after = fits("after") if step.held_out else {}
    shown = {i: {"before": before[i], "after": after[i]} if step.held_out else {} for i in done}
    return {"layers": {str(index): {**report, **shown[index]} for index, report in done.items()}}


# --- what the stages need ---------------------------------------------------------------------------------------------


def _groups(found: Sequence[Any], names: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """The forms' parameters by the names that `trains` uses, over all layers."""
    return {name: [p for form in found for p in form.groups()[name]] for name in names}


def _autocast(schedule: Schedule, device: str) -> Any:
    if schedule.autocast is None:
        return nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16)


@contextmanager
def _branches(
    found: Sequence[Any], schedule: BranchSchedule | None, part: Part, batch: Batch, seed: int
) -> Iterator[None]:
    """Within: the window is dropped and as wide as the schedule says for this micro-batch."""
    if schedule is None:
        yield
        return
    rows, before = batch.input_ids.shape[0], [form.state for form in found]
    where = {"seed": seed, "step": part.step, "total": part.total}
    for form in found:
        heads = form.architecture.num_attention_heads
        if isinstance(form.state.window, int):
            width = window_at(schedule, form.state.window, **where)
            form.state = form.state.model_copy(update={"window": width})
        if schedule.dropout:
            drawn = kept(schedule, micro=part.micro, layer=form.layer_index, rows=rows, heads=heads, **where)
            keep = torch.from_numpy(np.array(drawn)).to(batch.input_ids.device)
            form.drop = Drop(keep, schedule.on_drop)
    try:
        yield
    finally:
        for form, state in zip(found, before, strict=True):
            form.drop, form.state = None, state


def _window_on(
    branches: BranchSchedule, found: Sequence[Any], schedule: Schedule, seed: int, steps: int, total: int
) -> float:
    """The share of draws in which the window took part: drawn once more, which is exact and survives resuming."""
    drawn = [
        kept(
            branches,
            seed=seed,
            step=step,
            total=total,
            micro=micro,
            layer=form.layer_index,
            rows=schedule.batch,
            heads=form.architecture.num_attention_heads,
        ).mean()
        for step in range(steps)
        for micro in range(schedule.accumulation)
        for form in found
    ]
    return float(np.mean(drawn))


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


__all__ = ["BatchSource", "Part", "StageError", "calibrate", "transfer", "tune"]
