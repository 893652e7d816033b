"""Scheduled sliding-window dropout (arXiv 2510.05901, remedy 3): LoLCATs whose window is dropped in tuning (no torch)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..branches import RATES, BranchSchedule, Rate
from ..compose import hybrid_state, in_layers, joint_transfer, tune
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..states import Join
from ..steps import BlockLoss, ConvertedLayers, Lora, Objective, Step, Swap, Switch, Trained


class Dropped(BranchSchedule):
    """The window's schedule in `tune`: the paper's rates unless others are given; `dropout: []` drops nothing.

    Sample YAML: `{granularity: step}`, `{window: {random: [8, 16, 32]}, dropout: []}`
    """

    dropout: tuple[Rate, ...] = Field(RATES, description="arXiv 2510.05901 Fig. 4a: 0.9, 0.75, 0.5")

    @model_validator(mode="after")
    def _something(self) -> "Dropped":
        if not (self.dropout or self.window):
            raise ValueError("neither dropout nor window: nothing would be scheduled, which is method lolcats")
        return self


class Config(Base):
    """Stage `transfer`: as LoLCATs, or another `objective`. Stage `tune`: LoRA with the window dropped by `branches`
    (0.9, 0.75, 0.5 in the paper). Rates over time, windows, granularity and what a dropped window leaves to the linear
    branch were not found: they are fields. `branches: {window: {random: [8, 16, 32]}, dropout: []}` is SWAX, its rival.

    Sample YAML::

        method:
          name: ssd
          window: 64
          branches: {dropout: [{until: 0.33, value: 0.9}, {until: 0.66, value: 0.75}, {until: 1.0, value: 0.5}]}
    """

    name: Literal["ssd"] = "ssd"
    form: Hybrid = Hybrid()
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = Field(64, description="LoLCATs: 64")
    sinks: Annotated[int, Field(ge=0)] = 0
    cover: Literal["outside", "all"] = "outside"
    join: Join = Field("shared", description="LoLCATs' join; `absolute` sets its c_h in closed form before the LoRA")
    objective: dict[Objective, Annotated[float, Field(gt=0)]] = Field(
        {"hybrid_outputs": 1000.0},
        description="the transfer it starts from; LoLCATs' by default, Hedgehog's: {weights: 1}",
    )
    branches: Dropped = Dropped()
    block_loss: BlockLoss = Field("mse", description="of the objective block_outputs")
    calibration_batches: Annotated[int, Field(ge=1)] = Field(8, description="of c_h, for join: absolute")
    lora: Lora = Lora()
    tune_form: tuple[Trained, ...] = ()


_SHARED = Schedule(epochs=2.0, batch=1, accumulation=8, length=1024)  # LoLCATs' values: the paper's were not found
STAGES: dict[str, Schedule | None] = {
    "transfer": _SHARED.model_copy(update={"optimizer": Optimizer(lr=1e-2)}),
    "tune": _SHARED.model_copy(update={"optimizer": Optimizer(lr=1e-4)}),
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the hybrid, transfer, tune with the window dropped now and then."""
    method = recipe.method
    assert isinstance(method, Config)
    state = hybrid_state(window=method.window, sinks=method.sinks, cover=method.cover, join=method.join)
    return in_layers(
        recipe,
        method.layers,
        Swap(form="hybrid", config=method.form),
        Switch(state=state),
        *joint_transfer(
            recipe,
            state,
            method.objective,
            block_loss=method.block_loss,
            stages=STAGES,
            calibration_batches=method.calibration_batches,
        ),
        *tune(recipe, "tune", lora=method.lora, trains=method.tune_form, branches=method.branches),
    )
