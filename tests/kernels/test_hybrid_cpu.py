"""Hybrid attention by the C kernels: against the definition in float64, over every option and their pairs."""

import itertools
import platform
import random

import pytest
import torch
from torch import Tensor

from recipelin_kernels import cpu as kernels
from recipelin_kernels import (
    hybrid_attention,
    hybrid_attention_step,
    resolve_kernel,
    teacher_attention,
    weight_transfer_loss,
)
from recipelin_kernels.hybrid import cpu_features, cpu_step
from tests.kernels.hybrid_inputs import (
    COVERS,
    HEADS,
    JOINS,
    OUTCOMES,
    SHAPES,
    Inputs,
    attend,
    empty_is_nan,
    padding,
    standard,
    with_gradients,
)

SINGLE = 3e-5  # relative; sums of float32
CHOICES = {
    "join": JOINS,
    "shape": SHAPES,
    "cover": COVERS,
    "sinks": [0, 3, 20],  # fewer than a vector, and more
    "window": [0, 1, 16, 33, 200],
    "reach": [None, None, 7, 40],
    "max_gradient": ["through", "detached"],
    "heads": HEADS,
    "per_key_head": [False, True],
    "length": [1, 15, 32, 33, 97, 150],  # of chunks of 32 queries and vectors of 16 keys
    "dim": [8, 16, 40],
    "features": [6, 32, 48],
    "rows": ["none", "none", "left", "right", "segments"],
    "ablate": [{}, {}, {"window": "mass"}, {"window": "output"}, {"linear": "mass"}, {"linear": "output"},
               {"sinks": "mass"}, {"sinks": "output"}],
    "drop": [None, None, "linear_covers_all", "linear_outside"],
    "components": [False, True],
}  # fmt: skip


def calls(seed: int, count: int) -> list[dict]:
    """Random calls such that each option's values come equally often, each beside every other option's."""
    draw = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        column = list(itertools.islice(itertools.cycle(values), count))
        draw.shuffle(column)
        columns[name] = column
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def outcomes(call: dict, kernel: str, dtype: torch.dtype) -> list[Tensor]:
    x = Inputs(
        call["heads"], call["length"], per_key_head=call["per_key_head"], dim=call["dim"], features=call["features"]
    ).like(dtype)
    real = padding(call["rows"], 2, call["length"])
    options = {n: call[n] for n in ("join", "shape", "cover", "sinks", "window", "reach", "max_gradient", "ablate")}
    if call["drop"]:
        options |= {"window_keep": torch.arange(2 * call["heads"][0]).view(2, -1) % 3 > 0, "on_drop": call["drop"]}
    options |= {"components": call["components"], **real}
    return [t.double() for t in with_gradients(x, real.get("key_mask"), kernel=kernel, **options)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """In norm. A gradient that is 0 (of a single key, say) is a sum of terms that cancel, those of features of the size of
    1 / phi; it leaves their rounding.
    """
    names = OUTCOMES if len(found) == len(OUTCOMES) else ("y", *OUTCOMES[4:])  # without components
    for name, one, other in zip(names, found, expected, strict=True):
        size = float(other.norm())
        least = 1e-2 if name[:2] != "d_" else 1.0 if size > 1e-9 else 200.0
        assert float((one - other).norm()) <= tolerance * max(size, least), name


@pytest.mark.parametrize("seed", range(4))
def test_the_c_kernels_are_the_definition(seed):
    seen = set()
    for call in calls(seed, 60):
        found = outcomes(call, "cpu", torch.float32)
        close(found, outcomes(call, "reference", torch.float64), SINGLE)
        seen |= {(n, str(v)) for n, v in call.items()}
    assert len(seen) == sum(len({str(v) for v in values}) for values in CHOICES.values())


@pytest.mark.parametrize("join", JOINS)
def test_signed_features(join):
    """A denominator near 0 multiplies rounding: what `chunked` has in float32 is the measure."""
    x = Inputs((6, 2), 97, batch=1, per_key_head=True)
    make = torch.Generator().manual_seed(3)
    x.phi_q, x.phi_k = (torch.randn(t.shape, generator=make, dtype=torch.float64) for t in (x.phi_q, x.phi_k))
    x.phi_k[:, :, :9] = 0  # a row without linear mass; behind it one at the floor
    x.phi_k[:, :, 9:11] *= 1e-9
    options = {"window": 5, "join": join, "signed": True}
    exact = with_gradients(x, kernel="reference", **options)
    found, chunked = (
        [t.double() for t in with_gradients(x.like(torch.float32), kernel=n, **options)] for n in ("cpu", "chunked")
    )
    for one, other, expected in zip(found, chunked, exact, strict=True):
        least = 1e-5 * max(float(expected.norm()), 1e-2)
        assert float((one - expected).norm()) <= max(least, 20 * float((other - expected).norm()))


def test_long_rows_by_held_states():
    """2,000 tokens: several held states, rings that go round, and a run that begins in the middle of a row."""
    for options in (
        {"window": 64},
        {"window": 64, "sinks": 4, "shape": "terraced", "join": "absolute"},
        {"window": 80, "shape": "terraced", "join": "absolute"},  # of no whole chunks
        {"window": 200, "sinks": 1, "shape": "terraced"},
    ):
        x = Inputs((4, 2), 2000, batch=1, dim=16, features=16, per_key_head=True)
        mask = torch.arange(2000)[None] >= 37
        exact = with_gradients(x, mask, kernel="chunked", key_mask=mask, **options)
        found = with_gradients(x.like(torch.float32), mask, kernel="cpu", key_mask=mask, **options)
        close([t.double() for t in found], exact, SINGLE)


def test_large_scores_and_nan_in_padding():
    x = Inputs((6, 2), 130, dim=16, features=16)
    for scale in (50.0, 5000.0):
        x.q *= scale / float((x.q @ x.k.repeat_interleave(3, 1).mT).abs().max() * 16**-0.5)
        mask = padding("left", 2, 130)["key_mask"]
        poisoned = x.like(torch.float32)
        for name in ("q", "k", "v", "phi_q", "phi_k"):
            value = getattr(poisoned, name)
            value.masked_fill_(~mask[:, None, :, None], torch.nan)
        with empty_is_nan():
            found = with_gradients(poisoned, mask, kernel="cpu", key_mask=mask, window=9, join="absolute")
        exact = with_gradients(x, mask, kernel="reference", key_mask=mask, window=9, join="absolute")
        # Rounding of a score is a relative error of its weight.
        close([t.double() for t in found], exact, scale * 2e-6)


def test_equally_large_scores_share_the_gradient_of_the_maximum():
    x = Inputs((6, 2), 70, dim=16)
    x.k[:, :, 1::2] = x.k[:, :, ::2]  # each key twice
    for sinks in (0, 4):
        exact = with_gradients(x, kernel="reference", window=9, sinks=sinks)
        found = with_gradients(x.like(torch.float32), kernel="cpu", window=9, sinks=sinks)
        close([t.double() for t in found], exact, SINGLE)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_of_no_size(scale):
    half = Inputs((6, 2), 70, dtype=torch.bfloat16)
    y = attend(half, kernel="cpu", window=9, scale=scale).double()
    expected = attend(half.like(torch.float64), kernel="reference", window=9, scale=scale)
    assert ((y - expected).abs() <= torch.finfo(torch.bfloat16).eps * expected.abs() + 1e-5).all()
    x = Inputs((6, 2), 70)
    exact = with_gradients(x, kernel="reference", window=9, sinks=2, scale=scale)
    found = with_gradients(x.like(torch.float32), kernel="cpu", window=9, sinks=2, scale=scale)
    close([t.double() for t in found], exact, SINGLE)


def test_a_sign_that_is_still_to_be_taken():
    """Of a conjugate's imaginary part torch keeps the sign beside its memory."""
    x = Inputs((6, 2), 70, dtype=torch.float32, dim=16).by_maps(16)
    with torch.no_grad():
        lse = teacher_attention(x.q, x.k, x.v)[1].contiguous()
    names = ("q", "k", "v", "phi_q", "phi_k", "mix")

    def everything(given: dict[str, Tensor], lse: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        q, k, v, phi_q, phi_k, mix = leaves = [given[n].detach().requires_grad_() for n in names]
        y = hybrid_attention(*leaves, window=9, kernel="cpu")
        found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        loss = weight_transfer_loss(
            q.detach(), k.detach(), phi_q, phi_k, lse, mix=mix, target="hybrid", window=9, kernel="cpu"
        )
        found += [loss.detach(), *torch.autograd.grad(loss, (phi_q, phi_k, mix))]
        weight = weight.detach().requires_grad_()
        phi = softmax_of(weight)(q)
        found += [phi.detach(), *torch.autograd.grad(phi, (weight, q), torch.cat((dy, dy), -1))]
        with torch.no_grad():
            _, state = hybrid_attention(q, k, v, phi_q, phi_k, mix, window=9, output_state=True)
            for given_q in (x.maps[0], phi_q[:, :, :1]):
                y, _ = hybrid_attention_step(
                    q[:, :, :1], k[:, :, :1], v[:, :, :1], given_q, x.maps[1], mix, state, window=9
                )
                found.append(y)
        return found

    dy = torch.cos(torch.arange(x.q.numel(), dtype=torch.float32)).view_as(x.q)
    plain = {n: getattr(x, n) for n in names}
    late = [torch._neg_view(-t) for t in (lse, x.maps[0].weight, dy)]
    negated = {n: torch._neg_view(-t) for n, t in plain.items()}
    assert all(t.is_neg() and t.is_contiguous() for t in (*late, *negated.values()))
    for one, other in zip(everything(plain, lse, x.maps[0].weight, dy), everything(negated, *late), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_not_of_c():
    x, other = Inputs((6, 2), 70, dtype=torch.float32), Inputs((6, 2), 70, dtype=torch.float32)
    other.v = other.v + 1
    traced = torch.jit.trace(lambda q, v: hybrid_attention(q, x.k, v, x.phi_q, x.phi_k, x.mix, window=9), (x.q, x.v))
    assert (traced(other.q, other.v) - attend(other, window=9, components=False)).abs().max() < 1e-5


def test_nan_of_a_real_token_is_seen():
    x = Inputs(dtype=torch.float32)
    x.k[0, 0, 20] = torch.nan
    y = attend(x, kernel="cpu")
    assert y[0, :3, 20:25].isnan().all() and y.isnan().sum() == 3 * 5 * 8  # the queries whose window it is in
    x.phi_k[0, 0, 30] = torch.nan
    for join in JOINS:
        assert attend(x, kernel="cpu", join=join, signed=True)[0, 0, 35:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    x = Inputs((6, 2), 100, dtype=dtype)
    y = attend(x, window=32, kernel="cpu")
    assert y.dtype == dtype
    expected = attend(x.like(torch.float64), window=32, kernel="reference")
    assert ((y.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("join", JOINS)
def test_gradients_of_low_precision_are_rounded_once(join, dtype, tolerance):
    """Inputs are rounded alike on both sides; what is left is the rounding of y's gradient and of each that is given back."""
    x = Inputs((4, 2), 100, dim=16, features=16).like(dtype)
    options = {"window": 24, "sinks": 2, "join": join}
    exact = with_gradients(x.like(torch.float64), kernel="reference", components=False, **options)
    found = with_gradients(x, kernel="cpu", components=False, **options)
    assert all(t.dtype == dtype for t in found)
    close([t.double() for t in found], exact, tolerance)


def test_gradients_of_4097_tokens_are_the_definitions():
    x = Inputs((1, 1), 4097, batch=1, dim=16, features=16)
    for options in ({"window": 64, "sinks": 4}, {"window": 256, "join": "absolute"}):
        exact = with_gradients(x, kernel="reference", components=False, **options)
        found = with_gradients(x.like(torch.float32), kernel="cpu", components=False, **options)
        close([t.double() for t in found], exact, SINGLE)


@pytest.mark.parametrize("first", [1, 40, 64, 96])
def test_queries_from_a_position_on(first):
    x = Inputs((6, 2), 97, dtype=torch.float32)
    for where in ({}, padding("left", 2, 97), padding("segments", 2, 97)):
        whole = hybrid_attention(*x.cut(0, 97), x.mix, window=9, sinks=2, kernel="cpu", **where)
        q, phi_q = x.q[:, :, first:], x.phi_q[:, :, first:]
        some = hybrid_attention(
            q, x.k, x.v, phi_q, x.phi_k, x.mix, window=9, sinks=2, kernel="cpu", first_query=first, **where
        )
        assert (some - whole[:, :, first:]).abs().max() < 1e-6


def test_threads_and_repetition_change_no_bit():
    x = Inputs((6, 2), 150, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(x, kernel="cpu", window=9, **padding("segments", 2, 150)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_tensors_that_lie_apart_and_gradients_that_are_not_asked_for():
    x = Inputs((6, 2), 70, dtype=torch.float32)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t for t in x.tensors()]
    expected = with_gradients(x, kernel="cpu", components=False, window=9, join="absolute")
    for wanted in itertools.chain([(6,), (3, 4), (0,), (2,)], [(4, 6), (1, 5)]):
        leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(apart)]
        y = hybrid_attention(*leaves[:6], log_scale=leaves[6], window=9, join="absolute", kernel="cpu")
        weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).to(y.dtype).view_as(y)
        (y * weight).sum().backward()
        for i, (leaf, grad) in enumerate(zip(leaves, expected[1:], strict=True)):
            assert (leaf.grad is None) == (i not in wanted or i == 5)
            if leaf.grad is not None:
                assert torch.allclose(leaf.grad, grad, atol=1e-6)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, "meta"])
def test_another_default_dtype_or_device_changes_nothing(other):
    x = Inputs((6, 2), 70, dtype=torch.float32, dim=16).by_maps(16)
    with torch.no_grad():
        _, lse = teacher_attention(x.q, x.k, x.v)

    def everything() -> list[Tensor]:
        found = with_gradients(x, kernel="cpu", window=9)
        phi_q, mix = (t.detach().clone().requires_grad_() for t in (x.phi_q, x.mix))
        loss = weight_transfer_loss(x.q, x.k, phi_q, x.phi_k, lse, mix=mix, target="hybrid", window=9, kernel="cpu")
        weight = x.maps[0].weight.detach().requires_grad_()
        phi = softmax_of(weight)(x.q)
        found += [
            loss.detach(),
            *torch.autograd.grad(loss, (phi_q, mix)),
            *torch.autograd.grad(phi.square().sum(), weight),
        ]
        with torch.no_grad():
            _, state = hybrid_attention(*x.cut(0, 20), x.mix, window=9, output_state=True)
            for t in range(20, 30):
                y, state = hybrid_attention_step(*x.cut(t, t + 1)[:3], *x.maps, x.mix, state, window=9)
                found.append(y)
        return found

    expected = everything()
    if other == "meta":
        with torch.device("meta"):
            found = everything()
    else:
        torch.set_default_dtype(other)
        try:
            found = everything()
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_kept_is_spread_and_tensors_elsewhere_refused():
    x = Inputs((6, 2), 40, dtype=torch.float32)
    keep = torch.tensor([[True], [False]])
    for kernel in ("cpu", "reference"):
        found, expected = (attend(x, kernel=kernel, window_keep=each) for each in (keep, keep.expand(2, 6)))
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="another tensor on meta"):
        hybrid_attention(x.q, x.k.to("meta"), x.v, x.phi_q, x.phi_k, torch.rand(6), window=5, kernel="cpu")
    with pytest.raises(RuntimeError, match="another tensor on meta"):
        weight_transfer_loss(x.q, x.k, x.phi_q, x.phi_k.to("meta"), x.q[..., 0], kernel="cpu")
    with pytest.raises(RuntimeError, match="another tensor on meta"):
        softmax_of(torch.empty(6, 8, 16, device="meta"))(x.q)


def test_no_run():
    x = Inputs((6, 2), 20, dtype=torch.float32)
    nothing = torch.zeros(2, 20, dtype=torch.bool)
    for found in with_gradients(x, nothing, kernel="cpu", key_mask=nothing, window=5):
        assert not found.any()


@pytest.mark.parametrize("machine", {"x86_64": ["x86-64", "haswell"], "aarch64": ["armv8-a"]}[platform.machine()])
def test_vectors_of_other_machines_and_memory_that_is_not_a_number(machine, monkeypatch):
    """Vectors of 4 and 8 numbers, as this machine's compiler makes them; a thread's memory holds NaN before each piece."""
    monkeypatch.setattr(kernels, "MACHINE", f"-march={machine}")
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-DPOISONED"))
    made = kernels.library.__wrapped__()
    monkeypatch.setattr(kernels, "library", lambda: made)
    monkeypatch.setattr(cpu_step, "_library", cpu_step._library.__wrapped__)
    for call in calls(7, 30):
        close(outcomes(call, "cpu", torch.float32), outcomes(call, "reference", torch.float64), SINGLE)

    exact = Inputs((6, 2), 97, dim=16).by_maps(16)
    x, found = exact.like(torch.float32), []
    for options, first in (
        ({"window": 40}, 3),
        ({"window": 9, "sinks": 3}, 20),
    ):  # at first the window has empty places
        whole = hybrid_attention(*exact.cut(0, 97), exact.mix, **options)
        with torch.no_grad():
            _, state = hybrid_attention(*x.cut(0, first), x.mix, output_state=True, **options)
            for t in range(first, 97):
                y, state = hybrid_attention_step(*x.cut(t, t + 1)[:3], *x.maps, x.mix, state, **options)
                assert (y - whole[:, :, t : t + 1]).abs().max() < 1e-5

    for inputs, kernel in ((exact, "reference"), (x, "cpu")):
        leaves = [t.detach().clone().requires_grad_() for t in (inputs.phi_q, inputs.phi_k, inputs.mix)]
        _, lse = teacher_attention(inputs.q, inputs.k, inputs.v)
        loss = weight_transfer_loss(
            inputs.q, inputs.k, *leaves[:2], lse, mix=leaves[2], target="hybrid", kernel=kernel, **options
        )
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        weight = inputs.maps[0].weight.requires_grad_()
        made_of = standard(weight, 1e-12) if kernel == "reference" else softmax_of(weight)
        phi = made_of(inputs.q)
        found[-1] += [phi.detach(), *torch.autograd.grad((phi * phi.detach().cos()).sum(), weight)]
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= SINGLE * float(one.norm())


def softmax_of(weight: Tensor):
    return lambda x: cpu_features.softmax_features_cpu(x, weight, 1e-12)


def test_what_auto_takes_on_a_cpu():
    assert resolve_kernel("auto", "cpu") == resolve_kernel("cpu", "cpu", dtype=torch.bfloat16) == "cpu"
    assert resolve_kernel("auto", "cpu", dtype=torch.float64) == "chunked"
    assert resolve_kernel("auto", "cpu", covered=True) == "sdpa"
    with pytest.raises(RuntimeError, match=r"cpu.*float32, found torch.float64; use 'chunked'"):
        attend(Inputs(), kernel="cpu")
    with pytest.raises(ValueError, match=r"chunk=8: kernel 'cpu' has chunks of its own"):
        attend(Inputs(dtype=torch.float32), kernel="cpu", chunk=8)
    with pytest.raises(RuntimeError, match=r"cpu.*for a CPU, found meta"):
        resolve_kernel("cpu", "meta")
    x = Inputs(dtype=torch.float32)
    by_c = attend(x)
    assert torch.equal(by_c, attend(x, kernel="cpu")) and not torch.equal(by_c, attend(x, kernel="chunked"))
