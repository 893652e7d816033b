"""Ours: weight transfer of the linear form, then both branches joined in absolute units (facts/pocket.md §F; no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..states import Branch, State
from ..steps import Calibrate, Lora, Objective, Step, Swap, Switch, Trained, Transfer, Tune


class Config(Base):
    """Stage `transfer`: cross-entropy of the pure linear weights (Hedgehog). Then c_h of the `absolute` join in closed
    form. Stage `refine`, off by default: cross-entropy of the joint weights + `linear_share` of the linear one, c_h
    learned along. Stage `tune`, off by default: LoRA.

    Sample YAML: `{name: absolute, window: 32, form: {feature_map: {width: 8}}}`
    """

    name: Literal["absolute"] = "absolute"
    form: Hybrid = Hybrid()
    window: Annotated[int, Field(ge=1)] = 64
    sinks: Annotated[int, Field(ge=0)] = 0
    cover: Literal["outside", "all"] = "outside"
    calibration_batches: Annotated[int, Field(ge=1)] = Field(8, description="batches of the closed form of c_h")
    linear_share: Annotated[float, Field(ge=0)] = Field(
        0.3, description="weight of the linear objective in `refine`: keeps linear-only alive (facts/pocket.md §F)"
    )
    lora: Lora = Lora()
    tune_form: tuple[Trained, ...] = ()


STAGES = {
    "transfer": Schedule(steps=150, batch=4, length=1024, optimizer=Optimizer(lr=3e-2)),  # facts/pocket.md §F, recipe A
    "refine": None,
    "tune": None,
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, transfer the linear weights, switch to the absolute join, calibrate c_h, then what the schedule adds."""
    method = recipe.method
    assert isinstance(method, Config)
    branches: tuple[Branch, ...] = ("window", "linear", "sinks") if method.sinks else ("window", "linear")
    state = State(branches=branches, window=method.window, sinks=method.sinks, cover=method.cover, join="absolute")
    found: list[Step] = [Swap(form="hybrid", config=method.form)]
    transfer = recipe.schedule["transfer"]
    if transfer:
        found.append(
            Transfer(
                stage="transfer",
                objective={"weights": 1.0},
                trains=("feature_maps",),
                schedule=transfer,
                data=transfer.data or recipe.data,
            )
        )
    found.append(Switch(state=state))
    size = transfer or STAGES["transfer"]
    assert size is not None
    found.append(
        Calibrate(
            what="log_scale",
            data=(transfer.data if transfer else None) or recipe.data,
            batches=method.calibration_batches,
            batch=size.batch,
            length=size.length,
        )
    )
    if schedule := recipe.schedule["refine"]:
        objective: dict[Objective, float] = {"hybrid_weights": 1.0}
        if method.linear_share:
            objective["weights"] = method.linear_share
        found.append(
            Transfer(
                stage="refine",
                objective=objective,
                trains=("feature_maps", "log_scale"),
                schedule=schedule,
                data=schedule.data or recipe.data,
            )
        )
    if schedule := recipe.schedule["tune"]:
        found.append(
            Tune(
                stage="tune",
                lora=method.lora,
                trains=method.tune_form,
                schedule=schedule,
                data=schedule.data or recipe.data,
            )
        )
    return tuple(found)
