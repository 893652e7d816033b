"""What only a GPU can show of the Triton kernels: bf16, fp16, long rows, real layouts. Run by `make test-gpu` alone."""

import itertools
import random

import pytest
import torch

from tests.kernels.hybrid_inputs import Inputs, assert_same, padding, with_gradients
from tests.kernels.test_hybrid_gpu import DEVICE, compare

# Products of 8 or 11 bits, and y, from which backward takes its row terms, rounded to them.
COARSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


# Each set of options is compiled anew, which takes longer than to run it: few sets, many lengths (`pytest -n` helps).
SETS = {
    "shared": dict(join="shared", sinks=4, window=100),
    "shared, cover all": dict(join="shared", cover="all", window=16, max_gradient="detached"),
    "absolute": dict(join="absolute", window=64, shape="terraced"),
    "absolute, cover all": dict(join="absolute", cover="all", sinks=4, window=1),
    "replace": dict(join="replace", sinks=1, window=64),
    "replace, cover all": dict(join="replace", cover="all", shape="terraced", window=33),
    "average": dict(join="average", sinks=4, window=64, shape="terraced"),
    "sum": dict(join="sum", cover="all", sinks=2, window=50),
    "reach": dict(join="absolute", reach=150, sinks=4, window=64),
    "no window": dict(window=0),
}  # fmt: skip


@pytest.mark.parametrize("alike", [True, False], ids=["plain", "padded"])
@pytest.mark.parametrize("name", SETS)
def test_equals_the_definition(name, alike):
    draw = random.Random(name)
    kinds = ["none"] if alike else ["left", "right", "segments"]
    for kind, length in itertools.product(kinds, [1, 63, 333, 1025]):
        x = Inputs((4, 2), length, 2, draw.random() < 0.5, seed=length, dim=64, features=64)
        # A single key's gradients are 0 but for rounding: the floor of `assert_same` is absolute.
        compare(x, SETS[name] | padding(kind, 2, length), tolerance=1e-4 if length == 1 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(
    ("dim", "features", "length", "join"),
    [
        (80, 96, 333, "shared"),
        (64, 128, 4097, "shared"),
        (128, 128, 4097, "absolute"),
        (128, 256, 1025, "replace"),
        (256, 256, 1025, "average"),
    ],
)
def test_widths_and_long_rows(dtype, dim, features, length, join):
    x = Inputs((4, 2), length, 1, seed=length, dim=dim, features=features)
    x.log_scale -= 1.0
    compare(x, dict(window=64, join=join), dtype, COARSE.get(dtype, 2e-5))


def test_float32_features_beside_bf16():
    x = Inputs((4, 2), 1000, 1, dim=64, features=128)
    mixed = x.like(torch.bfloat16, DEVICE)
    mixed.phi_q, mixed.phi_k = (t.to(DEVICE, torch.float32) for t in (x.phi_q, x.phi_k))
    exact = mixed.like(torch.float64, DEVICE)
    found = with_gradients(mixed, window=64, kernel="gpu")
    assert_same([t.double() for t in found], with_gradients(exact, window=64, kernel="reference"), 2e-2)


def test_results_repeat_bit_by_bit():
    x = Inputs((4, 2), 2049, 2, dim=128, features=128).like(torch.bfloat16, DEVICE)
    once, again = (with_gradients(x, window=64, sinks=4, kernel="gpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
