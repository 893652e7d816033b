"""The laws of the gated delta rule: the chunked form is the definition, the definition is the formula, padding is nothing."""

import importlib
import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from recipelin_kernels import gated_delta_rule, resolve_gated_delta_kernel

EXACT = 1e-10
LENGTHS = (1, 2, 31, 32, 33, 63, 65, 257)
NAMES = ("q", "k", "v", "g", "beta", "state")


class Inputs:
    """q, k [2,Hk,T,8] of unit length, v [2,H,T,6], g, beta [2,H,T], a state; float64 where exactness is the point."""

    def __init__(self, length, heads=(4, 2), seed=0, dtype=torch.float64, strong=1.0, most=1.0):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        h, hk = heads
        self.q, self.k = (F.normalize(normal(2, hk, length, 8), dim=-1).to(dtype) for _ in range(2))
        self.v = normal(2, h, length, 6).to(dtype)
        self.g = -F.softplus(normal(2, h, length)).mul(strong).to(dtype)
        self.beta = normal(2, h, length).sigmoid().mul(most).to(dtype)
        self.state = normal(2, h, 8, 6).to(dtype)

    def tensors(self):
        return [getattr(self, n) for n in NAMES]


def run(x, **options):
    return gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, **options)


def with_gradients(tensors, real=None, **options):
    """o, the last state, and gradients to every input; `real`: rows of o that count."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    o, last = gated_delta_rule(*leaves[:5], state=leaves[5], output_state=True, **options)
    shown = o if real is None else torch.where(real[:, None, :, None], o, 0)
    weights = [torch.cos(torch.arange(y.numel(), device=y.device).double()).view_as(y).to(y.dtype) for y in (o, last)]
    grads = torch.autograd.grad((shown * weights[0]).sum() + (last * weights[1]).sum(), leaves)
    return [o.detach(), last.detach(), *grads]


def assert_same(found, expected, tolerance=EXACT):
    for name, a, b in zip(("o", "last", *(f"d_{n}" for n in NAMES)), found, expected, strict=True):
        assert torch.isfinite(a).all(), name
        error = float((a - b).norm() / b.norm().clamp(min=1e-2))
        assert error <= tolerance, f"{name}: {error:.2e}"


def masked(kind, length):
    mask = torch.ones(2, length, dtype=torch.bool)
    gap = min(length - 1, 11)
    if gap:
        mask[0, slice(None, gap) if kind == "left" else slice(-gap, None)] = False
    return mask


@pytest.mark.parametrize("kind", ["plain", "left", "right", "segments"])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_the_definition(length, kind):
    draw = random.Random(f"{length} {kind}")
    x = Inputs(length, draw.choice([(2, 2), (4, 2), (3, 1)]), seed=length, most=draw.choice([1.0, 2.0]))
    options = {}
    if kind in ("left", "right"):
        options["key_mask"] = masked(kind, length)
    elif kind == "segments":
        options["segment_ids"] = torch.arange(length) // torch.tensor([[13], [max(length // 2, 1)]])
    definition = with_gradients(x.tensors(), kernel="reference", **options)
    for chunk in (None, 7, 64):
        assert_same(with_gradients(x.tensors(), kernel="chunked", chunk=chunk, **options), definition)


def test_the_definition_is_the_formula_of_the_paper():
    """One row, S in R^{E x D} as the paper has it, against both implementations; the head that reads key head 1."""
    x = Inputs(19, (4, 2))
    s, found = torch.zeros(6, 8, dtype=torch.float64), []
    for t in range(19):
        k, v = x.k[1, 1, t], x.v[1, 3, t]
        forget = torch.eye(8, dtype=torch.float64) - x.beta[1, 3, t] * torch.outer(k, k)
        s = x.g[1, 3, t].exp() * s @ forget + x.beta[1, 3, t] * torch.outer(v, k)
        found.append(s @ x.q[1, 1, t] * 0.3)
    for kernel in ("reference", "chunked", "auto"):
        o, last = run(x, kernel=kernel, scale=0.3, output_state=True)
        assert (o[1, 3] - torch.stack(found)).abs().max() < EXACT
        assert (last[1, 3] - s.T).abs().max() < EXACT
    assert torch.equal(run(x), run(x, scale=8**-0.5))


def test_gradients_agree_with_finite_differences():
    x = Inputs(7, (2, 1))
    leaves = [t[:1].clone().requires_grad_() for t in x.tensors()]

    def both(q, k, v, g, beta, state):
        return gated_delta_rule(q, k, v, g, beta, state=state, output_state=True, kernel="chunked", chunk=3)

    assert torch.autograd.gradcheck(both, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [65, 257])
def test_lower_precision_stays_near_float64(length, dtype):
    x = Inputs(length, dtype=dtype)
    exact = with_gradients([t.double() for t in x.tensors()], kernel="reference")
    # bf16: computed in fp32, then o and the gradients are rounded to 8 bits.
    assert_same(
        [t.double() for t in with_gradients(x.tensors(), kernel="chunked")],
        exact,
        2e-6 if dtype == torch.float32 else 1e-2,
    )
    assert run(x, kernel="chunked").dtype == dtype
    assert run(x, output_state=True)[1].dtype == torch.float32


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
def test_extreme_gates(kernel):
    """Decays down to exp(-1e4) beside none at all, write gates of exactly 0 and 1: finite, and as in float64."""
    x = Inputs(129, dtype=torch.float32)
    x.g[:, :, 17] = -1e4
    x.g[:, :, 18:50] = -1e-6  # fp32 sums of g would lose these behind the one before
    x.g[:, 1] = 0.0
    x.beta[:, :, ::3] = 0.0
    x.beta[:, :, 1::3] = 1.0
    found = [t.double() for t in with_gradients(x.tensors(), kernel=kernel)]
    assert_same(found, with_gradients([t.double() for t in x.tensors()], kernel="reference"), 2e-6)
    x.g[:] = -1e4  # nothing is kept: o_t = scale beta_t (q_t.k_t) v_t
    q, k = (t.repeat_interleave(2, 1) for t in (x.q, x.k))
    alone = (q * k).sum(-1, keepdim=True) * x.beta[..., None] * x.v * 8**-0.5
    assert (run(x, kernel=kernel) - alone).abs().max() < 1e-6


@pytest.mark.parametrize("kernel", ["chunked", "reference", "auto"])
@pytest.mark.parametrize("kind", ["left", "right"])
def test_padding_changes_nothing_whatever_it_holds(kind, kernel):
    """NaN in every input at padded places: real rows, the state and all gradients are those of the row alone."""
    x, mask = Inputs(41), masked(kind, 41)
    for name in NAMES[:5]:
        value = getattr(x, name)
        gap = ~mask[:, None, :, None] if value.ndim == 4 else ~mask[:, None]
        setattr(x, name, torch.where(gap, torch.nan, value))
    o, last, *grads = with_gradients(x.tensors(), mask, kernel=kernel, key_mask=mask)
    assert torch.isfinite(o).all() and all(torch.isfinite(t).all() for t in grads)
    assert not o[0][:, ~mask[0]].any()
    alone = [t[:1, :, mask[0]] for t in x.tensors()[:5]]
    short, short_last = gated_delta_rule(*alone, state=x.state[:1], output_state=True, kernel="reference")
    assert (o[:1, :, mask[0]] - short).abs().max() < EXACT and (last[:1] - short_last).abs().max() < EXACT
    assert all(not t[0][:, ~mask[0]].any() for t in grads[:5])


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
def test_segments_are_rows_of_their_own(kernel):
    x = Inputs(71)
    ids = torch.zeros(2, 71, dtype=torch.long)
    ids[:, 23:], ids[:, 40:] = 1, 0  # an id that comes back is another segment
    o, last = run(x, kernel=kernel, segment_ids=ids, output_state=True)
    for part in (slice(0, 23), slice(23, 40), slice(40, 71)):
        cut = (t[:, :, part] for t in x.tensors()[:5])
        alone, end = gated_delta_rule(*cut, kernel="reference", output_state=True)
        assert (o[:, :, part] - alone).abs().max() < EXACT
    assert (last - end).abs().max() < EXACT


@pytest.mark.parametrize("kernel", ["chunked", "reference", "auto"])
def test_a_state_goes_on_where_the_call_before_ended(kernel):
    x = Inputs(41)
    whole, end = run(x, state=x.state, output_state=True, kernel="reference")
    parts, state = [], x.state
    for start, stop in ((0, 1), (1, 18), (18, 19), (19, 37), *((t, t + 1) for t in range(37, 41))):
        cut = (t[:, :, start:stop] for t in x.tensors()[:5])
        o, state = gated_delta_rule(*cut, state=state, output_state=True, kernel=kernel)
        parts.append(o)
    assert (torch.cat(parts, 2) - whole).abs().max() < EXACT and (state - end).abs().max() < EXACT


def test_one_token_has_the_gradients_of_the_definition():
    x = Inputs(1)
    assert_same(with_gradients(x.tensors(), kernel="auto"), with_gradients(x.tensors(), kernel="reference"))


def test_strides_and_heads_do_not_matter():
    """[B,T,H,D] seen as [B,H,T,D], every second token of a buffer, and key heads repeated by hand."""
    x = Inputs(33)
    expected = run(x, kernel="chunked")
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x.tensors()[:5]]
    wide = [torch.stack((t, torch.full_like(t, torch.nan)), 3).flatten(2, 3)[:, :, ::2] for t in x.tensors()[:5]]
    for tensors in (turned, wide):
        assert not tensors[2].is_contiguous()
        assert torch.equal(gated_delta_rule(*tensors, kernel="chunked"), expected)
        assert_same(
            with_gradients([*tensors, x.state], kernel="chunked"), with_gradients(x.tensors(), kernel="chunked")
        )
    q, k = (t.repeat_interleave(2, 1) for t in (x.q, x.k))
    assert torch.equal(gated_delta_rule(q, k, x.v, x.g, x.beta, kernel="chunked"), expected)


def test_the_span_of_chunks_does_not_matter(monkeypatch):
    chunked = importlib.import_module("recipelin_kernels.gated_delta.chunked")
    x = Inputs(130)
    expected = with_gradients(x.tensors(), kernel="chunked", chunk=8)
    for span in (1, 40, 10_000):
        monkeypatch.setitem(chunked.SPAN, "cpu", span)
        assert_same(with_gradients(x.tensors(), kernel="chunked", chunk=8), expected)


def test_no_graph_without_need():
    x = Inputs(9)
    x.q.requires_grad_()
    assert run(x).requires_grad
    with torch.no_grad():
        assert not run(x).requires_grad


def test_what_cannot_run_is_refused(monkeypatch):
    x = Inputs(9)
    with pytest.raises(ValueError, match=r"kernel='chunkd': expected one of auto, .*did you mean 'chunked'"):
        run(x, kernel="chunkd")
    with pytest.raises(RuntimeError, match="run on CUDA tensors only"):
        run(x, kernel="fla")
    with pytest.raises(RuntimeError, match="not installed; pip install flash-linear-attention"):
        monkeypatch.setitem(sys.modules, "fla", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        resolve_gated_delta_kernel("fla", "cuda")
    with pytest.raises(ValueError, match=r"g \(2, 4, 8\): expected \(2, 4, 9\)"):
        gated_delta_rule(x.q, x.k, x.v, x.g[:, :, :8], x.beta)
    with pytest.raises(ValueError, match="divisor of the 4 heads"):
        gated_delta_rule(x.q[:, :1].expand(2, 3, 9, 8), x.k[:, :1].expand(2, 3, 9, 8), x.v, x.g, x.beta)
    with pytest.raises(ValueError, match=r"state \(2, 4, 6, 8\): expected \(2, 4, 8, 6\)"):
        run(x, state=x.state.mT)


def test_fla_installed_does_not_reach_cpu_tensors(monkeypatch):
    """transformers 5.23 hands CPU tensors to fla's Triton kernels once fla is there; this dispatch does not look at it."""
    broken = types.ModuleType("fla")
    broken.__getattr__ = lambda name: pytest.fail("fla was touched")
    monkeypatch.setitem(sys.modules, "fla", broken)
    assert torch.isfinite(run(Inputs(40))).all()


def test_fla_gets_its_own_layout(monkeypatch):
    """What the thin path hands over, without a GPU: a stand-in with fla's signature that computes the definition."""
    package = importlib.import_module("recipelin_kernels.gated_delta")
    module = types.ModuleType("fla.ops.gated_delta_rule")

    def chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state):
        assert output_final_state and g.dtype == initial_state.dtype == torch.float32
        o, last = gated_delta_rule(
            *(t.transpose(1, 2) for t in (q, k, v, g, beta)), scale=scale, state=initial_state, output_state=True
        )
        return o.transpose(1, 2), last

    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    monkeypatch.setattr(package, "resolve_gated_delta_kernel", lambda kernel, device: kernel)
    x = Inputs(40, dtype=torch.float32)
    options = {"key_mask": masked("left", 40), "state": x.state, "output_state": True}
    for one, other in zip(run(x, kernel="fla", **options), run(x, kernel="chunked", **options), strict=True):
        assert (one - other).abs().max() < 1e-5
    with pytest.raises(ValueError, match="takes no segment_ids"):
        run(x, kernel="fla", segment_ids=torch.arange(40).expand(2, -1) // 9)
