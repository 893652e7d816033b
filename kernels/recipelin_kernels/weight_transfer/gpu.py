"""The cross-entropy between attention weights by Triton kernels: loss and gradients in one pass, in O(T) memory.

With P = exp(s - lse) from the teacher's log-sum-exp, A = (what the softmax side adds +) B_i phi.phi, and kept_i the sum of P
over the pairs that the clamp leaves alone (chunked.py), the gradient of a linear pair is B_i (kept_i - P_ij / A_ij). So

    row_masses     the masses of each row: phi_q times stored sums of phi_k, and the few keys behind them; O(T)
    transfer_rows  a program owns rows: loss, kept, phi_q's gradient
    transfer_keys  a program owns keys: phi_k's gradient. As kept is known, its first term is part of the same product, and
                   no running sum from the end is needed

Two passes over the pairs, as results are to repeat bit by bit: with phi_q's and phi_k's gradients in one pass, one of the
two would be added up by atomics, or T / 64 parts of it kept. A pair then costs 2 d + 4 F in each pass, together 4 d + 8 F
in the place of 2 d + 6 F: at d = F = 128 1536 FLOP where flash attention, forward and backward, does 14 d = 1792, and
0.41 TFLOP at T = 4096 for 32 heads, 0.52 ms at 800 TFLOP/s. Beside it, a pair takes two exponentials, two divisions and a
logarithm, 0.37 ms of an H100's special function units (16 a clock and SM).

Pairs that lie in full view of both sides are met without masks; in rows with padding or segments all are masked, and a
program begins and ends with its segments. Where the teacher has a window and the student none, phi_k's gradient still meets
all queries.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..hybrid import gpu_forward
from ..hybrid.gpu_call import Blocks, Call, cdiv, check_size, make_call, strides
from ..hybrid.gpu_support import interpreted
from ..hybrid.rows import SEPARATE, Options, Rows
from . import gpu_keys, gpu_rows
from .gpu_rows import Bounds


def fitting(kind: torch.dtype, phi: torch.dtype, width: int, features: int) -> Blocks:
    """Sizes for inputs of a dtype, their features' dtype, head_dim and features."""
    if interpreted():
        return Blocks(32, 16, 64, 32, 1)
    if kind == torch.float32 and max(width, features) > 128:
        return Blocks(32, 32, 128, 64, 1)
    if kind == torch.float32 or width > 128:
        return Blocks(64, 32, 128, 128, 2, 8)
    rows = 128 if features <= 128 else 64  # in 4 warps, 64 rows of 256 features spill 1.6 KB a thread
    if kind == phi == torch.bfloat16:
        return Blocks(rows, 64, 128, 256, 3, 8)
    return Blocks(rows, 32, 128, 256, 3 if features <= 128 else 2, 8)


@functools.lru_cache(1024)
def _options(options: Options, target: str, length: int) -> Options:
    """The row that is learned, as a form of the hybrid's: kernels then need no other."""
    if target == "linear":
        options = replace(options, window=0, sinks=0, shape="sliding", cover="all", join="average")
    elif options.join in SEPARATE:
        options = replace(options, join="average")  # of both, 1/2 (softmax + linear weights)
    reach = None if options.reach is not None and options.reach >= length else options.reach
    return replace(options, reach=reach, ablate=frozenset({("linear", "output")}))


def _bounds(options: Options, teacher_window: int | None, length: int) -> Bounds:
    teacher = 0 if teacher_window is None or teacher_window >= length else teacher_window
    near = 2 * options.window if options.shape == "terraced" else options.window
    return Bounds(teacher, near, least=min((n for n in (teacher, options.reach) if n), default=0))


def _sums(call: Call, phi_k: Tensor) -> tuple[Tensor, int]:
    """Stored sums of phi_k [B,p,n,F] before every `stored`-th query's span, the first one 0, and n."""
    o = call.form
    batch, maps, length, features = phi_k.shape
    states = cdiv(length, o.stored) if o.sums else 0
    if states < 2:
        return phi_k.new_empty(0, dtype=torch.float32), states
    sums = phi_k.new_empty(batch, maps, states, features, dtype=torch.float32)
    call.launch(
        gpu_forward.sum_keys,
        (states - 1, batch * maps, cdiv(features, o.tile)),
        phi_k, phi_k, None, call.q_rows[1], *call.k_rows, None, sums,
        *strides(phi_k, phi_k), maps, length, length, 0, states,
    )  # fmt: skip
    call.run_sums(None, sums, length, backward=False)
    return sums, states


def _ends(segment: Tensor) -> Tensor:
    """Where the segment of each token ends [B,T], int32; segment [B,T], none in plain rows."""
    if not segment.numel():
        return segment
    length = segment.shape[1]
    index = torch.arange(1, length + 1, dtype=torch.int32, device=segment.device)
    last = torch.ones_like(segment, dtype=torch.bool)
    last[:, :-1] = segment[:, 1:] != segment[:, :-1]
    return torch.where(last, index, length).flip(1).cummin(1).values.flip(1).contiguous()


@torch.no_grad()
def weight_transfer_gpu(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    lse: Tensor,
    target: str,
    options: Options,
    rows: Rows,
    teacher_window: int | None,
    learn: frozenset[str],
    *,
    plain: bool,
    blocks: Blocks | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `weight_transfer_chunked`; sums are float32, gradients of features bf16 for bf16 features, else float32.

    bf16: products of bf16, summed in fp32; features may be fp32 beside it, whose products are then taken in tf32. fp16: what
    multiplies features in tf32. fp32: three products of tf32 in the place of one. plain: no padding and no segments.
    """
    batch, heads, length, width = q.shape
    kind = torch.promote_types(q.dtype, k.dtype)
    exact = kind if phi_q.dtype == phi_k.dtype == kind else torch.float32
    tensors = [x.to(dtype) for x, dtype in ((q, kind), (k, kind), (phi_q, exact), (phi_k, exact))]
    q, k, phi_q, phi_k = tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    check_size(tensors)
    numbers = [None if x is None else x.float().contiguous() for x in (mix, log_scale)]
    lse = lse.float().contiguous()
    options = _options(options, target, length)
    bounds = _bounds(options, teacher_window, length)
    call = make_call(
        options, q, k, phi_k, None, None, rows, rows, None, plain, False,
        blocks or fitting(kind, exact, width, phi_q.shape[-1]),
    )  # fmt: skip
    o = call.form
    own, tiles = cdiv(length, o.rows), cdiv(phi_q.shape[-1], o.tile)
    more: dict[str, Any] = dict(dtype=torch.float32, device=q.device)
    stats, loss = torch.empty(4, batch, heads, length, **more), torch.empty(batch, heads, length, **more)
    terms = torch.empty(5, batch, heads, length, **more) if learn else None
    made = torch.bfloat16 if exact == torch.bfloat16 else torch.float32
    grads = {
        n: torch.empty(x.shape, dtype=made, device=q.device)
        for n, x in (("phi_q", phi_q), ("phi_k", phi_k))
        if n in learn
    }
    sums, states = _sums(call, phi_k)
    call.launch(
        gpu_rows.row_masses, (own, batch * heads),
        *tensors, *call.q_rows, sums, stats, *strides(*tensors), heads, length, states, options.anchor, options.scale,
    )  # fmt: skip
    call.launch(
        gpu_rows.transfer_rows, (own, batch * heads, tiles if "phi_q" in learn else 1),
        *tensors, lse, *numbers, *call.q_rows, sums, stats, loss, terms, grads.get("phi_q"),
        *strides(*tensors), heads, length, states, options.anchor, options.scale,
        TERMS=bool(learn), QUERIES="phi_q" in learn, bounds=bounds,
    )  # fmt: skip
    if "phi_k" in learn:
        call.launch(
            gpu_keys.transfer_keys, (own, batch * phi_k.shape[1], tiles),
            *tensors, lse, *call.q_rows, _ends(call.q_rows[1]), stats, terms, grads["phi_k"],
            *strides(*tensors), heads, batch, length, options.anchor, options.scale, bounds=bounds,
        )  # fmt: skip
    if terms is not None:
        grads |= {n: terms[4].sum((0, 2)) for n in ("mix", "log_scale") if n in learn}
    return loss.sum((0, 2)), grads
