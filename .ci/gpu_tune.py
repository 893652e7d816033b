#!/usr/bin/env python3
"""Times every Triton kernel of a Llama-3.1-8B layer over sizes of blocks, warps, stages and registers (`make gpu-tune`).

A kernel is launched alone, on the inputs that a call gives it, four times in a CUDA graph; the best of four replays counts.
Variants are compiled before, by `--jobs` processes side by side: on a lent GPU that is most of the time. Writes
kernels/bench/tuning-NAME.json and .md. What it finds goes into hybrid/gpu_call.py by hand, and counts once `make test-gpu` has
passed with it. A pipeline can race: a variant that writes other bits than one stage with as many warps is marked.
"""

import argparse
import datetime
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_cache import compiles

from recipelin.bars.gpu import DecodeOnGpu
from recipelin.bench.cuda import captured, timed
from recipelin.records import provenance
from recipelin_kernels import SoftmaxMap, hybrid_attention, weight_transfer_loss
from recipelin_kernels.hybrid import gpu, gpu_assembler, gpu_call, gpu_launch, gpu_step
from recipelin_kernels.hybrid.gpu_call import Blocks, Launch
from recipelin_kernels.hybrid.gpu_features import softmax_features_gpu
from recipelin_kernels.hybrid.gpu_step import StepBlocks
from recipelin_kernels.weight_transfer import gpu as transfer_gpu

ROOT = Path(__file__).resolve().parent.parent
BRIEF = 4  # best variants of a kernel that the page shows


@dataclass(frozen=True)
class Operator:
    """A call of 32 heads over 8, d 128, in bf16: `forward`, the same with features `made`, `both` with gradients, `transfer`."""

    kind: str
    length: int
    features: int = 128
    feature_dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.kind}, T {self.length}, F {self.features} in {self.feature_dtype}"

    def make(self) -> Callable[[], object]:
        def normal(heads: int, width: int) -> torch.Tensor:
            return torch.randn(1, heads, self.length, width, device="cuda").bfloat16()

        q, k, v, dy = (normal(h, 128) for h in (32, 8, 8, 32))
        mix = torch.full((32,), 0.1, device="cuda")
        if self.kind == "made":
            weight = torch.randn(32, 128, self.features // 2, device="cuda") * 0.1
            maps = [SoftmaxMap(lambda x: softmax_features_gpu(x, weight, 1e-12), weight, 1e-12)] * 2

            def make() -> Any:
                with torch.no_grad():
                    return hybrid_attention(q, k, v, maps[0], None, mix, window=64, kernel="gpu", phi_k_fn=maps[1])

            return make
        kind = getattr(torch, self.feature_dtype)
        phi = [normal(32, self.features).float().softmax(-1).to(kind) for _ in range(2)]
        given: list[Any] = [x.requires_grad_(self.kind != "forward") for x in (q, k, v, *phi)]
        if self.kind == "transfer":
            lse = torch.full((1, 32, self.length), 9.0, device="cuda")
            return lambda: weight_transfer_loss(q.detach(), k.detach(), phi[0], phi[1], lse, kernel="gpu")

        def attend() -> Any:
            return hybrid_attention(q, k, v, phi[0], phi[1], mix, window=64, kernel="gpu")

        return attend if self.kind == "forward" else lambda: torch.autograd.grad(attend(), given, dy)


@dataclass(frozen=True)
class Variant:
    """One kernel of one call, as it is compiled; microseconds, None where it does not fit the GPU. same: whether it writes the
    bits of one stage, with as many warps and all registers."""

    operator: str
    kernel: str
    blocks: str
    launch: Launch
    us: float | None = None
    same: bool | None = None


@dataclass(frozen=True)
class Sweep:
    """Kernels of a call, all that begin with one of `kernels`, by what they own and meet, queries between states, launch."""

    operator: Operator
    kernels: tuple[str, ...]
    sizes: tuple[tuple[int, int, int], ...]
    launches: tuple[Launch, ...]


FOUR = (Launch(4, 1), Launch(4, 1, 168), Launch(4, 2), Launch(4, 2, 168), Launch(4, 3, 168))
EIGHT = (Launch(8, 1), Launch(8, 2), Launch(8, 3))
FORWARD, BOTH, TRANSFER = (
    Operator(kind, length) for kind, length in (("forward", 8192), ("both", 8192), ("transfer", 4096))
)
OWNERS = ("transfer",)
SWEEPS = (
    Sweep(FORWARD, ("output",), ((64, 64, 256), (64, 32, 256), (64, 64, 128), (64, 64, 512)), FOUR),
    # Of 64 rows `output` takes 232 KB a program from L2 (ncu: 72 % of what L2 can), of 128 rows 320.
    Sweep(FORWARD, ("output",), ((128, 32, 256), (128, 64, 256)), (*EIGHT, Launch(8, 1, 128), Launch(8, 3, 128))),
    Sweep(FORWARD, ("sum_keys", "scan"), ((64, 64, 256), (64, 64, 128), (64, 64, 512)), (*FOUR[::2], *EIGHT)),
    Sweep(BOTH, ("output", "query", "key"), ((64, 64, 256), (64, 32, 256)), FOUR),
    Sweep(BOTH, ("sum_queries",), ((64, 64, 256),), (Launch(4, 1), Launch(4, 2), *EIGHT)),
    Sweep(TRANSFER, OWNERS, ((128, 64, 128), (128, 32, 128)), EIGHT),
    Sweep(Operator("made", 8192), ("output", "softmax"), ((64, 64, 256),), (*FOUR[:4], Launch(8, 1))),
)


@dataclass(frozen=True)
class Launched:
    """One launch of a call."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    more: dict[str, Any]

    @property
    def name(self) -> str:
        said = {("K", True): " of keys", ("K", False): " of values", ("backward", True): ", backward"}
        return str(self.kernel.__name__) + "".join(said.get(flag, "") for flag in self.more.items() if flag[0] != "o")

    def bits(self) -> int:
        """A sum over all that it read and wrote, as integers."""
        integers = {2: torch.int16, 4: torch.int32}
        tensors = [x for x in self.arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
        sums = [x.contiguous().view(integers[x.element_size()]).sum(dtype=torch.int64) for x in tensors if x.numel()]
        return hash(tuple(int(n) for n in sums))


def launched(sweep: Sweep, blocks: Blocks, *, run: bool) -> list[Launched]:
    """Those of its kernels, with blocks of these sizes. run: not only asked for, so that what later ones read is there."""
    found: list[Launched] = []
    plain = gpu_call.Compiled.launch

    def noted(self: gpu_call.Compiled, kernel: Any, grid: tuple[int, ...], *arguments: Any, **more: Any) -> None:
        if 0 in grid:
            return
        if kernel.__name__.startswith(sweep.kernels):
            found.append(Launched(kernel, grid, arguments, {**more, "o": self.form}))
        if run:
            kernel[grid](*arguments, o=self.form, **more, **sweep.launches[0].options)

    own = gpu.fitting, transfer_gpu.fitting
    gpu.fitting = transfer_gpu.fitting = lambda *_: blocks  # type: ignore[assignment]
    gpu_call.Compiled.launch = noted  # type: ignore[method-assign]
    try:
        sweep.operator.make()()
    finally:
        gpu_call.Compiled.launch = plain  # type: ignore[method-assign]
        gpu.fitting, transfer_gpu.fitting = own
    return found


def variants(sweeps: Iterable[Sweep]) -> Iterator[tuple[Sweep, Blocks, tuple[Launch, ...]]]:
    for sweep in sweeps:
        tile = 256 if sweep.operator.kind == "transfer" else 128
        for rows, columns, stored in sweep.sizes:
            yield sweep, Blocks(rows, columns, stored, tile, 3), sweep.launches


def compile_share(number: int, jobs: int) -> None:
    """Every `jobs`-th variant into Triton's cache."""
    at = 0
    for sweep, blocks, how in variants(SWEEPS):
        for one in launched(sweep, blocks, run=False):
            for launch in how:
                at += 1
                if at % jobs == number:
                    compiles(one.kernel, one.grid, one.arguments, one.more, launch.options)
    gpu_launch.launch = compiles
    for case, _name, blocks in step_cases():
        at += 1
        if at % jobs == number:
            step_call(replace(case, steps=1), blocks)()


def microseconds(call: Callable[[], object]) -> float:
    call()
    again = captured(lambda: [call() for _ in range(4)])
    return round(min(timed(again, 1) for _ in range(4)) / 4 * 1e6, 1)


@torch.no_grad()
def time_sweep(sweep: Sweep, note: Callable[[Variant | str], None]) -> None:
    """Notes the GPU's name, then what it is about to run and how that went."""
    note(torch.cuda.get_device_name())
    for _, blocks, how in variants([sweep]):
        sizes = f"{blocks.rows}/{blocks.columns}/{blocks.stored}"
        try:
            note(f"all, {sizes}")
            with torch.enable_grad():
                made = {one.name: one for one in launched(sweep, blocks, run=True)}
                torch.cuda.synchronize()
        except triton.runtime.errors.OutOfResources as error:
            print(f"left out, {error}: {sweep.operator.name}, {blocks}", file=sys.stderr)
            continue
        for kernel, one in made.items():
            plain: dict[int, int] = {}
            for launch in how:
                us, same = None, None
                note(f"{kernel}, {sizes}, {launch.options}")
                try:
                    us = microseconds(lambda: one.kernel[one.grid](*one.arguments, **one.more, **launch.options))  # noqa: B023
                except triton.runtime.errors.OutOfResources:
                    pass
                else:
                    if one.kernel.__name__ != "scan":  # which sums up in place
                        bits = one.bits()
                        same = bits == plain.setdefault(launch.num_warps, bits)
                note(Variant(sweep.operator.name, kernel, sizes, launch, us, same))


def step_cases() -> Iterator[tuple[DecodeOnGpu, str, StepBlocks]]:
    """A token under a graph with other sizes of its kernel, for few rows and for many."""
    few, many = gpu_step.FEW, gpu_step.MANY
    of_few = {
        "": few,
        "no overlap": replace(few, overlap=False),
        "8 warps": replace(few, warps=8),
        "256 programs": replace(few, programs=256),
    }
    of_many = {
        "": many,
        "no overlap": replace(many, overlap=False),
        "sums 2048": replace(many, sums=2048),
        "sums 2048, pairs 1024": replace(many, sums=2048, pairs=1024),
        "sums 2048, 168 registers": replace(many, sums=2048, registers=168),
        "keys 16384": replace(many, keys=16384),
        "128 registers": replace(many, registers=128),
        "2 warps": replace(many, warps=2, keys=16384, registers=128),
        "4 warps": replace(many, warps=4, keys=16384, registers=128),
    }
    for batch, layers, sizes in ((1, 32, of_few), (32, 2, of_many), (256, 1, of_many)):
        for name, blocks in sizes.items():
            yield DecodeOnGpu(batch, layers), name or "as it is", blocks


def step_call(case: DecodeOnGpu, blocks: StepBlocks) -> Callable[[], object]:
    gpu_step.blocks_for = lambda *_: blocks
    return case.make()


def time_steps(note: Callable[[Variant | str], None]) -> None:
    """Microseconds of a layer: many replays, as of many rows each sixteenth token also writes the sums."""
    note(torch.cuda.get_device_name())
    for case, name, blocks in step_cases():
        note(f"decode, batch {case.batch}, {name}")
        call = step_call(case, blocks)
        for _ in range(3):
            call()
        again = captured(call)
        timed(again, 16)
        us = min(timed(again, 160) for _ in range(5)) / case.steps * 1e6
        launch = Launch(blocks.warps, 1, blocks.registers or None)
        note(Variant(f"decode, batch {case.batch}", "step", name, launch, round(us, 2)))


def time_all(seconds: float, keep: Callable[[str, list[Variant]], None]) -> None:
    """All variants, as far as the seconds reach; says what it left out, and what failed: each sweep in a process of its own,
    after which the GPU's name and what was found are kept."""
    found: list[Variant] = []
    begun, gpu_name = time.monotonic(), ""
    fork = multiprocessing.get_context("fork")
    jobs = {f"{s.operator.name}, {', '.join(s.kernels)}": partial(time_sweep, s) for s in SWEEPS}
    for name, job in {"decode": time_steps, **jobs}.items():
        if time.monotonic() - begun > seconds:
            print(f"left out, no time: {name}", file=sys.stderr)
            continue
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=job, args=(there.send,))
        process.start()
        there.close()
        last = ""
        try:
            gpu_name = here.recv()
            while True:
                noted = here.recv()
                if isinstance(noted, str):
                    last = noted
                else:
                    found.append(noted)
        except EOFError:
            process.join()
        if process.exitcode:
            print(f"failed: {name}: {last}", file=sys.stderr)
        keep(gpu_name, found)


def _said(v: Variant) -> str:
    registers = "" if v.launch.maxnreg is None else f", {v.launch.maxnreg}"
    return f"{v.launch.num_warps}, {v.launch.num_stages}{registers}{' **other bits**' if v.same is False else ''}"


def page(gpu_name: str, head: str, found: list[Variant]) -> str:
    """The best variants of each kernel, in Markdown."""
    lines = [f"# Triton kernels on {gpu_name}, by their variants", "", head, ""]
    lines += [
        "| call | kernel | microseconds: queries / keys of a block / between states, warps, stages, registers at most |",
        "|---|---|---|",
    ]
    for operator, kernel in dict.fromkeys((v.operator, v.kernel) for v in found):
        mine = [v for v in found if (v.operator, v.kernel) == (operator, kernel) and v.us is not None]
        best = sorted(mine, key=lambda v: v.us or 0.0)[:BRIEF]
        said = "; ".join(f"{v.us:.4g}: {v.blocks}, {_said(v)}" for v in best)
        lines.append(f"| {operator} | {kernel} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile (default: 8)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="for timing (default: 60); what does not fit is named"
    )
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "kernels/bench")
    arguments = parser.parse_args()
    if arguments.share is not None:
        compile_share(arguments.share, arguments.jobs)
        return 0
    if not torch.cuda.device_count():
        print("gpu_tune: torch sees no CUDA device", file=sys.stderr)
        return 2
    command = [sys.executable, __file__, "--jobs", str(arguments.jobs), "--share"]
    shares = [subprocess.Popen([*command, str(n)]) for n in range(arguments.jobs)]
    if any([share.wait() for share in shares]):
        return 1
    source = provenance(ROOT)
    changed = " with changes" if source.dirty else ""
    head = (
        f"{datetime.date.today()}, commit {source.commit or 'unknown'}{changed}, torch {torch.__version__}, triton "
        f"{triton.__version__}. Each kernel alone, four launches in a CUDA graph, the best of four replays; of decoding a layer. "
        "Made by `make gpu-tune`; all variants are in the JSON beside this page. What is timed may be wrong: `make test-gpu`."
    )

    def keep(name: str, found: list[Variant]) -> None:
        file = arguments.out / f"tuning-{name.removeprefix('NVIDIA ').split()[0].lower()}"
        file.with_suffix(".json").write_text(json.dumps([asdict(v) for v in found], indent=1) + "\n")
        file.with_suffix(".md").write_text(page(name, head, found))

    time_all(arguments.seconds, keep)
    return 0


if __name__ == "__main__":
    with gpu_assembler.assembling():
        sys.exit(main())
