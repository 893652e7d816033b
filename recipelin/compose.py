"""Pieces that methods compose their steps from (no torch)."""

from collections.abc import Mapping
from typing import Any

from .branches import BranchSchedule
from .recipe import Recipe
from .schedule import Schedule
from .states import Branch, State
from .steps import Calibrate, Lora, Loss, Objective, Step, Trained, Transfer, Tune


def hybrid_state(*, sinks: int = 0, **fields: Any) -> State:
    """Window and linear branch, and the sinks where there are some; `fields` as in State."""
    branches: tuple[Branch, ...] = ("window", "linear", "sinks") if sinks else ("window", "linear")
    return State(branches=branches, sinks=sinks, **fields)


def linear_state(**fields: Any) -> State:
    """The linear branch alone, over all keys."""
    return State(branches=("linear",), cover="all", **fields)


def transfer(
    recipe: Recipe, stage: str, objective: Mapping[Objective, float], trains: tuple[Trained, ...]
) -> tuple[Step, ...]:
    """The layer-local stage of this name, or nothing where the schedule leaves it out."""
    schedule = recipe.schedule[stage]
    if schedule is None:
        return ()
    data = schedule.data or recipe.data
    return (Transfer(stage=stage, objective=dict(objective), trains=trains, schedule=schedule, data=data),)


def tune(
    recipe: Recipe,
    stage: str,
    *,
    lora: Lora | None,
    trains: tuple[Trained, ...] = (),
    loss: Loss | None = None,
    branches: BranchSchedule | None = None,
) -> tuple[Step, ...]:
    """The end-to-end stage of this name, or nothing where the schedule leaves it out."""
    schedule = recipe.schedule[stage]
    if schedule is None:
        return ()
    data = schedule.data or recipe.data
    return (
        Tune(
            stage=stage,
            lora=lora,
            trains=trains,
            loss=loss or Loss(),
            branches=branches,
            schedule=schedule,
            data=data,
        ),
    )


def calibrate_scale(recipe: Recipe, size: Schedule, batches: int) -> tuple[Step, ...]:
    """The closed form of c_h for the `absolute` join, on batches as large as those of `size`, of its data."""
    data = size.data or recipe.data
    return (Calibrate(what="log_scale", data=data, batches=batches, batch=size.batch, length=size.length),)
