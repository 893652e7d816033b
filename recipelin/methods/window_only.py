"""Sinks and a window, no linear branch: the honest control of every hybrid (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..compose import in_layers, tune
from ..recipe import Recipe
from ..schedule import Schedule
from ..states import State
from ..steps import ConvertedLayers, Lora, Step, Swap, Switch


class Config(Base):
    """Cuts the teacher's attention to a window; stage `tune` (off by default) adapts it by LoRA.

    Sample YAML: `{name: window_only, window: 32, sinks: 4}`
    """

    name: Literal["window_only"] = "window_only"
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = 64
    sinks: Annotated[int, Field(ge=0)] = 0
    lora: Lora = Lora()


STAGES: dict[str, Schedule | None] = {"tune": None}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the window, tune if the schedule says so."""
    method = recipe.method
    assert isinstance(method, Config)
    state = State(
        branches=("window", "sinks") if method.sinks else ("window",), window=method.window, sinks=method.sinks
    )
    return in_layers(
        recipe,
        method.layers,
        Swap(form="hybrid", config=Hybrid()),
        Switch(state=state),
        *tune(recipe, "tune", lora=method.lora),
    )
