"""Hybrid attention whose window holds every earlier key: causal softmax, by torch's own kernel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu.calls import is_traced
from .rows import Options, learning


def covered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | None,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    options: Options,
) -> Tensor:
    """y [B,H,T,D]: mix, row maximum and mass cancel (facts/performance.md §2). What learns keeps its gradients, zeros.

    phi_q None: features above 0, which are not made.
    """
    others = phi_q, phi_k, mix, log_scale
    beside = learning(*others)
    # SDPA would learn in bf16.
    exact = torch.promote_types(q.dtype, torch.float32) if beside or learning(q, k, v) else q.dtype
    q_, k_, v_ = (_as(exact, x) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q_, k_, v_, is_causal=True, scale=options.scale, enable_gqa=k.shape[1] < q.shape[1]
    )
    there = _window_counts(options.join, phi_q, phi_k, mix)
    if there is not None:
        y = y * there
    y = _as(q.dtype, y)
    return _Beside.apply(y, *others) if beside else y


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x.to(dtype), which takes torch some 30 us after SDPA also where it changes nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def _window_counts(join: str, phi_q: Tensor | None, phi_k: Tensor, mix: Tensor | None) -> Tensor | None:
    """Whether the window has a factor other than 0, broadcastable to [B,H,T,1]: without it a row has no mass. None: always.

    A CPU can be asked whether it is so everywhere, which spares a pass over y.
    """
    may_ask = type(phi_k) is Tensor and phi_k.device.type == "cpu" and not is_traced()
    if join == "shared" and mix is not None:
        return None if may_ask and 0 not in mix.tolist() else (mix != 0).reshape(-1, 1, 1)
    if join != "replace" or phi_q is None or (may_ask and _above_zero(phi_q) and _above_zero(phi_k)):
        return None
    total = phi_k.cumsum(2, dtype=torch.promote_types(phi_k.dtype, torch.float32))
    heads = phi_q.unflatten(1, (phi_k.shape[1], -1))
    return ((heads * total[:, :, None]).sum(-1, keepdim=True) != 0).flatten(1, 2)


def _above_zero(phi: Tensor) -> bool:
    """Whether the features are so large that their squares are not 0."""
    return phi.numel() > 0 and bool(phi.amin() > 1e-18)


class _Beside(torch.autograd.Function):
    """y, which does not depend on the other tensors: their gradients are zeros, whatever they hold."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *others: Tensor | None) -> Tensor:
        ctx.save_for_backward(*others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return dy, *(x.new_zeros(()).expand(x.shape) if want else None for x, want in wanted)  # one zero in memory
