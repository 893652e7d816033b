"""Triton kernels of the weight transfer loss are the definition: in the interpreter here, on a GPU by `make test-gpu`."""

import importlib
import importlib.metadata

import pytest
import torch
from torch import Tensor

from recipelin_kernels import teacher_attention, weight_transfer_loss
from recipelin_kernels.hybrid import gpu_support
from tests.kernels.gpu_device import CANCELLED, DEVICE, FP32, on_device
from tests.kernels.hybrid_inputs import Inputs, assert_same, empty_is_nan, padding

pytestmark = pytest.mark.usefixtures("quick_interpreter")

LEARNED = ("phi_q", "phi_k", "mix", "log_scale")


def teacher(x: Inputs, options) -> Tensor:
    where = {n: options[n] for n in ("key_mask", "segment_ids") if n in options}
    return teacher_attention(x.q, x.k, x.v, window=options.get("teacher_window"), **where)[1]


def loss_and_gradients(x: Inputs, lse: Tensor, **options) -> list[Tensor]:
    """The loss, and the gradients of its sum over rows and heads, which fp16 can hold."""
    leaves = {n: getattr(x, n).detach().clone().requires_grad_() for n in LEARNED}
    loss = weight_transfer_loss(x.q, x.k, lse=lse, **leaves, **options)
    grads = torch.autograd.grad(loss * lse.numel(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


def assert_close(found, expected, tolerance):
    assert all(bool(one.isfinite().all()) for one in found)
    assert_same(found, expected, tolerance, names=("loss", *LEARNED), cancelled=CANCELLED)


def compare(x: Inputs, options, dtype=torch.float32, tolerance=FP32):
    """gpu in dtype against the definition in float64 of the same numbers; what padding holds is NaN, strides are odd."""
    options = on_device(options)
    coarse = x.like(dtype, DEVICE)
    exact = coarse.like(torch.float64, DEVICE)
    lse = teacher(exact, options).float()
    expected = loss_and_gradients(exact, lse.double(), kernel="reference", **options)
    if "key_mask" in options:
        padded = ~options["key_mask"][:, None, :]
        lse.masked_fill_(padded, torch.nan)
        for name in ("q", "k", "phi_q", "phi_k"):
            getattr(coarse, name).masked_fill_(padded[..., None], torch.nan)
    coarse.q, coarse.phi_k = coarse.q.transpose(1, 2).contiguous().transpose(1, 2), coarse.phi_k.mT.contiguous().mT
    with empty_is_nan(DEVICE):
        found = loss_and_gradients(coarse, lse, kernel="gpu", **options)
    assert_close(found, expected, tolerance)


HYBRID = {"target": "hybrid", "window": 6}
CASES = {
    "linear": dict(length=97),
    "linear, phi_k of key heads, left padding": dict(heads=(2, 1), per_key_head=True, kind="left", batch=2),
    "linear, 4 heads over 2, features in tiles": dict(heads=(4, 2), length=20, features=40, per_key_head=True),
    "linear, both windowed": dict(length=67, reach=19, teacher_window=19),
    "linear, the teacher windowed, right padding": dict(teacher_window=9, kind="right", batch=2, length=34),
    "linear, signed": dict(signed=True, tolerance=2e-5),
    "shared, sinks": dict(HYBRID, sinks=3, length=97),
    "absolute, cover all, segments": dict(HYBRID, join="absolute", cover="all", kind="segments", batch=2, length=35),
    "absolute, terraced, the student windowed": dict(HYBRID, join="absolute", shape="terraced", reach=21, length=65),
    "replace, sinks, segments": dict(HYBRID, join="replace", sinks=2, kind="segments", length=67),
    "replace, the student windowed, sinks, phi_k of key heads": dict(
        HYBRID, join="replace", sinks=2, reach=9, heads=(2, 1), per_key_head=True, length=40
    ),
    "average, terraced, sums in tiles": dict(HYBRID, join="average", shape="terraced", length=65, features=40),
    "sum, signed": dict(HYBRID, join="sum", signed=True, sinks=1, tolerance=2e-5),
    "the published window": dict(HYBRID, shape="terraced", compat="lolcats_tk_v1"),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    case = {"heads": (1, 1), "batch": 1, "length": 41, "kind": "none", "per_key_head": False, **CASES[name]}
    batch, length, signed = case.pop("batch"), case.pop("length"), case.get("signed", False)
    x = Inputs(case.pop("heads"), length, batch, case.pop("per_key_head"), features=case.pop("features", 6))
    if signed:
        x.phi_q, x.phi_k = (t - 0.1 for t in (x.phi_q, x.phi_k))
        x.phi_q[:, :, 20] *= 1e-9  # below the floor of the divisor
    tolerance = case.pop("tolerance", FP32)
    compare(x, {**padding(case.pop("kind"), batch, length), **case}, tolerance=tolerance)


def test_fp16():
    """Half precision in the interpreter, which cannot multiply bf16."""
    compare(Inputs((1, 1), 40, 1), dict(HYBRID, join="absolute"), torch.float16, 3e-3)


@pytest.mark.parametrize("options", [{}, dict(HYBRID, join="absolute", cover="all")], ids=["linear", "hybrid"])
def test_extreme_scores_and_clamped_pairs(options):
    """Scores of 50, features 1e-14 of others: pairs below the clamp of 1e-12; a row without any feature."""
    x = Inputs((1, 1), 70, 1)
    x.q *= 50.0 / float((x.q @ x.k.mT).abs().max() * x.q.shape[-1] ** -0.5)
    x.phi_k[:, :, 3::3] *= 1e-14
    x.phi_q[:, :, 5] = 0.0
    x.log_scale += 20.0
    compare(x, options, tolerance=1e-4)  # float32 keeps scores of 50 to 3e-6, and P with them


def test_only_wanted_gradients_are_computed_and_they_repeat():
    x = Inputs((2, 1), 30, 1).like(torch.float32, DEVICE)
    options = dict(HYBRID, sinks=2, kernel="gpu", per_head=True)
    lse, weight = teacher(x, options), torch.tensor([1.0, -2.0], device=DEVICE)

    def found(*wanted: str) -> dict[str, Tensor | None]:
        leaves = {n: getattr(x, n).clone().requires_grad_(n in wanted) for n in LEARNED}
        (weight * weight_transfer_loss(x.q, x.k, lse=lse, **leaves, **options)).sum().backward()
        return {n: t.grad for n, t in leaves.items()}

    expected = found("phi_q", "phi_k", "mix")
    assert expected["log_scale"] is None
    for wanted in (("phi_k",), ("phi_q", "mix")):
        one, again = found(*wanted), found(*wanted)
        assert {n for n, grad in again.items() if grad is not None} == set(wanted)
        for n in wanted:  # kernels of other gradients are compiled anew, and may add up in another order
            assert torch.equal(one[n], again[n]) and torch.allclose(one[n], expected[n], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        given = [getattr(x, n).requires_grad_() for n in ("phi_q", "phi_k")]
        assert not weight_transfer_loss(x.q, x.k, *given, lse, kernel="gpu").requires_grad


def test_auto_takes_the_kernels_once_they_are_proven(monkeypatch):
    taken = []
    import recipelin_kernels.weight_transfer.gpu as module

    def spied(q: Tensor, *_, **__):
        taken.append(q.dtype)
        return torch.zeros(q.shape[1], device=q.device), {}

    monkeypatch.setattr(module, "weight_transfer_gpu", spied)
    x = Inputs((1, 1), 9, 1).like(torch.float32, DEVICE)
    given = (x.q, x.k, x.phi_q, x.phi_k, teacher(x, {}))
    monkeypatch.setattr(gpu_support, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(importlib.import_module("recipelin_kernels.hybrid"), "_not_in_c", lambda *_: "not here")
    series = ".".join(importlib.metadata.version("triton").split(".")[:2])
    for proven in (frozenset(), frozenset({(series, (9, 0))})):
        monkeypatch.setattr(gpu_support, "PROVEN", proven)
        takes = bool(proven) and DEVICE == "cuda"  # never on a CPU, whatever is proven
        assert (float(weight_transfer_loss(*given)) == 0) == takes and taken == [torch.float32] * takes
    taken.clear()
    assert float(weight_transfer_loss(*given, kernel="gpu")) == 0 and taken == [torch.float32]
    with pytest.raises(RuntimeError, match=r"kernel='gpu': the Triton kernels take float32.*found torch.float64"):
        weight_transfer_loss(*(t.double() for t in given), kernel="gpu")
