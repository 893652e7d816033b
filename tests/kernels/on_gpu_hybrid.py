"""What only a GPU can show of the Triton kernels: bf16, fp16, long rows, real layouts. Run by `make test-gpu` alone."""

import itertools
import random

import pytest
import torch

from tests.kernels.hybrid_inputs import COVERS, JOINS, SHAPES, Inputs, assert_same, padding, with_gradients
from tests.kernels.test_hybrid_gpu import DEVICE, compare

# Products of 8 or 11 bits, and y, from which backward takes its row terms, rounded to them.
COARSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.mark.parametrize(("join", "cover", "shape"), list(itertools.product(JOINS, COVERS, SHAPES)))
def test_gpu_equals_the_definition(join, cover, shape):
    draw = random.Random(f"{join} {cover} {shape}")
    for kind, length in itertools.product(["none", "left", "right", "segments"], [1, 63, 333, 1025]):
        heads, window = draw.choice([(2, 2), (4, 2), (8, 1)]), draw.choice([1, 16, 64, 100])
        x = Inputs(
            heads,
            length,
            2,
            draw.random() < 0.5,
            seed=length,
            dim=draw.choice([8, 64, 80]),
            features=draw.choice([16, 128]),
        )
        options = dict(window=window, shape=shape, join=join, cover=cover, sinks=draw.choice([0, 4]))
        options |= dict(max_gradient=draw.choice(["through", "detached"]), reach=draw.choice([None, None, 150]))
        # A single key's gradients are 0 but for rounding: the floor of `assert_same` is absolute.
        compare(x, options | padding(kind, 2, length), tolerance=1e-4 if length == 1 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(("dim", "features"), [(64, 128), (128, 128), (128, 256), (256, 256)])
def test_gpu_long_rows(dtype, dim, features):
    for length, join in ((4097, "shared"), (1000, "absolute"), (1000, "replace"), (1000, "average")):
        x = Inputs((4, 2), length, 1, seed=length, dim=dim, features=features)
        x.log_scale -= 1.0
        tolerance = COARSE.get(dtype, 2e-5)
        compare(x, dict(window=64, sinks=4 if length < 4097 else 0, join=join), dtype, tolerance)


def test_gpu_float32_features_beside_bf16():
    x = Inputs((4, 2), 1000, 1, dim=64, features=128)
    mixed = x.like(torch.bfloat16, DEVICE)
    mixed.phi_q, mixed.phi_k = (t.to(DEVICE, torch.float32) for t in (x.phi_q, x.phi_k))
    exact = mixed.like(torch.float64, DEVICE)
    found = with_gradients(mixed, window=64, kernel="gpu")
    assert_same([t.double() for t in found], with_gradients(exact, window=64, kernel="reference"), 2e-2)
