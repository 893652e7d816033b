"""Every operator against its definition in float64, over shapes that nobody chose: dtypes, layouts, extremes, length."""

import os
from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipelin_kernels import (
    hybrid_attention,
    hybrid_attention_step,
    outside_mass,
    teacher_attention,
    weight_transfer_loss,
)

JOINS = ("shared", "absolute", "replace", "average", "sum")
# Of the error's norm over the gradient's or output's. fp32: sums of up to 400 terms, scores to 50, whose rounding the
# exponential multiplies by 50. bf16: inputs are rounded alike on both sides; what is left is the result's own rounding.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2**-7}
often = settings(
    max_examples=40,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=list(HealthCheck),
)


@st.composite
def calls(draw):
    """Shapes and options of one call; the tensors follow from `seed`."""
    key_heads = draw(st.sampled_from([1, 2]))
    return {
        "batch": draw(st.integers(1, 2)),
        "key_heads": key_heads,
        "heads": key_heads * draw(st.integers(1, 8)),
        "length": draw(st.sampled_from([1, 2, 31, 64, 65, 300]) | st.integers(1, 150)),
        "width": draw(st.sampled_from([1, 7, 32, 64])),
        "features": draw(st.sampled_from([1, 9, 32, 128])),
        "per_key_head": draw(st.booleans()),
        "window": draw(st.sampled_from([1, 16, 63, 64, 256]) | st.integers(1, 80)),
        "shape": draw(st.sampled_from(["sliding", "sliding", "terraced"])),
        "sinks": draw(st.sampled_from([0, 0, 3])),
        "cover": draw(st.sampled_from(["outside", "outside", "all"])),
        "join": draw(st.sampled_from(JOINS)),
        "max_gradient": draw(st.sampled_from(["through", "through", "detached"])),
        "rows": draw(st.sampled_from(["whole", "whole", "left", "right", "segments"])),
        "logits": draw(st.sampled_from([1.0, 50.0])),  # the largest score in size
        "apart": draw(st.booleans()),  # heads beside each other in memory, as a projection leaves them
        "poisoned": draw(st.booleans()),  # NaN at what is padding
        "dtype": draw(st.sampled_from(list(TOLERANCE))),
        "seed": draw(st.integers(0, 1 << 16)),
    }


def tensors(call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs in the call's dtype, masks)."""
    make = torch.Generator().manual_seed(call["seed"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    b, h, g, t, d, f = (call[n] for n in ("batch", "heads", "key_heads", "length", "width", "features"))
    x = {n: normal(b, heads, t, d) for n, heads in (("q", h), ("k", g), ("v", g))}
    largest = (x["q"] @ x["k"].repeat_interleave(h // g, 1).mT).abs().max() * d**-0.5
    x["q"] *= call["logits"] / largest
    x["phi_q"] = normal(b, h, t, f).softmax(-1) + 1e-3
    x["phi_k"] = normal(b, g if call["per_key_head"] else h, t, f).softmax(-1) + 1e-3
    masks, real = {}, torch.ones(b, t, dtype=torch.bool)
    if call["rows"] == "segments":
        masks["segment_ids"] = (torch.arange(t) // 23).expand(b, t)
    elif call["rows"] != "whole":
        gap = min(t - 1, 9)
        real[0, : gap if call["rows"] == "left" else 0] = False
        real[0, t - gap if call["rows"] == "right" else t :] = False
        masks["key_mask"] = real
    for name, value in x.items():
        if call["poisoned"]:
            value = value.masked_fill(~real[:, None, :, None], torch.nan)
        if call["apart"]:
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        x[name] = value.to(call["dtype"])
    x["mix"], x["log_scale"] = normal(h).sigmoid().to(call["dtype"]), normal(h).to(call["dtype"])
    return x, masks


def compare(
    found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, cancels: Mapping[int, float] | None = None
) -> None:
    """cancels: where terms may leave nothing but their rounding, their size."""
    largest = max(float(e.norm()) for e in expected[1:])
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(one).all()
        # A gradient that is nothing but rounding is measured by the largest one.
        least = max(0.05 * largest, (cancels or {}).get(at, 1e-2))
        assert float((one.double() - other).norm()) <= TOLERANCE[dtype] * max(float(other.norm()), least)


def attended(x: dict[str, Tensor], options, kernel: str, dtype: torch.dtype) -> list[Tensor]:
    leaves = {n: t.detach().requires_grad_() for n, t in x.items()}
    *rest, log_scale = leaves.values()
    y = hybrid_attention(*rest, log_scale=log_scale, kernel=kernel, **options)
    weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    weight = weight.to(dtype).to(y.dtype)  # rounded alike on both sides
    grads = torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


# Scores so far apart that weights in the window are 0: the keys still count in the mass of `replace`.
@example(
    {
        "batch": 2, "key_heads": 1, "heads": 2, "length": 43, "width": 7, "features": 1, "per_key_head": False, "window": 16,
        "shape": "sliding", "sinks": 0, "cover": "outside", "join": "replace", "max_gradient": "through", "rows": "whole",
        "logits": 50.0, "apart": False, "poisoned": False, "dtype": torch.float32, "seed": 0,
    }
)  # fmt: skip
@often
@given(calls())
def test_hybrid_attention_is_its_definition(call):
    x, masks = tensors(call)
    options = {n: call[n] for n in ("window", "shape", "sinks", "cover", "join", "max_gradient")} | masks
    exact = {n: t.double() for n, t in x.items()}
    dtype = call["dtype"]
    found = attended(x, options, "auto", dtype)
    # Of a row of one key mix has no gradient, nor have q and k: a head's difference of two products over the width, which of q
    # and k multiplies the other. Nor have features of one linear key whose branch is divided by their product.
    sizes = {"mix": 2e-3 * call["width"] * call["heads"] ** 0.5}
    sizes |= dict.fromkeys(("phi_q", "phi_k"), 2e-3 * (call["width"] * call["heads"] * call["features"]) ** 0.5)
    sizes |= {a: 0.05 * float(exact[b].nan_to_num().norm()) for a, b in (("q", "k"), ("k", "q"))}
    cancels = {list(x).index(name) + 1: max(1e-2, size) for name, size in sizes.items()}
    compare(found, attended(exact, options, "reference", dtype), dtype, cancels)
    assert all(
        torch.equal(a, b) for a, b in zip(found, attended(x, options, "auto", dtype), strict=True)
    )  # repeats to the bit


def transferred(x: dict[str, Tensor], options, masks, kernel: str) -> list[Tensor]:
    leaves = {n: x[n].detach().requires_grad_() for n in ("phi_q", "phi_k", "mix", "log_scale")}
    lse = teacher_attention(x["q"], x["k"], x["v"], **masks)[1]
    loss = weight_transfer_loss(x["q"], x["k"], *list(leaves.values())[:2], lse, kernel=kernel, **options, **masks,
                                mix=leaves["mix"], log_scale=leaves["log_scale"])  # fmt: skip
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


@often
@given(calls(), st.sampled_from(["linear", "hybrid"]), st.sampled_from(["auto", "auto", "chunked"]))
def test_the_transfer_loss_is_its_definition(call, target, kernel):
    x, masks = tensors(call)
    options = {n: call[n] for n in ("window", "shape", "sinks", "cover", "join")} | {"target": target}
    exact = {n: t.double() for n, t in x.items()}
    found = transferred(x, options, masks, kernel)
    # Of a row of one key features have no gradient: a difference of two products, over the product of the features.
    cancels = dict.fromkeys((1, 2), max(1e-2, 4e-3 * call["features"] ** 0.5))
    compare(found, transferred(exact, options, masks, "reference"), call["dtype"], cancels)
    assert all(
        torch.equal(a, b) for a, b in zip(found, transferred(x, options, masks, kernel), strict=True)
    )  # repeats to the bit


@often
@given(calls())
def test_the_mass_outside_is_that_of_float64(call):
    x, masks = tensors(call)
    options = {n: call[n] for n in ("window", "shape", "sinks")} | masks
    found, expected = (outside_mass(q, k, **options) for q, k in ((x["q"], x["k"]), (x["q"].double(), x["k"].double())))
    assert torch.isfinite(found).all() and float((found.double() - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("length", "window", "width", "features", "heads"),
    [(257, 256, 32, 512, (2, 1)), (300, 128, 256, 32, (1, 1)), (129, 64, 128, 256, (8, 1)), (1025, 64, 32, 32, (1, 1))],
)
def test_wide_and_long_calls_in_single_precision(length, window, width, features, heads):
    call = {"batch": 1, "heads": heads[0], "key_heads": heads[1], "length": length, "width": width, "seed": 1,
            "features": features, "per_key_head": False, "rows": "whole", "logits": 8.0, "apart": True, "poisoned": False,
            "dtype": torch.float32}  # fmt: skip
    x, _ = tensors(call)
    exact = {n: t.double() for n, t in x.items()}
    for join in ("shared", "absolute"):
        options = {"window": window, "join": join}
        found, expected = (attended(y, options, n, torch.float32) for y, n in ((x, "auto"), (exact, "reference")))
        compare(found, expected, torch.float32)
    for options in ({}, {"target": "hybrid", "window": window, "join": "absolute"}):
        found, expected = (transferred(y, options, {}, n) for y, n in ((x, "auto"), (exact, "reference")))
        compare(found, expected, torch.float32)


@pytest.mark.parametrize("length", [4097, 32768])
def test_long_rows_are_exact_and_go_on_from_their_state(length):
    """Some rows of the last ones, computed alone; then the one-token form over the end."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8, generator=make, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(2, 8, 8, generator=make, dtype=torch.float64)

    def phi(x: Tensor) -> Tensor:
        return (x @ weight.to(x.dtype)).softmax(-1)

    mix, window, steps = torch.full((2,), 0.1, dtype=torch.float64), 16, 40
    whole = (q, k, v, phi(q), phi(k))
    with torch.no_grad():
        y = hybrid_attention(*whole, mix, window=window)
        single = hybrid_attention(*(t.float() for t in whole), mix.float(), window=window)
        for t in (0, 15, 16, length // 2, length - 1):
            soft = slice(max(0, t - window + 1), t + 1)
            scores = (q[:, :, t : t + 1] @ k[:, :, soft].mT)[:, :, 0] * 8**-0.5
            a = mix[:, None] * (scores - scores.amax(-1, keepdim=True)).exp()
            b = (whole[3][:, :, t : t + 1] @ whole[4][:, :, : soft.start].mT)[:, :, 0]
            top = (a[..., None] * v[:, :, soft]).sum(2) + (b[..., None] * v[:, :, : soft.start]).sum(2)
            row = top / (a.sum(-1) + b.sum(-1))[..., None]
            assert float((y[:, :, t] - row).abs().max()) < 1e-12
        assert float((single.double() - y).norm() / y.norm()) < 2e-6
        _, state = hybrid_attention(*(t[:, :, :-steps] for t in whole), mix, window=window, output_state=True)
        for t in range(length - steps, length):
            now = slice(t, t + 1)
            q_t, k_t, v_t, phi_t = (x[:, :, now] for x in whole[:4])
            one, state = hybrid_attention_step(q_t, k_t, v_t, phi_t, phi, mix, state, window=window)
            assert float((one - y[:, :, now]).abs().max()) < 1e-12


def test_uninitialised_memory_never_shows(monkeypatch):
    """torch.empty filled with NaN: transfer loss, teacher, outside mass, and decoding from a state."""
    call = {"batch": 2, "heads": 4, "key_heads": 2, "length": 70, "width": 8, "features": 8, "per_key_head": False,
            "rows": "whole", "logits": 4.0, "apart": False, "poisoned": False, "dtype": torch.float64, "seed": 0}  # fmt: skip
    x, _ = tensors(call)

    def positive(k: Tensor) -> Tensor:
        return k.abs() + 1e-3

    def everything() -> list[Tensor]:
        found = [*teacher_attention(x["q"], x["k"], x["v"], window=40), outside_mass(x["q"], x["k"], window=9)]
        for target, join in [("linear", "shared"), ("hybrid", "absolute"), ("hybrid", "replace")]:
            found += transferred(x, {"target": target, "join": join, "window": 9}, {}, "chunked")
        for kernel, dtype in (("chunked", torch.float64), ("cpu", torch.float32)):
            options = {"window": 9, "sinks": 2, "kernel": kernel}
            q, k, v, phi_q = (x[n].to(dtype) for n in ("q", "k", "v", "phi_q"))
            past, now = ([t[:, :, at] for t in (q, k, v, phi_q)] for at in (slice(69), slice(69, None)))
            mix = x["mix"].to(dtype)
            y, state = hybrid_attention(*past, positive(past[1]), mix, output_state=True, **options)
            found += [y, hybrid_attention_step(*now, positive, mix, state, **options)[0]]
        return found

    expected = everything()
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for one, other in zip(everything(), expected, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.use_deterministic_algorithms(before)
