"""Padding and packing as a swapped layer must see them: transformers hands a layer 4-D masks, never the 2-D padding.

A mask function of ours returns a `Padding` in its place, which carries the 2-D mask; kept softmax layers build the full
mask from it when they are reached, so that a model whose layers are all swapped never holds a T x T mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, and_masks, packed_sequence_mask_function, sdpa_mask

ATTENTION = "recipelin"  # the name of our attention and mask functions in transformers' registries


class Padding(NamedTuple):
    """`real` [B, seen] bool, True for real tokens, or None; `full(segment_ids)` makes the mask of a softmax layer."""

    real: Tensor | None
    full: Callable[[Tensor | None], Tensor | None]


def _mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Padding:
    real = None if attention_mask is None else attention_mask.bool()
    return Padding(real, partial(_full, attention_mask, kwargs))


def _full(attention_mask: Tensor | None, how: dict[str, Any], segment_ids: Tensor | None) -> Tensor | None:
    """transformers' mask (causal, the layer's own window, padding); with segments [B, T], every run of them by itself."""
    if segment_ids is not None:
        apart = and_masks(how["mask_function"], packed_sequence_mask_function(runs(segment_ids)))
        how = {**how, "mask_function": apart, "allow_is_causal_skip": False}
    return sdpa_mask(attention_mask=attention_mask, **how)


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, segment_ids: Tensor | None = None, **kwargs: Any
) -> Any:
    if isinstance(attention_mask, Padding):
        attention_mask = attention_mask.full(segment_ids)
    return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)


# Both names: without its mask function, an attention function gets no mask at all, and no error.
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def real_tokens(attention_mask: Any) -> Tensor | None:
    """Which of the tokens so far are real [B, seen], or None for all. Raises ValueError for an unknown mask."""
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Padding):
        return attention_mask.real
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.bool()
    found = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    raise ValueError(
        f"a swapped layer got the mask {found}, in which padding cannot be told from causality; "
        f"set the model's attention implementation to {ATTENTION!r} (recipelin.swap and recipelin.hf do)"
    )


def segments_of(position_ids: Tensor | None, key_mask: Tensor | None) -> Tensor | None:
    """Segments [B, T] from positions that begin anew inside a row (packed documents), or None where none does."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if key_mask is not None:
        begins = begins & key_mask[:, 1:] & key_mask[:, :-1]
    if not bool(begins.any()):
        return None
    return _numbered(begins)


def rows_of(
    attention_mask: Any, position_ids: Tensor | None, segment_ids: Tensor | None, length: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(real tokens so far [B, seen], of this call [B, length], segments [B, length]) of a swapped layer's call.

    None: all are real; no document ends. Segments are those given, or where positions begin anew.
    """
    real = real_tokens(attention_mask)
    key_mask = None if real is None else real[:, -length:]
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    if segment_ids is None:
        segment_ids = segments_of(position_ids, key_mask)
    return real, key_mask, segment_ids


def runs(segment_ids: Tensor) -> Tensor:
    """Segments [B, T] numbered anew: an id that comes back later in a row is another segment, as in the operator."""
    return _numbered(segment_ids[:, 1:] != segment_ids[:, :-1])


def _numbered(begins: Tensor) -> Tensor:
    return torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))


def hear_segments(model: Any) -> None:
    """Let the softmax layers of a model obey `segment_ids`: transformers' own attention passes over them without a word.

    The attention stays SDPA, and rows without segments give the same bits.
    """
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
