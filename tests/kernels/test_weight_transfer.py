"""The cross-entropy between attention weights: the blocked form and the C kernel against the definition in float64."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from recipelin_kernels import log_scale_closed_form, teacher_attention, weight_transfer_loss

JOINS = ("shared", "absolute", "replace", "average", "sum")
GROUPS = ((2, 2), (6, 2), (4, 1))
WINDOWS = ((1, "sliding"), (9, "sliding"), (400, "sliding"), (9, "terraced"), (70, "terraced"))
BLOCKED = {"chunked": 1e-10, "cpu": 1e-5}  # kernels, and how far they may be off; the C kernel is in fp32
LEAST = {"chunked": 1e-3, "cpu": 3e-2}  # where less is expected: what cancels leaves the rounding of terms of 1
REACHES = ((None, None), (21, 21), (None, 21), (21, None))  # the student's, the teacher's


def inputs(heads: int, key_heads: int, length: int, *, per_key_head: bool = False, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    double = {"dtype": torch.float64}
    found = {
        "q": torch.randn(2, heads, length, 8, **double),
        "k": torch.randn(2, key_heads, length, 8, **double),
        "v": torch.randn(2, key_heads, length, 8, **double),
        "phi_q": torch.rand(2, heads, length, 6, **double) + 0.01,
        "phi_k": torch.rand(2, key_heads if per_key_head else heads, length, 6, **double) + 0.01,
        "mix": torch.rand(heads, **double) * 0.8 + 0.1,
        "log_scale": torch.randn(heads, **double),
    }
    for name in ("phi_q", "phi_k", "mix", "log_scale"):
        found[name].requires_grad_()
    return found


def masks(kind: str, length: int) -> dict[str, Tensor]:
    if kind == "plain":
        return {}
    if kind == "segments":
        return {"segment_ids": torch.stack((torch.arange(length) // 13, torch.arange(length) // 29))}
    real = torch.ones(2, length, dtype=torch.bool)
    cut = min(7, length - 1)
    real[0, :cut] = kind != "left"
    if kind == "right" and cut:
        real[1, -cut:] = False
    return {"key_mask": real}


def rounded(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in x.items()}


def single(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return rounded(x, torch.float32)


def loss_and_gradients(x: dict[str, Tensor], kernel: str, **options) -> list[Tensor]:
    """In x's precision, of the C kernel in float32."""
    x = single(x) if kernel == "cpu" else x
    where = {n: options[n] for n in ("key_mask", "segment_ids") if n in options}
    _, lse = teacher_attention(x["q"], x["k"], x["v"], window=options.get("teacher_window"), **where)
    loss = weight_transfer_loss(
        x["q"], x["k"], x["phi_q"], x["phi_k"], lse, mix=x["mix"], log_scale=x["log_scale"], kernel=kernel, **options
    )
    learned = [x[n] for n in ("phi_q", "phi_k", "mix", "log_scale")]
    grads = torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


@pytest.mark.parametrize("kernel", BLOCKED)
@pytest.mark.parametrize("kind", ["plain", "left", "right", "segments"])
@pytest.mark.parametrize(("heads", "key_heads"), GROUPS)
@pytest.mark.parametrize("target", ["linear", "hybrid"])
def test_blocked_is_the_definition(target, heads, key_heads, kind, kernel):
    compared = 0
    joins = JOINS if target == "hybrid" else ("shared",)
    draw = random.Random(f"{target} {heads} {kind}")
    for length, (window, shape), (reach, teacher_window), sinks, join, cover in itertools.product(
        (3, 149, 301), WINDOWS, REACHES, (0, 4), joins, ("outside", "all")
    ):
        if draw.random() > (0.03 if target == "hybrid" else 0.06):
            continue  # spread over every axis
        x = inputs(heads, key_heads, length, per_key_head=bool(sinks), seed=length)
        options = {
            "target": target,
            "window": window,
            "shape": shape,
            "reach": reach,
            "teacher_window": teacher_window,
            "sinks": sinks,
            "join": join,
            "cover": cover,
            **masks(kind, length),
        }
        expected, found = (loss_and_gradients(x, n, **options) for n in ("reference", kernel))
        scale = max(float(g.abs().max()) for g in expected[1:])
        for one, other in zip(expected, found, strict=True):
            bound = BLOCKED[kernel] * max(scale, float(one.abs().max()), LEAST[kernel])
            assert float((one - other).abs().max()) <= bound, options
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("kernel", BLOCKED)
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("window", [0, 7])
def test_blocked_is_the_definition_where_pairs_are_clamped_and_the_teacher_is_windowed(join, window, kernel):
    x = inputs(6, 2, 149, per_key_head=True)
    with torch.no_grad():
        x["phi_k"][:, :, 3::3] *= 1e-14  # below the clamp; the first linear key of a row, its only one, stays
        x["phi_q"][:, :, 5] = 0
        x["q"] *= 20
        x["log_scale"] *= 20
    for target, reach, shape in (("linear", 31, "sliding"), ("hybrid", 31, "sliding"), ("hybrid", None, "terraced")):
        options = {"target": target, "window": window, "sinks": 2, "join": join, "teacher_window": 31}
        options |= {"reach": reach, "shape": shape, "cover": "outside" if reach else "all"}
        expected, found = (loss_and_gradients(x, n, **options) for n in ("reference", kernel))
        for one, other in zip(expected, found, strict=True):
            assert torch.isfinite(other).all()
            assert float((one - other).abs().max()) <= BLOCKED[kernel] * max(float(one.abs().max()), 1e-3), options


@pytest.mark.parametrize("kernel", BLOCKED)
@pytest.mark.parametrize("what", ["mix", "log_scale", "queries", "keys"])
def test_rows_and_pairs_without_mass(what, kernel):
    """0 / 0 of the formula gives the clamp and no gradient; a pair of 0 beside the window's weight (cover `all`) has one."""
    x = inputs(2, 1, 40)
    with torch.no_grad():
        x["mix"][1] *= what != "mix"
        x["log_scale"][1:] = -torch.inf if what == "log_scale" else 0.5
        x["phi_q"][:, :, 3:20] *= what != "queries"
        x["phi_k"][:, :, :20] *= what != "keys"
    for join, cover, (window, sinks), signed in itertools.product(
        JOINS, ("outside", "all"), ((5, 2), (60, 0), (0, 0)), (False, True)
    ):
        if join == "absolute" and signed:
            continue  # refused
        options = {"join": join, "cover": cover, "window": window, "sinks": sinks, "signed": signed}
        for target in ("hybrid", "linear"):
            expected, found = (loss_and_gradients(x, n, target=target, **options) for n in ("reference", kernel))
            for one, other in zip(expected, found, strict=True):
                assert torch.isfinite(one).all() and torch.isfinite(other).all()
                assert float((one - other).abs().max()) <= BLOCKED[kernel] * max(
                    float(one.abs().max()), LEAST[kernel]
                ), options


@pytest.mark.parametrize("join", JOINS)
def test_the_definition_has_the_gradient_of_a_pair_of_0_beside_the_windows_weight(join):
    x = inputs(2, 1, 12)
    with torch.no_grad():
        x["phi_k"][:, :, 4] = 0
    options = {"target": "hybrid", "join": join, "cover": "all", "window": 12}
    loss, _, exact, *_ = loss_and_gradients(x, "reference", **options)
    moved = {**x, "phi_k": x["phi_k"].detach().clone()}
    moved["phi_k"][0, 1, 4, 3] += 1e-6
    moved["phi_k"].requires_grad_()
    slope = (float(loss_and_gradients(moved, "reference", **options)[0]) - float(loss)) / 1e-6
    assert abs(slope) > 1e-3 and slope == pytest.approx(float(exact[0, 1, 4, 3]), rel=1e-4)


@pytest.mark.parametrize("kernel", BLOCKED)
@pytest.mark.parametrize("join", JOINS)
def test_single_precision_stays_finite_and_close_at_large_scores(join, kernel):
    x = inputs(4, 2, 149)
    with torch.no_grad():
        x["q"] *= 40  # scores of the future then exceed what exp can hold
        x["log_scale"] *= 30
    options = {"target": "hybrid", "window": 9, "join": join}
    expected, found = loss_and_gradients(x, "reference", **options), loss_and_gradients(single(x), kernel, **options)
    for one, other in zip(expected, found, strict=True):
        assert float((one - other.double()).norm()) <= 1e-3 * max(float(one.norm()), 1e-3)


@pytest.mark.parametrize("kernel", BLOCKED)
def test_each_heads_loss_has_its_own_gradient(kernel):
    exact = inputs(4, 2, 149)
    weight = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    grads = []
    for name, x in (("reference", exact), (kernel, single(exact) if kernel == "cpu" else exact)):
        _, lse = teacher_attention(x["q"], x["k"], x["v"])
        each = weight_transfer_loss(
            x["q"], x["k"], x["phi_q"], x["phi_k"], lse, target="hybrid", window=9, mix=x["mix"], per_head=True, kernel=name
        )  # fmt: skip
        grads.append(torch.autograd.grad((each * weight).sum(), [x["phi_q"], x["phi_k"], x["mix"]]))
    for one, other in zip(*grads, strict=True):
        assert float((one - other).abs().max()) <= BLOCKED[kernel] * float(one.abs().max())


@pytest.mark.parametrize(
    "options",
    [{}, {"target": "hybrid", "window": 9, "join": "absolute", "sinks": 2}],
    ids=["linear", "hybrid"],
)
def test_the_c_kernel_gives_the_same_bits_again_and_on_any_number_of_threads(options):
    x, threads = inputs(6, 2, 301, per_key_head=True), torch.get_num_threads()
    found = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            found.append(loss_and_gradients(x, "cpu", **options, **masks("segments", 301)))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))


def test_the_c_kernel_makes_only_the_gradients_that_are_wanted():
    x = inputs(4, 2, 149)
    options = {"target": "hybrid", "window": 9, "sinks": 1}
    expected = loss_and_gradients(x, "cpu", **options)
    for wanted in ("phi_q", "phi_k", "mix"):
        one = {n: t.detach().requires_grad_(n == wanted) for n, t in single(x).items()}
        _, lse = teacher_attention(one["q"], one["k"], one["v"])
        loss = weight_transfer_loss(
            one["q"], one["k"], one["phi_q"], one["phi_k"], lse, mix=one["mix"], kernel="cpu", **options
        )  # fmt: skip
        loss.backward()
        assert {n for n, t in one.items() if t.grad is not None} == {wanted}
        assert torch.equal(loss.detach(), expected[0])
        assert torch.equal(one[wanted].grad, expected[1 + ["phi_q", "phi_k", "mix"].index(wanted)])


def test_float64_is_left_to_chunked():
    x = single(inputs(2, 1, 29))
    _, lse = teacher_attention(x["q"], x["k"], x["v"])
    given = (x["q"], x["k"], x["phi_q"], x["phi_k"], lse)
    with pytest.raises(RuntimeError, match=r"float32, found torch\.float64"):
        weight_transfer_loss(*(t.double() for t in given), kernel="cpu")
    exact = [t.double() for t in given]
    assert torch.equal(weight_transfer_loss(*exact), weight_transfer_loss(*exact, kernel="chunked"))
    assert torch.equal(weight_transfer_loss(*given), weight_transfer_loss(*given, kernel="cpu"))


def test_it_is_torchs_cross_entropy():
    x = inputs(4, 2, 53)
    _, lse = teacher_attention(x["q"], x["k"], x["v"])
    k, phi_k = x["k"].repeat_interleave(2, 1), x["phi_k"]
    causal = torch.ones(53, 53, dtype=torch.bool).tril()
    p = (x["q"] @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    a = (x["phi_q"] @ phi_k.transpose(-1, -2)).masked_fill(~causal, 0)
    a = (a / a.sum(-1, keepdim=True)).clamp(min=1e-12)
    expected = -(p * a.log()).sum(-1).mean()
    found = weight_transfer_loss(x["q"], x["k"], x["phi_q"], phi_k, lse)
    assert abs(float((found - expected).detach())) < 1e-12
    per_head = weight_transfer_loss(x["q"], x["k"], x["phi_q"], phi_k, lse, per_head=True)
    assert per_head.shape == (4,) and abs(float((per_head.mean() - expected).detach())) < 1e-12


@pytest.mark.parametrize(
    ("window", "shape", "own"), [(41, "sliding", None), (21, "terraced", None), (12, "sliding", 11)]
)
@pytest.mark.parametrize("join", JOINS)
def test_a_covering_window_reaches_the_teachers_entropy(join, window, shape, own):
    """The hybrid then has the teacher's own weights: the loss is the entropy, its least value."""
    x = inputs(4, 1, 41)
    _, lse = teacher_attention(x["q"], x["k"], x["v"], window=own)
    scores = (x["q"] @ x["k"].repeat_interleave(4, 1).transpose(-1, -2)) * 8**-0.5
    causal = torch.ones(41, 41, dtype=torch.bool).tril()
    causal = causal & ~causal.tril(-(own or 41))
    p = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean()
    found = weight_transfer_loss(
        x["q"], x["k"], x["phi_q"], x["phi_k"], lse, target="hybrid", window=window, shape=shape, join=join,
        mix=x["mix"], log_scale=x["log_scale"], reach=own, teacher_window=own,
    )  # fmt: skip
    assert abs(float((found - entropy).detach())) < 1e-9


@pytest.mark.parametrize("kind", ["plain", "left", "segments"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "key_heads"), GROUPS)
def test_the_teacher_is_softmax(heads, key_heads, dtype, kind):
    x = {n: t.detach().to(dtype) for n, t in inputs(heads, key_heads, 205).items()}
    where = masks(kind, 205)
    y, lse = teacher_attention(x["q"], x["k"], x["v"], **where)
    k, v = (x[n].double().repeat_interleave(heads // key_heads, 1) for n in ("k", "v"))
    allowed = torch.ones(205, 205, dtype=torch.bool).tril()[None]
    if "key_mask" in where:
        allowed = allowed & where["key_mask"][:, None, :]
    if "segment_ids" in where:
        allowed = allowed & (where["segment_ids"][:, :, None] == where["segment_ids"][:, None, :])
    scores = (x["q"].double() @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~allowed[:, None], -torch.inf)
    real = where.get("key_mask", torch.ones(2, 205, dtype=torch.bool))[:, None, :, None]
    expected = torch.where(real, scores.softmax(-1).nan_to_num() @ v, 0)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert float((torch.where(real, y.double(), 0) - expected).abs().max()) < bound
    total = torch.where(real[..., 0], scores.logsumexp(-1), 0)
    assert float((torch.where(real[..., 0], lse.double(), 0) - total).abs().max()) < bound


def test_a_teachers_own_window():
    x = inputs(4, 2, 90)
    y, lse = teacher_attention(x["q"], x["k"], x["v"], window=11)
    far = torch.arange(90)[:, None] - torch.arange(90)[None]
    scores = (x["q"] @ x["k"].repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(
        (far < 0) | (far >= 11), -torch.inf
    )
    assert float((y - scores.softmax(-1) @ x["v"].repeat_interleave(2, 1)).abs().max()) < 1e-12
    assert float((lse - scores.logsumexp(-1)).abs().max()) < 1e-12


@pytest.mark.parametrize("cover", ["outside", "all"])
@pytest.mark.parametrize("shape", ["sliding", "terraced"])
@pytest.mark.parametrize(("reach", "own"), REACHES)
def test_the_closed_form_of_c(cover, shape, reach, own):
    x = {n: t.detach() for n, t in inputs(4, 2, 149).items()}
    _, lse = teacher_attention(x["q"], x["k"], x["v"], window=own)
    total, rows = log_scale_closed_form(
        x["q"], x["k"], x["phi_q"], x["phi_k"], lse, window=9, shape=shape, sinks=2, cover=cover, reach=reach,
        teacher_window=own,
    )  # fmt: skip
    index = torch.arange(149)
    behind = index[:, None] - index[None]
    causal = behind >= 0
    outside = behind >= 9 if shape == "sliding" else index[:, None] // 9 - index[None] // 9 > 1
    outside = outside & (index[None] >= 2)
    heard = (causal if cover == "all" else outside) & (behind < (reach or 149))
    outside = outside & (behind < (own or 149))
    scores = x["q"] @ x["k"].repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    pairs = x["phi_q"] @ x["phi_k"].transpose(-1, -2)
    kept = outside.any(-1) & heard.any(-1)
    teacher = scores.masked_fill(~outside, -torch.inf).logsumexp(-1)[:, :, kept]
    linear = pairs.masked_fill(~heard, 0).sum(-1).log()[:, :, kept]
    assert rows == 2 * int(kept.sum())
    assert float((total - (teacher - linear).sum((0, 2))).abs().max()) < 1e-8


@pytest.mark.parametrize("kernel", BLOCKED)
def test_padding_may_hold_anything(kernel):
    x = inputs(4, 2, 61)
    where = masks("left", 61)
    clean = loss_and_gradients(x, kernel, target="hybrid", window=5, **where)
    dirty = {n: t.detach().clone() for n, t in x.items()}
    for name in ("q", "k", "v", "phi_q", "phi_k"):
        dirty[name][0, :, :7] = torch.nan
    for name in ("phi_q", "phi_k", "mix", "log_scale"):
        dirty[name].requires_grad_()
    found = loss_and_gradients(dirty, kernel, target="hybrid", window=5, **where)
    assert all(torch.isfinite(t).all() for t in found)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(clean, found, strict=True))


@pytest.mark.parametrize("kernel", BLOCKED)
@pytest.mark.parametrize("name", ["q", "k", "phi_q", "phi_k"])
def test_what_is_not_a_number_is_no_loss(name, kernel):
    x = inputs(2, 1, 301)
    with torch.no_grad():
        x[name][0, 0, 3] = torch.nan
    assert loss_and_gradients(x, kernel)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["chunked", "cpu"])
def test_no_gradients_are_made_under_no_grad(monkeypatch, dtype):
    x = rounded(inputs(4, 2, 61), dtype)
    _, lse = teacher_attention(x["q"], x["k"], x["v"])

    def refuse(*_, **__):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        assert not weight_transfer_loss(x["q"], x["k"], x["phi_q"], x["phi_k"], lse).requires_grad
    with pytest.raises(ValueError, match="get no gradient"):
        weight_transfer_loss(x["q"].requires_grad_(), x["k"], x["phi_q"], x["phi_k"], lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["chunked", "cpu"])
def test_memory_is_linear(dtype):
    """The largest tensor that autograd or forward holds grows with T, not T x T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor):
                    self.size = max(self.size, t.numel())
            return out

    sizes = []
    for length in (512, 1024):
        x = rounded(inputs(2, 1, length), dtype)
        _, lse = teacher_attention(x["q"], x["k"], x["v"])
        with Largest() as largest:
            weight_transfer_loss(x["q"], x["k"], x["phi_q"], x["phi_k"], lse).backward()
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0] and sizes[1] < 2 * 2 * 1024 * 1024 / 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "lineer"}, "did you mean 'linear'"),
        ({"join": "shard"}, "did you mean 'shared'"),
        ({"shape": "terrace"}, "did you mean 'terraced'"),
        ({"kernel": "chunk"}, "did you mean 'chunked'"),
        ({"teacher_window": 0}, "teacher_window=0: expected an integer of at least 1"),
        ({"target": "hybrid", "mix": torch.ones(1)}, r"needs mix \[2\], .*found \(1,\)"),
        ({"target": "hybrid", "join": "absolute", "log_scale": None}, "needs log_scale"),
    ],
)
def test_bad_options_are_named(change, words):
    x = inputs(2, 1, 9)
    _, lse = teacher_attention(x["q"], x["k"], x["v"])
    with pytest.raises(ValueError, match=words):
        weight_transfer_loss(x["q"], x["k"], x["phi_q"], x["phi_k"], lse, **({"mix": x["mix"]} | change))
    with pytest.raises(ValueError, match=r"lse \(2, 2, 8\): expected \(2, 2, 9\)"):
        weight_transfer_loss(x["q"], x["k"], x["phi_q"], x["phi_k"], lse[..., 1:])
    with pytest.raises(ValueError, match=r"phi_q \(2, 2, 8, 6\): expected \(2, 2, 9, 6\)"):
        weight_transfer_loss(x["q"], x["k"], x["phi_q"][:, :, 1:], x["phi_k"], lse)
    with pytest.raises(ValueError, match=r"phi_q \(2, 2, 9, 0\): expected at least one feature"):
        weight_transfer_loss(x["q"], x["k"], x["phi_q"][..., :0], x["phi_k"][..., :0], lse)
    for given, message in (
        ((x["q"], x["k"][:, :, 1:], x["v"]), r"k \(2, 1, 8, 8\): expected \(2, 1, 9, 8\)"),
        ((x["q"], x["k"], x["v"][..., 1:]), r"v \(2, 1, 9, 7\): expected \(2, 1, 9, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_attention(*given)
    with pytest.raises(ValueError, match="window=0: expected an integer of at least 1, or None"):
        teacher_attention(x["q"], x["k"], x["v"], window=0)
    with pytest.raises(ValueError, match="reach=True: expected an integer of at least 1, or None"):
        log_scale_closed_form(x["q"], x["k"], x["phi_q"], x["phi_k"], lse, window=2, reach=True)
    with pytest.raises(ValueError, match=r"lse \(2, 2, 8\): expected \(2, 2, 9\)"):
        log_scale_closed_form(x["q"], x["k"], x["phi_q"], x["phi_k"], lse[..., 1:], window=2)


# --- signed features --------------------------------------------------------------------------------------------------


def signed_inputs(heads: int, key_heads: int, length: int) -> dict[str, Tensor]:
    """Features of both signs; rows whose sums are below the floor of the divisor, and one without any.

    Pairs are multiples of 64, and 1/4 more: their sums are exact in fp32 too, and however they cancel, 1/4 or more is left.
    """
    x = inputs(heads, key_heads, length, per_key_head=True)
    with torch.no_grad():
        for name in ("phi_q", "phi_k"):
            x[name].normal_().mul_(2).round_().mul_(8)
            x[name][..., -1] = 1 if name == "phi_q" else 0.25
        x["phi_q"][:, :, 20::9] *= 2.0**-30
        x["phi_q"][:, :, 5] = 0
    return x


def test_signed_features_are_divided_by_their_signed_sum():
    x = signed_inputs(4, 4, 53)
    causal = torch.ones(53, 53, dtype=torch.bool).tril()
    p = (x["q"] @ x["k"].transpose(-1, -2) * 8**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    pairs = (x["phi_q"] @ x["phi_k"].transpose(-1, -2)).masked_fill(~causal, 0)
    n = pairs.sum(-1, keepdim=True)
    small = n.abs() < 1e-6
    assert (n < -1e-6).any() and (small & (n != 0)).any() and (n == 0).any()
    n = torch.where(small, torch.where(n < 0, -1e-6, 1e-6), n)
    loss = -(p * (pairs / n).clamp(min=1e-12).log()).sum(-1).mean()
    expected = [loss.detach(), *torch.autograd.grad(loss, [x["phi_q"], x["phi_k"]])]
    for kernel, bound in (("reference", 1e-10), *BLOCKED.items()):
        found = loss_and_gradients(x, kernel, signed=True)[:3]
        for one, other in zip(expected, found, strict=True):
            assert float((one - other).abs().max()) <= bound * float(one.abs().max())


@pytest.mark.parametrize("kernel", BLOCKED)
@pytest.mark.parametrize("kind", ["plain", "left", "segments"])
@pytest.mark.parametrize("join", [None, *(j for j in JOINS if j != "absolute")])
def test_blocked_is_the_definition_for_signed_features(join, kind, kernel):
    x = signed_inputs(6, 2, 149)
    both = "outside" if join == "replace" else "all"  # a window's keys would hold two weights that cancel
    for window, shape, sinks, cover, reach in ((9, "sliding", 0, "outside", None), (9, "terraced", 2, both, 31)):
        options = {"target": "hybrid", "join": join} if join else {"target": "linear"}
        options |= {"window": window, "shape": shape, "sinks": sinks, "cover": cover, "reach": reach, "signed": True}
        options |= masks(kind, 149)
        expected, found = (loss_and_gradients(x, n, **options) for n in ("reference", kernel))
        for one, other in zip(expected, found, strict=True):
            assert torch.isfinite(one).all()
            assert float((one - other).abs().max()) <= 2 * BLOCKED[kernel] * max(float(one.abs().max()), 1e-3), options
        assert all(torch.isfinite(t).all() for t in loss_and_gradients(single(x), kernel, **options))


def test_signed_features_have_no_absolute_scale():
    x = signed_inputs(2, 1, 29)
    _, lse = teacher_attention(x["q"], x["k"], x["v"])
    given = (x["q"], x["k"], x["phi_q"], x["phi_k"], lse)
    with pytest.raises(ValueError, match="signed features has no logarithm"):
        log_scale_closed_form(*given, window=5)
    with pytest.raises(ValueError, match="signed features has no logarithm"):
        log_scale_closed_form(*given[:2], given[2].abs(), given[3].abs(), lse, window=5, signed=True)
    with pytest.raises(ValueError, match="signed features has no logarithm"):
        weight_transfer_loss(*given, target="hybrid", join="absolute", log_scale=x["log_scale"], signed=True)
