"""What says which tokens of a row belong together: padding, and sequences side by side."""

import torch
from torch import Tensor


def check_tokens(key_mask: Tensor | None, segment_ids: Tensor | None, batch: int, length: int) -> None:
    """Raises ValueError for what is not [B,T], and for a key_mask that is not of bool."""
    for name, x in (("key_mask", key_mask), ("segment_ids", segment_ids)):
        if x is not None and x.shape != (batch, length):
            raise ValueError(
                f"{name} {tuple(x.shape)}: expected {(batch, length)}, a row of tokens for each of the batch"
            )
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask of {key_mask.dtype}: expected bool, True for real tokens")


def segment_ids_of(cu_seqlens: Tensor) -> Tensor:
    """`segment_ids` [1,T] int64 of the row that holds the tokens cu_seqlens[i] .. cu_seqlens[i + 1] of every sequence i.

    cu_seqlens [n + 1] integers, as flash-attn and fla take them: 0, then the ends of the n sequences, the last of them T; a
    sequence may be empty. On a GPU the host waits for them. Raises ValueError for others.
    """
    whole = not (cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool)
    if not whole or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"cu_seqlens {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected integers [n + 1]")
    ends = cu_seqlens.tolist()
    for before, end in zip([0, *ends], ends, strict=False):
        if end < before or ends[0] != 0:
            raise ValueError(
                f"cu_seqlens: {end} follows {before}; expected 0, then the ends of the sequences in their order"
            )
    number = torch.arange(len(ends) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(number, cu_seqlens.diff(), output_size=ends[-1])[None]
