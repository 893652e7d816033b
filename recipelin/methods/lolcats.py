"""LoLCATs (arXiv 2410.10254): output transfer of the hybrid, then LoRA on the next-token loss (no torch)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..attention.hybrid.config import Config as Hybrid
from ..base import Config as Base
from ..compose import hybrid_state, in_layers, joint_transfer, tune
from ..recipe import Recipe
from ..schedule import Decay, Optimizer, Schedule
from ..states import Compat, Join, Shape, check_compat
from ..steps import BlockLoss, ConvertedLayers, Lora, Objective, Step, Swap, Switch, Trained


class Config(Base):
    """Stage `transfer`: MSE x 1000 between hybrid and softmax outputs of each head, before o_proj, layer by layer.
    Stage `tune`: LoRA on q, k, v, o. Feature maps and mix are frozen in `tune` unless `tune_form` names them.

    Sample YAML: `{name: lolcats, window: 64, form: {feature_map: {width: 1}}}`
    """

    name: Literal["lolcats"] = "lolcats"
    form: Hybrid = Hybrid()
    layers: ConvertedLayers = "all"
    window: Annotated[int, Field(ge=1)] = Field(64, description="LoLCATs: 64")
    shape: Shape = Field(
        "sliding", description="LoLCATs: terraced in its published runs (wtk), sliding in others (wsw)"
    )
    sinks: Annotated[int, Field(ge=0)] = Field(0, description="LoLCATs: none")
    cover: Literal["outside", "all"] = "outside"
    compat: Compat | None = Field(
        None, description="with shape: terraced, LoLCATs' published window with its three defects (facts/peers.md A.6)"
    )
    join: Join = Field("shared", description="LoLCATs: shared; another one asks whether it mends the method")
    max_gradient: Literal["through", "detached"] = "through"
    objective: dict[Objective, Annotated[float, Field(gt=0)]] = Field(
        {"hybrid_outputs": 1000.0}, description="LoLCATs: mse_factor 1000, xent_factor 0"
    )
    block_loss: BlockLoss = Field("mse", description="of the objective block_outputs")
    calibration_batches: Annotated[int, Field(ge=1)] = Field(8, description="of c_h, for join: absolute")
    lora: Lora = Lora()
    tune_form: tuple[Trained, ...] = Field((), description="LoLCATs' fqkvo config: [feature_maps, mix]")

    @model_validator(mode="after")
    def _compat_fits(self) -> "Config":
        check_compat(self)
        return self


# LoLCATs configs/experiment: AdamW, lr 1e-2 and 1e-4, plateau x 0.1 (patience 10), batch 1 x 8, 2 epochs, 1024 tokens.
# The published plateau follows a validation on what it also tests; here the rate is constant unless a recipe says more.
_SHARED = Schedule(epochs=2.0, batch=1, accumulation=8, length=1024, decay=Decay(name="constant"))
STAGES = {
    "transfer": _SHARED.model_copy(update={"optimizer": Optimizer(lr=1e-2)}),
    "tune": _SHARED.model_copy(update={"optimizer": Optimizer(lr=1e-4)}),
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """Swap, switch to the hybrid, transfer, tune."""
    method = recipe.method
    assert isinstance(method, Config)
    state = hybrid_state(
        window=method.window,
        shape=method.shape,
        sinks=method.sinks,
        cover=method.cover,
        compat=method.compat,
        join=method.join,
        max_gradient=method.max_gradient,
    )
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
        *tune(recipe, "tune", lora=method.lora, trains=method.tune_form),
    )
