"""Inference-time hybrid (arXiv 2510.05901, remedy 1): a linear-only conversion that meets its window untrained (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..compose import calibrate_scale, hybrid_state, in_layers, linear_state, transfer, tune
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..states import Join
from ..steps import ConvertedLayers, Lora, Step, Swap, Switch, Trained


class Config(Base):
    """Stage `transfer`: cross-entropy of the linear weights. Stage `tune`, off by default: LoRA of the linear branch alone.
    Then the window joins, and nothing is trained any more; `absolute` sets its c_h in closed form.

    A grid over window, sinks, cover, join and mix sweeps one model: the steps before are made once.
    Sample YAML: `{name: inference_hybrid, window: 64, join: replace}`, `{name: inference_hybrid, join: shared, mix: 0.3}`
    """

    name: Literal["inference_hybrid"] = "inference_hybrid"
    form: Hybrid = Hybrid()
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = 64
    sinks: Annotated[int, Field(ge=0)] = 0
    cover: Literal["outside", "all"] | None = Field(
        None, description="None: all keys for `average` and `sum`, as Liger averages; outside the window for the others"
    )
    join: Join = Field("replace", description="the paper's rule was not found; `replace` needs no scale")
    mix: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="g of `shared`; None: where it starts (0.1)"
    )
    calibration_batches: Annotated[int, Field(ge=1)] = Field(8, description="of c_h, for join: absolute")
    lora: Lora = Lora()
    tune_form: tuple[Trained, ...] = ()


STAGES: dict[str, Schedule | None] = {
    "transfer": Schedule(epochs=1.0, batch=1, accumulation=8, length=1024, optimizer=Optimizer(lr=1e-2)),
    "tune": None,
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the linear branch, transfer, tune; then switch to the hybrid, and calibrate where its join asks."""
    method = recipe.method
    assert isinstance(method, Config)
    cover = method.cover or ("all" if method.join in ("average", "sum") else "outside")
    state = hybrid_state(window=method.window, sinks=method.sinks, cover=cover, join=method.join, mix=method.mix)
    return in_layers(
        recipe,
        method.layers,
        Swap(form="hybrid", config=method.form),
        Switch(state=linear_state()),
        *transfer(recipe, "transfer", {"weights": 1.0}, ("feature_maps",)),
        *tune(recipe, "tune", lora=method.lora, trains=method.tune_form),
        Switch(state=state),
        *(calibrate_scale(recipe, STAGES, method.calibration_batches) if method.join == "absolute" else ()),
    )
