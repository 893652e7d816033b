"""A loss whose gradients are made in the same pass as it: backward only scales them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..transforms import plain_backward

LEARNED = ("phi_q", "phi_k", "mix", "log_scale")


def learning(*tensors: Tensor | None) -> frozenset[str]:
    """Names out of LEARNED of those that ask for a gradient; none under no_grad."""
    if not torch.is_grad_enabled():
        return frozenset()
    return frozenset(n for n, x in zip(LEARNED, tensors, strict=True) if x is not None and x.requires_grad)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple[Tensor, dict[str, Tensor]]], *learned: Tensor | None) -> Tensor:
        sums, ctx.grads = compute()
        ctx.dtypes = [None if x is None else x.dtype for x in learned]
        return sums

    @staticmethod
    @plain_backward
    def backward(ctx: Any, weight: Tensor) -> Any:
        # The gradients of each head's own sum: one factor a head scales them.
        found: list[Tensor | None] = []
        for name, dtype in zip(LEARNED, ctx.dtypes, strict=True):
            grad = ctx.grads.get(name)
            if grad is None:
                found.append(None)
                continue
            factor = weight.to(torch.promote_types(grad.dtype, torch.float32))
            if grad.ndim == 4:
                group = weight.shape[0] // grad.shape[1]
                if group > 1 and bool((weight != weight[0]).any()):
                    raise ValueError("per-head losses with features per key head: weigh the heads alike")
                factor = factor[::group, None, None]
            # Made in fp32 or better, and rounded to the tensor's dtype in the same pass.
            found.append(torch.mul(grad, factor, out=torch.empty(grad.shape, dtype=dtype, device=grad.device)))
        return None, *found


def made(compute: Callable[[], tuple[Tensor, dict[str, Tensor]]], *learned: Tensor | None) -> Tensor:
    """sums [H] as a function of the tensors of LEARNED; `compute` gives them and the gradients of each head's own sum."""
    sums: Tensor = _Loss.apply(compute, *learned)
    return sums
