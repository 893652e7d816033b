"""T2R (arXiv 2103.13076): features relu(xW + b), learned with the next-token loss alone, no transfer (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ..attention.hybrid.config import Config as Hybrid
from ..attention.hybrid.config import FeatureMap
from ..base import Config as Base
from ..compose import in_layers, linear_state, tune
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..steps import ConvertedLayers, Lora, Step, Swap, Switch, Trained


class Config(Base):
    """Stage `tune`: LoRA and feature maps, the linear branch alone. b is one a feature; LoLCATs' code has one a head.

    Sample YAML: `{name: t2r}`, `{name: t2r, form: {feature_map: {name: t2r, activation: relu, bias: head, init: random}}}`
    """

    name: Literal["t2r"] = "t2r"
    form: Hybrid = Hybrid(feature_map=FeatureMap(name="t2r", activation="relu", bias="feature", init="random"))
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = Field(
        64, description="of the state `window` in the evaluation; the model has none"
    )
    lora: Lora | None = Field(Lora(), description="null: all weights, as T2R itself")
    tune_form: tuple[Trained, ...] = ("feature_maps",)


STAGES: dict[str, Schedule | None] = {
    "tune": Schedule(epochs=2.0, batch=1, accumulation=8, length=1024, optimizer=Optimizer(lr=1e-4)),  # as LoLCATs
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the linear branch, tune it."""
    method = recipe.method
    assert isinstance(method, Config)
    return in_layers(
        recipe,
        method.layers,
        Swap(form="hybrid", config=method.form),
        Switch(state=linear_state(window=method.window)),
        *tune(recipe, "tune", lora=method.lora, trains=method.tune_form),
    )
