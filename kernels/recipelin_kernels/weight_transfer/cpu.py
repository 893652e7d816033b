"""The C kernel of the weight transfer loss: cpu/weight_transfer.c, and its layout of a call."""

import ctypes

import torch
from torch import Tensor

from ..cpu.calls import check_device, dense, run, runs_of, whole_vectors
from ..hybrid.rows import JOINS, Options, Rows

LINEAR = -1  # in the place of a join: target linear


class _Given(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("row", "head", "token")))


class _Call(ctypes.Structure):
    """`Call` of weight_transfer.c."""

    _fields_ = (
        *((name, _Given) for name in ("q", "k", "phi_q", "phi_k")),
        *((name, ctypes.c_void_p) for name in ("lse", "mix", "log_scale", "runs")),
        *((name, ctypes.c_void_p) for name in ("grad_phi_q", "grad_phi_k", "loss", "grad_mix", "grad_log_scale")),
        *((name, ctypes.c_long) for name in ("run_count", "heads", "key_heads", "feature_heads", "length")),
        *((name, ctypes.c_long) for name in ("width", "features", "longest")),
        *((name, ctypes.c_long) for name in ("join", "is_signed", "window", "terraced", "anchor", "sinks")),
        *((name, ctypes.c_long) for name in ("cover_all", "reach", "teacher_window")),
        ("scale", ctypes.c_float),
    )


def _given(x: Tensor) -> _Given:
    return _Given(x.data_ptr(), *x.stride()[:3])


@torch.no_grad()
def weight_transfer_cpu(
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `weight_transfer_chunked`. A run of real tokens is a row of its own; a piece of a thread's work is a key head of one.

    Raises MemoryError where a thread finds no room: about T (D + F + 256) numbers.
    """
    (batch, heads, length, _), features = q.shape, phi_q.shape[-1]
    check_device("weight_transfer_loss", q, k, phi_q, phi_k, mix, log_scale, lse)
    hybrid = target == "hybrid"
    runs = runs_of(rows, batch)
    runs[:, 2] -= runs[:, 1]  # to tokens
    given = {n: whole_vectors(x) for n, x in (("q", q), ("k", k), ("phi_q", phi_q), ("phi_k", phi_k))}
    plain = (("lse", lse), ("mix", mix), ("log_scale", log_scale))
    numbers = {n: dense(x.float()) for n, x in plain if x is not None}
    grads: dict[str, Tensor] = {n: given[n].new_zeros(given[n].shape) for n in ("phi_q", "phi_k") if n in learn}
    sums = {
        n: torch.zeros(len(runs), heads, dtype=torch.float64, device=q.device) for n in ("loss", "mix", "log_scale")
    }
    call = _Call(
        **{n: _given(x) for n, x in given.items()},
        **{n: x.data_ptr() for n, x in numbers.items()},
        runs=runs.data_ptr(),
        **{f"grad_{n}": x.data_ptr() for n, x in grads.items()},
        loss=sums["loss"].data_ptr(),
        grad_mix=sums["mix"].data_ptr(),
        grad_log_scale=sums["log_scale"].data_ptr(),
        run_count=len(runs),
        heads=heads,
        key_heads=k.shape[1],
        feature_heads=phi_k.shape[1],
        length=length,
        width=given["q"].shape[-1],
        features=given["phi_q"].shape[-1],
        longest=int(runs[:, 2].max()) if len(runs) else 0,
        join=JOINS.index(options.join) if hybrid else LINEAR,
        is_signed=options.signed,
        window=options.window if hybrid else 0,
        terraced=options.shape == "terraced",
        anchor=options.anchor,
        sinks=options.sinks if hybrid else 0,
        cover_all=not hybrid or options.cover == "all",
        reach=min(length, options.reach or length),
        teacher_window=min(length, teacher_window or length),
        scale=options.scale,
    )
    run("weight_transfer", call)
    found = {n: x[..., :features] for n, x in grads.items()}
    found |= {n: sums[n].sum(0).float() for n in ("mix", "log_scale") if n in learn}
    return sums["loss"].sum(0).float(), found


__all__ = ["weight_transfer_cpu"]
