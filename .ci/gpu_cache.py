"""Compiles, without a GPU, what the GPU's tests, bars and sweeps launch, into an archive of Triton's cache (`make gpu-cache`).

Triton finds what it has compiled by source, constants, what it specialises on, and its own version: compiled here by the version
of the lent machine, of its Python's series, kernels are found there (all of 18 that were compared, on an H200's machine). To
compile them there takes most of ten minutes, and the time is lent.

The tests run as they are, except that CUDA's tensors are the CPU's, a launch only compiles, the definition gives zeros, and
nothing is asserted (python -O). This file is also the plugin by which they do. Written to .gpu/cache.tar.xz: kernels alone.
"""

import contextlib
import importlib
import io
import lzma
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode

from recipelin_kernels.hybrid.gpu_launch import hashed

ROOT = Path(__file__).resolve().parent.parent
CACHE, TARGET = ROOT / ".gpu/cache", ROOT / ".gpu/cache.tar.xz"
TESTS = sorted(str(p) for pattern in ("test_*_gpu*.py", "on_gpu_*.py") for p in (ROOT / "tests/kernels").glob(pattern))
OTHERS = ("bars", "sweeps")  # beside the tests; named on the command line, those alone
KEPT = (".cubin", ".json")  # all that is read of a compiled kernel
ONES = {torch.empty: torch.ones, torch.empty_like: torch.ones_like, torch.Tensor.new_empty: torch.Tensor.new_ones}
TO_THE_END = contextlib.ExitStack()  # of the process


class OnCpu(TorchFunctionMode):
    """ "cuda" is the CPU. instead: functions that others stand in for."""

    def __init__(self, instead: dict[Any, Any]) -> None:
        self.instead = instead

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(x: Any) -> Any:
            return "cpu" if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x

        function = self.instead.get(function, function)
        return function(*map(here, args), **{name: here(x) for name, x in (kwargs or {}).items()})


class Nothing:
    """In the place of streams and graphs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


def compiles(kernel: Any, grid: Any, arguments: Any, constants: Any, how: Any) -> None:
    hashed(kernel)
    made = kernel.warmup(*arguments, grid=grid, **constants, **how)
    os.utime(triton.runtime.cache.get_cache_manager(made.hash).cache_dir)  # asked for, by this run


def stand_in() -> None:
    """From here on this process compiles in the place of launches."""
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT / ".ci"))
    from gpu_compile import NoGpu
    from triton.runtime.driver import driver

    from recipelin_kernels.hybrid import gpu_assembler, gpu_launch

    driver.set_active(NoGpu())
    TO_THE_END.enter_context(gpu_assembler.assembling())
    gpu_launch.launch = compiles
    # What no launch fills is ones: with them, and without what its gradients hold, a model trains on, if to no end.
    pretend(ONES)
    torch.nn.utils.get_total_norm = no_gradients
    define_nothing()


def no_gradients(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """In the place of their norm."""
    for one in gradients:
        one.zero_()
    return torch.zeros(())


def pretend(instead: dict[Any, Any] | None = None) -> None:
    """From here on CUDA's tensors are the CPU's, and graphs are nothing."""
    os.environ["RECIPELIN_TEST_GPU"] = "1"
    from recipelin.bars import gpu
    from recipelin_kernels.hybrid import gpu_support

    gpu._normal = normal
    gpu_support.why_not = lambda *_, **__: ""
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]
    for name in ("Stream", "CUDAGraph", "current_stream", "Event"):
        setattr(torch.cuda, name, Nothing)
    for name in ("stream", "graph"):
        setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None  # type: ignore[assignment]
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda _: None  # type: ignore[method-assign]
    OnCpu(instead or {}).__enter__()


def define_nothing() -> None:
    """From here on what the GPU's tests compare with is zeros."""
    hybrid, transfer = (importlib.import_module(f"recipelin_kernels.{n}") for n in ("hybrid", "weight_transfer"))

    def zeros(q: torch.Tensor, *_: Any) -> list[torch.Tensor]:
        return [q * 0.0, q.detach() * 0.0, q.detach() * 0.0, q.detach()[..., 0] * 0.0]

    hybrid.hybrid_attention_reference = zeros  # type: ignore[attr-defined]
    transfer.weight_transfer_loss_reference = lambda q, k, phi_q, phi_k, *_: (phi_q * 0.0).sum(-1)  # type: ignore[attr-defined]


def pytest_configure() -> None:
    stand_in()


def of_bars() -> Iterator[Any]:
    """Their cases, each once. Of long rows as many tokens as give a call what Triton specialises on: states by sixteen."""
    from recipelin.bars.gpu import BARS, OnGpu, TransferOnGpu

    cases = {case for bar in BARS for case in getattr(bar, "cases", {}).values()}
    cases |= {OnGpu("gpu", 1024), OnGpu("gpu", 1024, True), TransferOnGpu("gpu", 1024)}  # the host's
    for case in cases:
        if getattr(case, "kind", "") not in ("sdpa", "fla", "chunked") and getattr(case, "kernel", "") != "chunked":
            length = getattr(case, "length", 0)
            yield replace(case, length=min(length, 4096)) if length else replace(case, steps=1)


def normal(length: int, batch: int = 1) -> Any:
    """In the place of the bars' own: a generator of CUDA's numbers is none of the CPU's."""
    return lambda heads, width: torch.randn(batch, heads, length, width, dtype=torch.bfloat16)


def compile_others(job: tuple[str, int, int]) -> None:
    """Of bars or sweeps every `jobs`-th."""
    what, number, jobs = job
    stand_in()
    if what == "sweeps":
        import gpu_tune

        gpu_tune.compile_share(number, jobs)
        return
    for at, case in enumerate(sorted(set(of_bars()), key=repr)):
        if at % jobs == number:
            case.make()()


def main() -> int:
    from gpu_compile import unfenced

    jobs, begun = os.cpu_count() or 1, time.time()
    os.environ["TRITON_CACHE_DIR"], os.environ["OMP_NUM_THREADS"] = str(CACHE), "1"
    ahead = os.environ.get("PYTHONPATH", "")  # where the lent machine's Triton is
    path = os.pathsep.join([ahead, *map(str, (ROOT, ROOT / "kernels", ROOT / ".ci"))])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONOPTIMIZE": "1", "RECIPELIN_TEST_GPU": "1"}
    options = f"-q -W ignore -p gpu_cache -p no:cacheprovider -n {jobs} --tb=line --assert=plain".split()
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *TESTS], cwd=ROOT, env=environment)
    if done.returncode not in (0, 1):  # 1: tests fail, as nothing is computed
        return done.returncode
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(compile_others, [(what, n, jobs) for what in sys.argv[1:] or OTHERS for n in range(jobs)]))
    # What this run did not ask for is of sources or sizes of before, and left out.
    found = (p for p in CACHE.rglob("*") if p.suffix in KEPT and p.parent.stat().st_mtime >= begun - 1)
    # Variants of a kernel are much alike: one after the other, and looked back at so far, they take half the room.
    kept = sorted(found, key=lambda p: (p.suffix, p.name, p.stat().st_size, p))
    how = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}]
    with lzma.open(TARGET, "wb", filters=how) as file, tarfile.open(fileobj=file, mode="w") as archive:
        for p in kept:
            # Triton writes down where it put the files of a kernel: `gpu_session.sh` says where they are now.
            content = p.read_bytes().replace(str(CACHE).encode(), b"@CACHE@") if p.suffix == ".json" else p.read_bytes()
            entry = tarfile.TarInfo(str(p.relative_to(CACHE)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    kernels = [p for p in kept if p.suffix == ".cubin"]
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size / 2**20:.1f} MiB, {len(kernels)} kernels")
    bare = [p.with_suffix(".ptx") for p in kernels if unfenced(p.with_suffix(".ptx").read_text())]
    for p in bare:
        print(f"{p.relative_to(ROOT)}: products read what was copied without a fence (gpu_parts.copied)")
    return bool(bare)


if __name__ == "__main__":
    sys.exit(main())
