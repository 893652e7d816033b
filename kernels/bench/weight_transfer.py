"""Speed and peak memory of the weight transfer loss beside SDPA and the quadratic reference; writes its numbers.

`python kernels/bench/weight_transfer.py [--lengths 512 1024 ...] [--rounds 5] [--write]`. One thread. Times are process
CPU time, all variants alternate in each round, a ratio is the median of the rounds' ratios. Peak memory is VmHWM beyond
the inputs, in a process of its own (Linux). B = 1, 8 heads, d = 64, F = 128, float32; hybrid: window 64, join absolute.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a checkout that is not installed
from hybrid import cpu_name, row, status_kib

from recipelin_kernels import teacher_attention, weight_transfer_loss

HEADS, DIM, FEATURES, WINDOW = 8, 64, 128, 64
VARIANTS = {
    "linear": "the loss of the linear form and its gradients, chunked",
    "hybrid": "the loss of the hybrid's row and its gradients, chunked",
    "reference": "the loss of the linear form and its gradients, T x T matrices and autograd",
    "sdpa": "torch's causal softmax attention, forward and backward",
    "teacher": "teacher_attention: output and log-sum-exp, forward only",
    "softmax": "the same from T x T matrices",
}
RATIOS = (("sdpa", "linear"), ("sdpa", "hybrid"), ("reference", "linear"), ("softmax", "teacher"))
PEAKS = ("linear", "hybrid", "reference", "sdpa")
QUADRATIC = ("reference", "softmax")
QUADRATIC_UP_TO = 2048  # beyond, their T x T matrices take many seconds and gigabytes


def make(variant: str, length: int) -> Callable[[], object]:
    """A call of one variant on fixed random inputs."""
    draw = torch.Generator().manual_seed(0)
    learned = variant == "sdpa"
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=draw, requires_grad=learned) for _ in range(3))
    if variant == "teacher":
        return lambda: teacher_attention(q, k, v)
    if variant == "softmax":
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)

        def quadratic() -> tuple[torch.Tensor, torch.Tensor]:
            scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(hidden, -torch.inf)
            return scores.softmax(-1) @ v, scores.logsumexp(-1)

        return quadratic
    if variant == "sdpa":
        dy = torch.randn(1, HEADS, length, DIM, generator=draw)
        return lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dy)
    phi_q, phi_k = (
        torch.randn(1, HEADS, length, FEATURES, generator=draw).softmax(-1).requires_grad_() for _ in range(2)
    )
    lse = teacher_attention(q, k, v)[1]
    c = torch.zeros(HEADS, requires_grad=True)
    kernel = "reference" if variant == "reference" else "chunked"

    def loss() -> tuple[torch.Tensor, ...]:
        if variant != "hybrid":
            return torch.autograd.grad(weight_transfer_loss(q, k, phi_q, phi_k, lse, kernel=kernel), (phi_q, phi_k))
        found = weight_transfer_loss(
            q, k, phi_q, phi_k, lse, target="hybrid", window=WINDOW, join="absolute", log_scale=c, kernel=kernel
        )
        return torch.autograd.grad(found, (phi_q, phi_k, c))

    return loss


def runs(length: int) -> list[str]:
    return [v for v in VARIANTS if v not in QUADRATIC or length <= QUADRATIC_UP_TO]


def times(length: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant in every round, after one call that is not counted."""
    calls = {v: make(v, length) for v in runs(length)}
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {v: [] for v in calls}
    for _ in range(rounds):
        for variant, call in calls.items():
            start = time.process_time()
            call()
            found[variant].append(time.process_time() - start)
    return found


def memory(variant: str, length: int) -> float:
    """Peak MiB beyond the inputs, the results included, in a fresh process."""
    command = [sys.executable, __file__, "--peak", variant, str(length)]
    # A fixed threshold: freed blocks go back to the system at once and are not counted for free later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def print_peak(variant: str, length: int) -> None:
    make(variant, 64)()  # libraries and thread pools
    call = make(variant, length)
    # Making the inputs took more than they are: begin at what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    call()
    print((status_kib("VmHWM") - before) / 1024)


def report(lengths: list[int], rounds: int) -> str:
    """The Markdown page of all measurements."""
    command = ["git", "log", "-1", "--format=%h", "--", "../recipelin_kernels"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    lines = [
        "# Weight transfer loss: speed and peak memory",
        "",
        f"{datetime.date.today()}, kernels of commit {commit or 'unknown'}, {cpu_name()}, one thread,",
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the start.",
        f"B = 1, {HEADS} heads, d = {DIM}, F = {FEATURES}, float32; hybrid: window {WINDOW}, join absolute.",
        f"Times: process CPU ms, median of {rounds} alternating rounds; ratios: median of the rounds' ratios.",
        "Memory: MiB, peak during one call beyond its inputs, results included (VmHWM).",
        "Made by `kernels/bench/weight_transfer.py --write`.",
        "",
        *(f"* `{name}`: {about}." for name, about in VARIANTS.items()),
        "",
        "## Time",
        "",
    ]
    heads = ["T", *(f"{v} ms" for v in VARIANTS), *(f"{a} / {b}" for a, b in RATIOS)]
    time_rows, memory_rows = [row(heads), row(["---"] * len(heads))], []
    for length in lengths:
        found = times(length, rounds)
        cells = [f"{statistics.median(found[v]) * 1e3:.1f}" if v in found else "not run" for v in VARIANTS]
        for a, b in RATIOS:
            known = a in found
            pairs = zip(found[a], found[b], strict=True) if known else ()
            cells.append(f"{statistics.median(x / y for x, y in pairs):.2f}" if known else "not run")
        time_rows.append(row([str(length), *cells]))
        print(time_rows[-1], file=sys.stderr)
        peaks = [f"{memory(v, length):.0f}" if v in found else "not run" for v in PEAKS]
        memory_rows.append(row([str(length), *peaks]))
        print(memory_rows[-1], file=sys.stderr)
    heads = ["T", *(f"{v} MiB" for v in PEAKS)]
    lines += [*time_rows, "", "## Peak memory", "", row(heads), row(["---"] * len(heads)), *memory_rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="write numbers-weight-transfer.md here instead of printing"
    )
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print_peak(given.peak[0], int(given.peak[1]))
        return
    page = report(given.lengths, given.rounds)
    if given.write:
        (Path(__file__).parent / "numbers-weight-transfer.md").write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
