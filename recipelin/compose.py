"""Pieces that methods compose their steps from (no torch)."""

from collections.abc import Mapping
from typing import Any

from .branches import BranchSchedule
from .recipe import Recipe
from .schedule import Schedule
from .states import Branch, State
from .steps import (
    BlockLoss,
    Calibrate,
    Choice,
    ConvertedLayers,
    FromSelect,
    Lora,
    Loss,
    Objective,
    Select,
    Step,
    StepsError,
    Swap,
    Trained,
    Transfer,
    Tune,
)


def in_layers(recipe: Recipe, layers: ConvertedLayers, *steps: Step, untrained: int | None = None) -> tuple[Step, ...]:
    """A method's `steps` for all layers, made to convert those that its field `layers` says.

    A Choice that measures tries each candidate in the student as the steps before the first `Tune` leave it. For
    `kl_stage2` a `Tune` of all weights on KL(teacher || student) follows, whose `trains` are what those steps trained.
    `untrained`: how many of `steps` make the student in which `single_keep_ppl` tries; None: those before the first `Tune`.
    """
    if layers == "all":
        return steps
    where = FromSelect() if isinstance(layers, Choice) else layers
    moved = tuple(s.model_copy(update={"layers": where}) if isinstance(s, Swap) else s for s in steps)
    if not isinstance(layers, Choice):
        return moved
    probe: list[Any] = []
    if layers.policy in ("single_keep_ppl", "kl_stage2"):
        first = next((i for i, s in enumerate(steps) if isinstance(s, Tune)), len(steps))
        first = first if untrained is None or layers.policy == "kl_stage2" else untrained
        probe += [_uncurved(s) for s in steps[:first]]
    if layers.tune:
        trains = tuple(dict.fromkeys(name for s in probe if isinstance(s, Transfer) for name in s.trains))
        data = layers.tune.data or recipe.data
        loss = Loss(lm=0.0, kl=1.0)
        probe.append(Tune(stage="tune", lora=None, trains=trains, loss=loss, schedule=layers.tune, data=data))
    given = {name: getattr(layers, name) for name in Choice.model_fields if name != "data"}
    data_of_rows = (layers.data or recipe.data) if layers.scored else None
    return (Select(**given, data=data_of_rows, probe=tuple(probe)), *moved)


def _uncurved(step: Step) -> Step:
    """A step of a probe: nothing is measured while it trains, or beside what it sets."""
    if isinstance(step, Calibrate):
        return step.model_copy(update={"held_out": 0})
    if not isinstance(step, Transfer):
        return step
    return step.model_copy(update={"schedule": step.schedule.model_copy(update={"curve": None})})


def hybrid_state(*, sinks: int = 0, **fields: Any) -> State:
    """Window and linear branch, and the sinks where there are some; `fields` as in State."""
    branches: tuple[Branch, ...] = ("window", "linear", "sinks") if sinks else ("window", "linear")
    return State(branches=branches, sinks=sinks, **fields)


def linear_state(**fields: Any) -> State:
    """The linear branch alone, over all keys."""
    return State(branches=("linear",), cover="all", **fields)


def transfer(
    recipe: Recipe,
    stage: str,
    objective: Mapping[Objective, float],
    trains: tuple[Trained, ...],
    block_loss: BlockLoss = "mse",
) -> tuple[Step, ...]:
    """The layer-local stage of this name, or nothing where the schedule leaves it out."""
    schedule = recipe.schedule[stage]
    if schedule is None:
        return ()
    data = schedule.data or recipe.data
    return (
        Transfer(
            stage=stage,
            objective=dict(objective),
            trains=trains,
            block_loss=block_loss,
            schedule=schedule,
            data=data,
        ),
    )


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


def joint_transfer(
    recipe: Recipe,
    state: State,
    objective: Mapping[Objective, float],
    *,
    block_loss: BlockLoss,
    stages: Mapping[str, Schedule | None],
    calibration_batches: int,
) -> tuple[Step, ...]:
    """Stage `transfer` of a hybrid in its own state, as LoLCATs: it trains the maps, and what weighs the branches.

    `hybrid_*` objectives and `block_outputs` train the mix of `shared` and c_h of `absolute` along; pure linear ones do
    not see them. c_h is set in closed form: before a joint objective, which then learns it; after a linear one, which does
    not move it.
    """
    if block_loss != "mse" and "block_outputs" not in objective:
        raise StepsError(
            f"method.block_loss: {block_loss} is of the objective block_outputs; found {', '.join(objective)}"
        )
    joint = any(name.startswith(("hybrid", "block")) for name in objective)
    scales: dict[str, tuple[Trained, ...]] = {"shared": ("mix",), "absolute": ("log_scale",)}
    trains: tuple[Trained, ...] = ("feature_maps", *(scales.get(state.join, ()) if joint else ()))
    scale = calibrate_scale(recipe, stages, calibration_batches) if state.join == "absolute" else ()
    learned = transfer(recipe, "transfer", objective, trains, block_loss)
    return (*scale, *learned) if joint else (*learned, *scale)


def calibrate_scale(recipe: Recipe, stages: Mapping[str, Schedule | None], batches: int) -> tuple[Step, ...]:
    """The closed form of c_h for the `absolute` join, on the data of stage `transfer`, in batches of its size.

    `stages`: the method's STAGES, which say it where the recipe leaves the stage out.
    """
    size = recipe.schedule["transfer"] or stages["transfer"]
    assert size is not None
    data = size.data or recipe.data
    return (Calibrate(what="log_scale", data=data, batches=batches, batch=size.batch, length=size.length),)
