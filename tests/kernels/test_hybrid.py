"""The laws of hybrid attention (DESIGN §5): the chunked form is the definition, and the definition is the formula."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recipelin_kernels import hybrid_attention
from recipelin_kernels.hybrid import block, chunked
from tests.kernels.hybrid_inputs import (
    COVERS,
    EXACT,
    HEADS,
    JOINS,
    SHAPES,
    Inputs,
    assert_same,
    attend,
    gradients,
    padding,
    with_gradients,
)

# chunked = definition


@pytest.mark.parametrize(("join", "cover"), list(itertools.product(JOINS, COVERS)))
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunked_equals_the_definition(heads, join, cover):
    draw = random.Random(f"{heads} {join} {cover}")
    kinds = ["none", "left", "right", "segments"]
    grid = itertools.product([1, 4, 37, 75], [0, 1, 6, 32, 200], SHAPES, [None, 5, 19, 60], [0, 4], kinds)
    cases = [c for c in grid if draw.random() < 0.016]
    assert {c[2] for c in cases} == set(SHAPES) and {bool(c[3]) for c in cases} == {False, True}
    for length, window, shape, reach, sinks, kind in cases:
        x = Inputs(heads, length, per_key_head=draw.random() < 0.5, seed=length + window)
        options = dict(window=window, shape=shape, reach=reach, sinks=sinks, join=join, cover=cover)
        options |= padding(kind, 2, length)
        options["max_gradient"] = draw.choice(["through", "detached"])
        real = options.get("key_mask")
        definition = with_gradients(x, real, kernel="reference", **options)
        chunk = draw.choice([7, 16, 64])
        assert_same(with_gradients(x, real, kernel="chunked", chunk=chunk, **options), definition)


@pytest.mark.parametrize("branch", ["window", "linear", "sinks"])
@pytest.mark.parametrize("how", ["mass", "output"])
@pytest.mark.parametrize("join", JOINS)
def test_chunked_equals_the_definition_under_ablation(branch, how, join):
    geometries = itertools.cycle([("sliding", None), ("terraced", None), ("sliding", 17), ("terraced", 17)])
    for cover, kind in itertools.product(COVERS, ["none", "left", "segments"]):
        x = Inputs((6, 2), 41)
        options = dict(window=6, sinks=3, join=join, cover=cover, ablate={branch: how}, **padding(kind, 2, 41))
        options["shape"], options["reach"] = next(geometries)
        real = options.get("key_mask")
        definition = with_gradients(x, real, kernel="reference", **options)
        assert_same(with_gradients(x, real, kernel="chunked", chunk=16, **options), definition)


@pytest.mark.parametrize("join", JOINS)
def test_chunked_equals_the_definition_without_a_softmax_set(join):
    for cover, kind, sinks in itertools.product(COVERS, ["none", "left", "segments"], [0, 3]):
        x = Inputs((6, 2), 41)
        options = dict(window=6, sinks=sinks, join=join, cover=cover, **padding(kind, 2, 41))
        options["ablate"] = {"window": "mass", "sinks": "mass"}
        real = options.get("key_mask")
        definition = with_gradients(x, real, kernel="reference", **options)
        for chunk in (None, 7, 16):
            assert_same(with_gradients(x, real, kernel="chunked", chunk=chunk, **options), definition)


@pytest.mark.parametrize("on_drop", ["linear_covers_all", "linear_outside"])
@pytest.mark.parametrize("join", JOINS)
def test_chunked_equals_the_definition_with_dropped_windows(on_drop, join):
    geometries = itertools.cycle([("sliding", None), ("terraced", None), ("terraced", 17)])
    for cover, sinks, per_key_head in itertools.product(COVERS, [0, 4], [False, True]):
        x = Inputs((6, 2), 41, per_key_head=per_key_head)
        keep = torch.rand(2, 6, generator=torch.Generator().manual_seed(sinks)) > 0.5
        options = dict(window=6, sinks=sinks, join=join, cover=cover, window_keep=keep, on_drop=on_drop)
        options["shape"], options["reach"] = next(geometries)
        definition = with_gradients(x, kernel="reference", **options)
        assert_same(with_gradients(x, kernel="chunked", chunk=16, **options), definition)


@pytest.mark.parametrize("join", JOINS)
def test_autocast_changes_nothing(join):
    """A tuned bf16 model calls the operator within it, in rows of several chunks; so does a backward pass within."""
    x = Inputs((6, 2), 41, dtype=torch.float32)
    options = dict(window=6, join=join, kernel="chunked", chunk=8)
    expected = with_gradients(x, **options), attend(x, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(x, **options)
        with torch.no_grad():
            alone = attend(x, **options)
    assert torch.equal(alone, expected[1]) and all(map(torch.equal, found, expected[0]))


def test_second_derivatives_are_refused_not_wrong():
    x = Inputs((6, 2), 20)
    leaves = [t.detach().requires_grad_() for t in x.tensors()]
    y = hybrid_attention(*leaves[:6], log_scale=leaves[6], window=4, kernel="chunked")
    first = torch.autograd.grad(y.square().sum(), leaves[:3], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.square().sum() for g in first).backward()


def test_masks_that_are_kept_are_real_numbers(monkeypatch):
    """Made by a call without numbers, or in inference mode, they would be of no use to the next one."""
    x = Inputs((6, 2), 41)
    for window, order in ((5, (True, False)), (7, (False, True))):
        for fake in order:
            if not fake:
                expected = with_gradients(x, window=window, kernel="reference")
                assert_same(with_gradients(x, window=window, kernel="chunked"), expected)
                continue
            real = (*x.cut(0, 41), x.mix)
            with FakeTensorMode() as mode:
                given = [mode.from_tensor(t) for t in real]
                assert hybrid_attention(*given, window=window, kernel="chunked").shape == x.q.shape
    seen, weigh = [], chunked.weigh
    monkeypatch.setattr(chunked, "weigh", lambda *given: seen.append(given[2].soft) or weigh(*given))
    with torch.inference_mode():
        hybrid_attention(*x.cut(0, 41), x.mix, window=9, kernel="chunked")
    hybrid_attention(*x.cut(0, 41), x.mix, window=9, kernel="chunked")
    assert len(seen) == 4 and seen[0] is seen[2] and not any(soft.is_inference() for soft in seen)


def test_a_compiled_call_is_the_same_and_keeps_no_masks():
    x = Inputs((6, 2), 41)
    expected = hybrid_attention(*x.cut(0, 41), x.mix, window=11, kernel="chunked")
    kept = block._plain_masks.cache_info().misses
    compiled = torch.compile(hybrid_attention, backend="eager")
    assert torch.equal(compiled(*x.cut(0, 41), x.mix, window=11, kernel="chunked"), expected)
    assert block._plain_masks.cache_info().misses == kept


@pytest.mark.parametrize("sinks", [0, 2])
def test_autocast_changes_no_bit_of_a_state(sinks):
    """Read in two parts, then token by token: sums, late keys and outputs."""
    x = Inputs((6, 2), 25, dtype=torch.float32)
    options = dict(window=6, sinks=sinks, join="shared", phi_k_fn=x.features, output_state=True)

    def run():
        parts, state = [], None
        for a, b in ((0, 9), (9, 15), *((t, t + 1) for t in range(15, 25))):
            y, state = hybrid_attention(*x.cut(a, b), x.mix, state=state, **options)
            parts.append(y)
        return [*parts, *state.tensors.values()]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("join", "cover"), list(itertools.product(JOINS, COVERS)))
def test_what_training_keeps_changes_no_bit(join, cover, monkeypatch):
    """With many features a chunk's weights and state are kept, else computed again: the same bits, and the definition."""
    whole = Inputs((6, 2), 41, features=128, per_key_head=cover == "all")
    computed = []
    weigh = chunked.weigh
    monkeypatch.setattr(chunked, "weigh", lambda *given: computed.append(1) or weigh(*given))

    def run(x, **options):
        leaves = [t.detach().clone().requires_grad_() for t in x.tensors()]
        computed.clear()
        y = hybrid_attention(*leaves[:6], log_scale=leaves[6], **options)
        return [y.detach(), *gradients(y.square().sum(), leaves)]

    kinds = itertools.cycle(["none", "left", "right", "segments"])
    for shape, sinks, dropped in itertools.product(SHAPES, [0, 3], [False, True]):
        options = dict(window=6, shape=shape, sinks=sinks, join=join, cover=cover, **padding(next(kinds), 2, 41))
        if dropped:
            options["window_keep"] = torch.tensor([[True, False] * 3, [False] * 6])
        for x in (whole, whole.like(torch.float32)):
            kept = run(x, kernel="chunked", chunk=8, **options)
            assert len(computed) == 6, "six chunks, once"
            with monkeypatch.context() as patch:
                patch.setattr(chunked._Call, "keeps_weights", lambda *_: False)
                again = run(x, kernel="chunked", chunk=8, **options)
            assert len(computed) == 2 * 6
            assert all(map(torch.equal, kept, again))
        names = ("y", *("d_" + n for n in Inputs.names))
        assert_same(
            run(whole, kernel="chunked", chunk=8, **options), run(whole, kernel="reference", **options), names=names
        )


@pytest.mark.parametrize("chunk", [1, 5, 8, 40, 41, 64])
def test_result_does_not_depend_on_the_chunk_size(chunk):
    x = Inputs()
    for join, shape, reach in (("absolute", "sliding", None), ("average", "terraced", None), ("sum", "terraced", 19)):
        options = dict(window=7, sinks=2, kernel="chunked", join=join, shape=shape, reach=reach)
        assert_same(with_gradients(x, chunk=chunk, **options), with_gradients(x, chunk=16, **options))


def test_chunked_gradients_agree_with_finite_differences():
    x = Inputs((2, 1), 7, batch=1)
    for join in JOINS:
        shape, reach = {"average": ("terraced", None), "sum": ("sliding", 4)}.get(join, ("sliding", None))

        def run(*leaves, join=join, shape=shape, reach=reach):
            return hybrid_attention(
                *leaves[:6],
                log_scale=leaves[6],
                window=2,
                shape=shape,
                reach=reach,
                sinks=1,
                join=join,
                kernel="chunked",
                chunk=3,
            )

        assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in x.tensors()], fast_mode=True)


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


def in_window(t: int, i: int, window: int, shape: str) -> bool:
    """Whether key i <= t is in the window of query t, as DESIGN §5 writes it."""
    return t - i < window if shape == "sliding" else i >= (t // window - 1) * window


def by_hand(x: Inputs, join: str, window: int, sinks: int, cover: str, shape: str, reach: int) -> Tensor:
    """One row after the other, as DESIGN §5 writes it."""
    y = torch.zeros_like(x.q)
    batch, heads, length, dim = x.q.shape
    for b_, h, t in itertools.product(range(batch), range(heads), range(length)):
        g = h // (heads // x.k.shape[1])
        p = h // (heads // x.phi_k.shape[1])
        inside = [i for i in range(t + 1) if (in_window(t, i, window, shape) and t - i < reach) or i < sinks]
        outside = [i for i in range(t + 1) if t - i < reach and (cover == "all" or i not in inside)]
        score = torch.stack([x.q[b_, h, t] @ x.k[b_, g, i] / dim**0.5 for i in inside])
        linear = [x.phi_q[b_, h, t] @ x.phi_k[b_, p, i] for i in range(t + 1)]
        weight = torch.zeros(t + 1, dtype=x.q.dtype)
        if join in ("average", "sum"):
            b = torch.stack([linear[i] if i in outside else 0 * linear[i] for i in range(t + 1)])
            one = score.softmax(0) @ x.v[b_, g, inside]
            other = b @ x.v[b_, g, : t + 1] / b.sum() if outside else one * (join == "average")
            y[b_, h, t] = (one + other) / (2 if join == "average" else 1)
            continue
        soft = (score - score.max()).exp() * x.mix[h]
        if join == "absolute":
            soft = score.exp()
        elif join == "replace":
            soft = score.softmax(0) * sum(linear[i] for i in inside)
        for i, s in zip(inside, soft, strict=True):
            weight[i] += s
        for i in outside:
            weight[i] += linear[i] * (x.log_scale[h].exp() if join == "absolute" else 1)
        y[b_, h, t] = weight @ x.v[b_, g, : t + 1] / weight.sum()
    return y


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize(("shape", "window", "reach"), [("sliding", 4, 99), ("terraced", 3, 99), ("terraced", 3, 7)])
@pytest.mark.parametrize(("join", "cover", "sinks"), list(itertools.product(JOINS, COVERS, [0, 2])))
def test_formula(join, cover, sinks, shape, window, reach, kernel):
    x = Inputs((2, 1), 13, batch=1)
    y = attend(x, window=window, shape=shape, sinks=sinks, join=join, cover=cover, reach=reach, kernel=kernel)
    assert (y - by_hand(x, join, window, sinks, cover, shape, reach)).abs().max() < EXACT


def test_the_terraced_window_holds_its_block_and_the_one_before():
    """From the linear side's view: which values a poked key reaches, in all rows."""
    x, w = Inputs((2, 1), 20, batch=1), 4
    for key in range(20):
        poked = Inputs((2, 1), 20, batch=1)
        poked.v[:, :, key] += 100.0
        options = dict(window=w, shape="terraced", ablate={"linear": "mass"}, kernel="chunked", chunk=7)
        reached = (attend(x, **options) != attend(poked, **options)).any(-1)[0, 0].nonzero().flatten().tolist()
        assert reached == [t for t in range(key, 20) if t // w - key // w <= 1]


@pytest.mark.parametrize("kernel", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_window_over_everything_is_causal_softmax(heads, join, kernel):
    x = Inputs(heads, 41)
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
    for window, shape, reach in (
        (41, "sliding", None),
        (1000, "sliding", 41),
        (21, "terraced", None),
        (41, "terraced", 41),
    ):
        y = attend(x, window=window, shape=shape, reach=reach, join=join, kernel=kernel)
        assert (y - expected).abs().max() < EXACT
    assert (attend(x, window=40, join=join, kernel=kernel) - expected).abs().max() > EXACT
    assert (attend(x, window=20, shape="terraced", join=join, kernel=kernel) - expected).abs().max() > EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("join", JOINS)
def test_a_window_over_the_teachers_own_is_its_windowed_softmax(join, kernel):
    x = Inputs(length=41)
    at = torch.arange(41)
    mask = (at[:, None] >= at) & (at[:, None] - at < 11)
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=mask, enable_gqa=True)
    for window, shape in ((11, "sliding"), (30, "sliding"), (10, "terraced")):
        y, parts = attend(x, window=window, shape=shape, reach=11, join=join, kernel=kernel, components=True)
        assert (y - expected).abs().max() < EXACT and not parts.linear_share.any()
        assert (
            attend(x, window=window, shape=shape, reach=11, join=join, kernel=kernel) - expected
        ).abs().max() < EXACT


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
@pytest.mark.parametrize(("shape", "reach"), [("sliding", None), ("terraced", None), ("terraced", 17)])
def test_causal_and_prefix(join, cover, shape, reach):
    x, y = Inputs(), Inputs()
    cut = 20
    for name in ("q", "k", "v", "phi_q", "phi_k"):
        getattr(y, name)[:, :, cut:] += 1.0
    options = dict(join=join, cover=cover, shape=shape, reach=reach, sinks=2, kernel="chunked", chunk=16)
    assert torch.equal(attend(x, **options)[:, :, :cut], attend(y, **options)[:, :, :cut])
    for length in (1, 5, 9, cut):
        short = hybrid_attention(*x.cut(0, length), x.mix, log_scale=x.log_scale, window=5, **options)
        assert (attend(x, **options)[:, :, :length] - short).abs().max() < EXACT


def test_gradient_through_the_maximum_is_no_no_op():
    x = Inputs()
    through = with_gradients(x, window=5, kernel="chunked", max_gradient="through")
    detached = with_gradients(x, window=5, kernel="chunked", max_gradient="detached")
    assert torch.equal(through[0], detached[0])
    for which in (4, 5):  # d_q, d_k
        assert (through[which] - detached[which]).norm() > 0.01 * through[which].norm()
    for join in ("absolute", "replace", "average", "sum"):
        one, other = (
            with_gradients(x, window=5, kernel="chunked", join=join, max_gradient=m) for m in ("through", "detached")
        )
        assert_same(one, other)
