"""The end-to-end loss behind a large vocabulary: share by share of the tokens, its gradient made along with it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .steps import Loss


def plain_loss(logits: Tensor, labels: Tensor, taught: Tensor | None, loss: Loss) -> Tensor:
    """The definition: `loss` summed over tokens, of logits [N,V] and the teacher's [N,V]; differentiable in the logits."""
    found = loss.lm * F.cross_entropy(logits, labels, reduction="sum") if loss.lm else logits.new_zeros(())
    if taught is not None:
        target = (taught / loss.temperature).log_softmax(-1)
        own = (logits / loss.temperature).log_softmax(-1)
        one, other = (target, own) if loss.direction == "forward" else (own, target)
        # F.kl_div(a, b) is KL(b || a).
        found = found + loss.kl * loss.temperature**2 * F.kl_div(other, one, reduction="sum", log_target=True)
    return found


def exact(logits: Tensor) -> Tensor:
    """Softmax in fp32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    taught: Callable[[slice], Tensor] | None,
    loss: Loss,
    rows: int,
) -> Tensor:
    """`plain_loss` of logits hidden weight^T ([N,D], [V,D]), `rows` tokens at a time; `taught(share)`: the teacher's logits.

    Gradients of hidden and weight are made with the loss, in closed form, so that three arrays of rows x V are held at
    once and nothing is made twice; that of the weight is summed in fp32. Under autocast the products are in its dtype.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        found: Tensor = _HeadLoss.apply(hidden, weight, labels, taught, loss, rows, dtype, torch.is_grad_enabled())
    return found


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        taught: Any,
        loss: Loss,
        rows: int,
        dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:
        # `needs_input_grad` is true under no_grad too.
        of_hidden, of_weight = (learns and need for need in ctx.needs_input_grad[:2])
        matrix = weight.to(dtype)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if of_weight else None
        )
        for start in range(0, hidden.shape[0], rows):
            share = slice(start, start + rows)
            h = hidden[share].to(dtype)
            value, gradient = _share(exact(h @ matrix.T), labels[share], taught(share) if taught else None, loss)
            total += value
            if learns:
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[share] = gradient @ matrix
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(gradient.T, h)
                elif grad_weight is not None:
                    grad_weight += gradient.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *up: Tensor) -> Any:
        found = [None if g is None else g * up[0].to(g.dtype) for g in ctx.saved_tensors]
        return (*found, None, None, None, None, None, None)


def _share(logits: Tensor, labels: Tensor, taught: Tensor | None, loss: Loss) -> tuple[Tensor, Tensor]:
    """(summed loss, its gradient in the logits) of one share. With p, t the softmaxes at the temperature T, in logits z:

    cross-entropy: softmax(z) - onehot; T^2 KL(t || p): T (p - t); T^2 KL(p || t): T p (log p - log t - KL).
    """
    gradient: Tensor | None = None
    value = logits.new_zeros(())
    if loss.lm:
        own = logits.log_softmax(-1)
        value = value - loss.lm * own.gather(1, labels[:, None]).sum()
        gradient = own.exp_()
        gradient.scatter_add_(1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
        gradient *= loss.lm
    if taught is not None:
        size = loss.kl * loss.temperature
        target = (exact(taught) / loss.temperature).log_softmax(-1)
        own = logits.div_(loss.temperature).log_softmax(-1)
        if loss.direction == "forward":
            shares = torch.exp(target, out=logits)
            value = value + size * loss.temperature * target.sub_(own).mul_(shares).sum()
            change = own.exp_().sub_(shares)
        else:
            difference = torch.sub(own, target, out=target)
            shares = torch.exp(own, out=logits)
            rows = torch.mul(shares, difference, out=own).sum(-1, keepdim=True)
            value = value + size * loss.temperature * rows.sum()
            change = difference.sub_(rows).mul_(shares)
        change *= size
        gradient = change if gradient is None else gradient.add_(change)
    assert gradient is not None
    return value, gradient
