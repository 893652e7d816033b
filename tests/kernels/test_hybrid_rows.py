"""Hybrid attention with branches switched off, rows that see nothing, padding, segments and signed features."""

import itertools

import pytest
import torch

from recipelin_kernels import hybrid_attention, hybrid_attention_step
from tests.kernels.hybrid_inputs import (
    COVERS,
    EXACT,
    JOINS,
    SHAPES,
    Inputs,
    assert_same,
    attend,
    both_kinds,
    empty_is_nan,
    gradients,
    padding,
    with_gradients,
)

# ablation, empty rows, padding


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize(
    ("join", "shape"), [*((j, "sliding") for j in JOINS), ("shared", "terraced"), ("average", "terraced")]
)
def test_components_and_ablation_fit_together(join, shape, kernel):
    x = Inputs()
    first = 9 if shape == "sliding" else 12  # the first query with a key beyond window and sinks
    options = dict(window=6, shape=shape, sinks=3, join=join, kernel=kernel)
    y, parts = attend(x, components=True, **options)
    share = parts.linear_share[..., None]
    total = torch.ones_like(share)
    if join == "sum":
        total[:, :, first:] = 2.0
    assert (y / total - ((1 - share) * parts.window + share * parts.linear)).abs().max() < EXACT
    # Without mass the other branch stands alone; without output the denominator stays.
    alone = attend(x, ablate={"linear": "mass"}, **options)
    assert (alone - parts.window).abs().max() < EXACT
    assert (attend(x, ablate={"linear": "output"}, **options) / total - (1 - share) * parts.window).abs().max() < EXACT
    assert (attend(x, ablate={"window": "mass", "sinks": "mass"}, **options) - parts.linear).abs().max() < EXACT
    assert float(share[:, :, :first].abs().max()) == 0.0 and float(share[:, :, first:].min()) > 0.0
    if join in ("average", "sum"):
        assert (share[:, :, first:] == 0.5).all()


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("join", JOINS)
def test_ablated_keys_do_not_become_linear(join, kernel):
    x = Inputs()
    poked = Inputs()
    poked.v[:, :, 30] += 100.0
    for shape, beyond in (("sliding", 36), ("terraced", 38)):  # window 6; blocks of 19: 30 is in the second
        options = dict(window=6 if shape == "sliding" else 19, join=join, ablate={"window": "mass"}, kernel=kernel)
        same = attend(x, shape=shape, **options) == attend(poked, shape=shape, **options)
        assert same[:, :, :beyond].all() and (shape == "terraced" or not same[:, :, beyond:].any())


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


def without_mass(x: Inputs, what: str) -> Inputs:
    """x with numbers that leave rows of some heads, or of some queries, without mass."""
    for name in ("mix", "phi_q", "phi_k"):
        setattr(x, name, getattr(x, name).clone())
    if what == "mix":
        x.mix[1:3] = 0
    elif what == "log_scale":
        x.log_scale = torch.where(torch.arange(len(x.mix)) % 2 == 0, x.log_scale, -torch.inf)
    elif what == "queries":
        x.phi_q[:, :, 3:20] = 0
    else:
        x.phi_k[:, :, :20] = 0
    return x


@pytest.mark.parametrize("kernel", ["chunked", "cpu", "auto"])
@pytest.mark.parametrize("what", ["mix", "log_scale", "queries", "keys"])
def test_a_row_without_mass_is_zero_and_passes_no_gradient(what, kernel):
    """0 / 0 of the formula, where a window counts for nothing and there is no linear side beside it; `auto` of float64, whose
    window of 60 holds all keys, is torch's softmax."""
    dtype, tolerance = (torch.float32, 3e-5) if kernel == "cpu" else (torch.float64, EXACT)
    for join, cover, (window, sinks), signed in itertools.product(
        JOINS, COVERS, [(5, 2), (60, 0), (0, 0)], [False, True]
    ):
        options = dict(window=window, sinks=sinks, join=join, cover=cover, signed=signed, components=False)
        x = without_mass(Inputs((4, 2)), what)
        expected = with_gradients(x, kernel="reference", **options)
        found = with_gradients(x.like(dtype), kernel=kernel, **options)
        for one, other in zip(found, expected, strict=True):
            assert bool(one.isfinite().all()) and (one - other).norm() <= tolerance * max(float(other.norm()), 1.0)
        with torch.no_grad():
            assert (attend(x.like(dtype), kernel=kernel, **options) - found[0]).abs().max() < tolerance
        empty = (expected[0] == 0).all(-1)
        assert bool((found[0][empty] == 0).all()) and bool((found[4].norm(dim=-1)[empty] == 0).all())  # dphi_q
        if (what, join, cover) == ("mix", "shared", "outside"):
            assert bool(empty[:, 1:3, :window].all())
        if (what, join, window) == ("queries", "replace", 60):
            assert bool(empty[:, :, 3:20].all())


@both_kinds
@pytest.mark.parametrize("kernel", ["auto", "chunked"])
def test_a_token_without_mass_is_zero(kernel, kind):
    """Heads whose mix is 0 have nothing until a key has left the window, and a query whose features are 0 never."""
    x = kind(length=24)
    x.mix[1:3], x.phi_q[:, :, 15] = 0, 0
    options = dict(window=5, log_scale=x.log_scale)
    expected = x.whole(kernel="reference", **options)
    state = hybrid_attention(*x.cut(0, 1), x.mix, output_state=True, **options)[1]
    for t in range(1, 24):
        given = x.cut(t, t + 1)[:4]
        y, state = hybrid_attention_step(*given, x.features, x.mix, state, kernel=kernel, **options)
        assert (y - expected[:, :, t : t + 1]).abs().max() < x.tolerance
        if t < 5 or t == 15:
            assert not y[:, 1:3].any()


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("cover", COVERS)
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_padded_batch_is_the_single_row(join, cover, kernel):
    for shape, reach in (("sliding", None), ("terraced", None), ("terraced", 13)):
        padded_batch_is_the_single_row(join, cover, kernel, shape, reach)


def padded_batch_is_the_single_row(join, cover, kernel, shape, reach):
    x = Inputs(batch=3)
    pads = {0: slice(9, 41), 1: slice(0, 30), 2: slice(0, 41)}
    mask = torch.zeros(3, 41, dtype=torch.bool)
    for row, real in pads.items():
        mask[row, real] = True
    options = dict(window=5, sinks=3, join=join, cover=cover, log_scale=x.log_scale, kernel=kernel)
    options |= {"shape": shape, "reach": reach}
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
@pytest.mark.parametrize(("shape", "reach"), [("sliding", None), ("terraced", None), ("sliding", 9)])
def test_segments_are_rows_of_their_own(join, kernel, shape, reach):
    x = Inputs(batch=1)
    edges = [0, 3, 17, 41]
    ids = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(itertools.pairwise(edges))])[None]
    options = dict(window=5, shape=shape, reach=reach, sinks=3, join=join, log_scale=x.log_scale, kernel=kernel)
    y = hybrid_attention(*x.cut(0, 41), x.mix, segment_ids=ids, **options)
    for a, b in itertools.pairwise(edges):
        single = hybrid_attention(*x.cut(a, b), x.mix, **options)
        assert (y[:, :, a:b] - single).abs().max() < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("join", JOINS)
def test_queries_from_a_position_on_are_those_of_the_whole(join, kernel):
    """y, the components and all gradients; chunked from a border of chunks on to the bit."""
    kinds = itertools.cycle(["none", "left", "right", "segments"])
    shapes = [("sliding", 6, None), ("terraced", 6, None), ("sliding", 6, 17), ("sliding", 41, None)]
    for (shape, window, reach), cover, features in itertools.product(shapes, COVERS, [6, 64]):
        x = Inputs((6, 2), 41, features=features, per_key_head=cover == "all")
        options = dict(window=window, shape=shape, reach=reach, sinks=3, cover=cover, join=join, kernel=kernel)
        options |= {"log_scale": x.log_scale, **padding(kind := next(kinds), 2, 41)}
        if kernel == "chunked":
            options["chunk"] = 8
        if kind == "none" and cover == "outside":
            options["sinks"] = 0  # `auto` is then softmax where the window holds all
        for first in (16, 19, 40):
            found = []
            for skipped in (0, first):
                leaves = [t.detach().clone().requires_grad_() for t in x.tensors()[:6]]
                q, k, v, phi_q, phi_k, mix = leaves
                asked = (q[:, :, skipped:], k, v, phi_q[:, :, skipped:], phi_k, mix)
                y = hybrid_attention(*asked, first_query=skipped, **options)[:, :, first - skipped :]
                _, parts = hybrid_attention(*asked, first_query=skipped, components=True, **options)
                shown = [getattr(parts, n)[:, :, first - skipped :] for n in ("window", "linear", "linear_share")]
                found.append([y, *shown, *gradients(y.square().sum(), leaves)])
            for whole, part in zip(*found, strict=True):
                assert whole.shape == part.shape and (whole - part).abs().max() < EXACT
            if kernel == "chunked" and first == 16:
                assert torch.equal(found[0][0], found[1][0])


def test_queries_from_a_position_on_after_a_state():
    x = Inputs()
    options = dict(window=5, sinks=2, log_scale=x.log_scale, phi_k_fn=x.features)
    _, state = hybrid_attention(*x.cut(0, 11), x.mix, output_state=True, **options)
    q, k, v, phi_q, phi_k = x.cut(11, 41)
    whole, last = hybrid_attention(q, k, v, phi_q, phi_k, x.mix, state=state, output_state=True, **options)
    asked = (q[:, :, 13:], k, v, phi_q[:, :, 13:], phi_k, x.mix)
    y, same = hybrid_attention(*asked, state=state, output_state=True, first_query=13, **options)
    assert (y - whole[:, :, 13:]).abs().max() < EXACT and torch.equal(same.sums, last.sums)


@pytest.mark.parametrize("join", JOINS)
def test_uninitialised_memory_does_not_leak(join):
    x = Inputs((6, 2), 75)
    options = dict(window=6, shape="terraced", sinks=2, join=join, kernel="chunked", chunk=16)
    expected = with_gradients(x, **options)
    with empty_is_nan():
        assert_same(with_gradients(x, **options), expected)


def test_scores_far_apart_stay_finite():
    for join, dtype in itertools.product(JOINS, [torch.float32, torch.float64]):
        x = Inputs(dtype=dtype)
        x.q, x.k = x.q * 40, x.k * 40
        x.log_scale = x.log_scale * 60
        for shape in SHAPES:
            found = with_gradients(x, window=5, join=join, shape=shape, kernel="chunked")
            assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("join", ["shared", "replace", "average", "sum"])
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


@pytest.mark.parametrize("join", ["shared", "replace", "average", "sum"])  # a row of `absolute` is normalised before
def test_signed_denominators_at_their_floor_have_the_definitions_gradient(join):
    x = Inputs()
    x.phi_q, x.phi_k = (x.phi_q - 0.17) * 1e-3, (x.phi_k - 0.17) * 1e-4
    options = dict(window=0, join=join, signed=True)
    definition = with_gradients(x, kernel="reference", **options)
    assert_same(with_gradients(x, kernel="chunked", chunk=16, **options), definition)
