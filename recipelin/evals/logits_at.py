"""Logits at some positions of rows, without what only the others need."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.swapped import SwappedAttention

ALIGNED = 64  # tokens; rows are cut between chunks of the operators, so that a shorter row has the same ones
FEWEST = 16  # rows of a product of matrices; for one to three, BLAS takes kernels that round otherwise


def logits_at(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """[B, P, vocabulary] of rows ids [B, T] at positions [P]: what `logits_to_keep` gives, on a CPU bit for bit.

    Behind the last attention no position looks at another: o_proj and MLP of the last layer and the head are computed at
    `positions` alone, and its queries from the first of them on. On a GPU only the head is: its products round otherwise with
    fewer rows, and one layer of many is little.
    In a state whose layers all see a few keys only (the window alone), tokens that no position can know of are left out.
    """
    begin, at = unseen(model, int(positions.min())), None
    positions = positions.to(ids.device)
    if begin:
        at = torch.arange(begin, ids.shape[1], device=ids.device)[None]  # rotated as in the whole row
        ids, positions = ids[:, begin:], positions - begin
    with ExitStack() as undo:
        if ids.device.type == "cpu":
            last = model.model.layers[-1]
            first = int(positions.min()) // ALIGNED * ALIGNED
            if isinstance(last.self_attn, SwappedAttention) and len(ids) * (ids.shape[1] - first) >= FEWEST:
                undo.enter_context(_asked_from(last.self_attn, first))
            if len(ids) * len(positions) >= FEWEST:
                for module in (last.self_attn.o_proj, last.mlp):
                    undo.enter_context(_only_at(module, positions))
        found: Tensor = model(input_ids=ids, position_ids=at, use_cache=False, logits_to_keep=positions).logits
    return found


def unseen(model: Any, position: int) -> int:
    """How many tokens at the begin of a row its logits at `position` do not depend on, or fewer."""
    layers = [layer.self_attn for layer in model.model.layers]
    seen = [form.sees if isinstance(form, SwappedAttention) else None for form in layers]
    near = [n for n in seen if n is not None]
    if len(near) < len(layers):
        return 0
    reach = 1 + sum(n - 1 for n in near)
    return max(0, position + 1 - reach) // ALIGNED * ALIGNED


@contextmanager
def _asked_from(form: SwappedAttention, first: int) -> Iterator[None]:
    """Within: nothing that the form gives before a position is read."""
    before, form.asked_from = form.asked_from, first
    try:
        yield
    finally:
        form.asked_from = before


@contextmanager
def _only_at(module: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within: a module of [B,T,D] -> [B,T,E] that takes each position by itself computes these; the others get zeros."""
    length = 0

    def cut(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        nonlocal length
        length = given[0].shape[1]
        return (given[0][:, positions],)

    def spread(_: nn.Module, __: tuple[Tensor], found: Tensor) -> Tensor:
        whole = found.new_zeros(found.shape[0], length, found.shape[2])
        whole[:, positions] = found
        return whole

    handles = [module.register_forward_pre_hook(cut), module.register_forward_hook(spread)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
