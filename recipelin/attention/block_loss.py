"""The loss between a student's and a teacher's attention block, after o_proj: shared by all forms."""

import math

import torch
from torch import Tensor


def block_loss(student: Tensor, teacher: Tensor, kind: str, key_mask: Tensor | None = None) -> Tensor:
    """A scalar of [B,T,D] each, at least in fp32: the error of a good student is far below the outputs themselves.

    mse: mean over real tokens and channels of (s - t)^2. l2norm: mean over real tokens of |s - t|_2 / sqrt(D), whose
    gradient keeps its size as the error shrinks (0 where it is 0). key_mask [B,T] bool: real tokens; None: all.
    """
    exact = torch.promote_types(student.dtype, torch.float32)
    error = student.to(exact) - teacher.to(exact)
    if kind == "mse":
        tokens = error.square().mean(-1)
    elif kind == "l2norm":
        tokens = torch.linalg.vector_norm(error, dim=-1) / math.sqrt(error.shape[-1])
    else:
        raise ValueError(f"block_loss {kind!r}; expected mse or l2norm")
    return tokens.mean() if key_mask is None else torch.where(key_mask, tokens, 0).sum() / key_mask.sum()
