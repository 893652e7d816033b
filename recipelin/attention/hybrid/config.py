"""Structure of the `hybrid` form (no torch): feature maps and their parameter counts."""

from typing import Annotated, Literal

from pydantic import Field

from ...base import Config as Base
from ...families import Architecture


class FeatureMap(Base):
    """Hedgehog: phi(x) = [act(xW); act(-xW)], one W a head and layer, separate for queries and keys.

    Sample YAML: `{name: hedgehog, activation: softmax, width: 2}`
    """

    name: Literal["hedgehog"] = "hedgehog"
    activation: Literal["softmax", "exp", "relu", "elu", "none"] = Field(
        "softmax", description="arXiv 2510.05901 Table 4: softmax is best; elu is 1 + ELU"
    )
    width: Annotated[int, Field(ge=1)] = Field(
        1, description="features as a multiple of head_dim: 1 LoLCATs (128 of 128), 2 arXiv 2510.05901 (256 of 128)"
    )
    key_heads: Literal["query", "key"] = Field(
        "query", description="keys' map for each query head (LoLCATs), or each key head: a state G times smaller"
    )
    init: Literal["identity", "random"] = Field(
        "identity", description="W starts as the identity (LoLCATs --lk_zero_init), further columns kaiming-uniform"
    )
    clamp: Annotated[float, Field(gt=0)] = Field(1e-12, description="features are at least this (LoLCATs); not `none`")


class Config(Base):
    """Softmax over a window joined with linear attention over the rest (DESIGN §5).

    Sample YAML: `{feature_map: {width: 2}, mix: 0.1}`
    """

    feature_map: FeatureMap = FeatureMap()
    mix: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="start of g_h = sigmoid(theta_h) (LoLCATs: logit -2.1972)"
    )
    kernel: Literal["auto", "reference", "chunked"] = Field("auto", description="the operator's implementation")

    def features(self, architecture: Architecture) -> int:
        """F: features of one head (both signs together)."""
        return self.feature_map.width * architecture.head_dim

    def parameters(self, architecture: Architecture) -> dict[str, int]:
        """New parameters of one layer, by group: held against the built module by a test."""
        half = self.features(architecture) // 2
        key_heads = (
            architecture.num_attention_heads
            if self.feature_map.key_heads == "query"
            else architecture.num_key_value_heads
        )
        maps = (architecture.num_attention_heads + key_heads) * architecture.head_dim * half
        return {
            "feature_maps": maps,
            "mix": architecture.num_attention_heads,
            "log_scale": architecture.num_attention_heads,
        }
