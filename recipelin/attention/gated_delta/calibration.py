"""Phase 1 of arXiv 2606.16429: gates and values of a `gated_delta` layer in closed form, and how near the layer then is."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recipelin_kernels import gated_delta_rule

from ...masks import runs
from ..calibration import Calibration
from ..captured import Captured
from ..swapped import after
from .rules import DecayRule, OutputGateRule, Rule, SmallGateRule, ValueRule, WriteGateRule, ZeroGateRule

if TYPE_CHECKING:
    from .module import GatedDeltaAttention

SCORES = 2**22  # attention weights that are held at once: 16 MiB in fp32


class OfRule(Calibration):
    """A calibration by a rule."""

    def __init__(self, form: "GatedDeltaAttention", rule: Any) -> None:
        self.form, self.rule = form, rule


class DecayCalibration(OfRule):
    """A_log and dt_bias from the mean look-back: see DecayRule."""

    rule: DecayRule

    def __init__(self, form: "GatedDeltaAttention", rule: DecayRule) -> None:
        super().__init__(form, rule)
        self.total, self.rows = torch.zeros(form.heads, dtype=torch.float64), 0

    @torch.no_grad()
    def add(self, captured: Captured) -> None:
        distance, _, rows = lookback(self.form, captured, diagonal=self.rule.diagonal)
        self.total += distance
        self.rows += rows

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        rule, form = self.rule, self.form
        distance = (self.total / self.rows).clamp(min=rule.min_distance)
        wanted = math.log(2) / distance
        rate = wanted.clamp(rule.min_rate, rule.max_rate)
        form.A_log.zero_()
        form.dt_bias.copy_((rate + (-torch.expm1(-rate)).log()).to(form.dt_bias))  # softplus^-1
        if rule.zero_a_proj:
            form.a_proj.weight.zero_()
        return {
            "lookback": rounded(distance),
            "half_life_set": rounded(math.log(2) / rate),
            "clamped": float((rate != wanted).double().mean()),
        }


class WriteGateCalibration(OfRule):
    """b_proj from the entropy of the teacher's rows: see WriteGateRule."""

    rule: WriteGateRule

    def __init__(self, form: "GatedDeltaAttention", rule: WriteGateRule) -> None:
        super().__init__(form, rule)
        self.total, self.rows = torch.zeros(form.heads, dtype=torch.float64), 0
        self.inputs: list[Tensor] = []  # [n, D] in fp64 on the CPU, for the modes that need them

    @torch.no_grad()
    def add(self, captured: Captured) -> None:
        _, entropy, rows = lookback(self.form, captured)
        self.total += entropy
        self.rows += rows
        if self.rule.mode != "rescale_rows":
            self.inputs.append(real_tokens(captured).double().cpu())

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        rule, gate = self.rule, self.form.b_proj
        entropy = self.total / self.rows
        concentration = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min()).clamp(min=1e-3)
        target = rule.base + rule.span * concentration
        logit = target.logit()
        weight = gate.weight.double().cpu()
        found: dict[str, Any] = {"entropy": rounded(entropy), "target": rounded(target)}
        if rule.mode == "rescale_rows":
            size = weight.abs().mean(1, keepdim=True).clamp(min=1e-12)
            weight = (logit / math.sqrt(weight.shape[1]))[:, None] * weight / size
        elif rule.mode == "bias":
            mean = torch.cat(self.inputs).mean(0)
            gate.bias.copy_(logit - weight @ mean)
        else:
            x = torch.cat(self.inputs)
            direction = constant_from(x, rule.ridge)
            weight = logit[:, None] * direction
            found["constant_reached"] = float((x @ direction).mean())  # of 1
        gate.weight.copy_(weight)
        return found


class ValueCalibration(OfRule):
    """W_V by least squares, one factor a head: see ValueRule."""

    rule: ValueRule

    def __init__(self, form: "GatedDeltaAttention", rule: ValueRule) -> None:
        super().__init__(form, rule)
        self.both, self.own = (torch.zeros(form.heads, dtype=torch.float64) for _ in range(2))

    @torch.no_grad()
    def add(self, captured: Captured) -> None:
        scale = self.form.config.scale if self.rule.match_kernel_scale else 1.0
        y = context(self.form, captured, scale=scale).double()
        target = of_real(captured, captured.y).double()
        self.both += (target * y).sum((0, 2, 3)).cpu()
        self.own += y.square().sum((0, 2, 3)).cpu()

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        form, (low, high) = self.form, self.rule.clip
        exact = self.both / self.own.clamp(min=1e-8)
        sigma = exact.clamp(low, high)
        for parameter in form.v_proj.parameters():  # the bias too, where it was kept
            factor = sigma.repeat_interleave(form.head_dim).to(parameter)
            parameter.mul_(factor.reshape(-1, *[1] * (parameter.ndim - 1)))
        return {
            "sigma": rounded(sigma),
            "unclamped": rounded(exact),
            "clamped_low": float((exact <= low).double().mean()),
            "clamped_high": float((exact >= high).double().mean()),
        }


class OutputGateCalibration(OfRule):
    """W_g = alpha W_V: see OutputGateRule."""

    rule: OutputGateRule

    def __init__(self, form: "GatedDeltaAttention", rule: OutputGateRule) -> None:
        super().__init__(form, rule)
        self.teacher, self.values, self.vectors = 0.0, 0.0, 0

    @torch.no_grad()
    def add(self, captured: Captured) -> None:
        form = self.form
        hidden, positions = inputs(captured)
        segment = None if captured.segment_ids is None else runs(captured.segment_ids)
        v = of_real(captured, form.prepare(hidden, positions, captured.key_mask, segment)[2]).double()
        y = of_real(captured, captured.y).double()
        self.teacher += float(y.square().mean(-1).sqrt().sum())
        self.values += float(v.square().mean(-1).sum())
        self.vectors += count(captured) * form.heads

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        gate = self.form.g_proj
        assert gate is not None, "refused by Config.refuses_calibration"
        alpha = self.rule.damping * (self.teacher / self.vectors) / math.sqrt(max(self.values / self.vectors, 1e-30))
        gate.weight.copy_(alpha * self.form.v_proj.weight)
        return {"alpha": float(f"{alpha:.4g}")}


class GateScale(OfRule):
    """W_g times a number: see ZeroGateRule, SmallGateRule."""

    rule: ZeroGateRule | SmallGateRule

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        gate = self.form.g_proj
        assert gate is not None, "refused by Config.refuses_calibration"
        factor = self.rule.gate_scale if isinstance(self.rule, SmallGateRule) else 0.0
        gate.weight.mul_(factor)
        return {"factor": factor}


class Fit:
    """How near a layer is to the teacher's on the teacher's stream, and what its gates do there.

    cosine, error = |s - t|^2 / |t|^2, over all tokens: of the output after o_proj; by head of what o_proj reads. half_life:
    median of ln 2 / -g_t over tokens, by head, in tokens; write_gate: mean and standard deviation of beta_t, by head.
    """

    def __init__(self, form: "GatedDeltaAttention") -> None:
        self.form = form
        self.sums = torch.zeros(3, form.heads + 1, dtype=torch.float64)  # s t, s s, t t; the last column: after o_proj
        self.decays: list[Tensor] = []
        self.betas: list[Tensor] = []

    @torch.no_grad()
    def add(self, captured: Captured) -> None:
        """Take in one batch."""
        form = self.form
        hidden, positions = inputs(captured)
        assert captured.output is not None
        *_, y = form.attend(hidden, positions, key_mask=captured.key_mask, segment_ids=captured.segment_ids)
        made = after(form.o_proj, y, hidden.dtype)[:, None]
        for part, student, teacher in (
            (slice(0, -1), y, captured.y),
            (slice(-1, None), made, captured.output[:, None]),
        ):
            s, t = (of_real(captured, x).double() for x in (student, teacher))
            self.sums[:, part] += torch.stack([(a * b).sum((0, 2, 3)) for a, b in ((s, t), (s, s), (t, t))]).cpu()
        g, beta = form.gates(hidden)
        kept = slice(None) if captured.key_mask is None else captured.key_mask
        self.decays.append(g.transpose(1, 2)[kept].reshape(-1, form.heads).double().cpu())
        self.betas.append(beta.transpose(1, 2)[kept].reshape(-1, form.heads).double().cpu())

    def finish(self) -> dict[str, Any]:
        """The numbers."""
        both, own, teacher = self.sums
        cosine = both / (own * teacher).sqrt().clamp(min=1e-30)
        error = (own - 2 * both + teacher) / teacher.clamp(min=1e-30)
        beta = torch.cat(self.betas)
        return {
            "cosine": rounded(cosine[-1:])[0],
            "error": rounded(error[-1:])[0],
            "head_cosine": rounded(cosine[:-1]),
            "head_error": rounded(error[:-1]),
            "half_life": rounded(math.log(2) / (-torch.cat(self.decays)).clamp(min=1e-30).median(0).values),
            "write_gate_mean": rounded(beta.mean(0)),
            "write_gate_std": rounded(beta.std(0, unbiased=False)),
        }


CALIBRATIONS: dict[str, type[OfRule]] = {
    DecayRule.WHAT: DecayCalibration,
    WriteGateRule.WHAT: WriteGateCalibration,
    ValueRule.WHAT: ValueCalibration,
    OutputGateRule.WHAT: OutputGateCalibration,
    ZeroGateRule.WHAT: GateScale,
    SmallGateRule.WHAT: GateScale,
}


def calibration(form: "GatedDeltaAttention", what: str, rule: Rule) -> Calibration:
    """The calibration of a layer by name."""
    return CALIBRATIONS[what](form, rule)


# --- what they need of the teacher and the student --------------------------------------------------------------------


@torch.no_grad()
def lookback(
    form: "GatedDeltaAttention", captured: Captured, *, diagonal: float = 0.5, chunk: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """Over the real tokens of a batch, by query head: summed mean look-back in tokens, summed row entropy in nats, rows.

    The teacher's weights A are made for `chunk` queries at a time (by default as many as keep SCORES weights), in fp32 at
    least; distance of a key to its query i - j, to itself `diagonal`.
    """
    q, k = captured.q, captured.k
    exact = torch.promote_types(q.dtype, torch.float32)
    batch, heads, length, _ = q.shape
    k = k.to(exact).repeat_interleave(heads // k.shape[1], 1)
    own = None if captured.segment_ids is None else runs(captured.segment_ids)
    at = torch.arange(length, device=q.device)
    distances, entropies = (torch.zeros(heads, dtype=torch.float64) for _ in range(2))
    chunk = chunk or max(1, SCORES // (batch * heads * length))
    for first in range(0, length, chunk):
        rows = slice(first, min(first + chunk, length))
        keys = slice(0, rows.stop)  # causal: later ones have no weight
        behind = at[rows, None] - at[keys]
        seen = (behind >= 0)[None]
        if form.own_window:
            seen = seen & (behind < form.own_window)
        if own is not None:
            seen = seen & (own[:, rows, None] == own[:, None, keys])
        if captured.key_mask is not None:
            seen = seen & captured.key_mask[:, None, keys] & captured.key_mask[:, rows, None]
        scores = q[:, :, rows].to(exact) @ k[:, :, keys].transpose(-1, -2) * form.scaling
        scores = torch.where(seen[:, None], scores, -torch.inf)
        full = seen.any(-1)[:, None, :, None]
        scores = torch.where(full, scores, 0)  # a padding row: no NaN, and 0 below
        weights = torch.where(full, scores.softmax(-1), 0)
        far = behind.to(exact) + diagonal * (behind == 0)
        distances += (weights * far).sum(-1).double().sum((0, 2)).cpu()
        logs = torch.where(weights > 0, weights, 1).log()
        entropies -= (weights * logs).sum(-1).double().sum((0, 2)).cpu()
    return distances, entropies, count(captured)


@torch.no_grad()
def context(form: "GatedDeltaAttention", captured: Captured, *, scale: float | None) -> Tensor:
    """What the recurrence of the layer reads before its norm, [B,H,T,d] in fp32 at least; 0 at padding."""
    hidden, positions = inputs(captured)
    segment = None if captured.segment_ids is None else runs(captured.segment_ids)
    q, k, v, _ = form.prepare(hidden, positions, captured.key_mask, segment)
    exact = torch.promote_types(v.dtype, torch.float32)
    found: Tensor = gated_delta_rule(
        q,
        k,
        v.to(exact),
        *form.gates(hidden),
        scale=scale,
        key_mask=captured.key_mask,
        segment_ids=segment,
        kernel=form.config.kernel,
    )
    return found


def constant_from(x: Tensor, ridge: float) -> Tensor:
    """u = argmin |x u - 1|^2 + ridge n mean(x^2) |u|^2 for x [n, D]; solved in the smaller of n and D."""
    penalty = ridge * x.shape[0] * x.square().mean()
    ones = x.new_ones(x.shape[0])
    if x.shape[0] < x.shape[1]:
        gram = x @ x.T + penalty * torch.eye(x.shape[0], dtype=x.dtype)
        return x.T @ torch.linalg.solve(gram, ones)
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ ones)


def inputs(captured: Captured) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The layer's input and (cos, sin), which only a recorder gets."""
    if captured.hidden_states is None or captured.position_embeddings is None:
        raise ValueError("calibration: needs the layer's input, which only a recorder gets")
    return captured.hidden_states, captured.position_embeddings


def of_real(captured: Captured, x: Tensor) -> Tensor:
    """x [B,H,T,d] with padding at 0."""
    return x if captured.key_mask is None else torch.where(captured.key_mask[:, None, :, None], x, 0)


def real_tokens(captured: Captured) -> Tensor:
    """The layer's input at real tokens, [n, D]."""
    hidden, _ = inputs(captured)
    return hidden.flatten(0, 1) if captured.key_mask is None else hidden[captured.key_mask]


def count(captured: Captured) -> int:
    """Real tokens of a batch."""
    mask = captured.key_mask
    return captured.q.shape[0] * captured.q.shape[2] if mask is None else int(mask.sum())


def rounded(x: Tensor) -> list[float]:
    """Four digits are enough for a report."""
    return [float(f"{value:.4g}") for value in x.tolist()]


__all__ = ["Fit", "calibration", "constant_from", "context", "lookback"]
