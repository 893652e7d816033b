"""The laws of hybrid attention (DESIGN §5), in float64 where exactness is the point."""

import dataclasses
import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipelin_kernels import (
    Components,
    HybridState,
    empty_state,
    hybrid_attention,
    hybrid_attention_step,
    resolve_kernel,
)

EXACT = 1e-10
DIM, FEATURES = 8, 6
HEADS = [(2, 2), (6, 2), (4, 1)]  # grouped 1:1, 3:1, 4:1
JOINS = ["shared", "absolute", "replace"]
COVERS = ["outside", "all"]


class Inputs:
    """Random q, k, v, features, mix and log-scale; phi_k is a positive map of the keys."""

    names = ("q", "k", "v", "phi_q", "phi_k", "mix", "log_scale")

    def __init__(self, heads=(6, 2), length=41, batch=2, per_key_head=False, seed=0, dtype=torch.float64):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

        h, g = heads
        self.q, self.k, self.v = (
            normal(batch, h, length, DIM),
            normal(batch, g, length, DIM),
            normal(batch, g, length, DIM),
        )
        self.map = normal(g if per_key_head else h, DIM, FEATURES)
        self.phi_q = normal(batch, h, length, FEATURES).softmax(-1)
        self.phi_k = self.features(self.k)
        self.mix, self.log_scale = normal(h).sigmoid(), normal(h)

    def features(self, k: Tensor) -> Tensor:
        """phi_k_fn: keys [B,Hkv,n,D] -> features [B,H or Hkv,n,F]."""
        return (k.repeat_interleave(self.map.shape[0] // k.shape[1], 1) @ self.map).softmax(-1)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, n) for n in self.names]

    def cut(self, start: int, stop: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        return tuple(x[rows, :, start:stop] for x in (self.q, self.k, self.v, self.phi_q, self.phi_k))


def attend(x: Inputs, **options):
    options = {"window": 5, "log_scale": x.log_scale, **options}
    return hybrid_attention(x.q, x.k, x.v, x.phi_q, x.phi_k, x.mix, **options)


def with_gradients(x: Inputs, real: Tensor | None = None, **options) -> list[Tensor]:
    """y, the components, and the gradients to every input (zeros where there is none)."""
    leaves = [t.detach().clone().requires_grad_() for t in x.tensors()]
    y, parts = hybrid_attention(*leaves[:6], **{"log_scale": leaves[6], "components": True, **options})
    weight = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    grads = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    seen = torch.ones(y.shape[0], y.shape[2], dtype=torch.bool) if real is None else real
    shown = [p.detach() * seen[:, None, :, None] for p in (parts.window, parts.linear)] + [
        parts.linear_share.detach() * seen[:, None]
    ]
    return [y.detach(), *shown, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))]


def assert_same(found, expected, tolerance=EXACT):
    names = ["y", "window", "linear", "linear_share", *("d_" + n for n in Inputs.names)]
    for name, a, b in zip(names, found, expected, strict=True):
        # The floor is for gradients that are 0 but for rounding (mix, where no linear key is seen).
        error = float((a - b).norm() / b.norm().clamp(min=1e-2))
        assert error <= tolerance, f"{name}: {error:.2e}"


def padding(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    if kind == "none":
        return {}
    if kind == "segments":
        step = torch.tensor([13, max(length // 2, 1)])[:batch, None]
        return {"segment_ids": torch.arange(length) // step}
    mask = torch.ones(batch, length, dtype=torch.bool)
    gap = min(length - 1, 9)
    if gap and kind == "left":
        mask[0, :gap] = False
    elif gap:
        mask[0, -gap:] = False
    return {"key_mask": mask}


# chunked = definition


@pytest.mark.parametrize(("join", "cover"), list(itertools.product(JOINS, COVERS)))
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunked_equals_the_definition(heads, join, cover):
    draw = random.Random(f"{heads} {join} {cover}")
    grid = itertools.product([1, 4, 37, 75], [0, 1, 6, 32, 200], [0, 4], ["none", "left", "right", "segments"])
    cases = [c for c in grid if draw.random() < 0.14]
    for length, window, sinks, kind in cases:
        x = Inputs(heads, length, per_key_head=draw.random() < 0.5, seed=length + window)
        options = dict(window=window, sinks=sinks, join=join, cover=cover, **padding(kind, 2, length))
        options["max_gradient"] = draw.choice(["through", "detached"])
        real = options.get("key_mask")
        definition = with_gradients(x, real, kernel="reference", **options)
        chunk = draw.choice([7, 16, 64])
        assert_same(with_gradients(x, real, kernel="chunked", chunk=chunk, **options), definition)


@pytest.mark.parametrize("branch", ["window", "linear", "sinks"])
@pytest.mark.parametrize("how", ["mass", "output"])
@pytest.mark.parametrize("join", JOINS)
def test_chunked_equals_the_definition_under_ablation(branch, how, join):
    for cover, kind in itertools.product(COVERS, ["none", "left", "segments"]):
        x = Inputs((6, 2), 41)
        options = dict(window=6, sinks=3, join=join, cover=cover, ablate={branch: how}, **padding(kind, 2, 41))
        real = options.get("key_mask")
        definition = with_gradients(x, real, kernel="reference", **options)
        assert_same(with_gradients(x, real, kernel="chunked", chunk=16, **options), definition)


@pytest.mark.parametrize("on_drop", ["linear_covers_all", "linear_outside"])
@pytest.mark.parametrize("join", JOINS)
def test_chunked_equals_the_definition_with_dropped_windows(on_drop, join):
    for cover, sinks, per_key_head in itertools.product(COVERS, [0, 4], [False, True]):
        x = Inputs((6, 2), 41, per_key_head=per_key_head)
        keep = torch.rand(2, 6, generator=torch.Generator().manual_seed(sinks)) > 0.5
        options = dict(window=6, sinks=sinks, join=join, cover=cover, window_keep=keep, on_drop=on_drop)
        definition = with_gradients(x, kernel="reference", **options)
        assert_same(with_gradients(x, kernel="chunked", chunk=16, **options), definition)


@pytest.mark.parametrize("chunk", [1, 5, 8, 40, 41, 64])
def test_result_does_not_depend_on_the_chunk_size(chunk):
    x = Inputs()
    options = dict(window=7, sinks=2, kernel="chunked", join="absolute")
    assert_same(with_gradients(x, chunk=chunk, **options), with_gradients(x, chunk=16, **options))


def test_chunked_gradients_agree_with_finite_differences():
    x = Inputs((2, 1), 7, batch=1)
    for join in JOINS:

        def run(*leaves, join=join):
            return hybrid_attention(
                *leaves[:6], log_scale=leaves[6], window=2, sinks=1, join=join, kernel="chunked", chunk=3
            )

        assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in x.tensors()])


def test_only_wanted_gradients_are_computed():
    x = Inputs()
    expected = with_gradients(x, window=5, kernel="chunked")[4:]
    for wanted in range(6):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(x.tensors())]
        y = hybrid_attention(*leaves[:6], window=5, kernel="chunked")
        (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(7)]
        torch.testing.assert_close(leaves[wanted].grad, expected[wanted], rtol=1e-9, atol=1e-11)
    leaves = [t.clone().requires_grad_() for t in x.tensors()]
    with torch.no_grad():
        assert not hybrid_attention(*leaves[:6], window=5, kernel="chunked").requires_grad


# what the formulas say, without the other implementation


def by_hand(x: Inputs, join: str, window: int, sinks: int, cover: str) -> Tensor:
    """One row after the other, as DESIGN §5 writes it."""
    y = torch.zeros_like(x.q)
    batch, heads, length, dim = x.q.shape
    for b, h, t in itertools.product(range(batch), range(heads), range(length)):
        g = h // (heads // x.k.shape[1])
        p = h // (heads // x.phi_k.shape[1])
        inside = [i for i in range(t + 1) if t - i < window or i < sinks]
        outside = [i for i in range(t + 1) if cover == "all" or i not in inside]
        score = torch.stack([x.q[b, h, t] @ x.k[b, g, i] / dim**0.5 for i in inside])
        linear = [x.phi_q[b, h, t] @ x.phi_k[b, p, i] for i in range(t + 1)]
        weight = torch.zeros(t + 1, dtype=x.q.dtype)
        soft = (score - score.max()).exp() * x.mix[h]
        if join == "absolute":
            soft = score.exp()
        elif join == "replace":
            soft = score.softmax(0) * sum(linear[i] for i in inside)
        for i, s in zip(inside, soft, strict=True):
            weight[i] += s
        for i in outside:
            weight[i] += linear[i] * (x.log_scale[h].exp() if join == "absolute" else 1)
        y[b, h, t] = weight @ x.v[b, g, : t + 1] / weight.sum()
    return y


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize(("join", "cover", "sinks"), list(itertools.product(JOINS, COVERS, [0, 2])))
def test_formula(join, cover, sinks, kernel):
    x = Inputs((6, 2), 13, batch=1)
    y = attend(x, window=4, sinks=sinks, join=join, cover=cover, kernel=kernel)
    assert (y - by_hand(x, join, 4, sinks, cover)).abs().max() < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_window_over_everything_is_causal_softmax(heads, join, kernel):
    x = Inputs(heads, 41)
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
    for window in (41, 1000):
        assert (attend(x, window=window, join=join, kernel=kernel) - expected).abs().max() < EXACT


def test_grouped_heads_are_an_explicit_repeat():
    x = Inputs((6, 2), 41)
    wide = hybrid_attention(
        x.q,
        x.k.repeat_interleave(3, 1),
        x.v.repeat_interleave(3, 1),
        x.phi_q,
        x.phi_k,
        x.mix,
        window=5,
        kernel="chunked",
    )
    assert (attend(x, kernel="chunked") - wide).abs().max() < EXACT


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("cover", COVERS)
def test_causal_and_prefix(join, cover):
    x, y = Inputs(), Inputs()
    cut = 20
    for name in ("q", "k", "v", "phi_q", "phi_k"):
        getattr(y, name)[:, :, cut:] += 1.0
    options = dict(join=join, cover=cover, sinks=2, kernel="chunked", chunk=16)
    assert torch.equal(attend(x, **options)[:, :, :cut], attend(y, **options)[:, :, :cut])
    short = hybrid_attention(*x.cut(0, cut), x.mix, log_scale=x.log_scale, window=5, **options)
    assert (attend(x, **options)[:, :, :cut] - short).abs().max() < EXACT


def test_gradient_through_the_maximum_is_no_no_op():
    x = Inputs()
    through = with_gradients(x, window=5, kernel="chunked", max_gradient="through")
    detached = with_gradients(x, window=5, kernel="chunked", max_gradient="detached")
    assert torch.equal(through[0], detached[0])
    for which in (4, 5):  # d_q, d_k
        assert (through[which] - detached[which]).norm() > 0.01 * through[which].norm()
    for join in ("absolute", "replace"):
        one, other = (
            with_gradients(x, window=5, kernel="chunked", join=join, max_gradient=m) for m in ("through", "detached")
        )
        assert_same(one, other)


# ablation, empty rows, padding


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("join", JOINS)
def test_components_and_ablation_fit_together(join, kernel):
    x = Inputs()
    options = dict(window=6, sinks=3, join=join, kernel=kernel)
    y, parts = attend(x, components=True, **options)
    share = parts.linear_share[..., None]
    assert (y - ((1 - share) * parts.window + share * parts.linear)).abs().max() < EXACT
    # Without mass the other branch stands alone; without output the denominator stays.
    alone = attend(x, ablate={"linear": "mass"}, **options)
    assert (alone - parts.window).abs().max() < EXACT
    assert (attend(x, ablate={"linear": "output"}, **options) - (1 - share) * parts.window).abs().max() < EXACT
    assert (attend(x, ablate={"window": "mass", "sinks": "mass"}, **options) - parts.linear).abs().max() < EXACT
    assert float(parts.linear_share[:, :, :6].abs().max()) == 0.0 and float(parts.linear_share[:, :, 9:].min()) > 0.0


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("join", JOINS)
def test_ablated_keys_do_not_become_linear(join, kernel):
    x = Inputs()
    poked = Inputs()
    poked.v[:, :, 30] += 100.0
    options = dict(window=6, join=join, ablate={"window": "mass"}, kernel=kernel)
    same = attend(x, **options) == attend(poked, **options)
    assert same[:, :, :36].all() and not same[:, :, 36:].any()


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("join", JOINS)
def test_a_row_that_sees_nothing_is_exactly_zero(join, kernel):
    x = Inputs()
    everything = {"window": "mass", "linear": "mass", "sinks": "mass"}
    found = with_gradients(x, window=5, sinks=2, join=join, ablate=everything, kernel=kernel)
    assert all(not t.any() for t in found)
    no_window = with_gradients(x, window=5, join=join, ablate={"window": "mass"}, kernel=kernel)
    assert not no_window[0][:, :, :5].any() and no_window[0][:, :, 5:].any()
    assert all(torch.isfinite(t).all() for t in no_window)
    empty = attend(x, window=0, join=join, ablate={"linear": "mass"}, kernel=kernel)
    assert not empty.any()


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("cover", COVERS)
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_padded_batch_is_the_single_row(join, cover, kernel):
    x = Inputs(batch=3)
    pads = {0: slice(9, 41), 1: slice(0, 30), 2: slice(0, 41)}
    mask = torch.zeros(3, 41, dtype=torch.bool)
    for row, real in pads.items():
        mask[row, real] = True
    options = dict(window=5, sinks=3, join=join, cover=cover, log_scale=x.log_scale, kernel=kernel)
    poisoned = [t.clone() for t in x.cut(0, 41)]
    for t in poisoned:
        t.masked_fill_(~mask[:, None, :, None], torch.nan)
    leaves = [t.requires_grad_() for t in poisoned]
    y = hybrid_attention(*leaves, x.mix, key_mask=mask, **options)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert not y.masked_select(~mask[:, None, :, None]).any()
    for row, real in pads.items():
        alone = [t[row : row + 1, :, real].clone().requires_grad_() for t in x.cut(0, 41)]
        single = hybrid_attention(*alone, x.mix, **options)
        assert (y[row : row + 1, :, real] - single).abs().max() < EXACT
        for whole, part in zip(grads, torch.autograd.grad(single.sum(), alone), strict=True):
            assert (whole[row : row + 1, :, real] - part).abs().max() < EXACT
            outside = whole[row].clone()
            outside[:, real] = 0
            assert not outside.any()


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("join", JOINS)
def test_segments_are_rows_of_their_own(join, kernel):
    x = Inputs(batch=1)
    edges = [0, 3, 17, 41]
    ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(itertools.pairwise(edges))])[None]
    options = dict(window=5, sinks=3, join=join, log_scale=x.log_scale, kernel=kernel)
    y = hybrid_attention(*x.cut(0, 41), x.mix, segment_ids=ids, **options)
    for a, b in itertools.pairwise(edges):
        single = hybrid_attention(*x.cut(a, b), x.mix, **options)
        assert (y[:, :, a:b] - single).abs().max() < EXACT


@pytest.mark.parametrize("join", JOINS)
def test_uninitialised_memory_does_not_leak(join, monkeypatch):
    x = Inputs((6, 2), 75)
    options = dict(window=6, sinks=2, join=join, kernel="chunked", chunk=16)
    expected = with_gradients(x, **options)
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert_same(with_gradients(x, **options), expected)
    finally:
        torch.use_deterministic_algorithms(before)


def test_scores_far_apart_stay_finite():
    for join, dtype in itertools.product(JOINS, [torch.float32, torch.float64]):
        x = Inputs(dtype=dtype)
        x.q, x.k = x.q * 40, x.k * 40
        x.log_scale = x.log_scale * 60
        assert all(torch.isfinite(t).all() for t in with_gradients(x, window=5, join=join, kernel="chunked"))


@pytest.mark.parametrize("join", ["shared", "replace"])
def test_signed_features_keep_the_denominator_away_from_zero(join):
    x = Inputs()
    x.phi_q, x.phi_k = x.phi_q - 0.17, x.phi_k - 0.17
    options = dict(window=6, join=join, signed=True)
    definition = with_gradients(x, kernel="reference", **options)
    assert_same(with_gradients(x, kernel="chunked", chunk=16, **options), definition)
    # One key of linear mass +-1e-9: the output is v * mass / 1e-6, with the sign kept.
    q, k, v = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    for sign in (1.0, -1.0):
        y = hybrid_attention(q, k, v, torch.full((1, 1, 1, 1), sign * 1e-9), q, torch.ones(1), window=0, signed=True)
        assert float(y) == pytest.approx(3e-3)


@pytest.mark.parametrize("join", ["shared", "replace"])  # a row of `absolute` is normalised before
def test_signed_denominators_at_their_floor_have_the_definitions_gradient(join):
    x = Inputs()
    x.phi_q, x.phi_k = (x.phi_q - 0.17) * 1e-3, (x.phi_k - 0.17) * 1e-4
    options = dict(window=0, join=join, signed=True)
    definition = with_gradients(x, kernel="reference", **options)
    assert_same(with_gradients(x, kernel="chunked", chunk=16, **options), definition)


# states


STATE_OPTIONS = [
    dict(window=w, sinks=s, join=j, cover=c)
    for (w, s), j, c in itertools.product([(0, 0), (1, 0), (5, 0), (5, 3), (60, 2)], JOINS, COVERS)
]


@pytest.mark.parametrize("options", STATE_OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_prefill_in_parts_and_steps_equal_the_parallel_form(options):
    for heads, per_key_head in (((6, 2), False), ((4, 1), True)):
        x = Inputs(heads, 29, per_key_head=per_key_head)
        options = dict(options, log_scale=x.log_scale)
        expected = hybrid_attention(*x.cut(0, 29), x.mix, kernel="chunked", chunk=8, **options)
        y, state = hybrid_attention(*x.cut(0, 3), x.mix, output_state=True, **options)
        parts = [y]
        for a, b in ((3, 12), (12, 13), (13, 22)):
            y, state = hybrid_attention(
                *x.cut(a, b), x.mix, state=state, output_state=True, phi_k_fn=x.features, chunk=4, **options
            )
            parts.append(y)
        for t in range(22, 29):
            q, k, v, phi_q, _ = x.cut(t, t + 1)
            y, state = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
            parts.append(y)
        assert (torch.cat(parts, 2) - expected).abs().max() < EXACT
        _, whole = hybrid_attention(*x.cut(0, 29), x.mix, output_state=True, **options)
        for field in dataclasses.fields(HybridState):
            one, other = getattr(state, field.name), getattr(whole, field.name)
            assert one.shape == other.shape and (one - other).abs().max() < EXACT if one.numel() else True, field.name


@pytest.mark.parametrize("options", STATE_OPTIONS[12:], ids=lambda o: "-".join(str(v) for v in o.values()))
def test_left_padded_decoding_is_the_single_row(options):
    x = Inputs(length=29)
    options = dict(options, log_scale=x.log_scale)
    mask = torch.ones(2, 29, dtype=torch.bool)
    mask[0, :9] = False
    y, state = hybrid_attention(*x.cut(0, 12), x.mix, key_mask=mask[:, :12], output_state=True, **options)
    assert state.positions.tolist() == [3, 12]
    found = [y[:, :, 9:]]
    for t in range(12, 29):
        q, k, v, phi_q, _ = x.cut(t, t + 1)
        y, state = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
        found.append(y)
    for row, start in ((0, 9), (1, 0)):
        alone = hybrid_attention(*x.cut(start, 29, slice(row, row + 1)), x.mix, **options)
        assert (torch.cat(found, 2)[row] - alone[0][:, -20:]).abs().max() < EXACT


def test_decoding_from_nothing_and_a_state_that_does_not_grow():
    x = Inputs(length=29)
    options = dict(window=5, sinks=2, log_scale=x.log_scale, join="absolute")
    state = empty_state(2, 6, 2, DIM, FEATURES, window=5, sinks=2, like=x.q)
    found, sizes = [], set()
    for t in range(29):
        q, k, v, phi_q, _ = x.cut(t, t + 1)
        before = [t.clone() for t in vars(state).values()]
        y, following = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, vars(state).values(), strict=True))
        state = following
        found.append(y)
        sizes.add(state.bytes)
    assert (torch.cat(found, 2) - hybrid_attention(*x.cut(0, 29), x.mix, **options)).abs().max() < EXACT
    assert len(sizes) == 1


def test_a_state_of_other_options_is_refused():
    x = Inputs()
    _, state = attend(x, output_state=True)
    with pytest.raises(ValueError, match="window"):
        attend(x, window=9, state=state, phi_k_fn=x.features)
    with pytest.raises(ValueError, match="phi_k_fn"):
        attend(x, state=state)


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
    with pytest.raises(ValueError, match=r"shape='terraced'.*sliding"):
        attend(x, shape="terraced")
    with pytest.raises(ValueError, match=r"join='share'.*shared, absolute, replace.*did you mean 'shared'"):
        attend(x, join="share")
    with pytest.raises(ValueError, match=r"cover='inside'.*outside, all"):
        attend(x, cover="inside")
    with pytest.raises(ValueError, match=r"ablate='windows'.*did you mean 'window'"):
        attend(x, ablate={"windows": "mass"})
    with pytest.raises(ValueError, match="window"):
        attend(x, window=-1)
    with pytest.raises(ValueError, match="log_scale"):
        attend(x, join="absolute", log_scale=None)
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
    assert resolve_kernel("auto", "cpu") == "chunked"
    assert resolve_kernel("auto", "cpu", covered=True) == "sdpa"
    assert resolve_kernel("chunked", "cpu", covered=True) == "chunked"


@pytest.mark.parametrize("join", JOINS)
def test_what_auto_chooses_is_never_seen_in_the_result(join):
    """Whatever else is asked for, a window over everything gives under `auto` what the definition gives."""
    x = Inputs(length=17)
    keep = torch.arange(12).view(2, 6) % 3 > 0
    asked = [{}, {"cover": "all"}, {"window_keep": keep}, {"ablate": {"window": "mass"}}, {"sinks": 3}, {"scale": 0.7}]
    asked += [{"ablate": {"linear": "output"}}, padding("left", 2, 17), padding("segments", 2, 17), {"signed": True}]
    for window, options in itertools.product([16, 17, 18], asked):
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


@pytest.mark.parametrize("options", STATE_OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_one_token_at_once_equals_the_chunked_form(options):
    for per_key_head, ablate in ((False, None), (True, {"window": "output"}), (False, {"linear": "mass"})):
        x = Inputs(length=24, per_key_head=per_key_head)
        keep = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) > 0.5 if ablate is None else None
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, :17] = False  # a row that begins in the middle of decoding
        mask[1, 19:21] = False  # and one that rests
        common = dict(options, log_scale=x.log_scale, ablate=ablate, window_keep=keep, on_drop="linear_outside")
        _, state = hybrid_attention(*x.cut(0, 15), x.mix, key_mask=mask[:, :15], output_state=True, **common)
        other = state
        for t in range(15, 24):
            q, k, v, phi_q, phi_k = x.cut(t, t + 1)
            now = {**common, "key_mask": mask[:, t : t + 1]}
            y, state = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **now)
            slow, other = hybrid_attention(
                q,
                k,
                v,
                phi_q,
                phi_k,
                x.mix,
                state=other,
                phi_k_fn=x.features,
                output_state=True,
                kernel="chunked",
                **now,
            )
            assert (y - slow).abs().max() < EXACT
        assert state.positions.tolist() == [7, 22]
        for a, b in zip(vars(state).values(), vars(other).values(), strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=EXACT, rtol=0)
