"""Speed and peak memory of the chunked gated delta rule beside transformers' torch form and SDPA; writes numbers-gated-delta.md.

`python kernels/bench/gated_delta.py [--lengths 512 1024 ...] [--rounds 7] [--write]`. One thread. Times are process CPU
time, all variants alternate in each round, a ratio is the median of the rounds' ratios. Peak memory is VmHWM
beyond the inputs, in a process of its own (Linux). B = 1, 8 heads, d = 64, float32; each variant in its own layout.
"""

import argparse
import datetime
import functools
import importlib.metadata
import inspect
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a checkout that is not installed
from recipelin_kernels import gated_delta_rule

HEADS, DIM = 8, 64
VARIANTS = ("chunked", "transformers", "sdpa")


@functools.cache
def torch_form() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Qwen3.5's torch code: with fla installed, the public name is fla's Triton kernel, on CPU tensors too."""
    from transformers.models.qwen3_5 import modeling_qwen3_5  # slow to import, and only this variant needs it

    form: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = inspect.unwrap(
        modeling_qwen3_5.torch_chunk_gated_delta_rule
    )
    return form


def make(variant: str, length: int, backward: bool) -> Callable[[], torch.Tensor]:
    """A call of one variant on fixed random inputs, unit queries and keys; gradients to all inputs where `backward`."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(1, HEADS, length, DIM, generator=draw) for _ in range(4))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g, beta = -0.1 * torch.rand(1, HEADS, length, generator=draw), torch.rand(1, HEADS, length, generator=draw)
    inputs = [q, k, v] if variant == "sdpa" else [q, k, v, g, beta]
    if variant == "transformers":  # [B,T,H,D]
        inputs, dy = [x.transpose(1, 2).contiguous() for x in inputs], dy.transpose(1, 2).contiguous()
    leaves = [x.requires_grad_(backward) for x in inputs]

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(backward):
            if variant == "sdpa":
                o = F.scaled_dot_product_attention(*leaves, is_causal=True)
            elif variant == "transformers":
                o = torch_form()(*leaves)[0]
            else:
                o = gated_delta_rule(*leaves, kernel=variant)
        if backward:
            torch.autograd.grad(o, leaves, dy)
        return o.detach()

    return run


def difference(length: int) -> float:
    """Largest difference of the two gated delta rules' outputs."""
    ours, theirs = (make(variant, length, False)() for variant in ("chunked", "transformers"))
    return float((ours.transpose(1, 2) - theirs).abs().max())


def times(length: int, backward: bool, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round."""
    runs = {v: make(v, length, backward) for v in VARIANTS}
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {v: [] for v in runs}
    for _ in range(rounds):
        for variant, run in runs.items():
            start = time.process_time()
            run()
            found[variant].append(time.process_time() - start)
    return found


def status_kib(field: str) -> int:
    """A field of the process' status, KiB: VmRSS, or VmHWM, the high-water mark of resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1])


def memory(variant: str, length: int, backward: bool) -> float:
    """Peak MiB beyond the inputs, the results included, in a fresh process."""
    command = [sys.executable, __file__, "--peak", variant, str(length), str(int(backward))]
    # A fixed threshold: freed blocks go back to the system at once and are not counted for free later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def print_peak(variant: str, length: int, backward: bool) -> None:
    make(variant, 64, backward)()  # libraries and thread pools
    run = make(variant, length, backward)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # making the inputs took more than they are: begin at what is held now
    before = status_kib("VmRSS")
    run()
    print((status_kib("VmHWM") - before) / 1024)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        return next(x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name"))
    return platform.processor()


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def report(lengths: list[int], rounds: int) -> str:
    """The Markdown page of all measurements."""
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    setting = (
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}, {cpu_name()}, one thread,",
        f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')},",
        f"load {os.getloadavg()[0]:.1f} at the start.",
        f"B = 1, {HEADS} heads, d = {DIM}, float32. transformers: the torch form of Qwen3.5's gated delta rule, unwrapped.",
        f"Times: process CPU ms, median of {rounds} alternating rounds; ratios: median of the rounds' ratios,",
        "above 1 = chunked is faster. Memory: MiB, peak during one call beyond its inputs, results included (VmHWM).",
        f"Largest difference of the two outputs at T = {lengths[-1]}: {difference(lengths[-1]):.0e}.",
        "Made by `kernels/bench/gated_delta.py --write`.",
    )
    lines = ["# Chunked gated delta rule: speed and peak memory", "", *setting]
    for backward in (False, True):
        lines += ["", f"## {'Forward and backward' if backward else 'Forward'}", ""]
        head = ["T", *(f"{v} ms" for v in VARIANTS), *(f"{v} / chunked" for v in VARIANTS[1:])]
        head += [f"{v} MiB" for v in VARIANTS]
        lines += [row(head), row(["---"] * len(head))]
        for length in lengths:
            found = times(length, backward, rounds)
            ms = [f"{statistics.median(found[v]) * 1e3:.1f}" for v in VARIANTS]
            ratio = [
                f"{statistics.median(a / b for a, b in zip(found[v], found['chunked'], strict=True)):.2f}"
                for v in VARIANTS[1:]
            ]
            mib = [f"{memory(v, length, backward):.0f}" for v in VARIANTS]
            lines.append(row([str(length), *ms, *ratio, *mib]))
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write numbers-gated-delta.md instead of printing")
    parser.add_argument("--peak", nargs=3, metavar=("VARIANT", "LENGTH", "BACKWARD"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print_peak(given.peak[0], int(given.peak[1]), given.peak[2] == "1")
        return
    page = report(given.lengths, given.rounds)
    if given.write:
        (Path(__file__).parent / "numbers-gated-delta.md").write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
