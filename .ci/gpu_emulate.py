"""Runs the GPU's tests of the Triton kernels without one: what Triton compiles for sm_90, on a CPU (`make gpu-emulate`).

What Triton's interpreter cannot show: bf16 and fp16, layouts, tensor cores' operands, copies under way, barriers, fences, what a
launch reads before it has waited for the one ahead. What this cannot: ptxas, speed, programs that meet in memory. ptx.c says what
is refused. The tests run as they are, except that CUDA's tensors are the CPU's. This file is also the plugin by which they do.

    make gpu-emulate ONLY="tests/kernels/on_gpu_hybrid.py -k 'decoding and bfloat16'"
"""

import contextlib
import ctypes
import functools
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gpu_cache
import torch
from ptx import Program, Refused, machine
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

ROOT = gpu_cache.ROOT
# Tests of what this file pretends, and of what one run of it cannot differ in from another.
LEFT_OUT = ("why_not", "once_they_are_proven", "known_launches", "repeat_bit_by_bit")
captured: list[Callable[[], None]] | None = None  # calls of the graph that is being captured
written: list[tuple[int, int]] = []  # by the launch before
memory: list[Any] = []  # of the launch before


@functools.cache
def program(compiled: CompiledKernel) -> Program:
    return Program(compiled.asm["ptx"])


def bits(value: Any, kind: str) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) if kind == "fp32" else int(value)


@contextlib.contextmanager
def hidden(spans: list[tuple[int, int]]) -> Iterator[Callable[[int], None]]:
    """What the launch ahead wrote is NaN, as it may be, until a block has waited for it."""
    kept: list[tuple[int, bytes]] = []

    def ahead(waited: int) -> None:
        if not waited:
            kept.extend((a, ctypes.string_at(a, b - a)) for a, b in spans)
        for a, content in kept:
            ctypes.memmove(a, content if waited else b"\xff" * len(content), len(content))
        if waited:
            kept.clear()

    try:
        yield ahead
    finally:
        ahead(1)


def emulates(kernel: Any, grid: Any, arguments: Any, constants: Any, how: Any) -> None:
    """In the place of `gpu_launch.launch`."""
    gpu_cache.hashed(kernel)
    made = kernel.warmup(*arguments, grid=grid, **constants, **how)
    kinds = [made.src.signature[name] for name in kernel.arg_names[: len(arguments)]]
    given = [(value, kind) for value, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
    storages = [value.untyped_storage() for value, _ in given if isinstance(value, torch.Tensor)]
    tensors = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
    parameters = [bits(value, kind) for value, kind in given] + [0, 0]  # Triton's own scratch, which none has

    def run(kept: list[Any] = storages) -> None:  # memory of a captured launch stays
        global written, memory
        with hidden(written if dict(how).get("launch_pdl") else []) as ahead:
            written = []  # if this one is refused, its tensors are not kept
            try:
                written = program(made).run(grid, parameters, made.metadata.shared, tensors, ahead)
            except Refused as refused:
                raise Refused(f"{kernel.__name__}{grid}: {refused}") from None
            finally:
                memory = kept

    if captured is not None:
        captured.append(run)
    run()


class Graph:
    """In the place of CUDA's: launches, and what torch computes between them, again into the same memory."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Captures(TorchDispatchMode):
    """Of a graph's capture what torch computes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))

        def again() -> None:
            for one, other in zip(*map(pytree.tree_leaves, (made, function(*args, **(kwargs or {})))), strict=True):
                if isinstance(one, torch.Tensor) and one.data_ptr() != other.data_ptr():
                    one.copy_(other)

        assert captured is not None
        captured.append(again)
        return made


@contextlib.contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    global captured
    captured = graph.calls
    try:
        with Captures():
            yield
    finally:
        captured = None


def pytest_configure() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["RECIPELIN_TEST_GPU"] = "1"
    from gpu_compile import NoGpu
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.driver import driver

    from recipelin_kernels.hybrid import gpu_launch

    driver.set_active(NoGpu())
    CUDABackend.make_cubin = lambda *_, **__: b""  # ptxas, for nothing
    gpu_launch.launch = emulates
    gpu_cache.pretend()
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture  # type: ignore[misc, assignment]


def main() -> int:
    machine()  # compiled once, not by each process
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *map(str, (ROOT, ROOT / "kernels", ROOT / ".ci"))])
    os.environ.pop("TRITON_INTERPRET", None)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RECIPELIN_TEST_GPU": "1"}
    options = f"-q -W ignore -p gpu_emulate -p no:cacheprovider -n {os.cpu_count() or 1} --tb=short".split()
    asked = sys.argv[1:] or [*gpu_cache.TESTS, "-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *asked], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
