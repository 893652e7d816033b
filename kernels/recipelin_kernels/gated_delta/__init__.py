"""The gated delta rule (Yang et al., arXiv 2412.06464): linear attention that forgets, and overwrites what a key held."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..hybrid.rows import one_of
from ..kernel_error import KernelError
from ..packing import check_tokens
from ..ran import note
from .chunked import gated_delta_chunked
from .reference import gated_delta_reference
from .step import one_token

KERNELS = ("auto", "reference", "chunked", "fla")


def resolve_gated_delta_kernel(kernel: str, device: torch.device | str) -> str:
    """The implementation that a call takes: what `auto` means here. Raises KernelError for one that cannot run.

    `auto` is `chunked` on every device: fla's Triton kernels take products of tf32 in float32 (their tests hold them to 5e-3 of
    the definition), so they are taken by name.
    """
    one_of("kernel", kernel, KERNELS)
    if kernel == "fla":
        if torch.device(device).type != "cuda":
            raise KernelError("kernel='fla': its Triton kernels run on CUDA tensors only; use 'chunked', or 'auto'")
        if importlib.util.find_spec("fla") is None:
            raise KernelError("kernel='fla': not installed; pip install flash-linear-attention, or use 'chunked'")
    return "chunked" if kernel == "auto" else kernel


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    state: Tensor | None = None,
    output_state: bool = False,
    kernel: str = "auto",
    chunk: int | None = None,
) -> Any:
    """o [B,H,T,E]; with `output_state` also the state behind the last token, [B,H,D,E].

        S_t = exp(g_t) (S_{t-1} - beta_t S_{t-1} k_t k_t^T) + beta_t v_t k_t^T        o_t = scale S_t q_t

    q, k [B,Hk,T,D], head h of v reads head h // (H / Hk) of them; v [B,H,T,E]; g <= 0 (log of the decay) and beta
    [B,H,T]. Nothing is normalised here: the rule is stable for |k| = 1 and beta in (0, 2). scale: D^-1/2 by default.
    key_mask [B,T] bool: tokens that are False change nothing, whatever they hold, and get 0. segment_ids [B,T]: S is 0
    again where it changes. state: S before the first token, transposed, [B,H,D,E]; gradients flow into it.

    Any float dtype; computed in fp32 (fp64 where an input is), which is the state's dtype; o has v's. kernel `reference`:
    token by token, the definition; `chunked`: O(T); `fla`: flash-linear-attention's Triton kernels, on a GPU, with products of
    tf32 in float32, take no segments. `auto`: chunked; one token that goes on from a state is computed as such.

    Raises ValueError for shapes that do not fit and unknown options, RuntimeError for a kernel that cannot run here.
    """
    _check_shapes(q, k, v, g, beta, state)
    batch, heads, length, width = v.shape
    check_tokens(key_mask, segment_ids, batch, length)
    ran = resolve_gated_delta_kernel(kernel, v.device)
    by_token = kernel == "auto" and length == 1
    note("gated_delta_rule_step" if by_token else "gated_delta_rule", ran)
    if key_mask is not None:
        # Padding may hold anything, NaN included, and 0 x NaN is NaN.
        real = key_mask[:, None, :, None]
        q, k, v = (torch.where(real, x, 0) for x in (q, k, v))
        g, beta = (torch.where(key_mask[:, None], x, 0) for x in (g, beta))
    exact = torch.float64 if any(x.dtype == torch.float64 for x in (q, k, v, g, beta)) else torch.float32
    dtype = v.dtype
    group = heads // k.shape[1]
    if group > 1:
        q, k = (x.repeat_interleave(group, 1) for x in (q, k))
    if state is None:
        state = v.new_zeros(batch, heads, k.shape[-1], width, dtype=exact)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    begins = None
    if segment_ids is not None:
        begins = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
    if ran == "fla":
        o, last = _fla(q, k, v, g, beta, scale, begins, state)
    else:
        q, k, v, g, beta, state = (x.to(exact) for x in (q, k, v, g, beta, state))
        with without_autocast(v.device):
            if ran == "reference":
                none = torch.zeros(batch, length, dtype=torch.bool, device=v.device)
                o, last = gated_delta_reference(q, k, v, g, beta, scale, none if begins is None else begins, state)
            elif by_token:
                o, last = one_token(q[:, :, 0], k[:, :, 0], v[:, :, 0], g[:, :, 0], beta[:, :, 0], scale, state)
                o = o[:, :, None]
            else:
                o, last = gated_delta_chunked(q, k, v, g, beta, scale, begins, state, chunk)
    if key_mask is not None:
        o = torch.where(key_mask[:, None, :, None], o, 0)
    o = o.to(dtype)
    return (o, last) if output_state else o


def _fla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, begins: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """fla's chunk_gated_delta_rule, whose layout is [B,T,H,D]; it computes in the dtype of q, k, v."""
    if begins is not None:
        raise ValueError("kernel='fla' takes no segment_ids here; use 'chunked' for packed documents")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]  # a GPU's extra

    q, k, v, g, beta = (x.transpose(1, 2).contiguous() for x in (q, k, v, g, beta))
    o, last = chunk_gated_delta_rule(
        q=q, k=k, v=v, g=g.float(), beta=beta, scale=scale, initial_state=state.float(), output_final_state=True
    )
    return o.transpose(1, 2), last


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> None:
    batch, heads, length, width = v.shape
    if k.ndim != 4 or heads % k.shape[1]:
        raise ValueError(f"k {tuple(k.shape)}: expected [B,Hk,T,D] with Hk a divisor of the {heads} heads of v")
    if length < 1:
        raise ValueError("expected at least one token")
    expected = {
        "q": (q, tuple(k.shape)),
        "k": (k, (batch, k.shape[1], length, k.shape[3])),
        "g": (g, (batch, heads, length)),
        "beta": (beta, (batch, heads, length)),
    }
    if state is not None:
        expected["state"] = (state, (batch, heads, k.shape[3], width))
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} {tuple(x.shape)}: expected {shape} beside v {tuple(v.shape)}")


__all__ = ["gated_delta_rule", "resolve_gated_delta_kernel"]
