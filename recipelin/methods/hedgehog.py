"""Hedgehog whole (arXiv 2402.04347): weight transfer of the linear form, then LoRA of the linear-only model (no torch).

The baseline of every hybrid at equal features and budget (arXiv 2510.05901, reviewers' demand 10).
"""

from typing import Annotated, Literal

from pydantic import Field

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..compose import in_layers, linear_state, transfer, tune
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..steps import ConvertedLayers, Lora, Step, Swap, Switch, Trained


class Config(Base):
    """Stage `transfer`: cross-entropy of the linear weights. Stage `tune`: LoRA with the linear branch alone.

    Sample YAML: `{name: hedgehog, form: {feature_map: {width: 2}}}`
    """

    name: Literal["hedgehog"] = "hedgehog"
    form: Hybrid = Hybrid()
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = Field(
        64, description="of the state `window` in the evaluation; the model has none"
    )
    lora: Lora = Lora()
    tune_form: tuple[Trained, ...] = ()


# LoLCATs' values (arXiv 2510.05901 gives none but one epoch of transfer).
STAGES: dict[str, Schedule | None] = {
    "transfer": Schedule(epochs=1.0, batch=1, accumulation=8, length=1024, optimizer=Optimizer(lr=1e-2)),
    "tune": Schedule(epochs=2.0, batch=1, accumulation=8, length=1024, optimizer=Optimizer(lr=1e-4)),
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the linear branch, transfer its weights, tune it."""
    method = recipe.method
    assert isinstance(method, Config)
    return in_layers(
        recipe,
        method.layers,
        Swap(form="hybrid", config=method.form),
        Switch(state=linear_state(window=method.window)),
        *transfer(recipe, "transfer", {"weights": 1.0}, ("feature_maps",)),
        *tune(recipe, "tune", lora=method.lora, trains=method.tune_form),
    )
