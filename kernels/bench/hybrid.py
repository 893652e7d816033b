"""Speed and peak memory of chunked hybrid attention beside the quadratic reference and SDPA; writes numbers.md.

`python kernels/bench/hybrid.py [--lengths 512 1024 ...] [--rounds 5] [--write]`. One thread. Times are process CPU
time, all variants alternate in each round, a ratio is the median of the rounds' ratios. Peak memory is VmHWM
beyond the inputs, in a process of its own (Linux). B = 1, 8 heads, d = 64, F = 128, window 64, float32.
"""

import argparse
import datetime
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
from recipelin_kernels import hybrid_attention

HEADS, DIM, FEATURES, WINDOW = 8, 64, 128, 64
VARIANTS = ("chunked", "sdpa", "reference")
REFERENCE_UP_TO = 2048  # beyond, its T x T matrices take many seconds and gigabytes


def make(variant: str, length: int, backward: bool) -> Callable[[], None]:
    """A call of one variant on fixed random inputs; gradients to all inputs where `backward`."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=draw, requires_grad=backward) for _ in range(3))
    phi_q, phi_k = (
        torch.randn(1, HEADS, length, FEATURES, generator=draw).softmax(-1).requires_grad_(backward) for _ in range(2)
    )
    mix = torch.full((HEADS,), 0.1, requires_grad=backward)
    dy = torch.randn(1, HEADS, length, DIM, generator=draw)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            if variant == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = hybrid_attention(q, k, v, phi_q, phi_k, mix, window=WINDOW, kernel=variant)
        if backward:
            used = (q, k, v) if variant == "sdpa" else (q, k, v, phi_q, phi_k, mix)
            torch.autograd.grad(y, used, dy)

    return run


def times(length: int, backward: bool, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round."""
    runs = {v: make(v, length, backward) for v in VARIANTS if v != "reference" or length <= REFERENCE_UP_TO}
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
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the start.",
        f"B = 1, {HEADS} heads, d = {DIM}, F = {FEATURES}, window {WINDOW}, float32.",
        f"Times: process CPU ms, median of {rounds} alternating rounds; ratios: median of the rounds' ratios,",
        "above 1 = chunked is faster. Memory: MiB, peak during one call beyond its inputs, results included (VmHWM).",
        "Made by `kernels/bench/hybrid.py --write`.",
    )
    lines = ["# Chunked hybrid attention: speed and peak memory", "", *setting]
    for backward in (False, True):
        title = "Forward and backward" if backward else "Forward"
        lines += ["", f"## {title}", ""]
        head = ["T", *(f"{v} ms" for v in VARIANTS), *(f"{v} / chunked" for v in VARIANTS[1:])]
        head += [f"{v} MiB" for v in VARIANTS]
        lines += [row(head), row(["---"] * len(head))]
        for length in lengths:
            found = times(length, backward, rounds)
            ms = {v: f"{statistics.median(found[v]) * 1e3:.1f}" if v in found else "not run" for v in VARIANTS}
            ratio = {
                v: f"{statistics.median(a / b for a, b in zip(found[v], found['chunked'], strict=True)):.2f}"
                if v in found
                else "not run"
                for v in VARIANTS
            }
            mib = {v: f"{memory(v, length, backward):.0f}" if v in found else "not run" for v in VARIANTS}
            lines.append(row([str(length), *ms.values(), *(ratio[v] for v in VARIANTS[1:]), *mib.values()]))
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write numbers.md beside this file instead of printing")
    parser.add_argument("--peak", nargs=3, metavar=("VARIANT", "LENGTH", "BACKWARD"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print_peak(given.peak[0], int(given.peak[1]), given.peak[2] == "1")
        return
    page = report(given.lengths, given.rounds)
    if given.write:
        (Path(__file__).parent / "numbers.md").write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
