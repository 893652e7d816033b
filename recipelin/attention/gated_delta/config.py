"""Structure of the `gated_delta` form (no torch): what of the teacher is kept, the gates, and parameter counts."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ... import families
from ...base import Config as Base
from ...families import Architecture
from ...mistakes import among
from ...states import NAMES, State
from ..form import Form
from .rules import RULES, WriteGateRule

STATE = State(branches=("linear",), window="full", cover="all")
"""The student as it is: one linear branch over all keys. Its `softmax` state has no window either."""

STATES = ("teacher", "softmax", "hybrid", "none")
CHUNK = 32  # of the operator on a CPU, for estimates


class Decay(Base):
    """Start of g_t = -exp(A_log) softplus(a_proj x + dt_bias), the log of the decay; one A_log and dt_bias a head.

    Sample YAML: `{rate: [0.0, 16.0], step: [0.001, 0.1]}`
    """

    rate: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(
        (0.0, 16.0), description="exp(A_log) is drawn uniformly from here (fla's GatedDeltaNet, after Mamba2: 0 to 16)"
    )
    step: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1e-3, 0.1), description="softplus(dt_bias) is drawn log-uniformly from here (fla, after Mamba2: 0.001 to 0.1)"
    )

    @model_validator(mode="after")
    def _rising(self) -> "Decay":
        for name in ("rate", "step"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name}: [{low:g}, {high:g}] does not rise")
        return self


class WriteGate(Base):
    """beta_t = sigmoid(b_proj x), how much of what a key held is overwritten. Sample YAML: `{bias: true}`"""

    bias: bool = Field(
        False,
        description="a bias in b_proj, 0 at the start (fla: none; without one the mean of beta_t stays near 1/2, "
        "whatever the rows of b_proj are)",
    )


class Config(Form):
    """Gated delta rule (arXiv 2412.06464) with the teacher's projections, as the student of arXiv 2606.16429 has it:

        q_t = n(act(W_q x_t))    k_t = n(act(W_k x_t))    v_t = act(W_v x_t)          n: L2 norm over a head
        S_t = exp(g_t) (S_{t-1} - beta_t S_{t-1} k_t k_t^T) + beta_t v_t k_t^T        o_t = scale S_t q_t
        y_t = W_o concat_h( RMSNorm(o_t) * silu(W_g x_t) )

    Heads: the teacher's query heads; its key and value heads are repeated, in the weights. Everything is a layer's own
    copy. Not offered: values wider than keys (fla's expand_v), fewer query than value heads.

    Sample YAML: `{activation: silu, rope: none, qk_norm: drop, output_gate: silu, short_convolution: null}`
    """

    NAME: ClassVar[str] = "gated_delta"
    PROJECTIONS: ClassVar[tuple[str, ...]] = ("projections", "output_projection")
    OBJECTIVES: ClassVar[tuple[str, ...]] = ("outputs", "block_outputs")

    activation: Literal["silu", "none"] = Field(
        "silu", description="on q and k (fla: silu, where there is no short convolution, and after it)"
    )
    value_activation: Literal["silu", "none"] = Field("silu", description="on v (fla: silu)")
    l2_norm: bool = Field(
        True, description="q and k to unit length, eps 1e-6 as in fla; false: the rule may become unstable"
    )
    scale: Annotated[float, Field(gt=0)] | None = Field(None, description="of q; null: head_dim^-1/2 (fla)")
    decay: Decay = Decay()
    write_gate: WriteGate = WriteGate()
    allow_negative_eigenvalues: bool = Field(
        False, description="beta_t in (0, 2): a key's old value may change its sign (fla's allow_neg_eigval: false)"
    )
    output_gate: Literal["silu", "none"] = Field(
        "silu", description="silu(g_proj x) on the normed output (fla's use_gate: true); none: the norm alone"
    )
    norm_eps: Annotated[float, Field(gt=0)] = Field(1e-5, description="of the RMSNorm of o_t over a head (fla: 1e-5)")
    short_convolution: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="width in tokens of a causal convolution of each channel of q, k and v, before the activation; starts as "
        "the identity. null: none, as arXiv 2606.16429 (fla: 4)",
    )
    kv_expand: Literal["head_repeat", "row_interleave_legacy"] = Field(
        "head_repeat",
        description="key and value heads to query heads: whole heads repeated, or single rows, which scrambles the heads: the "
        "bug of the authors' code of arXiv 2606.16429, to reproduce its numbers",
    )
    qkv_bias: Literal["drop", "keep"] = Field(
        "drop", description="the teacher's biases of q, k and v (Qwen2.5; arXiv 2606.16429: drop)"
    )
    qk_norm: Literal["drop", "fold"] = Field(
        "drop",
        description="the teacher's RMSNorm of q and k (Qwen3): the L2 norm stands in; fold: its gains go into the rows of "
        "W_q and W_k (arXiv 2606.16429: drop)",
    )
    rope: Literal["none", "keep"] = Field(
        "none", description="the teacher's RoPE on q and k, after activation and norm (arXiv 2606.16429: none)"
    )
    gate_std: Annotated[float, Field(ge=0)] = Field(
        0.02,
        description="start of a_proj, b_proj and g_proj: normal with this deviation (arXiv 2606.16429's code: 0.02 at hidden "
        "sizes of 1536 to 4096; 0.9 / sqrt(hidden_size) has the same effect at others)",
    )
    kernel: Literal["auto", "reference", "chunked", "fla"] = Field(
        "auto", description="the operator's implementation; fla: its Triton kernels, on a GPU"
    )

    @model_validator(mode="after")
    def _known_trade(self) -> "Config":
        if self.rope == "keep" and self.kv_expand == "row_interleave_legacy":
            raise ValueError("rope: keep turns pairs of a head's channels, which row_interleave_legacy has scrambled")
        return self

    def biased(self, architecture: Architecture) -> bool:
        """Whether q, k and v of the student have a bias."""
        has = families.family(architecture.model_type).qkv_bias or architecture.attention_bias
        return has and self.qkv_bias == "keep"

    def parameters(self, architecture: Architecture) -> dict[str, int]:
        """Of one layer by group: q, k and v; o; a_proj, A_log and dt_bias; b_proj; g_proj; the norm; the convolutions."""
        hidden, heads = architecture.hidden_size, architecture.num_attention_heads
        wide = heads * architecture.head_dim
        return {
            "projections": 3 * wide * (hidden + self.biased(architecture)),
            "output_projection": hidden * (wide + architecture.attention_bias),
            "decay": heads * (hidden + 2),
            "write_gate": heads * (hidden + self.write_gate.bias),
            "output_gate": wide * hidden if self.output_gate == "silu" else 0,
            "output_norm": architecture.head_dim,
            "short_convolution": 3 * wide * (self.short_convolution or 0),
        }

    def added(self, architecture: Architecture) -> int:
        """What the form has more than the attention that it replaces."""
        return sum(self.parameters(architecture).values()) - families.parameters(architecture)["attention"]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, int]]:
        """As the family's, but for k and v, which have as many heads as q."""
        found = families.shapes(architecture)
        return {**found, "k_proj": found["q_proj"], "v_proj": found["q_proj"]}

    def flops(self, architecture: Architecture, keys: int) -> float:
        """10 C d + C^2 + 6 d^2 a head with chunk C: five products of C x C with C x d, one solve, three with the state; and 2
        for each weight more than the teacher's attention has (gates, repeated heads).
        """
        d = architecture.head_dim
        rule = architecture.num_attention_heads * (10 * CHUNK * d + CHUNK**2 + 6 * d * d)
        return float(rule + 2 * max(0, self.added(architecture)))

    def saved(self, architecture: Architecture) -> int:
        """q, k, v, output and output gate; g and beta."""
        return architecture.num_attention_heads * (5 * architecture.head_dim + 2)

    def refuses_calibration(self, what: str, rule: Base | None) -> str:
        """A name or settings that it does not have, and parameters that this config leaves out."""
        kind = next((r for r in RULES if what == r.WHAT), None)
        if kind is None:
            return f"the form has no calibration {what!r}{among(what, [r.WHAT for r in RULES], 'it has')}"
        if not isinstance(rule, kind):
            return f"calibration {what!r} takes a {kind.__name__}, found {type(rule).__name__}"
        if "output_gate" in kind.NEEDS and self.output_gate == "none":
            return f"calibration {what!r} sets the output gate, and form: {{output_gate: none}} has none"
        if isinstance(rule, WriteGateRule) and rule.mode == "bias" and not self.write_gate.bias:
            return "calibration 'write_gate' with mode: bias needs form: {write_gate: {bias: true}}"
        return ""

    def refuses(self, name: str, state: State, architecture: Architecture) -> str:
        """A state with a window, sinks or a limited linear branch; `softmax` where the weights no longer allow it."""
        have = f"its states are {', '.join(STATES)}"
        if name == "linear":
            return f"{self.NAME} is a linear branch over all keys and nothing else, so `linear` is `hybrid`; {have}"
        softmax = state.branches == ("window",) and state.window == "full"
        whole = state.branches == ("linear",) and state.window == "full" and state.cover == "all"
        if (name in NAMES and name not in STATES) or not (softmax or whole or not state.branches):
            return f"{self.NAME} has no window, no sinks, and no keys that its linear branch leaves out; {have}"
        return self.no_softmax(architecture) if softmax else ""

    def no_softmax(self, architecture: Architecture) -> str:
        """Why the student's projections cannot be used by softmax attention; empty where they can."""
        row = families.family(architecture.model_type)
        grouped = architecture.num_key_value_heads < architecture.num_attention_heads
        if grouped and self.kv_expand == "row_interleave_legacy":
            lost = "kv_expand: row_interleave_legacy scrambled their heads"
        elif (row.qkv_bias or architecture.attention_bias) and self.qkv_bias == "drop":
            lost = "qkv_bias: drop left the teacher's biases out; qkv_bias: keep has the state"
        elif self.short_convolution:
            lost = "they are followed by short convolutions"
        elif row.qk_norm:
            lost = f"the q/k norm of {architecture.model_type} is not in them (qk_norm: {self.qk_norm})"
        else:
            return ""
        return f"softmax attention with the student's q, k and v would mean nothing: {lost}"
