"""The C kernels under AddressSanitizer: no byte is read or written outside of a tensor, or of what a thread has asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipelin_kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("libasan.so", "libubsan.so")
WATCHED = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def found(name: str) -> str:
    """The compiler's own file, or its bare name where it has none."""
    return subprocess.run([*cpu.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_no_byte_outside_is_touched(tmp_path):
    libraries = [found(name) for name in SANITIZERS]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip(f"the compiler has no {' and '.join(SANITIZERS)}")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stdout.split() == ["36", "calls"]


def main() -> None:
    """Rooms that are just full, rows that end with their tensor, widths and heads of every kind."""
    import torch

    from recipelin_kernels import hybrid_attention, hybrid_attention_step, teacher_attention, weight_transfer_loss
    from recipelin_kernels.hybrid import cpu_features
    from tests.kernels.hybrid_inputs import Inputs
    from tests.kernels.test_hybrid_cpu import calls, outcomes

    cpu.FLAGS = (*WATCHED, *cpu.FLAGS[1:])
    torch.set_num_threads(2)
    count = 0
    for call in calls(3, 15):
        outcomes(call, "cpu", torch.float32)
        count += 1
    for heads, dim, columns, window, sinks in (
        ((7, 1), 64, 16, 5, 3), ((10, 2), 80, 16, 7, 0), ((2, 2), 128, 32, 1, 0), ((6, 3), 48, 16, 9, 1), ((4, 1), 16, 64, 6, 2)
    ):  # fmt: skip
        x = Inputs(heads, window + 28, dim=dim).by_maps(columns).like(torch.float32)
        with torch.no_grad():
            options = {"window": window, "sinks": sinks}
            _, state = hybrid_attention(*x.cut(0, 5), x.mix, output_state=True, **options)
            for t in range(5, window + 28):
                _, state = hybrid_attention_step(*x.cut(t, t + 1)[:3], *x.maps, x.mix, state, **options)
        count += 1
    for join in ("linear", "shared", "absolute", "replace", "average", "sum"):
        for signed in (False, True):
            if signed and join == "absolute":
                continue
            x = Inputs((6, 2), 149, dim=24, features=20, per_key_head=signed).like(torch.float32)
            _, lse = teacher_attention(x.q, x.k, x.v)
            learned = [t.requires_grad_() for t in (x.phi_q, x.phi_k, x.mix, x.log_scale)]
            row = (
                {"target": "linear"}
                if join == "linear"
                else {"target": "hybrid", "join": join, "window": 9, "sinks": 3}
            )
            loss = weight_transfer_loss(
                x.q, x.k, *learned[:2], lse, mix=learned[2], log_scale=learned[3], signed=signed, kernel="cpu", **row
            )
            torch.autograd.grad(loss, learned, allow_unused=True)
            count += 1
    for length, columns in ((1, 16), (33, 16), (70, 48), (5, 128), (17, 32)):
        weight = torch.randn(6, 16, columns, requires_grad=True)
        phi = cpu_features.softmax_features_cpu(torch.randn(2, 2, length, 16, requires_grad=True), weight, 1e-12)
        torch.autograd.grad(phi.square().sum(), weight)
        count += 1
    print(count, "calls")


if __name__ == "__main__":
    main()
