"""The cross-entropy between attention weights in O(T) memory: blocks of queries, gradients made in the same pass.

A block of queries meets all its keys at once; its loss is differentiated as soon as it is known, so backward only has to
scale what forward has found. Nothing of size T x T is held: a block is BLOCK x T.
"""

from typing import Any

import torch
from torch import Tensor

from ..hybrid.chunk import dot
from ..hybrid.rows import Options, Rows, softmax_set, visible
from .reference import log_weights

BLOCK = 128  # measured best (facts/performance.md §3)


def cut(rows: Rows, start: int, stop: int) -> Rows:
    """Tokens start .. stop - 1."""
    return Rows(rows.position[:, start:stop], rows.segment[:, start:stop])


def masks(options: Options, rows: Rows, start: int, stop: int, teacher_window: int | None) -> tuple[Tensor, ...]:
    """(all causal keys, window, sinks beside the window) of a block of queries over the keys 0 .. stop - 1, [B,1,C,stop]."""
    q_rows, k_rows = cut(rows, start, stop), cut(rows, 0, stop)
    seen = visible(q_rows, k_rows)[:, None]
    near, sinks = (m[:, None] for m in softmax_set(options, q_rows, k_rows))
    if teacher_window is not None:
        close = (q_rows.position[:, :, None] - k_rows.position[:, None, :] < teacher_window)[:, None]
        seen, near, sinks = seen & close, near & close, sinks & close
    return seen, near, sinks


class _Loss(torch.autograd.Function):
    """[H] sums over rows of the loss; the gradients of their sum weighted by `weight` [H] are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        phi_q: Tensor,
        phi_k: Tensor,
        mix: Tensor | None,
        log_scale: Tensor | None,
        lse: Tensor,
        facts: tuple[str, Options, Rows, int | None, bool],
    ) -> Tensor:
        target, options, rows, teacher_window, wants = facts
        learn = dict(zip(("phi_q", "phi_k", "mix", "log_scale"), ctx.needs_input_grad[2:6], strict=True))
        wants = wants and any(learn.values())
        whole = {"phi_q": phi_q, "phi_k": phi_k, "mix": mix, "log_scale": log_scale}
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        grads = {n: torch.zeros_like(whole[n], dtype=dtype) for n in whole if wants and learn[n]}  # type: ignore[arg-type]
        length = q.shape[2]
        total = torch.zeros(q.shape[1], dtype=dtype, device=q.device)
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            seen, near, sinks = masks(options, rows, start, stop, teacher_window)
            scores = dot(q[:, :, start:stop].to(dtype), k[:, :, :stop].to(dtype)) * options.scale
            above = torch.where(seen, scores - lse[:, :, start:stop, None].to(dtype), 0.0)
            p = torch.where(seen, above.clamp(min=-85.0).exp(), 0.0)
            parts = {
                "phi_q": phi_q[:, :, start:stop].to(dtype),
                "phi_k": phi_k[:, :, :stop].to(dtype),
                "mix": None if mix is None else mix.to(dtype),
                "log_scale": None if log_scale is None else log_scale.to(dtype),
            }
            leaves = {n: None if x is None else x.detach().requires_grad_(n in grads) for n, x in parts.items()}
            with torch.enable_grad() if grads else torch.no_grad():
                pairs = dot(leaves["phi_q"], leaves["phi_k"])  # type: ignore[arg-type]
                logs = log_weights(
                    scores, pairs, seen, near, sinks, leaves["mix"], leaves["log_scale"], target, options
                )
                found = -(p * logs).sum((0, 2, 3))
            total += found.detach()
            if found.requires_grad:
                names = [n for n in grads if leaves[n] is not None]
                ones = torch.ones_like(found)
                made = torch.autograd.grad(found, [leaves[n] for n in names], ones, allow_unused=True)  # type: ignore[arg-type]
                for name, grad in zip(names, made, strict=True):
                    if grad is None:
                        continue
                    if name == "phi_q":
                        grads[name][:, :, start:stop] += grad
                    elif name == "phi_k":
                        grads[name][:, :, :stop] += grad
                    else:
                        grads[name] += grad
        ctx.grads, ctx.dtypes = grads, {n: None if x is None else x.dtype for n, x in whole.items()}
        return total

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> Any:
        # Every head enters the sum alike, so that one factor a head scales its gradients.
        found: list[Tensor | None] = []
        for name in ("phi_q", "phi_k", "mix", "log_scale"):
            grad = ctx.grads.get(name)
            if grad is None:
                found.append(None)
                continue
            factor = weight.to(grad.dtype)
            if grad.ndim == 4:
                group = weight.shape[0] // grad.shape[1]
                if group > 1 and bool((weight != weight[0]).any()):
                    raise ValueError("per-head losses with features per key head: weigh the heads alike")
                factor = weight[::group].to(grad.dtype)[:, None, None]
            found.append((grad * factor).to(ctx.dtypes[name]))
        return None, None, *found, None, None
