"""Ours: weight transfer of the linear form, then both branches joined in absolute units (facts/pocket.md §F; no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..branches import BranchSchedule
from ..compose import calibrate_scale, hybrid_state, in_layers, transfer, tune
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..steps import ConvertedLayers, Lora, Loss, Objective, Step, Swap, Switch, Trained


class Config(Base):
    """Stage `transfer`: cross-entropy of the pure linear weights (Hedgehog). Then c_h of the `absolute` join in closed
    form. Stage `refine`, off by default: cross-entropy of the joint weights + `linear_share` of the linear one, c_h
    learned along. Stage `tune`, off by default: LoRA, or all weights with `lora: null`, on `loss`; `branches` may drop the
    window in a share of its steps, which keeps the linear branch alive.

    Sample YAML: `{name: absolute, window: 32, form: {feature_map: {width: 8, token_scale: true}},
    loss: {lm: 0, kl: 1}, branches: {dropout: [{until: 1, value: 0.25}], granularity: step}}`
    """

    name: Literal["absolute"] = "absolute"
    form: Hybrid = Hybrid()
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = 64
    sinks: Annotated[int, Field(ge=0)] = 0
    cover: Literal["outside", "all"] = "outside"
    calibration_batches: Annotated[int, Field(ge=0)] = Field(
        8, description="batches of the closed form of c_h; 0: c starts at 0"
    )
    linear_share: Annotated[float, Field(ge=0)] = Field(
        0.3, description="weight of the linear objective in `refine`: keeps linear-only alive (facts/pocket.md §F)"
    )
    loss: Loss = Field(Loss(), description="of stage `tune`; facts/pocket.md §F, recipe C: {lm: 0, kl: 1}")
    branches: BranchSchedule | None = Field(None, description="of stage `tune`: steps without the window")
    lora: Lora | None = Field(Lora(), description="null: all weights train in `tune`")
    tune_form: tuple[Trained, ...] = ()


STAGES: dict[str, Schedule | None] = {
    "transfer": Schedule(steps=150, batch=4, length=1024, optimizer=Optimizer(lr=3e-2)),  # facts/pocket.md §F, recipe A
    "refine": None,
    "tune": None,
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, transfer the linear weights, switch to the absolute join, calibrate c_h, then what the schedule adds."""
    method = recipe.method
    assert isinstance(method, Config)
    state = hybrid_state(window=method.window, sinks=method.sinks, cover=method.cover, join="absolute")
    refined: dict[Objective, float] = {"hybrid_weights": 1.0}
    if method.linear_share:
        refined["weights"] = method.linear_share
    return in_layers(
        recipe,
        method.layers,
        Swap(form="hybrid", config=method.form),
        *transfer(recipe, "transfer", {"weights": 1.0}, ("feature_maps",)),
        Switch(state=state),
        *(calibrate_scale(recipe, STAGES, method.calibration_batches) if method.calibration_batches else ()),
        *transfer(recipe, "refine", refined, ("feature_maps", "log_scale")),
        *tune(
            recipe,
            "tune",
            lora=method.lora,
            trains=method.tune_form,
            loss=method.loss,
            branches=method.branches,
        ),
    )
