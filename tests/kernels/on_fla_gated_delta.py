"""fla's gated delta rule as `kernel: fla` runs it, against the definition. On a CUDA device, by `make test-fla` alone."""

import pytest
import torch
import torch.nn.functional as F

from recipelin_kernels import gated_delta_rule
from tests.kernels.test_gated_delta import assert_same, with_gradients

TOLERANCE = {
    torch.float32: 5e-3,
    torch.bfloat16: 3e-2,
    torch.float16: 6e-3,
}  # products of tf32, 8 and 11 bits, several in a row


@pytest.fixture(autouse=True)
def one_size(monkeypatch):
    """Of each of fla's kernels the first of its sizes: it compiles and times all of them, ten to forty, for minutes."""
    from triton.runtime.autotuner import Autotuner  # fla's own is made of it

    every = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, given: every(self, given)[:1])


def inputs(batch, heads, length, width, dtype):
    """q, k of unit length [B,Hk,T,D], v [B,H,T,D], g, beta [B,H,T], the state [B,H,D,D], rounded to dtype; that in float32."""
    make = torch.Generator().manual_seed(length)
    h, hk = heads

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, hk, length, width), dim=-1) for _ in range(2))
    g, beta = -F.softplus(normal(batch, h, length) - 3), normal(batch, h, length).sigmoid()
    made = [q, k, normal(batch, h, length, width), g, beta]
    return [*(t.to("cuda", dtype) for t in made), normal(batch, h, width, width).to("cuda", torch.float32)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 64), ((8, 2), 128)])
@pytest.mark.parametrize("length", [1, 63, 64, 333, 1025])
def test_equals_the_definition(length, heads, width, dtype):
    given = inputs(2, heads, length, width, dtype)
    expected = with_gradients([t.double() for t in given], kernel="reference")
    found = with_gradients(given, kernel="fla")
    assert_same([t.double() for t in found], expected, TOLERANCE[dtype])


def test_left_padding_and_going_on_from_a_state():
    given = inputs(2, (4, 4), 200, 64, torch.bfloat16)
    mask = torch.arange(200, device="cuda").expand(2, -1) >= torch.tensor([[0], [37]], device="cuda")
    *rows, state = given
    exact = [t.double() for t in rows]
    options = {"key_mask": mask, "output_state": True}
    expected, last = gated_delta_rule(*exact, state=state.double(), kernel="reference", **options)
    late = slice(120, None)
    first, middle = gated_delta_rule(
        *(t[:, :, :120] for t in rows), state=state, kernel="fla", key_mask=mask[:, :120], output_state=True
    )
    second, end = gated_delta_rule(
        *(t[:, :, late] for t in rows), state=middle, kernel="fla", key_mask=mask[:, late], output_state=True
    )
    for found, other in ((torch.cat((first, second), 2), expected), (end, last)):
        assert float((found.double() - other).norm() / other.norm()) < TOLERANCE[torch.bfloat16]
