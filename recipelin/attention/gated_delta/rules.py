"""Settings of the calibrations of `gated_delta` (no torch): phase 1 of arXiv 2606.16429, and the gates of its other arms."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ...base import Config as Base

Share = Annotated[float, Field(gt=0, lt=1)]


class Rule(Base):
    """What one calibration does; `WHAT` is its name in a `Calibrate`, `NEEDS` the groups of parameters that it sets."""

    WHAT: ClassVar[str] = ""
    NEEDS: ClassVar[tuple[str, ...]] = ()


class DecayRule(Rule):
    """Half-life of a head's memory = its mean look-back in the teacher (its eq. 8).

        distance_h = max(min_distance, mean over rows of sum_j A_ij (i - j)), the diagonal counts `diagonal`
        rate_h = clamp(ln 2 / distance_h, min_rate, max_rate)    A_log = 0    dt_bias = softplus^-1(rate_h)

    exact where a_proj x = 0; the random a_proj of the paper spreads the half-life around it, zero_a_proj takes that away.
    A row of T tokens cannot show more than about T / 2. Sample YAML: `{zero_a_proj: true}`
    """

    WHAT: ClassVar[str] = "decay"
    NEEDS: ClassVar[tuple[str, ...]] = ("decay",)

    min_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="the authors' code: 1e-3")
    max_rate: Annotated[float, Field(gt=0)] = Field(5.0, description="the authors' code: 5")
    min_distance: Annotated[float, Field(gt=0)] = Field(0.5, description="in tokens (the authors' code: 0.5)")
    diagonal: Annotated[float, Field(ge=0)] = Field(0.5, description="distance to itself (the authors' code: 0.5)")
    zero_a_proj: bool = Field(
        False, description="a_proj = 0: every token forgets alike (arXiv 2606.16429: stays random)"
    )

    @model_validator(mode="after")
    def _rising(self) -> "DecayRule":
        if not self.min_rate < self.max_rate:
            raise ValueError(f"min_rate {self.min_rate:g} is not below max_rate {self.max_rate:g}")
        return self


class WriteGateRule(Rule):
    """Heads that look at few keys overwrite more (its eq. 9).

        c_h = 1 - (H_h - min H) / max(max H - min H, 1e-3)    H_h: mean row entropy of the teacher; over heads of a layer
        beta*_h = base + span c_h, the wanted value of sigmoid(b_proj x)

    * rescale_rows (the paper): W_b[h] = logit(beta*_h) / sqrt(D) W_b[h] / mean |W_b[h]|. Rows are random and x has a mean near
      0, so this sets a spread, and the mean of beta stays near 1/2.
    * bias: b_h = logit(beta*_h) - mean over tokens of W_b[h] x, so that the mean logit is the wanted one; needs the form's
      `write_gate: {bias: true}`.
    * ridge: W_b[h] = logit(beta*_h) u, u = argmin |X u - 1|^2 + ridge n mean(x^2) |u|^2: as near to it as x allows without a
      bias.

    Sample YAML: `{mode: ridge, ridge: 0.01}`
    """

    WHAT: ClassVar[str] = "write_gate"
    NEEDS: ClassVar[tuple[str, ...]] = ("write_gate",)

    mode: Literal["rescale_rows", "bias", "ridge"] = "rescale_rows"
    base: Share = Field(0.3, description="arXiv 2606.16429: 0.3")
    span: Annotated[float, Field(ge=0, lt=1)] = Field(0.4, description="arXiv 2606.16429: 0.4")
    ridge: Annotated[float, Field(gt=0)] = Field(1e-2, description="of mode ridge; ours, not tuned")

    @model_validator(mode="after")
    def _below_one(self) -> "WriteGateRule":
        if self.base + self.span >= 1:
            raise ValueError(f"base + span is {self.base + self.span:g}; expected less than 1, it is a gate")
        if self.mode != "ridge" and self.ridge != WriteGateRule.model_fields["ridge"].default:
            raise ValueError(f"ridge is of mode ridge; found mode {self.mode}")
        return self


class ValueRule(Rule):
    """Least squares of the student's context against the teacher's, one factor a head (its eq. 36).

        sigma_h = clamp(<y_T, y_S> / <y_S, y_S>, clip)    W_V[head h] *= sigma_h

    y_T: the teacher's attention before o_proj, y_S: what the recurrence reads before its norm, sums over tokens and channels.
    The norm takes a factor of a head out again: it acts through silu(W_V x) alone, which sigma under 1 makes linear and over 1
    a relu. So sigma is fitted at scale 1, as the paper's formulas have it: at the layer's own, head_dim^-1/2, it is
    sqrt(head_dim) times larger (near 2 sqrt(head_dim), since silu halves small values), which the clip cuts for heads of 32
    and more.

    On teacher pocket-qwen3 (heads of 32, layers 1 to 3, 1,024 tokens of text) it is 1.0 to 2.4 at scale 1 and 5.4 to 13.6 at the
    layer's own (10 of 18 heads cut), where y_S and y_T have a cosine of 0.5 to 0.6. With `kv_expand: row_interleave_legacy`
    that cosine is 0.00 and sigma noise around 0: 15 of 18 heads lie at 0.1 at scale 1, as in the authors' logs, 11 at the own.

    Sample YAML: `{match_kernel_scale: true}`
    """

    WHAT: ClassVar[str] = "value"
    NEEDS: ClassVar[tuple[str, ...]] = ("projections",)

    clip: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.1, 10.0), description="arXiv 2606.16429: 0.1 to 10; in the authors' logs 87 to 95 % of heads lie at 0.1"
    )
    match_kernel_scale: bool = Field(
        False,
        description="y_S with the scale that the layer runs with; false, arXiv 2606.16429 and its code: with scale 1",
    )

    @model_validator(mode="after")
    def _rising(self) -> "ValueRule":
        if not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip: [{self.clip[0]:g}, {self.clip[1]:g}] does not rise")
        return self


class OutputGateRule(Rule):
    """A quiet output gate that opens where values are large (its eq. 42): one alpha a layer.

        alpha = damping mean RMS(y_T) / RMS(v)    W_g = alpha W_V

    mean RMS(y_T): of the teacher's context of a token and head, mean over both; RMS(v): of the student's values, act(W_V x),
    over all elements. Sample YAML: `{damping: 0.1}`
    """

    WHAT: ClassVar[str] = "output_gate"
    NEEDS: ClassVar[tuple[str, ...]] = ("output_gate",)

    damping: Annotated[float, Field(gt=0)] = Field(0.01, description="arXiv 2606.16429's lambda: 0.01")


class ZeroGateRule(Rule):
    """W_g = 0: the branch is silent. Sample YAML: `{}`"""

    WHAT: ClassVar[str] = "zero_gate"
    NEEDS: ClassVar[tuple[str, ...]] = ("output_gate",)


class SmallGateRule(Rule):
    """W_g times `gate_scale`, as it was drawn. Sample YAML: `{gate_scale: 0.01}`"""

    WHAT: ClassVar[str] = "small_gate"
    NEEDS: ClassVar[tuple[str, ...]] = ("output_gate",)

    gate_scale: Annotated[float, Field(gt=0)] = Field(
        0.02, description="the authors' code: 0.02; their paper's text: 0.01"
    )


RULES: tuple[type[Rule], ...] = (
    DecayRule,
    WriteGateRule,
    ValueRule,
    OutputGateRule,
    ZeroGateRule,
    SmallGateRule,
)
