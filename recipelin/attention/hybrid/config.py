"""Structure of the `hybrid` form (no torch): feature maps and their parameter counts."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ...base import Config as Base
from ...families import Architecture
from ..form import Form


class FeatureMap(Base):
    """phi of the linear branch, one map a head and layer, separate for queries and keys.

    hedgehog: [act(xW); act(-xW)]. t2r: relu(xW + b). fixed: [act(x); act(-x)], nothing to learn.

    Sample YAML: `{name: hedgehog, activation: softmax, width: 2}`, `{name: t2r, activation: relu, bias: feature, init: random}`,
    `{name: fixed, activation: elu, width: 2}`
    """

    name: Literal["hedgehog", "t2r", "fixed"] = "hedgehog"
    activation: Literal["softmax", "exp", "relu", "elu", "none"] = Field(
        "softmax", description="arXiv 2510.05901 Table 4: softmax is best; elu is 1 + ELU"
    )
    width: Annotated[int, Field(ge=1)] = Field(
        1, description="features as a multiple of head_dim: 1 LoLCATs (128 of 128), 2 arXiv 2510.05901 (256 of 128)"
    )
    features: Literal["matched", "as_lolcats"] = Field(
        "matched", description="as_lolcats: relu and elu without the second sign, half the features: LoLCATs' code"
    )
    bias: Literal["none", "feature", "head"] = Field(
        "none", description="b of t2r: one a feature (arXiv 2410.10254), or one scalar a head (LoLCATs' code)"
    )
    token_scale: bool = Field(
        False, description="phi(x) exp(u.x), one u a head: features may grow with their token (facts/pocket.md §F)"
    )
    key_heads: Literal["query", "key"] = Field(
        "query", description="keys' map for each query head (LoLCATs), or each key head: a state G times smaller"
    )
    init: Literal["identity", "random"] = Field(
        "identity", description="W starts as the identity (LoLCATs --lk_zero_init), further columns kaiming-uniform"
    )
    clamp: Annotated[float, Field(gt=0)] = Field(1e-12, description="features are at least this (LoLCATs); not `none`")

    @model_validator(mode="after")
    def _fits(self) -> "FeatureMap":
        if self.name == "t2r" and self.activation != "relu":
            raise ValueError(f"t2r is relu(xW + b); found activation {self.activation!r}, expected relu")
        if self.name == "fixed" and self.width != 2:
            raise ValueError(f"fixed has both signs of x, width 2; found width {self.width}")
        if self.bias != "none" and self.name != "t2r":
            raise ValueError(f"bias: {self.bias} belongs to t2r; found {self.name}")
        if self.features == "as_lolcats" and (self.name != "hedgehog" or self.activation not in ("relu", "elu")):
            raise ValueError("features: as_lolcats concerns the activations relu and elu of hedgehog only")
        return self

    def columns(self, head_dim: int) -> int:
        """Columns of W: half of the features where both signs are taken."""
        return self.width * head_dim if self.name == "t2r" else self.width * head_dim // 2

    def size(self, head_dim: int) -> int:
        """F: features of one head."""
        both = self.name != "t2r" and self.features == "matched"
        return self.columns(head_dim) * (2 if both else 1)

    def parameters(self, head_dim: int) -> int:
        """Of one head's map of one side."""
        if self.name == "fixed":
            found = 0
        else:
            found = head_dim * self.columns(head_dim)
            found += {"none": 0, "feature": self.columns(head_dim), "head": 1}[self.bias]
        return found + (head_dim if self.token_scale else 0)


class Config(Form):
    """Softmax over a window joined with linear attention over the rest (DESIGN §5).

    Sample YAML: `{feature_map: {width: 2}, mix: 0.1}`
    """

    OBJECTIVES: ClassVar[tuple[str, ...]] = (
        "weights",
        "outputs",
        "hybrid_weights",
        "hybrid_outputs",
        "block_outputs",
    )
    STATELESS: ClassVar[tuple[str, ...]] = ("weights",)

    feature_map: FeatureMap = FeatureMap()
    mix: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="start of g_h = sigmoid(theta_h) (LoLCATs: logit -2.1972)"
    )
    teacher_window: Literal["cut", "ignore"] = Field(
        "cut",
        description="where the teacher has a window of its own (Mistral): `cut` ends the linear branch there too, exact, with "
        "a state of that many keys; `ignore` lets it see all keys, with a small state",
    )
    kernel: Literal["auto", "reference", "chunked", "cpu", "gpu"] = Field(
        "auto",
        description="the operator's implementation; cpu: C kernels of a CPU, which `auto` takes where there is a C compiler; "
        "gpu: Triton kernels, which `auto` takes where they are proven (Hopper with Triton 3.6 or 3.7)",
    )

    def features(self, architecture: Architecture) -> int:
        """F: features of one head (both signs together)."""
        return self.feature_map.size(architecture.head_dim)

    def reach(self, architecture: Architecture, layer: int) -> int | None:
        """How far a layer's branches may look, the query included; None: no limit."""
        return architecture.own_window(layer) if self.teacher_window == "cut" else None

    def refuses_calibration(self, what: str, rule: Base | None) -> str:
        """It has log_scale alone, without settings."""
        has = what == "log_scale" and rule is None
        return "" if has else f"the hybrid form has no calibration {what!r}; it has log_scale, without settings"

    def parameters(self, architecture: Architecture) -> dict[str, int]:
        """New parameters of one layer, by group: held against the built module by a test."""
        key_heads = (
            architecture.num_attention_heads
            if self.feature_map.key_heads == "query"
            else architecture.num_key_value_heads
        )
        maps = (architecture.num_attention_heads + key_heads) * self.feature_map.parameters(architecture.head_dim)
        return {
            "feature_maps": maps,
            "mix": architecture.num_attention_heads,
            "log_scale": architecture.num_attention_heads,
        }

    def flops(self, architecture: Architecture, keys: int) -> float:
        """8 w d + 2 w F + 6 F d a head, w = `keys`, in chunks as long (facts/performance.md §2)."""
        d, features = architecture.head_dim, self.features(architecture)
        return float(architecture.num_attention_heads * (8 * keys * d + 2 * keys * features + 6 * features * d))

    def saved(self, architecture: Architecture) -> int:
        """Features of queries and keys."""
        return 2 * architecture.num_attention_heads * self.features(architecture)
