"""Processes that begin where the imports of a run end, which take seconds: forks of one server, killed like any other.

The server is started once by the first test that asks; it has imported, and computed nothing.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["recipelin.run", "peft", "torch.utils.tensorboard"])

Pipe = _CONTEXT.Pipe


def start(
    target: Callable[..., object], *given: Any, stderr: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """`target(*given)` of an importable module, under way; what it writes to stderr goes to a file."""
    process = _CONTEXT.Process(target=_begin, args=(target, given, stderr, dict(environment or {})))
    process.start()
    return process


def _begin(target: Callable[..., object], given: tuple[Any, ...], stderr: Path, environment: dict[str, str]) -> None:
    with stderr.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    target(*given)
