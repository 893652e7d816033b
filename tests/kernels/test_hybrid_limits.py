"""Hybrid attention: dtypes, memory, errors, and what is returned."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from recipelin_kernels import Components, HybridState, hybrid_attention, resolve_kernel
from recipelin_kernels.hybrid import covered
from tests.kernels.hybrid_inputs import EXACT, JOINS, Inputs, assert_same, attend, padding, with_gradients

# dtypes, memory, errors


@pytest.mark.parametrize("join", JOINS)
def test_low_precision_inputs_are_computed_in_float32(join):
    exact = Inputs((6, 2), 300, batch=1)
    coarse = Inputs((6, 2), 300, batch=1, dtype=torch.bfloat16)
    y = attend(coarse, window=32, join=join, kernel="chunked")
    assert y.dtype == torch.bfloat16
    rounded = Inputs((6, 2), 300, batch=1)
    for name in Inputs.names:
        setattr(rounded, name, getattr(coarse, name).double())
    expected = attend(rounded, window=32, join=join, kernel="reference")
    # Inputs are rounded the same in both: what is left is the rounding of y itself, 2^-9 of each element.
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all()
    assert (y.double() - attend(exact, window=32, join=join)).norm() < 0.03 * expected.norm()


def test_float32_is_close_to_float64():
    x32, x64 = Inputs(length=300, dtype=torch.float32), Inputs(length=300)
    for name in Inputs.names:
        setattr(x64, name, getattr(x32, name).double())
    for join in JOINS:
        options = dict(window=32, join=join)
        found = with_gradients(x32, kernel="chunked", **options)
        assert_same([t.double() for t in found], with_gradients(x64, kernel="reference", **options), 5e-6)


PEAK = """
import sys, torch
from recipelin_kernels import hybrid_attention
torch.set_num_threads(1)
def run(length):
    q, k, v, phi_q, phi_k = (torch.rand(1, 4, length, 32, requires_grad=True) for _ in range(5))
    hybrid_attention(q, k, v, phi_q, phi_k, torch.rand(4), window=32, kernel="chunked").sum().backward()
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
run(64)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM")
def test_memory_grows_linearly():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    peaks = {}
    for length in (4096, 8192):
        found = subprocess.run(
            [sys.executable, "-c", PEAK, str(length)], env=env, capture_output=True, text=True, check=True
        )
        peaks[length] = int(found.stdout)
    # Weights of 4 heads at T = 8192 would be 1 GB; inputs and gradients are 42 MB.
    assert peaks[8192] < 2.6 * peaks[4096] and peaks[8192] < 250_000, peaks


def test_errors_name_what_is_valid():
    x = Inputs()
    with pytest.raises(ValueError, match=r"shape='terrace'.*sliding, terraced.*did you mean 'terraced'"):
        attend(x, shape="terrace")
    for reach in (0, -3, True, 2.0):
        with pytest.raises(ValueError, match=r"reach=.*at least 1, or None"):
            attend(x, reach=reach)
    with pytest.raises(
        ValueError, match=r"join='share'.*shared, absolute, replace, average, sum.*did you mean 'shared'"
    ):
        attend(x, join="share")
    with pytest.raises(ValueError, match=r"cover='inside'.*outside, all"):
        attend(x, cover="inside")
    with pytest.raises(ValueError, match=r"ablate='windows'.*did you mean 'window'"):
        attend(x, ablate={"windows": "mass"})
    with pytest.raises(ValueError, match="window"):
        attend(x, window=-1)
    for first in (-1, True, 2.0):
        with pytest.raises(ValueError, match=r"first_query=.*expected the position of a query, 41 of them"):
            attend(x, first_query=first)
    with pytest.raises(ValueError, match=r"k \(2, 2, 41, 8\): expected \(2, 2, 44, 8\) beside q \(2, 6, 41, 8\)"):
        attend(x, first_query=3)
    for join, name in (("shared", "mix"), ("absolute", "log_scale")):
        for given in (None, 0.3, torch.tensor(0.3), torch.ones(1), torch.ones(3), torch.ones(6, 1)):
            setattr(x, name, given)
            with pytest.raises(ValueError, match=rf"join='{join}' needs {name} \[6\].*found"):
                attend(x, join=join, log_scale=x.log_scale)
        x = Inputs()
    for keep in (torch.ones(2, 6), torch.ones(2, 3, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"window_keep of .*: expected bool \(2, 6\)"):
            attend(x, window_keep=keep)
    with pytest.raises(ValueError, match=r"ablate=\['window'\]: expected a map"):
        attend(x, ablate=["window"])
    for sinks in (-1, True, 1.5):
        with pytest.raises(ValueError, match=r"sinks=.*expected integers"):
            attend(x, sinks=sinks)
    x.phi_q, x.phi_k = x.phi_q[..., :0], x.phi_k[..., :0]
    for join in ("shared", "average"):
        with pytest.raises(ValueError, match=r"phi_q \(2, 6, 41, 0\): without features there is no linear branch"):
            attend(x, join=join)
    with pytest.raises(ValueError, match="without features"):
        attend(x, join="replace", ablate={"linear": "mass"})
    assert attend(x, ablate={"linear": "mass"}).any()
    for cut, words in (
        (lambda t: t[0], r"q of torch.float64 \(6, 41, 8\)"),
        (lambda t: t.long(), "q of torch.int64"),
        (lambda t: t[:, :, :0], "expected at least one token"),
        (lambda t: t[..., :0], "a width of 1"),
    ):
        with pytest.raises(ValueError, match=words):
            hybrid_attention(*(cut(t) for t in (x.q, x.k, x.v, x.phi_q, x.phi_k)), x.mix, window=5)
    x = Inputs()
    with pytest.raises(ValueError, match="multiple of"):
        hybrid_attention(x.q[:, :5], x.k, x.v, x.phi_q[:, :5], x.phi_k, x.mix, window=5)
    with pytest.raises(RuntimeError, match="Triton"):
        attend(x, kernel="gpu")
    with pytest.raises(ValueError, match=r"kernel='chunk'.*did you mean 'chunked'"):
        resolve_kernel("chunk", "cpu")


def test_what_is_returned():
    x = Inputs()
    assert isinstance(attend(x), Tensor)
    y, state, parts = attend(x, output_state=True, components=True)
    assert isinstance(state, HybridState) and isinstance(parts, Components)
    assert (y - attend(x)).abs().max() < EXACT
    assert resolve_kernel("auto", "cpu", dtype=torch.float64) == "chunked"
    assert resolve_kernel("auto", "cpu", covered=True) == "sdpa"
    assert resolve_kernel("chunked", "cpu", covered=True) == "chunked"


@pytest.mark.parametrize("join", JOINS)
def test_a_window_over_everything_is_sdpa_and_nothing_else_is(join, monkeypatch):
    x, calls = Inputs(length=17), []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(covered.F, "scaled_dot_product_attention", lambda *a, **b: calls.append(a) or sdpa(*a, **b))
    keep = torch.arange(12).view(2, 6) % 3 > 0
    taken = [{}, {"scale": 0.7}, {"window": 30}, {"window": 9, "shape": "terraced"}, {"output_state": True}]
    others = [
        {"window": 16},
        {"window": 8, "shape": "terraced"},
        {"components": True},
        {"cover": "all"},
        {"window_keep": keep},
    ]
    others += [{"ablate": {"window": "mass"}}, {"kernel": "chunked"}, padding("left", 2, 17)]
    for options in taken + others:
        calls.clear()
        attend(x, **{"window": 17, "join": join, **options})
        assert len(calls) == (options in taken), options


@pytest.mark.parametrize("join", JOINS)
def test_what_auto_chooses_is_never_seen_in_the_result(join):
    """Whatever else is asked for, a window over everything gives under `auto` what the definition gives."""
    x = Inputs(length=17)
    keep = torch.arange(12).view(2, 6) % 3 > 0
    asked = [{}, {"cover": "all"}, {"window_keep": keep}, {"ablate": {"window": "mass"}}, {"sinks": 3}, {"scale": 0.7}]
    asked += [{"ablate": {"linear": "output"}}, padding("left", 2, 17), padding("segments", 2, 17), {"signed": True}]
    asked += [{"shape": "terraced"}, {"reach": 16}, {"reach": 17}]
    for window, options in itertools.product([16, 17, 18], asked):
        window = window // 2 if "shape" in options else window  # 8 blocks of terraced hold 16 of 17 keys, 9 all
        auto = attend(x, window=window, join=join, **options)
        definition = attend(x, window=window, join=join, kernel="reference", **options)
        assert (auto - definition).abs().max() < EXACT, (window, options)
        gradients = [
            with_gradients(x, window=window, join=join, kernel=n, **options)[4:] for n in ("auto", "reference")
        ]
        for a, b in zip(*gradients, strict=True):
            assert (a - b).abs().max() < EXACT
    leaves = [t.clone().requires_grad_() for t in x.tensors()]
    hybrid_attention(*leaves[:6], log_scale=leaves[6], window=17, join=join).sum().backward()
    assert leaves[3].grad is not None and leaves[3].grad.abs().max() < EXACT  # features that learn nothing here: zeros
