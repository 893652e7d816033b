"""The standard feature map by Triton, forward and backward: a kernel each, between which no exponent is kept."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..autocast import without_autocast
from ..transforms import plain_backward
from .gpu_call import Compiled, cdiv, power
from .gpu_parts import head, mapped, softmax_of
from .softmax_map import SoftmaxMap
from .step_state import StepState

ROWS = 16  # tokens of a program, of any rows of the batch; the least that a product takes
SINGLE = 1  # of so few rows of one token each is a program of its own
MANY = 64  # of the many tokens of whole rows, if maps are narrow: W is read once for all of them
NARROW = 128  # columns; wider ones take 8 warps, as 4 spill
DEPTH = 8192  # elements of W at once, of 64 to 128 rows: all of it where 128 features are made, so that loads wait once


class Shape(NamedTuple):
    """What the kernel is compiled for: heads of the map for each one of x, head_dim, columns of W."""

    group: int
    width: int
    columns: int
    block: int
    depth: int  # of head_dim at once


@triton.jit
def softmax_features(x, weight, out, x_b, x_h, x_t, tokens, length, heads, clamp, rows: tl.constexpr, o: tl.constexpr):
    """Grid: (ceil(B T / rows), H). out [B,H,T,2 columns]."""
    _features_of_rows(x, weight, out, x_b, x_h, x_t, tokens, length, heads, tl.program_id(1), clamp, rows, o.group, o)


@triton.jit
def taken_over():
    """Waits for the launch ahead, and only then lets the next one begin: for that one, what is older than this launch is done."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def asked_for(x, count, part, parts):
    """Has x[:count] brought into L2, each of `parts` programs a share. A hint: nothing is read, so it may precede a wait."""
    LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth
    lines = (count + LINE - 1) // LINE
    for first in range(part * 256, lines, parts * 256):
        at = x + tl.minimum(first + tl.arange(0, 256), lines - 1).to(tl.int64) * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def token_features(
    q, k, map_q, map_k, out_q, out_k, value, ring_k, ring_v, mass, counts,
    q_b, q_h, k_b, k_h, tokens, heads, maps, values, ring, masses, clamp_q, clamp_k,
    OVERLAPPED: tl.constexpr, SOON: tl.constexpr, rows: tl.constexpr, o: tl.constexpr,
):  # fmt: skip
    """`softmax_features` of queries [B,H,1,D] and of keys [B,h,1,D] in one launch, by maps of H and of `maps` heads.

    Grid: (ceil(B / rows), H + maps). OVERLAPPED: it is launched while the launch ahead ends, waits for that, and then lets the
    next one begin, which waits before it reads the features. Before that W is asked for, and, SOON, what that one reads of its
    state: `values` numbers of the sums, `ring` of each ring, `masses` of the masses.
    """
    h = tl.program_id(1)
    if OVERLAPPED:
        size = o.width * o.columns
        if h < heads:
            asked_for(map_q + h * size, size, 0, 1)
        else:
            asked_for(map_k + (h - heads) * size, size, 0, 1)
        if SOON:
            part = tl.program_id(0) * (heads + maps) + h
            parts = tl.num_programs(0) * (heads + maps)
            asked_for(value, values, part, parts)
            asked_for(ring_k, ring, part, parts)
            asked_for(ring_v, ring, part, parts)
            asked_for(mass, masses, part, parts)
            asked_for(counts, masses // o.columns, part, parts)
        taken_over()
    if h < heads:
        if rows == 1:
            _features_of_row(q, map_q, out_q, q_b, q_h, heads, h, clamp_q, 1, o)
        else:
            _features_of_rows(q, map_q, out_q, q_b, q_h, 0, tokens, 1, heads, h, clamp_q, rows, 1, o)
    elif rows == 1:
        _features_of_row(k, map_k, out_k, k_b, k_h, maps, h - heads, clamp_k, o.group, o)
    else:
        _features_of_rows(k, map_k, out_k, k_b, k_h, 0, tokens, 1, maps, h - heads, clamp_k, rows, o.group, o)


@triton.jit
def _features_of_row(x, weight, out, x_b, x_h, heads, h, clamp, group: tl.constexpr, o: tl.constexpr):
    """Of one token: a product of 16 rows takes five times the instructions."""
    b = tl.program_id(0)
    base = head(x, b, h // group, x_b, x_h)
    c = tl.arange(0, o.block)
    inside = (c < o.columns)[None, :]
    u = tl.full([1, o.block], 0.0, tl.float32)
    for first in range(0, o.width, o.depth):
        d = first + tl.arange(0, o.depth)
        a = tl.load(base + d, mask=d < o.width, other=0.0).to(tl.float32)
        place = (h * o.width + d)[:, None] * o.columns + c[None, :]
        w = tl.load(weight + place, mask=(d < o.width)[:, None] & inside, other=0.0)
        u += tl.sum(a[:, None] * w, 0)[None, :]
    to = out + (b.to(tl.int64) * heads + h) * (2 * o.columns) + c[None, :]
    tl.store(to, softmax_of(u, o.columns, clamp), mask=inside)
    tl.store(to + o.columns, softmax_of(-u, o.columns, clamp), mask=inside)


@triton.jit
def _features_of_rows(
    x, weight, out, x_b, x_h, x_t, tokens, length, heads, h, clamp, rows: tl.constexpr, group: tl.constexpr, o: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0) * rows + tl.arange(0, rows)
    real = (n < tokens)[:, None]
    b = n // length
    t = n % length
    base = head(x, b, h // group, x_b, x_h) + t.to(tl.int64) * x_t
    c = tl.arange(0, o.block)
    inside = (c < o.columns)[None, :]
    COARSE: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    u = tl.full([rows, o.block], 0.0, tl.float32)
    for first in range(0, o.width, o.depth):
        d = first + tl.arange(0, o.depth)
        a = tl.load(base[:, None] + d[None, :], mask=real & (d < o.width)[None, :], other=0.0)
        place = (h * o.width + d)[:, None] * o.columns + c[None, :]
        w = tl.load(weight + place, mask=(d < o.width)[:, None] & inside, other=0.0)
        u = mapped(a, w, u, COARSE)
    row = ((b.to(tl.int64) * heads + h) * length + t) * (2 * o.columns)
    to = out + row[:, None] + c[None, :]
    tl.store(to, softmax_of(u, o.columns, clamp).to(out.dtype.element_ty), mask=real & inside)
    tl.store(to + o.columns, softmax_of(-u, o.columns, clamp).to(out.dtype.element_ty), mask=real & inside)


@triton.jit
def softmax_features_gradient(
    phi, grad, out, tokens, clamp, rows: tl.constexpr, columns: tl.constexpr, o: tl.constexpr
):
    """du of u = x W: phi, grad [tokens, 2 columns] -> out [tokens, columns], all in float32. Grid: (ceil(tokens / rows),).

    d softmax(u) = p (g - sum p g), and of softmax(-u) the same, subtracted; what the clamp held has g = 0, and the clamp in the
    place of its p, which is less: du is off there by at most clamp |sum p g|.
    """
    n = (tl.program_id(0) * rows + tl.arange(0, rows)).to(tl.int64)
    c = tl.arange(0, columns)
    inside = (n < tokens)[:, None] & (c < o.columns)[None, :]
    at = n[:, None] * (2 * o.columns) + c[None, :]
    total = tl.full([rows, columns], 0.0, tl.float32)
    for side in range(0, 2):
        p = tl.load(phi + at + side * o.columns, mask=inside, other=0.0)
        g = tl.load(grad + at + side * o.columns, mask=inside, other=0.0)
        g = tl.where(p > clamp, g, 0.0)
        d = p * (g - tl.sum(p * g, 1)[:, None])
        total += tl.where(side == 0, d, -d)
    tl.store(out + n[:, None] * o.columns + c[None, :], total, mask=inside)


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, clamp: float) -> Tensor:
        out = features(x, weight, clamp)
        ctx.save_for_backward(x, weight, out)
        ctx.clamp = clamp
        return out

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, phi = ctx.saved_tensors
        batch, heads, length, features = phi.shape
        grad, shape = grad.float().contiguous(), _shape(x, weight)
        du = torch.empty(batch, x.shape[1], shape.group, length, features // 2, dtype=torch.float32, device=x.device)
        tokens, rows = batch * heads * length, max(1, 4096 // shape.block)
        Compiled(shape, 1, 4).launch(
            softmax_features_gradient, (cdiv(tokens, rows),),
            phi, grad, du, tokens, ctx.clamp, rows=rows, columns=shape.block,
        )  # fmt: skip
        by_head = weight.float().unflatten(0, (-1, shape.group))
        d_x = d_weight = None
        with without_autocast(x.device):  # as in the forward pass
            if ctx.needs_input_grad[0]:
                d_x = torch.einsum("bhgtf,hgdf->bhtd", du, by_head).to(x.dtype)
            if ctx.needs_input_grad[1]:
                d_weight = torch.einsum("bhtd,bhgtf->hgdf", x.float(), du).flatten(0, 1).to(weight.dtype)
        return d_x, d_weight, None


def _shape(x: Tensor, weight: Tensor) -> Shape:
    heads, width, columns = weight.shape
    block = power(columns)
    depth = min(power(width), max(64, min(128, DEPTH // block)))
    return Shape(heads // x.shape[1], width, columns, block, depth)


def _warps(columns: int) -> int:
    return 4 if columns <= NARROW else 8


def features(x: Tensor, weight: Tensor, clamp: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`softmax_features_gpu` without gradients, rounded to a dtype."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, length, _ = x.shape
    heads, _, columns = weight.shape
    out = torch.empty(batch, heads, length, 2 * columns, dtype=dtype, device=x.device)
    rows = MANY if length > ROWS and columns <= NARROW else ROWS
    Compiled(_shape(x, weight), 1, _warps(columns)).launch(
        softmax_features, (cdiv(batch * length, rows), heads),
        x, weight.float().contiguous(), out, *x.stride()[:3], batch * length, length, heads, clamp, rows=rows,
    )  # fmt: skip
    return out


def features_of_token(
    q: Tensor, k: Tensor, map_q: SoftmaxMap, map_k: SoftmaxMap, *, overlapped: bool, soon: StepState | None = None
) -> tuple[Tensor, Tensor]:
    """phi_q [B,H,1,F] of q [B,H,1,D] and phi_k [B,h,1,F] of k [B,Hkv,1,D] in fp32, one launch.

    overlapped: it begins while the launch ahead ends, and what is launched next begins meanwhile; each waits itself (`gdc_wait`).
    soon: a state that the next one reads, to be in L2 by then.
    """
    state = [None] * 5 if soon is None else [soon.value, soon.ring_k, soon.ring_v, soon.mass, soon.counts]
    sizes = [0] * 3 if soon is None else [x.numel() for x in (soon.value, soon.ring_k, soon.mass)]
    batch, heads = q.shape[:2]
    maps, _, columns = map_k.weight.shape
    out_q, out_k = (torch.empty(batch, n, 1, 2 * columns, dtype=torch.float32, device=q.device) for n in (heads, maps))
    weights = [m.weight.float().contiguous() for m in (map_q, map_k)]
    rows = 1 if batch <= SINGLE else ROWS
    warps = 8 if rows == 1 else _warps(columns)
    Compiled(_shape(k, map_k.weight), 1, warps, more=(("launch_pdl", True),) * overlapped).launch(
        token_features, (cdiv(batch, rows), heads + maps),
        q, k, *weights, out_q, out_k, *state, *q.stride()[:2], *k.stride()[:2], batch, heads, maps, *sizes,
        map_q.clamp, map_k.clamp, OVERLAPPED=overlapped, SOON=soon is not None, rows=rows,
    )  # fmt: skip
    return out_q, out_k


def softmax_features_gpu(x: Tensor, weight: Tensor, clamp: float) -> Tensor:
    """[softmax(x W), softmax(-x W)] over features, at least `clamp`, in fp32: x [B,h,T,d], W [H,d,C] -> [B,H,T,2 C].

    Products are made of three of tf32 (21 bits or more). Gradients to x and W; where the clamp holds a feature, none passes.
    """
    phi: Tensor = _Features.apply(x, weight, clamp)
    return phi
