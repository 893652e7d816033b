"""What runs is noted, whatever was asked for."""

import pytest
import torch

from recipelin_kernels import (
    gated_delta_rule,
    hybrid_attention,
    hybrid_attention_step,
    kernels_ran,
    teacher_attention,
    weight_transfer_loss,
)
from tests.kernels.hybrid_inputs import Double, Inputs, Single, attend


def single(length=20) -> Single:
    return Single(heads=(2, 1), length=length, batch=1)


def on_from_a_state(x, **options):
    """Ten tokens, then ten."""
    _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, kernel="chunked", **options)
    return lambda: hybrid_attention(*x.cut(10, 20), x.mix, state=state, phi_k_fn=x.features, **options)


def token(x, **options):
    prompt = {**options, "kernel": "chunked"}
    _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **prompt)
    return lambda: hybrid_attention_step(*x.token(10), x.mix, state, **options)


def transfer(x):
    _, lse = teacher_attention(x.q, x.k, x.v)
    return lambda: weight_transfer_loss(x.q, x.k, x.phi_q, x.phi_k, lse)


def delta(x):
    return lambda: gated_delta_rule(x.k, x.k, x.v, -x.v[..., 0].abs(), x.v[..., 0].sigmoid())


def triton(request):
    pytest.importorskip("triton")
    request.getfixturevalue("quick_interpreter")


ROWS, STEP = "hybrid_attention", "hybrid_attention_step"
CASES = {
    "rows of float32": (lambda: lambda: attend(single()), {ROWS: {"cpu"}}),
    "rows of float64": (lambda: lambda: attend(Inputs()), {ROWS: {"chunked"}}),
    "a window over all": (lambda: lambda: attend(single(), window=20), {ROWS: {"sdpa"}}),
    "the definition": (lambda: lambda: attend(single(), kernel="reference"), {ROWS: {"reference"}}),
    "rows by Triton": (lambda: lambda: attend(single(), kernel="gpu"), {ROWS: {"gpu"}}),
    "rows from a state": (lambda: on_from_a_state(single(), window=5), {ROWS: {"chunked"}}),
    "a token in C": (lambda: token(single(), window=5), {STEP: {"cpu"}}),
    "a token in torch": (lambda: token(single(), window=5, cover="all"), {STEP: {"chunked"}}),
    "a plain token in torch": (lambda: token(Double(length=20), window=5), {STEP: {"chunked"}}),
    "a token by Triton": (lambda: token(single(), window=5, kernel="gpu"), {STEP: {"gpu"}}),
    "weight transfer": (lambda: transfer(single()), {"weight_transfer_loss": {"cpu"}}),
    "the gated delta rule": (lambda: delta(single()), {"gated_delta_rule": {"chunked"}}),
    "a token of it": (lambda: delta(single(1)), {"gated_delta_rule_step": {"chunked"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_runs_is_noted(name, request):
    prepare, expected = CASES[name]
    if "Triton" in name:
        triton(request)
    call = prepare()
    with torch.no_grad(), kernels_ran() as found:
        call()
        assert found == expected
        with kernels_ran() as inside:
            pass
        assert inside == {}
    call()
    assert found == expected, "only within"
