"""What only a GPU can show of the transfer kernels: bf16, fp16, long rows, real layouts. Run by `make test-gpu` alone."""

import itertools
import random

import pytest
import torch

from tests.kernels.gpu_device import COARSE, DEVICE
from tests.kernels.hybrid_inputs import Inputs, padding
from tests.kernels.test_weight_transfer_gpu import assert_close, compare, loss_and_gradients, teacher

HYBRID = {"target": "hybrid", "window": 64}
# Each set of options is compiled anew, which takes longer than to run it: few sets, many lengths (`pytest -n` helps).
SETS = {
    "linear": {},
    "linear, both windowed": dict(reach=150, teacher_window=150),
    "linear, the teacher windowed": dict(teacher_window=150),
    "shared, sinks": dict(HYBRID, sinks=4),
    "absolute, cover all": dict(HYBRID, join="absolute", cover="all"),
    "absolute, terraced, both windowed": dict(HYBRID, join="absolute", shape="terraced", reach=150, teacher_window=150),
    "replace, sinks": dict(HYBRID, join="replace", sinks=2),
    "replace, sinks, the student windowed": dict(HYBRID, join="replace", sinks=2, reach=150),
    "average": dict(HYBRID, join="average", sinks=4),
    "no window": dict(HYBRID, window=0),
}


@pytest.mark.parametrize("alike", [True, False], ids=["plain", "padded"])
@pytest.mark.parametrize("name", SETS)
def test_equals_the_definition(name, alike):
    draw = random.Random(name)
    kinds = ["none"] if alike else ["left", "right", "segments"]
    for kind, length in itertools.product(kinds, [1, 63, 333, 1025]):
        x = Inputs((4, 2), length, 2, draw.random() < 0.5, seed=length, dim=64, features=64)
        compare(x, SETS[name] | padding(kind, 2, length), tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(
    ("heads", "dim", "features", "length", "options"),
    [
        ((4, 2), 80, 96, 333, HYBRID),
        ((4, 2), 64, 128, 4097, {}),
        ((8, 1), 128, 128, 2049, dict(HYBRID, join="absolute")),
        ((4, 2), 128, 256, 1025, {}),
        ((4, 2), 256, 512, 1025, dict(HYBRID, join="average")),
    ],
)
def test_widths_and_long_rows(dtype, heads, dim, features, length, options):
    x = Inputs(heads, length, 1, seed=length, dim=dim, features=features)
    compare(x, options, dtype, COARSE.get(dtype, 2e-5))


def test_float32_features_beside_bf16():
    x = Inputs((4, 2), 1000, 1, dim=64, features=128)
    mixed = x.like(torch.bfloat16, DEVICE)
    mixed.phi_q, mixed.phi_k = (t.to(DEVICE, torch.float32) for t in (x.phi_q, x.phi_k))
    exact = mixed.like(torch.float64, DEVICE)
    lse = teacher(exact, {}).float()
    found = loss_and_gradients(mixed, lse, kernel="gpu")
    assert_close(found, loss_and_gradients(exact, lse.double(), kernel="reference"), 2e-2)


def test_extreme_scores():
    x = Inputs((4, 2), 1025, 1, dim=64, features=64)
    x.q *= 50.0 / float((x.q @ x.k.repeat_interleave(2, 1).mT).abs().max() / 8)
    for dtype, tolerance in ((torch.float32, 1e-4), *COARSE.items()):
        compare(x, dict(HYBRID, join="absolute"), dtype, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(("dim", "features"), [(128, 128), (128, 256), (80, 96)])
def test_results_repeat_bit_by_bit(dtype, dim, features):
    x = Inputs((4, 2), 2049, 2, dim=dim, features=features).like(dtype, DEVICE)
    lse = teacher(x, {})
    for options in ({}, dict(HYBRID, sinks=4)):
        once, *others = (loss_and_gradients(x, lse, kernel="gpu", **options) for _ in range(4))
        assert all(torch.equal(a, b) for again in others for a, b in zip(once, again, strict=True))
