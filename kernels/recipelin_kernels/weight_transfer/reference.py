"""The cross-entropy between attention weights as it is defined: whole T x T matrices, any float dtype, plain autograd."""

import torch
from torch import Tensor

from ..hybrid.rows import SEPARATE, Options, Rows, branch_weights, divide, softmax_set, visible

LEAST = 1e-12  # weights are clamped here before the logarithm (LoLCATs: log clamp(a, 1e-12))


def log_weights(
    scores: Tensor,
    pairs: Tensor,
    seen: Tensor,
    near: Tensor,
    sinks: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    target: str,
    options: Options,
) -> Tensor:
    """log of the student's weights of some query rows over all their keys, [B,H,C,n], clamped at log 1e-12.

    target linear: phi.phi / sum over all `seen` keys. hybrid: the joint row of the join (DESIGN §5). Sums that hold
    signed features are divided by as `divide` does.
    """
    if target == "linear":
        b = torch.where(seen, pairs, 0.0)
        return divide(b, b.sum(-1), options.signed).clamp(min=LEAST).log()
    soft = near | sinks
    linear = seen if options.cover == "all" else seen & ~soft
    b = torch.where(linear, pairs, 0.0)
    most = torch.where(soft, scores, -torch.inf).amax(-1, keepdim=True)
    if options.join == "absolute":
        assert log_scale is not None
        # Both sides are taken over the row's largest part, which cancels; a row without linear mass has no gradient to it.
        finfo, unit = torch.finfo(scores.dtype), log_scale[:, None, None]
        mass = b.sum(-1, keepdim=True)
        linear_most = torch.where(mass > 0, unit + mass.clamp(min=finfo.tiny).log(), -torch.inf)
        most = torch.maximum(most, linear_most).clamp(min=finfo.min).detach()
        b = torch.where(mass > 0, torch.where(mass > 0, unit - most, 0.0).exp(), 0.0) * b
    a = torch.where(soft, torch.exp(torch.where(soft, scores - most, 0.0)), 0.0)
    if options.join in SEPARATE:
        a_mass, b_mass = a.sum(-1), b.sum(-1)
        a_weight, b_weight = branch_weights(options.join, a_mass, b_mass)
        a = a_weight[..., None] * divide(a, a_mass, False)
        b = b_weight[..., None] * divide(b, b_mass, options.signed)
        return divide(a + b, a_weight + b_weight, False).clamp(min=LEAST).log()
    if options.join == "shared":
        assert mix is not None
        a = mix[:, None, None] * a
    elif options.join == "replace":
        mass = torch.where(soft, pairs, 0.0).sum(-1, keepdim=True)
        weight = a.sum(-1, keepdim=True)
        a = mass * a / torch.where(weight == 0, 1.0, weight)
    return divide(a + b, (a + b).sum(-1), options.signed).clamp(min=LEAST).log()


def weight_transfer_loss_reference(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    lse: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    target: str,
    options: Options,
    rows: Rows,
    teacher_window: int | None,
) -> Tensor:
    """[B,H,T]: - sum_j P_ij log A_ij, P_ij = exp(s_ij - lse_i); 0 for padded queries."""
    heads = q.shape[1]
    k, phi_k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, phi_k))
    scores = (q @ k.transpose(-1, -2)) * options.scale
    seen, taught = (visible(rows, rows, w)[:, None] for w in (options.reach, teacher_window))
    near, sinks = (m[:, None] for m in softmax_set(options, rows, rows))
    p = torch.where(taught, torch.exp(torch.where(taught, scores - lse[..., None], 0.0)), 0.0)
    logs = log_weights(scores, phi_q @ phi_k.transpose(-1, -2), seen, near, sinks, mix, log_scale, target, options)
    return -(p * logs).sum(-1)
