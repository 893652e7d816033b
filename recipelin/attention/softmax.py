"""The teacher's side of every form: its q, k, v, its rotation, and causal softmax attention."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Architecture, family
from ..masks import runs

Rotate = Callable[..., tuple[Tensor, Tensor]]


def rotation(architecture: Architecture) -> Rotate:
    """The family's own `apply_rotary_pos_emb(q, k, cos, sin)`."""
    rotate: Rotate = import_module(family(architecture.model_type).modeling).apply_rotary_pos_emb
    return rotate


def project(
    attention: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *, head_dim: int, rotate: Rotate
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,H,T,d] and k, v [B,Hkv,T,d] of an attention module, after its q/k norm (if it has one) and RoPE."""
    q, k, v = (
        projection(hidden_states).unflatten(-1, (-1, head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if getattr(attention, "q_norm", None) is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = rotate(q, k, *position_embeddings)
    return q, k, v


def causal_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    real: Tensor | None,
    segment_ids: Tensor | None,
) -> Tensor:
    """Causal softmax over all keys, or the last `window`: the teacher's attention. k, v may hold a past; real [B, keys]."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if real is not None or segment_ids is not None or window or queries != keys:
        at = torch.arange(keys, device=q.device)
        behind = at[keys - queries :, None] - at
        mask = (behind >= 0 if window is None else (behind >= 0) & (behind < window))[None, None]
        if segment_ids is not None:
            own_run = runs(segment_ids)
            mask = mask & (own_run[:, None, :, None] == own_run[:, None, None, :])
        if real is not None:
            mask = mask & real[:, None, None, -keys:]  # a windowed cache has forgotten the keys before
    y = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y if real is None else torch.where(real[:, None, -queries:, None], y, 0)
