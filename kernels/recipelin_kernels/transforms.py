"""torch.func (vmap, grad, jvp, ...) and forward-mode derivatives: only what is made of torch's own operations takes part.

Of the operators that is the definition, kernel `reference`; others would end in torch's words of what they lack, or, in C, give
numbers without a tangent.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


def under_way() -> bool:
    """Whether what is computed now may be part of a transform; in backward is_grads_batched does not say so."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def refuse_transforms(what: str, *given: object) -> None:
    """Raises RuntimeError where a tensor is one of a transform that is under way."""
    if under_way():
        _refuse(what, *given)


def _refuse(what: str, *given: object) -> None:
    for x in given:
        if isinstance(x, Tensor) and _transformed(x):
            raise RuntimeError(
                f"{what}: takes no part in torch.func (vmap, grad, jvp, ...), is_grads_batched and forward-mode derivatives; "
                "of the operators kernel='reference' does, in memory of T x T"
            )


def _transformed(x: Tensor) -> bool:
    func = torch._C._functorch
    batched = func.is_functorch_wrapped_tensor(x) or func.is_legacy_batchedtensor(x)
    return batched or forward_ad.unpack_dual(x).tangent is not None


def plain_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward, once differentiable, which takes part in no transform."""

    @wraps(backward)
    def called(ctx: Any, *grads: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            _refuse("backward", *grads)
        return backward(ctx, *grads)

    return once_differentiable(called)
