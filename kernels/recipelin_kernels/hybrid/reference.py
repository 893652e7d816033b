"""Hybrid attention as it is defined: quadratic, in any float dtype, gradients by autograd."""

import torch
from torch import Tensor

from .rows import SEPARATE, Options, Rows, branch_weights, divide, softmax_set, visible


def hybrid_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    window_keep: Tensor | None,
    options: Options,
    q_rows: Rows,
    k_rows: Rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [B,H,Tq,D]; the window branch alone, the linear branch alone (each normalised by itself); the linear
    share [B,H,Tq].

    The formulas are DESIGN §5. Whole T x T matrices: the definition, not the way to compute.
    """
    heads = q.shape[1]
    k, v, phi_k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v, phi_k))
    near, far_sinks = (m[:, None] for m in softmax_set(options, q_rows, k_rows))
    seen = visible(q_rows, k_rows)[:, None]
    reached = visible(q_rows, k_rows, options.reach)[:, None]
    linear = reached if options.cover == "all" else reached & ~near & ~far_sinks
    sink = (k_rows.position < options.sinks)[:, None, None, :]
    soft = torch.zeros_like(seen)
    if options.has("window"):
        soft = soft | near
    if options.has("sinks"):
        # A sink inside the window goes with the window, unless only the sinks are left.
        soft = soft | (seen & sink)
    if window_keep is not None:
        kept = window_keep[:, :, None, None]
        soft = soft & kept
        linear = torch.where(kept, linear, reached if options.on_drop == "linear_covers_all" else linear)
    if not options.has("linear"):
        linear = torch.zeros_like(linear)
    hidden = torch.zeros_like(seen)
    if not options.shown("window"):
        hidden = hidden | (near & ~sink)
    if not options.shown("sinks"):
        hidden = hidden | far_sinks
    scores = (q @ k.transpose(-1, -2)) * options.scale
    top = torch.where(soft, scores, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(torch.isinf(top), 0.0, top)
    if options.max_gradient == "detached" or options.join == "absolute":
        top = top.detach()
    a = torch.where(soft, torch.exp(torch.where(soft, scores - top, 0.0)), 0.0)
    pairs = phi_q @ phi_k.transpose(-1, -2)
    b = torch.where(linear, pairs, 0.0)
    a_mass, b_mass = a.sum(-1), b.sum(-1)
    a_value = torch.where(hidden, 0.0, a) @ v
    b_value = b @ v if options.shown("linear") else torch.zeros_like(a_value)

    real = (q_rows.segment >= 0)[:, None, :, None]
    alone = divide(a_value, a_mass, False), divide(b_value, b_mass, options.signed)
    if options.join in SEPARATE:
        a_weight, b_weight = branch_weights(options.join, a_mass, b_mass)
        y = a_weight[..., None] * alone[0] + b_weight[..., None] * alone[1]
        share = divide(b_weight[..., None], a_weight + b_weight, False)[..., 0]
        return torch.where(real, y, 0.0), *alone, share

    if options.join == "shared":
        assert mix is not None
        a_factor, b_factor = mix.to(q.dtype)[:, None], torch.ones_like(b_mass)
    elif options.join == "replace":
        m = torch.where(soft, pairs, 0.0).sum(-1, keepdim=True)
        a_factor, b_factor = divide(m, a_mass, False)[..., 0], torch.ones_like(b_mass)
    else:
        assert log_scale is not None
        # exp(s) = exp(s - top) exp(top): top drops out, and so does the level of a row, its side that is larger.
        c = log_scale.to(q.dtype)[:, None]
        tiny = torch.finfo(a.dtype).tiny
        level = torch.where(b_mass != 0, c + b_mass.abs().clamp(min=tiny).log(), -torch.inf)
        level = torch.maximum(level, torch.where(a_mass > 0, top[..., 0], -torch.inf)).detach()
        level = torch.where(torch.isinf(level), 0.0, level)
        a_factor, b_factor = (top[..., 0] - level).clamp(max=0.0).exp(), (c - level).clamp(max=69.0).exp()
    mass = a_factor * a_mass + b_factor * b_mass
    y = divide(a_factor[..., None] * a_value + b_factor[..., None] * b_value, mass, options.signed)
    share = divide((b_factor * b_mass)[..., None], mass, options.signed)[..., 0]
    return torch.where(real, y, 0.0), *alone, share
