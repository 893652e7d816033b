"""Structure of the `native` form (no torch): gated_delta in the shape of a stock architecture."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from ...families import Architecture
from ..gated_delta.config import Config as GatedDelta


class Config(GatedDelta):
    """gated_delta with the settings that transformers' `qwen3_5_text` (Qwen3.5, dense) has for every linear layer, so that
    a student of a Qwen3 teacher is such a model: a run writes it to `stock/`, which loads without recipelin and gives the
    same logits. Retained layers are written there as Qwen3.5's gated attention with a gate of 1/2 everywhere and a doubled
    W_o. Teachers of other families have no such shape, and at least one layer has to stay softmax.

    Sample YAML: `{short_convolution: 4, norm_eps: 1.0e-6}`
    """

    NAME: ClassVar[str] = "native"
    STOCK: ClassVar[str] = "qwen3_5_text"
    FIXED: ClassVar[dict[str, object]] = {
        "activation": "silu",
        "value_activation": "silu",
        "l2_norm": True,
        "scale": None,
        "allow_negative_eigenvalues": False,
        "output_gate": "silu",
        "qkv_bias": "drop",
        "rope": "none",
    }

    norm_eps: Annotated[float, Field(gt=0)] = Field(
        1e-6,
        description="of the RMSNorm of o_t; the teacher's rms_norm_eps, as qwen3_5_text has one for all (Qwen3: 1e-6)",
    )
    short_convolution: Annotated[int, Field(ge=2, le=4)] | None = Field(
        None,
        description="width in tokens, at most 4, as GPU kernels go no further; null: written as one that does nothing",
    )

    @model_validator(mode="after")
    def _stock(self) -> "Config":
        wrong = [f"{n}: {getattr(self, n)}" for n, x in self.FIXED.items() if getattr(self, n) != x]
        if self.write_gate.bias:
            wrong.append("write_gate: {bias: true}")
        if wrong:
            raise ValueError(f"{self.STOCK} has no {', no '.join(wrong)}; use form gated_delta for it")
        return self

    def refuses_teacher(self, architecture: Architecture, kept: int) -> str:
        """Whatever a `qwen3_5_text` cannot hold of a teacher."""
        shape = f"form native is written as {self.STOCK}, "
        if architecture.model_type != "qwen3":
            return (
                f"{shape}whose softmax layers have Qwen3's q/k norm; found a teacher of model_type "
                f"{architecture.model_type!r}, expected 'qwen3' (form gated_delta takes any)"
            )
        if not kept:
            return f"{shape}which needs a softmax layer; found none kept, expected one at least"
        if architecture.rms_norm_eps != self.norm_eps:
            return (
                f"{shape}which has one eps for all norms; found norm_eps {self.norm_eps:g} beside the teacher's "
                f"{architecture.rms_norm_eps:g}, expected the same"
            )
        lost = {
            "biases": architecture.attention_bias or architecture.mlp_bias,
            "an own window": architecture.sliding_window is not None,
            "scaled RoPE": architecture.rope_scaling is not None,
        }
        if found := [name for name, there in lost.items() if there]:
            return f"{shape}which has no {', no '.join(found)}; this teacher has"
        return ""
