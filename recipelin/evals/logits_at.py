"""Logits at some positions of rows, without what only the others need."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

FEWEST = 16  # rows of a product of matrices; for one to three, BLAS takes kernels that round otherwise


def logits_at(model: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """[B, P, vocabulary] of rows ids [B, T] at positions [P]: what `logits_to_keep` gives, on a CPU bit for bit.

    Behind the last attention no position looks at another: o_proj and MLP of the last layer and the head are computed at
    `positions` alone. On a GPU only the head is: its products round otherwise with fewer rows, and one layer of many is little.
    """
    positions = positions.to(ids.device)
    with ExitStack() as undo:
        if ids.device.type == "cpu" and len(ids) * len(positions) >= FEWEST:
            last = model.model.layers[-1]
            for module in (last.self_attn.o_proj, last.mlp):
                undo.enter_context(_only_at(module, positions))
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
    return logits


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
