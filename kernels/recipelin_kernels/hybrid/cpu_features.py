"""The standard feature map by the C kernels (cpu/features.c): in float32 on a CPU, product and both softmaxes at once."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..cpu.calls import VECTOR, check_device, dense, run, whole_vectors
from ..transforms import plain_backward, refuse_transforms


class Features(ctypes.Structure):
    """As in cpu/features.c."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("batch", "x_heads", "heads", "length", "width", "columns")),
        *((n, ctypes.c_int64) for n in ("x_batch", "x_head", "x_row")),
        *((n, ctypes.c_void_p) for n in ("x", "weight", "phi", "dphi", "dx", "dweight")),
        ("least", ctypes.c_float),
    )


def takes(weight: Tensor) -> bool:
    """Whether the C kernels make the features of a map: widths in whole vectors."""
    return weight.numel() > 0 and not weight.shape[1] % VECTOR and not weight.shape[2] % VECTOR


def _run(name: str, x: Tensor, weight: Tensor, clamp: float, **others: Tensor | None) -> None:
    batch, x_heads, length, width = x.shape
    heads, _, columns = weight.shape
    pointers = {n: t.data_ptr() for n, t in {"x": x, "weight": weight, **others}.items() if t is not None}
    x_batch, x_head, x_row, _ = x.stride()
    call = Features(
        batch=batch, x_heads=x_heads, heads=heads, length=length, width=width, columns=columns,
        x_batch=x_batch, x_head=x_head, x_row=x_row, least=clamp, **pointers,
    )  # fmt: skip
    run(name, call)


class _Features(torch.autograd.Function):
    """In the gradient a clamped feature has the clamp in the place of its softmax p: off by at most clamp |sum p g|."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, clamp: float) -> Tensor:
        phi = x.new_empty(x.shape[0], weight.shape[0], x.shape[2], 2 * weight.shape[2])
        _run("features_forward", x, weight, clamp, phi=phi)
        ctx.save_for_backward(x, weight, phi)
        ctx.clamp = clamp
        return phi

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, phi = ctx.saved_tensors
        dx = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        # A sum for each row of the batch, added up after: the same for any number of threads.
        dweight = weight.new_zeros(x.shape[0], *weight.shape) if ctx.needs_input_grad[1] else None
        _run("features_backward", x, weight, ctx.clamp, phi=phi, dphi=dense(grad), dx=dx, dweight=dweight)
        return dx, None if dweight is None else dweight.sum(0), None


def softmax_features_cpu(x: Tensor, weight: Tensor, clamp: float) -> Tensor:
    """[softmax(x W), softmax(-x W)] over features, at least `clamp`, in fp32: x [B,h,T,D], W [H,d,C] -> [B,H,T,2 C].

    Gradients to x and W; where the clamp holds a feature, none passes. Raises ValueError for x of other sizes.
    """
    if x.shape[3] != weight.shape[1] or weight.shape[0] % x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}: expected a width of {weight.shape[1]}, and heads that divide {weight.shape[0]}"
        )
    check_device("softmax features", x, weight)
    refuse_transforms("softmax features in C", x, weight)
    phi: Tensor = _Features.apply(whole_vectors(x), dense(weight.float()), clamp)
    return phi
