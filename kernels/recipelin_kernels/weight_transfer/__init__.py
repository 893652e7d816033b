"""Learning attention weights from a teacher (Hedgehog, arXiv 2402.04347) without ever holding them."""

import torch
from torch import Tensor

from ..hybrid import resolve_kernel
from ..hybrid.chunk import dot
from ..hybrid.compat import check_compat, whole_rows
from ..hybrid.rows import (
    COVERS,
    JOINS,
    SHAPES,
    Options,
    check_reach,
    check_shapes,
    numbers_of,
    one_of,
    rows,
    visible,
)
from ..ran import note
from ..transforms import refuse_transforms
from .chunked import BLOCK, cut, sets, weight_transfer_chunked
from .cpu import weight_transfer_cpu
from .made import learning, made
from .reference import weight_transfer_loss_reference

TARGETS = ("linear", "hybrid")


def _options(
    window: int,
    shape: str,
    sinks: int,
    cover: str,
    join: str,
    scale: float | None,
    reach: int | None,
    width: int,
    *,
    signed: bool,
) -> Options:
    one_of("shape", shape, SHAPES)
    one_of("cover", cover, COVERS)
    one_of("join", join, JOINS)
    return Options(
        window=window,
        sinks=sinks,
        cover=cover,
        join=join,
        max_gradient="through",
        ablate=frozenset(),
        scale=width**-0.5 if scale is None else scale,
        on_drop="linear_outside",
        signed=signed,
        shape=shape,
        reach=reach,
    )


def _refuse_signed(signed: bool) -> None:
    if signed:
        raise ValueError(
            "join='absolute': the sum of signed features has no logarithm; expected features of at least 0"
        )


@torch.no_grad()
def teacher_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention and its log-sum-exp: (y [B,H,T,D] in q's dtype, lse [B,H,T] in fp32, or fp64 for fp64).

    q [B,H,T,D]; k, v [B,Hkv,T,D]; forward only, O(T) memory. Plain causal rows on a CPU go through torch's flash kernel, which
    returns the log-sum-exp; padding, segments, a window of the teacher's own, and other devices go block by block.
    Padded queries give y = 0 and lse = 0.
    """
    check_shapes(q, k, v, q, None, 0, 0)
    check_reach("window", window)
    batch, heads, length, width = q.shape
    scale = width**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.device.type == "cpu" and key_mask is None and segment_ids is None and window is None:
        group = heads // k.shape[1]
        k_all, v_all = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k_all, v_all, 0.0, True, scale=scale)
        return y, lse.to(dtype)
    own = rows(batch, length, q.device, key_mask, segment_ids)
    if key_mask is not None:
        q, k, v = (torch.where(key_mask[:, None, :, None], x, 0) for x in (q, k, v))
    y = torch.empty_like(q)
    lse = torch.empty(batch, heads, length, dtype=dtype, device=q.device)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = visible(cut(own, start, stop), cut(own, 0, stop), window)[:, None]
        scores = torch.where(seen, dot(q[:, :, start:stop].to(dtype), k[:, :, :stop].to(dtype)) * scale, -torch.inf)
        total = scores.logsumexp(-1)
        real = ~torch.isinf(total)
        total = torch.where(real, total, 0.0)
        p = torch.where(seen, (scores - total[..., None]).clamp(min=-85.0).exp(), 0.0)
        grouped = p.reshape(batch, k.shape[1], -1, stop) @ v[:, :, :stop].to(dtype)
        y[:, :, start:stop] = grouped.view(batch, heads, stop - start, width).to(y.dtype)
        lse[:, :, start:stop] = total
    return y, lse


def weight_transfer_loss(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    lse: Tensor,
    *,
    target: str = "linear",
    window: int = 0,
    shape: str = "sliding",
    sinks: int = 0,
    cover: str = "outside",
    join: str = "shared",
    mix: Tensor | None = None,
    log_scale: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    teacher_window: int | None = None,
    reach: int | None = None,
    compat: str | None = None,
    signed: bool = False,
    per_head: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Mean over real query rows and heads of - sum_j P_ij log A_ij: a scalar, or [H] with `per_head`.

    P_ij = exp(q_i.k_j scale - lse_i), the teacher's softmax weights; A the student's: target `linear`, phi_i.phi_j / sum over
    all causal keys (Hedgehog), or `hybrid`, the whole row of the hybrid with its window, shape, sinks, cover, join and
    compat; of `average` and `sum`, 1/2 (softmax + linear weights), which is the row of `sum` made to add up to 1. A is
    clamped at 1e-12 pair by pair before the logarithm; a clamped pair has no gradient (LoLCATs: log clamp(a, 1e-12)).
    `signed`: phi may be negative (activation `none`); sums are then divided by as in `hybrid_attention`, sign(N)
    max(|N|, 1e-6), and a weight below 0 is a clamped pair. With target `hybrid` the join `absolute` has no logarithm of
    a negative sum: ValueError.
    teacher_window cuts P, `reach` the student's keys, both as in `hybrid_attention`.

    q [B,H,T,D], k [B,Hkv,T,D] are the teacher's, after RoPE, and carry no gradient here: ValueError if they ask for one.
    phi_q [B,H,T,F], phi_k [B,H or Hkv,T,F], lse [B,H,T] from `teacher_attention`. Gradients reach phi_q, phi_k, mix and
    log_scale; they are computed in the same pass, and not at all under no_grad. Memory O(T).

    kernel: as of `hybrid_attention`; `gpu` (Triton) and `cpu` (C) compute what `chunked` does, the precision of `gpu`: gpu.py.
    Raises ValueError for unknown options and shapes that do not fit, RuntimeError for a kernel that cannot run here.
    """
    one_of("target", target, TARGETS)
    options = _options(window, shape, sinks, cover, join, scale, reach, q.shape[-1], signed=signed)
    width, features, many = q.shape[-1], phi_q.shape[-1], q.shape[0] * q.shape[1]
    ran = resolve_kernel(kernel, q.device, dtype=q.dtype, width=width, features=features, rows=many)
    note("weight_transfer_loss", ran)
    if ran != "reference":
        refuse_transforms("weight_transfer_loss", q, k, phi_q, phi_k, lse, mix, log_scale)
    if q.requires_grad or k.requires_grad:
        raise ValueError("weight_transfer_loss: q and k are the teacher's and get no gradient; detach them")
    if compat is not None:
        check_compat(compat, options, key_mask, segment_ids)
        options = whole_rows(options, q.shape[2])
    if target == "hybrid" and join == "absolute":
        _refuse_signed(signed)
    _check(q, k, phi_q, phi_k, lse, window, sinks, teacher_window=teacher_window, reach=reach)
    batch, heads, length, _ = q.shape
    mix, log_scale = numbers_of(join, mix, log_scale, heads) if target == "hybrid" else (None, None)
    alike = key_mask is None and segment_ids is None  # then one row of masks serves all
    own = rows(1 if alike else batch, length, q.device, key_mask, segment_ids)
    count = batch * length
    if key_mask is not None:
        count = int(key_mask.sum())
        if ran != "cpu":  # which never reads padding
            real = key_mask[:, None, :, None]
            q, k, phi_q, phi_k = (torch.where(real, x, 0) for x in (q, k, phi_q, phi_k))
            lse = torch.where(key_mask[:, None, :], lse, 0)
    learned = (phi_q, phi_k, mix, log_scale)
    row = (target, options, own, teacher_window)
    learn = learning(*learned)
    if ran == "reference":
        sums = weight_transfer_loss_reference(q, k, phi_q, phi_k, lse, mix, log_scale, *row).sum((0, 2))
    elif ran == "gpu":
        from .gpu import weight_transfer_gpu

        sums = made(lambda: weight_transfer_gpu(q, k, *learned, lse, *row, learn, plain=alike), *learned)
    else:
        compute = weight_transfer_cpu if ran == "cpu" else weight_transfer_chunked
        sums = made(lambda: compute(q, k, *learned, lse, *row, learn), *learned)
    return sums / count if per_head else sums.sum() / (count * heads)


def _check(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    *,
    teacher_window: int | None,
    reach: int | None,
) -> None:
    """Raises ValueError for tensors that do not fit, and windows that are none."""
    check_shapes(q, k, k, phi_q, phi_k, window, sinks)
    if not phi_q.shape[-1]:
        raise ValueError(f"phi_q {tuple(phi_q.shape)}: expected at least one feature")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse {tuple(lse.shape)}: expected {tuple(q.shape[:3])}")
    check_reach("teacher_window", teacher_window)
    check_reach("reach", reach)


@torch.no_grad()
def log_scale_closed_form(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    lse: Tensor,
    *,
    window: int,
    shape: str = "sliding",
    sinks: int = 0,
    cover: str = "outside",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    teacher_window: int | None = None,
    reach: int | None = None,
    signed: bool = False,
) -> tuple[Tensor, int]:
    """(sum over rows [H], rows): their quotient over all batches is c_h of the `absolute` join.

    Of a row: log sum_{L} exp(q.k scale) - log sum_{L} phi_q.phi_k, L the keys outside window and sinks, or with cover `all`
    the teacher's keys outside and all keys of the linear side: what the linear branch adds to the window then stands for
    what the window lacks. teacher_window cuts the first sum, `reach` the second. Rows with an empty sum do not count.
    `lse` only fixes the shapes: the mass outside is summed directly, since exp(lse) - sum over the window cancels where the
    window holds nearly everything. Raises ValueError for signed features, said or found to be so: their sum
    may be negative.
    """
    options = _options(window, shape, sinks, cover, "absolute", scale, reach, q.shape[-1], signed=signed)
    _check(q, k, phi_q, phi_k, lse, window, sinks, teacher_window=teacher_window, reach=reach)
    batch, heads, length, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    own = rows(batch, length, q.device, key_mask, segment_ids)
    if key_mask is not None:
        q, k, phi_q, phi_k = (torch.where(key_mask[:, None, :, None], x, 0) for x in (q, k, phi_q, phi_k))
    _refuse_signed(signed or bool((phi_q < 0).any()) or bool((phi_k < 0).any()))
    total, count = torch.zeros(heads, dtype=dtype, device=q.device), 0
    tiny = torch.finfo(dtype).tiny
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        found = sets(options, own, start, stop, teacher_window)
        soft = found.near | found.sinks
        outside = found.teacher & ~soft
        heard = found.seen if cover == "all" else found.seen & ~soft
        real = outside.any(-1) & heard.any(-1)
        if not bool(real.any()):
            continue
        scores = dot(q[:, :, start:stop].to(dtype), k[:, :, :stop].to(dtype)) * options.scale
        teacher = torch.where(outside, scores, -torch.inf).logsumexp(-1)
        pairs = dot(phi_q[:, :, start:stop].to(dtype), phi_k[:, :, :stop].to(dtype))
        linear = torch.where(heard, pairs, 0.0).sum(-1).clamp(min=tiny).log()
        total += torch.where(real, torch.where(real, teacher, 0.0) - linear, 0.0).sum((0, 2))
        count += int(real.sum()) * (batch if real.shape[0] == 1 else 1)
    return total, count


__all__ = ["log_scale_closed_form", "teacher_attention", "weight_transfer_loss"]
