"""The standard feature map by one Triton kernel, forward alone: what decoding needs beside the step's kernel."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_call import Compiled, power
from .gpu_parts import head

ROWS = 16  # tokens of a program, of any rows of the batch; the least that a product takes


class Shape(NamedTuple):
    """What the kernel is compiled for: heads of the map for each one of x, head_dim, columns of W."""

    group: int
    width: int
    columns: int
    block: int
    depth: int  # of head_dim at once


@triton.jit
def store_softmax(u, inside, clamp, to, real):
    """max(softmax(u), clamp) of rows."""
    level = tl.max(tl.where(inside, u, float("-inf")), 1)
    e = tl.where(inside, tl.exp(tl.where(inside, u - level[:, None], 0.0)), 0.0)
    phi = tl.maximum(e / tl.sum(e, 1)[:, None], clamp)
    tl.store(to, phi, mask=real & inside)


@triton.jit
def softmax_features(x, weight, out, x_b, x_h, x_t, tokens, length, heads, clamp, rows: tl.constexpr, o: tl.constexpr):
    """Grid: (ceil(B T / rows), H). out [B,H,T,2 columns] in float32."""
    h = tl.program_id(1)
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    real = (n < tokens)[:, None]
    b = n // length
    t = n % length
    base = head(x, b, h // o.group, x_b, x_h) + t.to(tl.int64) * x_t
    c = tl.arange(0, o.block)
    inside = (c < o.columns)[None, :]
    u = tl.full([rows, o.block], 0.0, tl.float32)
    for first in range(0, o.width, o.depth):
        d = first + tl.arange(0, o.depth)
        a = tl.load(base[:, None] + d[None, :], mask=real & (d < o.width)[None, :], other=0.0).to(tl.float32)
        place = (h * o.width + d)[:, None] * o.columns + c[None, :]
        w = tl.load(weight + place, mask=(d < o.width)[:, None] & inside, other=0.0)
        u = tl.dot(a, w, u, input_precision="tf32x3")
    row = ((b.to(tl.int64) * heads + h) * length + t) * (2 * o.columns)
    to = out + row[:, None] + c[None, :]
    store_softmax(u, inside, clamp, to, real)
    store_softmax(-u, inside, clamp, to + o.columns, real)


@torch.no_grad()
def softmax_features_gpu(x: Tensor, weight: Tensor, clamp: float) -> Tensor:
    """[softmax(x W), softmax(-x W)] over features, at least `clamp`, in fp32: x [B,h,T,d], W [H,d,C] -> [B,H,T,2 C].

    Products are made of three of tf32 (21 bits or more). Without gradient.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, given, length, width = x.shape
    heads, _, columns = weight.shape
    out = torch.empty(batch, heads, length, 2 * columns, dtype=torch.float32, device=x.device)
    shape = Shape(heads // given, width, columns, power(columns), min(power(width), 64))
    Compiled(shape, 1).launch(
        softmax_features, (triton.cdiv(batch * length, ROWS), heads),
        x, weight.float().contiguous(), out, *x.stride()[:3], batch * length, length, heads, clamp, rows=ROWS,
    )  # fmt: skip
    return out
