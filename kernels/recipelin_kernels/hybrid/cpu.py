"""Hybrid attention by the C kernels: what `chunked` computes, in float32 on a CPU, in products that stay in registers.

The chunked form of chunked.py in chunks of 32 queries (cpu/hybrid.h). A run of real tokens is a row of its own, so that
padding is never read. Backward reads the states before every 512th token, which forward leaves, and computes the rest anew.
"""

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu
from ..cpu.calls import check_device, dense, run, runs_of, whole_vectors
from ..transforms import plain_backward
from .rows import JOINS, Options, Rows, learning

INPUTS = ("q", "k", "v", "phi_q", "phi_k", "mix", "log_scale")

OUTPUTS = ("y", "window_y", "linear_y", "share")
BRANCHES = ("window", "sinks", "linear")
SIZES = ("run_count", "heads", "key_heads", "map_heads", "length", "first", "width", "features")
OPTIONS = (
    *("window", "terraced", "anchor", "sinks", "cover_all", "drop_covers_all", "join", "through"),
    *("reach", "sums_up", "is_signed"),
)


class _Call(ctypes.Structure):
    """`Call` of cpu/hybrid.h. It holds addresses, not tensors: whoever calls keeps these alive."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in (*INPUTS, "keep", "runs", *OUTPUTS, "held", "dy", *(f"d{n}" for n in INPUTS))),
        *(
            (n, ctypes.c_int64)
            for n in (*SIZES, *OPTIONS, *(f"{has}_{b}" for has in ("has", "shown") for b in BRANCHES))
        ),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True)
class _Given:
    """One call but for its tensors: runs [n,4] int64 (row, first token, end, held states before), keep [B,H] uint8."""

    runs: Tensor
    keep: Tensor | None
    options: Options
    first: int
    whole: bool  # every token is in a run


def _struct(given: _Given, inputs: list[Tensor | None], **others: Tensor | None) -> _Call:
    q, k, _, _, phi_k, *_ = inputs
    assert q is not None and k is not None and phi_k is not None
    o = given.options
    named = dict(zip(INPUTS, inputs, strict=True)) | {"keep": given.keep, "runs": given.runs} | others
    sizes = (
        len(given.runs),
        q.shape[1],
        k.shape[1],
        phi_k.shape[1],
        k.shape[2],
        given.first,
        k.shape[3],
        phi_k.shape[3],
    )
    terraced = o.shape == "terraced"
    options = (
        *(o.window if terraced else min(o.window, k.shape[2]), terraced, o.anchor, min(o.sinks, k.shape[2])),
        *(o.cover == "all", o.on_drop == "linear_covers_all", JOINS.index(o.join)),
        *(o.join == "shared" and o.max_gradient == "through", o.reach or 0, o.sums_up, o.signed),
    )
    return _Call(
        **{n: x.data_ptr() for n, x in named.items() if x is not None},
        **dict(zip(SIZES, sizes, strict=True)),
        **dict(zip(OPTIONS, options, strict=True)),
        **{f"{has}_{b}": getattr(o, has)(b) for has in ("has", "shown") for b in BRANCHES},
        scale=o.scale,
    )


def _forward(given: _Given, inputs: list[Tensor | None], *, components: bool, learns: bool) -> list[Tensor]:
    """y, with components their three parts, and where it learns the held states."""
    q, _, _, _, phi_k, *_ = inputs
    assert q is not None and phi_k is not None
    new = torch.empty_like if given.whole else torch.zeros_like  # padding gives 0
    outputs = [new(q) for _ in range(3 if components else 1)]
    if components:
        outputs.append(new(q[..., 0]))
    held = None
    if learns:
        sizes = (ctypes.c_int64 * 2)()
        cpu.library().hybrid_held(ctypes.byref(_struct(given, inputs)), sizes)
        tokens = given.runs[:, 2] - given.runs[:, 1]
        counts = (tokens + sizes[1] - 1) // sizes[1]
        given.runs[:, 3] = counts.cumsum(0) - counts
        held = q.new_empty(int(counts.sum()) * phi_k.shape[1] * sizes[0])
    run("hybrid_forward", _struct(given, inputs, held=held, **dict(zip(OUTPUTS, outputs, strict=False))))
    return outputs if held is None else [*outputs, held]


class _Hybrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: _Given, components: bool, *inputs: Any) -> Any:
        *outputs, held = _forward(given, list(inputs), components=components, learns=True)
        ctx.given = given
        ctx.save_for_backward(*inputs, outputs[0], held)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        *inputs, y, held = ctx.saved_tensors
        given: _Given = ctx.given
        grads: dict[str, Tensor] = {}
        for name, x, want in zip(INPUTS, inputs, ctx.needs_input_grad[2:], strict=True):
            if not want:
                continue
            if name in ("mix", "log_scale"):
                grads[name] = x.new_zeros(len(given.runs), len(x))
            else:
                written = name in ("q", "phi_q") and given.whole  # each query's at once; others are added up
                grads[name] = torch.empty_like(x) if written else torch.zeros_like(x)
        if "log_scale" in grads and "phi_q" not in grads:
            grads["phi_q"] = torch.empty_like(inputs[INPUTS.index("phi_q")])
        others = {f"d{n}": x for n, x in grads.items()}
        dy = dense(dy)  # held here for as long as C reads it
        run("hybrid_backward", _struct(given, inputs, y=y, held=held, dy=dy, **others))
        found = {n: x.sum(0) if n in ("mix", "log_scale") else x for n, x in grads.items()}
        return None, None, *(found.get(n) if w else None for n, w in zip(INPUTS, ctx.needs_input_grad[2:], strict=True))


def hybrid_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    window_keep: Tensor | None,
    options: Options,
    rows: Rows,
    *,
    components: bool,
    first_query: int = 0,
) -> list[Tensor]:
    """y, and with `components` the three parts, as `hybrid_attention_chunked` has them; without a state."""
    check_device("hybrid_attention", q, k, v, phi_q, phi_k, mix, log_scale, window_keep)
    dtype = q.dtype
    if options.scale <= 0:  # the kernels take the largest product for the largest score
        q, options = q.float() * options.scale, replace(options, scale=1.0)
    tensors = [whole_vectors(x).contiguous() for x in (q, k, v, phi_q, phi_k)]
    numbers = [None if x is None else dense(x.float()) for x in (mix, log_scale)]
    keep = None if window_keep is None else window_keep.to(torch.uint8).contiguous()
    runs = F.pad(runs_of(rows, q.shape[0]), (0, 1))  # held states are counted where there are any
    whole = int((runs[:, 2] - runs[:, 1]).sum()) == q.shape[0] * k.shape[2]
    given = _Given(runs, keep, options, first_query, whole)
    inputs = [*tensors, *numbers]
    if learning(*inputs):
        found = list(_Hybrid.apply(given, components, *inputs))
    else:
        found = _forward(given, inputs, components=components, learns=False)
    return [x[..., : q.shape[3]].to(dtype) if x.ndim == 4 else x.to(dtype) for x in found]
