"""A published conversion as it is: no training, only its window switched on for the evaluations (no torch)."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..attention.hybrid.config import Config as Hybrid
from ..attention.hybrid.config import FeatureMap
from ..base import Config as Base
from ..recipe import Recipe
from ..schedule import Schedule
from ..states import Compat, Shape, State, check_compat
from ..steps import Step, StepsError, Swap, Switch


class Config(Base):
    """Lays the weights of `model.converted` into the teacher. Defaults: LoLCATs' Llama-3.1-8B as its authors evaluate it.

    `compat: lolcats_tk_v1` is the terraced window of the published code, with its three defects; null leaves them out.
    Width and activation are not in the files by name: a width that does not fit their shapes is refused before any work.
    Sample YAML: `{name: converted, window: 64, shape: terraced, compat: lolcats_tk_v1}`
    """

    name: Literal["converted"] = "converted"
    window: Annotated[int, Field(ge=1)] = Field(64, description="LoLCATs: 64")
    shape: Shape = Field("terraced", description="LoLCATs, wtk configs: terraced")
    compat: Compat | None = Field("lolcats_tk_v1", description="null: the window without its defects")
    width: Annotated[int, Field(ge=1)] = Field(
        1, description="features as a multiple of head_dim; LoLCATs' feature_dim 64 a sign of head_dim 128 is 1"
    )
    activation: Literal["softmax", "exp"] = Field("softmax", description="LoLCATs' softmax_dim, exp_dim (full space)")

    @model_validator(mode="after")
    def _compat_fits(self) -> "Config":
        check_compat(self)
        return self


STAGES: Mapping[str, Schedule | None] = {}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap with the published weights, then switch to their window. Raises StepsError without `model.converted`."""
    method = recipe.method
    assert isinstance(method, Config)
    if recipe.model.converted is None:
        raise StepsError(
            "method: converted starts from published weights: give model.converted, e.g. "
            "{format: lolcats, distill: PATH.pt, finetune: PATH.pt}"
        )
    form = Hybrid(feature_map=FeatureMap(activation=method.activation, width=method.width))
    state = State(window=method.window, shape=method.shape, compat=method.compat)
    return (Swap(form="hybrid", config=form, published=recipe.model.converted), Switch(state=state))
