"""How much of causal softmax attention lies outside a window."""

import torch
from torch import Tensor

from .hybrid.compat import check_compat, whole_rows
from .hybrid.rows import SHAPES, Options, check_reach, check_shapes, one_of, rows, softmax_set, visible
from .weight_transfer.chunked import BLOCK, cut

WEIGHTS = 1 << 24  # weights that exist at once, at most, where a query has fewer keys than that


@torch.no_grad()
def outside_mass(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    shape: str = "sliding",
    sinks: int = 0,
    reach: int | None = None,
    compat: str | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    teacher_window: int | None = None,
) -> Tensor:
    """[B,H,T]: sum over the keys outside W(t) of softmax over all causal keys, in fp32 (fp64 for fp64); forward only.

    q [B,H,T,D]; k [B,Hkv,T,D]. W(t), the softmax set of `hybrid_attention` with the same options, holds the window and
    the first `sinks` keys; `teacher_window` is how far the full softmax itself looks. Summed key by key, not as a
    difference from 1: a mass of 1e-7 is 1e-7. Padded queries give 0. Memory O(T).
    """
    one_of("shape", shape, SHAPES)
    check_shapes(q, k, k, q, None, window, sinks)
    check_reach("teacher_window", teacher_window)
    check_reach("reach", reach)
    batch, heads, length, width = q.shape
    options = Options(
        window=window,
        sinks=sinks,
        cover="outside",
        join="shared",
        max_gradient="through",
        ablate=frozenset(),
        scale=width**-0.5 if scale is None else scale,
        on_drop="linear_outside",
        signed=False,
        shape=shape,
        reach=reach,
    )
    if compat is not None:
        check_compat(compat, options, key_mask, segment_ids)
        options = whole_rows(options, length)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    alike = key_mask is None and segment_ids is None  # then one row of masks serves all
    own = rows(1 if alike else batch, length, q.device, key_mask, segment_ids)
    if key_mask is not None:  # padding may hold anything, NaN included
        q, k = (torch.where(key_mask[:, None, :, None], x, 0) for x in (q, k))
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
    keys = k.to(dtype)[:, :, None]
    found = torch.empty(batch, heads, length, dtype=dtype, device=q.device)
    size = max(1, min(BLOCK, WEIGHTS // (batch * heads * length)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        queries, before = cut(own, start, stop), cut(own, 0, stop)
        near, far_sinks = softmax_set(options, queries, before)
        seen = visible(queries, before, teacher_window)
        scores = grouped[..., start:stop, :] @ keys[..., :stop, :].mT * options.scale
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        outside = (seen & ~near & ~far_sinks)[:, None, None]
        found[:, :, start:stop] = torch.where(outside, weights, 0.0).sum(-1).flatten(1, 2)
    return found
