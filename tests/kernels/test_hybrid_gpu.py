"""The Triton kernels are the definition: in Triton's interpreter here, on a GPU by `make test-gpu`."""

import importlib
import importlib.metadata
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipelin_kernels import hybrid_attention, resolve_kernel
from recipelin_kernels.hybrid import gpu, gpu_support
from tests.conftest import GPU
from tests.kernels.gpu_device import CANCELLED, DEVICE, FP32, on_device
from tests.kernels.hybrid_inputs import OUTCOMES, Inputs, assert_same, attend, empty_is_nan, padding, with_gradients

pytestmark = pytest.mark.usefixtures("quick_interpreter")


EACH = (True, False) if GPU else (True,)


def compare(x: Inputs, options, dtype=torch.float32, tolerance=FP32, *, components=EACH):
    """gpu in dtype against the definition in float64 of the same numbers; what padding holds is NaN, heads lie side by side in
    memory. components: whether they are asked for, in turn; where not, a kernel may keep one sum for both sets (`output`)."""
    options = on_device(options)
    coarse = x.like(dtype, DEVICE)
    exact = coarse.like(torch.float64, DEVICE)
    real = options.get("key_mask")
    expected = with_gradients(exact, real, kernel="reference", **options)
    if real is not None:
        for name in ("q", "k", "v", "phi_q", "phi_k"):
            getattr(coarse, name).masked_fill_(~real[:, None, :, None], torch.nan)
    for name in ("q", "k", "v", "phi_q", "phi_k"):
        setattr(coarse, name, getattr(coarse, name).transpose(1, 2).contiguous().transpose(1, 2))
    for asked in components:
        names = OUTCOMES if asked else OUTCOMES[:1] + OUTCOMES[4:]
        with empty_is_nan(DEVICE):
            found = with_gradients(coarse, real, components=asked, kernel="gpu", **options)
        assert all(bool(t.isfinite().all()) for t in found)
        same = [e for n, e in zip(OUTCOMES, expected, strict=True) if n in names]
        assert_same(found, same, tolerance, names=names, cancelled=CANCELLED)


KEEP = torch.tensor([[True, False]])
CASES = {
    "shared, sinks, phi_k of key heads": dict(per_key_head=True, batch=1, sinks=3),
    "absolute, cover all, left padding": dict(join="absolute", cover="all", kind="left", length=34, window=7),
    "replace, sinks, segments": dict(join="replace", kind="segments", sinks=2, length=34, batch=1),
    "average, dropped windows": dict(join="average", window_keep=KEEP, on_drop="linear_covers_all", sinks=2, length=33, batch=1),
    "sum, terraced, no longer than reach": dict(join="sum", shape="terraced", reach=19, batch=1),
    "shared, terraced, detached": dict(shape="terraced", max_gradient="detached", batch=1, window=10),
    "replace, cover all, sinks, a key head each, features in tiles": dict(
        join="replace", cover="all", sinks=4, batch=1, length=34, heads=(2, 2), features=40
    ),
    "the window not shown, right padding": dict(ablate={"window": "output"}, kind="right", sinks=2, length=33),
    "no window": dict(window=0, batch=1, length=49),
    "linear not shown": dict(ablate={"linear": "output"}, join="average", batch=1, length=33),
}  # fmt: skip


def of_case(name):
    case = {
        "heads": (2, 1),
        "batch": 2,
        "length": 41,
        "kind": "none",
        "per_key_head": False,
        "window": 6,
        **CASES[name],
    }
    batch, length = case.pop("batch"), case.pop("length")
    x = Inputs(case.pop("heads"), length, batch, case.pop("per_key_head"), features=case.pop("features", 6))
    return x, {**padding(case.pop("kind"), batch, length), **case}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    compare(*of_case(name))


@pytest.mark.parametrize("name", ["shared, sinks, phi_k of key heads", "replace, sinks, segments"])
def test_what_owns_keys_may_meet_fewer_queries_and_a_call_without_components_keep_one_sum(name, monkeypatch):
    """Sinks are where the two sides must agree: what is before the span of some queries is left to another kernel."""
    blocks = gpu.fitting(torch.float32, torch.float32, 64, 64)
    monkeypatch.setattr(gpu, "fitting", lambda *_: replace(blocks, columns=blocks.columns // 2))
    compare(*of_case(name), components=(True, False) if GPU else (False,))


def test_a_row_without_mass_is_zero():
    """0 / 0 of the formula: a mix of 0, or features of 0, where there is no linear side beside the window; a log_scale of -inf
    where the window is dropped."""
    x = Inputs((2, 1), 33, 1)
    x.mix[1], x.phi_q[:, :, 20:30], x.log_scale[1] = 0, 0, -torch.inf
    for options in (dict(join="shared"), dict(join="replace"), dict(join="absolute", window_keep=KEEP)):
        compare(x, dict(window=25, **options))


def test_fp16():
    """Half precision in the interpreter, which cannot multiply bf16."""
    x = Inputs((2, 1), 40, 1)
    compare(x, dict(window=6), torch.float16, 3e-3)


@pytest.mark.parametrize("join", ["shared", "absolute", "replace"])
def test_scores_of_50_and_their_gradients(join):
    x = Inputs((2, 1), 34, batch=1).with_scores_to(50.0)
    compare(x, dict(window=6, sinks=2, join=join), tolerance=2e-5)


def test_extreme_scores_stay_finite_and_right():
    x = Inputs((2, 1), 34, batch=1)
    x.q *= 300.0
    x.k[:, :, 20] *= 50.0
    for join in ("shared", "absolute"):
        y, exact = (
            attend(z, window=6, sinks=2, join=join, kernel=kernel)
            for z, kernel in ((x.like(torch.float32, DEVICE), "gpu"), (x.like(torch.float64, DEVICE), "reference"))
        )
        # Scores of thousands: float32 keeps their differences to 1e-3 or so.
        assert bool(y.isfinite().all()) and float((y - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize(("join", "batch"), [("shared", 2), ("replace", 1)])
def test_goes_on_from_a_state(join, batch):
    x = Inputs((2, 1), 37, batch).like(torch.float32, DEVICE)
    options = dict(window=6, sinks=3, join=join, phi_k_fn=x.features, kernel="gpu")
    whole = attend(x.like(torch.float64, DEVICE), window=6, sinks=3, join=join, kernel="reference")
    for cut in (2, 20):
        _, state = hybrid_attention(*x.cut(0, cut), x.mix, **{**options, "kernel": "chunked"}, output_state=True)
        y = hybrid_attention(*x.cut(cut, 37), x.mix, state=state, **options)
        assert float((y - whole[:, :, cut:]).abs().max()) < 2e-6


def test_a_states_sink_may_be_the_largest_score_of_a_row(monkeypatch):
    """It stands before index 0: the gradient of that maximum is no key's of the call."""
    blocks = gpu.fitting(torch.float32, torch.float32, 64, 64)
    monkeypatch.setattr(gpu, "fitting", lambda *_: replace(blocks, columns=blocks.columns // 2))
    x = Inputs((1, 1), 64, 1)
    x.q *= 2
    found = []
    for kernel, same in (("gpu", x.like(torch.float32, DEVICE)), ("chunked", x.like(torch.float64, DEVICE))):
        options = dict(window=5, sinks=4, phi_k_fn=same.features)
        _, state = hybrid_attention(*same.cut(0, 30), same.mix, kernel="chunked", output_state=True, **options)
        late = [t.detach().clone().requires_grad_() for t in same.cut(30, 64)]
        y = hybrid_attention(*late, same.mix, state=state, kernel=kernel, **options)
        weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=DEVICE)).to(y.dtype).view_as(y)
        found.append([y.detach(), *torch.autograd.grad((y * weight).sum(), late)])
    assert_same(*found, FP32, names=("y", "d_q", "d_k", "d_v", "d_phi_q", "d_phi_k"))


@pytest.mark.parametrize("on_drop", ["linear_outside", "linear_covers_all"])
def test_goes_on_from_a_state_with_windows_dropped_and_features_of_key_heads(on_drop):
    """Whether a sink is linear depends on the query head then: the state's heads are repeated."""
    x = Inputs((4, 2), 40, 1, per_key_head=True).like(torch.float32, DEVICE)
    keep = torch.tensor([[True, False, False, True]], device=DEVICE)
    options = dict(window=6, sinks=3, window_keep=keep, on_drop=on_drop)
    whole = attend(x.like(torch.float64, DEVICE), kernel="reference", **options)
    _, state = hybrid_attention(*x.cut(0, 20), x.mix, kernel="chunked", output_state=True, **options)
    assert state.sums.shape[1] == 2
    for kernel in ("gpu", "chunked"):
        y = hybrid_attention(*x.cut(20, 40), x.mix, state=state, phi_k_fn=x.features, kernel=kernel, **options)
        assert float((y - whole[:, :, 20:]).abs().max()) < 2e-6


MADE = {
    "shared, sinks": dict(sinks=3),
    "replace, phi_k of key heads, left padding": dict(join="replace", kind="left", per_key_head=True),
    "absolute, segments": dict(join="absolute", kind="segments", heads=(2, 1), batch=2),
    "average, the parts too": dict(join="average", components=True),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_features_of_queries_are_made_where_they_are_used(name):
    case = {"kind": "none", "per_key_head": False, "heads": (4, 2), "batch": 1, **MADE[name]}
    batch, kind = case.pop("batch"), case.pop("kind")
    x = Inputs(case.pop("heads"), 41, batch, case.pop("per_key_head"), dim=20).like(torch.float32, DEVICE).by_maps(16)
    exact = x.like(torch.float64, DEVICE)
    options = on_device({"window": 6, "log_scale": x.log_scale, **case, **padding(kind, batch, 41)})
    expected = attend(exact, kernel="reference", **options)
    if "key_mask" in options:
        for z in (x.q, x.k, x.v):
            z.masked_fill_(~options["key_mask"][:, None, :, None], torch.nan)
    unmade = replace(x.maps[0], make=None)  # not by its maker
    with empty_is_nan(DEVICE):
        found = hybrid_attention(x.q, x.k, x.v, unmade, None, x.mix, phi_k_fn=x.maps[1], kernel="gpu", **options)
    if options.get("components"):
        (found, parts), (expected, others) = found, expected
        for name, part in vars(parts).items():
            assert_same([part], [getattr(others, name)], FP32, names=[name])
    assert_same([found], [expected], FP32, names=["y"])


def test_maps_go_on_from_a_state_and_are_called_where_the_kernel_cannot_make_their_features():
    x = Inputs((2, 1), 50, 1, dim=20).like(torch.float32, DEVICE).by_maps(16)
    exact, options = x.like(torch.float64, DEVICE), dict(window=5, sinks=2, phi_k_fn=x.maps[1], kernel="gpu")
    expected = attend(exact, kernel="reference", window=5, sinks=2)
    unmade = replace(x.maps[0], make=None)
    (q, k, v), (q2, k2, v2) = ([z[:, :, a:b] for z in (x.q, x.k, x.v)] for a, b in ((0, 33), (33, 50)))
    y, state = hybrid_attention(q, k, v, unmade, None, x.mix, output_state=True, **options)
    more = hybrid_attention(q2, k2, v2, unmade, None, x.mix, state=state, **options)
    assert_same([torch.cat((y, more), 2)], [expected], FP32, names=["y"])

    called = []
    noted = replace(x.maps[0], make=lambda z: called.append(z) or x.maps[0](z))
    for other in (
        dict(kernel="chunked"),  # in torch
        dict(mix=x.mix.clone().requires_grad_()),  # gradients need them
    ):
        mix = other.pop("mix", x.mix)
        y = hybrid_attention(x.q, x.k, x.v, noted, None, mix, **{**options, **other})
        assert_same([y.detach()], [expected], FP32, names=["y"])
    x.by_maps(12)  # no power of two
    noted = replace(x.maps[0], make=lambda z: called.append(z) or x.maps[0](z))
    y = hybrid_attention(x.q, x.k, x.v, noted, None, x.mix, **{**options, "phi_k_fn": x.maps[1]})
    expected = attend(x.like(torch.float64, DEVICE), kernel="reference", window=5, sinks=2)
    assert_same([y], [expected], FP32, names=["y"])
    assert len(called) == 3
    with pytest.raises(ValueError, match=r"map \(2, 20, 12\): expected \(2, 19, 12\)"):
        hybrid_attention(x.q[..., :19], x.k[..., :19], x.v[..., :19], noted, None, x.mix, **options)


def test_queries_from_a_position_on():
    x = Inputs((2, 1), 45, 1, dim=16, features=16).like(torch.float32, DEVICE)
    options = dict(window=8, sinks=2, join="absolute", log_scale=x.log_scale, kernel="gpu")
    whole = hybrid_attention(x.q, x.k, x.v, x.phi_q, x.phi_k, x.mix, **options)
    asked = (x.q[:, :, 21:], x.k, x.v, x.phi_q[:, :, 21:], x.phi_k, x.mix)
    assert torch.equal(hybrid_attention(*asked, first_query=21, **options), whole[:, :, 21:])


def test_only_wanted_gradients_are_computed_and_they_repeat():
    x = Inputs((1, 1), 33, batch=1).like(torch.float32, DEVICE)
    options = dict(window=6, sinks=2, kernel="gpu")
    expected = with_gradients(x, components=False, **options)[1:]
    for wanted in ((3, 4), (0, 2)):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(x.tensors())]
        y = hybrid_attention(*leaves[:6], **options)
        (
            y * torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=DEVICE)).to(y.dtype).view_as(y)
        ).sum().backward()
        assert [t.grad is not None for t in leaves] == [i in wanted for i in range(7)]
        assert all(torch.equal(leaves[i].grad, expected[i]) for i in wanted)


# which kernel runs


def test_why_not(monkeypatch):
    x = Inputs()
    with pytest.raises(
        RuntimeError, match=r"kernel='gpu': the Triton kernels take float32.*found torch.float64.*chunked"
    ):
        attend(x, kernel="gpu") if not GPU else resolve_kernel("gpu", "cuda", dtype=torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"need a CUDA device, found cpu"):
        attend(x.like(torch.float32), kernel="gpu")
    monkeypatch.setattr(gpu_support, "_capability", lambda index: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 8.0.*found 7.5"):
        resolve_kernel("gpu", "cuda")
    monkeypatch.setattr(gpu_support, "_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"Triton is not installed: pip install 'recipelin\[gpu\]'"):
        resolve_kernel("gpu", "cuda")


class Looking(TorchDispatchMode):
    """A tracer."""


def test_auto_takes_the_kernels_where_they_can_run_once_they_are_proven(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gpu_support, "_capability", lambda index: (9, 0))
    shape = dict(dtype=torch.bfloat16, width=128, features=256)
    series = ".".join(importlib.metadata.version("triton").split(".")[:2])
    for other in ((series, (8, 0)), ("2.0", (9, 0))):
        monkeypatch.setattr(gpu_support, "PROVEN", frozenset({other}))
        assert resolve_kernel("auto", "cuda", **shape) == "chunked" and resolve_kernel("gpu", "cuda", **shape) == "gpu"
    monkeypatch.setattr(gpu_support, "PROVEN", frozenset({(series, (9, 0))}))
    assert resolve_kernel("auto", "cuda", **shape) == "gpu" != resolve_kernel("auto", "cpu", **shape)
    assert resolve_kernel("auto", "cuda", covered=True, **shape) == "sdpa"
    with Looking():
        assert resolve_kernel("auto", "cuda", **shape) == "chunked"
    for other in ({"dtype": torch.float64}, {"width": 512}, {"features": 2048}, {"rows": 65536}):
        assert resolve_kernel("auto", "cuda", **{**shape, **other}) == "chunked"
        with pytest.raises(RuntimeError, match="Triton kernels take"):
            resolve_kernel("gpu", "cuda", **{**shape, **other})


def test_the_package_needs_no_triton():
    """Imported anew beside a Triton that is not there."""
    kept = {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("recipelin_kernels", "triton")}
    try:
        for name in kept:
            del sys.modules[name]
        sys.modules["triton"] = None
        anew = importlib.import_module("recipelin_kernels")
        x = torch.rand(1, 1, 4, 2)
        anew.hybrid_attention(x, x, x, x, x, torch.ones(1), window=2)
        assert "recipelin_kernels.hybrid.gpu" not in sys.modules
        with pytest.raises(RuntimeError, match="not installed"):
            anew.resolve_kernel("gpu", "cpu")
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("recipelin_kernels", "triton")]:
            del sys.modules[name]
        sys.modules.update(kept)
