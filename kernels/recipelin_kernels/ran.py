"""Which kernels have run: a call may take another than `auto`, or a name, stands for (SDPA where a window covers all, torch where
a call goes on from a state)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_found: ContextVar[dict[str, set[str]] | None] = ContextVar("kernels that ran", default=None)


@contextmanager
def kernels_ran() -> Iterator[dict[str, set[str]]]:
    """Within: operator -> the kernels that its calls in this thread have run, forward. One inside another begins anew."""
    found: dict[str, set[str]] = {}
    before = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(before)


def note(operator: str, kernel: str) -> None:
    """A call of an operator runs a kernel. What torch.compile has compiled is not noted again."""
    if torch.compiler.is_compiling():
        return
    found = _found.get()
    if found is not None:
        found.setdefault(operator, set()).add(kernel)
