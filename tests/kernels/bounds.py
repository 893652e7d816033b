"""Every address that an interpreted kernel reads or writes must lie in one of its arguments: on a GPU another one may belong to
anybody, or to nobody."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch


class OutOfBounds(Exception):
    """Raised within a kernel: the interpreter says in which line."""


class Memory:
    """The bytes of a launch's tensors: disjoint ranges in order."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in sorted(map(extent, tensors)):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def check(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Raises OutOfBounds for an element of `size` bytes that the mask lets through and no tensor holds."""
        used = pointers[np.broadcast_to(mask, pointers.shape)] if not mask.all() else pointers
        if used.size == 0:
            return
        least, most = int(used.min()), int(used.max()) + size
        at = bisect_right(self.starts, least) - 1
        if at >= 0 and most <= self.ends[at]:
            return  # as a rule all of one tensor
        at = np.searchsorted(np.array(self.starts, dtype=np.uint64), used.ravel(), "right") - 1
        wrong = (at < 0) | (used.ravel() + size > np.array(self.ends, dtype=np.uint64)[at])
        if wrong.any():
            beyond = [
                int(used.ravel()[i]) + size - self.ends[at[i]] if at[i] >= 0 else 0 for i in np.flatnonzero(wrong)
            ]
            raise OutOfBounds(f"{int(wrong.sum())} of {used.size} elements, up to {max(beyond)} bytes behind a tensor")


def extent(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first byte of its memory and behind the last one: what stands before a view may be meant."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def tensors_of(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from tensors_of(x)


def watch(patch: Callable[[Any, str, Any], None]) -> None:
    """Has the interpreter look at every address. patch(object, name, value), as of `monkeypatch.setattr`."""
    from triton.runtime import interpreter

    builder, memory = interpreter.interpreter_builder, Memory()
    arguments_of = interpreter.GridExecutor._init_args_hst
    load, store, add = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def noted(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal memory
        found = arguments_of(self, args, kwargs)
        memory = Memory(tensors_of((*found[0], *found[1].values())))
        return found

    def check(pointers: Any, mask: Any) -> None:
        memory.check(pointers.data, mask.data.astype(bool), pointers.get_element_ty().primitive_bitwidth // 8)

    def loaded(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(pointers, mask, *rest)

    def stored(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(pointers, value, mask, *rest)

    def added(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return add(operation, pointers, value, mask, *rest)

    patch(interpreter.GridExecutor, "_init_args_hst", noted)
    for name, checked in (
        ("create_masked_load", loaded),
        ("create_masked_store", stored),
        ("create_atomic_rmw", added),
    ):
        patch(builder, name, checked)
