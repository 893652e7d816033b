"""One more token by the C function: its definition, what it has made ahead, and which calls it takes for the last one's like."""

import copy
from dataclasses import replace

import pytest
import torch

from recipelin_kernels import SoftmaxMap, hybrid_attention, hybrid_attention_step
from recipelin_kernels.hybrid import cpu_step
from recipelin_kernels.hybrid.state import settled
from tests.kernels.hybrid_inputs import JOINS, Inputs, Single, empty_is_nan


def counted(monkeypatch, name):
    """A list that grows with each call of a function of cpu_step."""
    own, calls = getattr(cpu_step, name), []
    monkeypatch.setattr(cpu_step, name, lambda *a: calls.append(1) or own(*a))
    return calls


@pytest.mark.parametrize("join", [j for j in JOINS if j != "replace"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (9, 0), (5, 3), (64, 2)])
def test_a_token_of_the_c_function_is_its_definition_for_any_threads(window, sinks, join, monkeypatch):
    """Rows of two lengths, one of whose windows is short at first; maps, and features that are made before."""
    monkeypatch.setattr(cpu_step, "WORTH_A_THREAD", 1)
    calls, threads, length = counted(monkeypatch, "cpu_token"), torch.get_num_threads(), window + 42
    first = window + sinks + 5 if sinks else 20  # sinks are soon behind the window of the shorter row
    # Each way by which query heads of a key head read together, and what is left of them: 4 and 4, 4 and 2 and 1, 4 and 1.
    for dim, columns, heads, per_key_head in (
        (128, 64, (8, 1), False),
        (64, 16, (7, 1), True),
        (80, 16, (10, 2), False),
        (128, 16, (2, 2), True),
        (16, 32, (6, 3), False),
    ):
        exact = Inputs(heads, length, per_key_head=per_key_head, dim=dim).by_maps(columns)
        options = dict(window=window, sinks=sinks, join=join)
        expected = [
            hybrid_attention(*exact.cut(a, length, slice(r, r + 1)), exact.mix, log_scale=exact.log_scale, **options)
            for r, a in ((0, 9), (1, 0))
        ]
        x = exact.like(torch.float32)
        mask = (torch.arange(first) >= 9) | torch.tensor([[False], [True]])
        found = {}
        for name, count in (("maps", 1), ("maps", 2), ("features", 1)):
            torch.set_num_threads(count)
            options["log_scale"] = x.log_scale
            with torch.no_grad(), empty_is_nan():
                _, state = hybrid_attention(*x.cut(0, first), x.mix, key_mask=mask, output_state=True, **options)
                calls.clear()
                parts = []
                for t in range(first, length):
                    q, k, v, phi_q, _ = x.cut(t, t + 1)
                    maps = x.maps if name == "maps" else (phi_q, x.maps[1].make)
                    y, state = hybrid_attention_step(q, k, v, *maps, x.mix, state, **options)
                    parts.append(y)
            assert len(calls) >= length - first - 4
            y = torch.cat(parts, 2)
            for row, other in zip(y.double(), expected, strict=True):
                assert (row - other[0, :, first - length :]).norm() < 1e-5 * other.norm()
            found[name, count] = [y, *settled(state).tensors.values()]
        torch.set_num_threads(threads)
        assert all(map(torch.equal, found["maps", 1], found["maps", 2]))


@pytest.mark.parametrize("join", [j for j in JOINS if j != "replace"])
def test_tokens_of_signed_features(join, monkeypatch):
    """With rows at the floor of the denominator. What `chunked` has in float32 is the measure."""
    calls = counted(monkeypatch, "cpu_token")
    exact = Inputs(length=40, dim=16, features=32)
    make = torch.Generator().manual_seed(2)
    exact.features = lambda k: (k.repeat_interleave(3, 1) @ exact.map.to(k)) * (k[..., :1] > -1).repeat_interleave(3, 1)
    exact.phi_q, exact.phi_k = torch.randn(2, 6, 40, 32, generator=make, dtype=torch.float64), exact.features(exact.k)
    exact.phi_q[:, :, 15::3] *= 1e-9
    exact.mix *= 1e-9  # so that of `shared` too a denominator is near 0
    options = dict(window=5, join=join, signed=True)
    expected = hybrid_attention(*exact.cut(0, 40), exact.mix, log_scale=exact.log_scale, **options)
    x, found = exact.like(torch.float32), {}
    for kernel in ("cpu", "chunked"):
        options |= {"log_scale": x.log_scale, "kernel": kernel}
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **options)
        parts = []
        for t in range(10, 40):
            y, state = hybrid_attention_step(*x.cut(t, t + 1)[:4], exact.features, x.mix, state, **options)
            parts.append(y)
        found[kernel] = (torch.cat(parts, 2).double() - expected[:, :, 10:]).abs().amax((0, 1, 3))
    assert len(calls) == 30
    size = expected[:, :, 10:].abs().amax((0, 1, 3))
    assert (found["cpu"] <= 1e-5 * size + 20 * found["chunked"]).all()


@pytest.mark.parametrize("inference", [False, True])
def test_a_map_that_changes_between_tokens(inference):
    """Features of keys that are still in the window are made anew."""
    with torch.inference_mode(inference), torch.no_grad():
        x = Single(length=30)
        weight = x.maps[1].weight
        options = dict(window=5, join="absolute", log_scale=x.log_scale)
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **options)
        _, other = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **options)
        for t in range(10, 30):
            if t == 15:  # features of keys of this room are there
                weight.mul_(-2)
            y, state = hybrid_attention_step(*x.token(t), x.mix, state, **options)
            expected, other = hybrid_attention_step(*x.cut(t, t + 1)[:4], x.maps[1].make, x.mix, other, **options)
            assert (y - expected).abs().max() < 1e-6


OTHERWISE = (
    {"scale": 0.7},
    {"kernel": "chunked"},
    {"join": "shared"},
    {"join": "average"},
    {"cover": "all"},
    {"ablate": {"linear": "mass"}},
    {"key_mask": torch.tensor([[True], [False]])},
    {"window_keep": torch.arange(12).view(2, 6) % 2 == 0},
    {"log_scale": torch.linspace(-1, 1, 6).double()},
    {"signed": True},
    {"scale": torch.tensor(0.7)},
)


@pytest.mark.parametrize("window", [5, 30])
@pytest.mark.parametrize("options", OTHERWISE, ids=lambda options: next(iter(options)))
def test_tokens_that_ask_the_same_are_prepared_once(options, window, monkeypatch):
    """From room to room. One that asks for something else, or comes in another precision, is not taken for one of them."""
    made, ran = counted(monkeypatch, "prepared"), counted(monkeypatch, "cpu_token")
    x = Single(length=24)
    same = dict(window=window, join="absolute", log_scale=x.log_scale)
    same |= dict(kernel="auto", cover="outside", ablate={}, key_mask=None, window_keep=None, scale=0.25, signed=False)
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **same)
        for t in range(10, 22):
            _, state = hybrid_attention_step(*x.token(t), x.mix, state, **same)
        assert len(made) == 1 and len(ran) == 12
        found, expected = copy.copy(state), settled(state)
        same["ablate"].update(options.get("ablate", {}))  # the caller's own
        for t in (22, 23):
            by_torch = same | options | {"kernel": "chunked"}
            y, expected = hybrid_attention_step(*x.token(t), x.mix, settled(expected), **by_torch)
            other, found = hybrid_attention_step(*x.token(t), x.mix, found, **same | options)
            assert (other - y).abs().max() < 3e-6
        expected = settled(state)
        same["ablate"].clear()
        for t in (22, 23):
            q, *others = x.token(t)
            y, expected = hybrid_attention_step(q, *others, x.mix, expected, **same)
            other, state = hybrid_attention_step(q.double(), *others, x.mix, state, **same)
            assert other.dtype == torch.float64 and (other - y).abs().max() < 1e-6


def test_a_scale_that_is_a_tensor_is_looked_at_anew():
    x = Single(length=24)
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, window=5)
        _, state = hybrid_attention_step(*x.token(10), x.mix, state, window=5, scale=torch.tensor(0.25))
        expected, _ = hybrid_attention_step(*x.token(11), x.mix, settled(state), window=5, scale=0.9)
        found, _ = hybrid_attention_step(*x.token(11), x.mix, state, window=5, scale=torch.tensor(0.9))
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_was_prepared_with_gradients_on_is_not_taken_for_another_precision(dtype):
    """By a call that torch's token answers, in the room of one that the C function has answered."""
    x = Inputs(length=24, dim=64).by_maps(16).like(torch.float32)  # a room of several places
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, window=5)
    _, state = hybrid_attention_step(*x.cut(10, 11)[:3], *x.maps, x.mix, state, window=5)
    with torch.no_grad():
        expected = settled(state)
        for t in range(11, 14):
            q, k, v = (a.to(dtype) for a in x.cut(t, t + 1)[:3])
            y, expected = hybrid_attention_step(q.float(), k.float(), v.float(), *x.maps, x.mix, expected, window=5)
            found, state = hybrid_attention_step(q, k, v, *x.maps, x.mix, state, window=5)
            assert found.dtype == dtype and (found - y).abs().max() < (1e-6 if dtype == torch.float64 else 2e-2)


def test_tokens_whose_numbers_lie_in_another_order():
    """Heads before rows, as a product of all heads at once leaves them; positions of rows that share one in memory."""
    x = Single(length=24, batch=2)
    for name in ("q", "k", "v"):
        getattr(x, name)[1] = getattr(x, name)[0]
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, window=20)
        assert state.positions.tolist() == [10, 10]
        other = replace(state, positions=state.positions[:1].expand(2))
        for t in range(10, 24):
            tokens = x.token(t)
            y, state = hybrid_attention_step(*tokens, x.mix, state, window=20)
            turned = [a.transpose(0, 1).contiguous().transpose(0, 1) for a in tokens[:3]]
            assert not turned[0].is_contiguous()
            found, other = hybrid_attention_step(*turned, *tokens[3:], x.mix, other, window=20)
            assert torch.equal(found, y)


@pytest.mark.parametrize("change", ["data", "turned", "clamp"])
def test_a_map_of_queries_that_changes_between_tokens(change):
    """Behind the back of its version; its width is that of its columns, so that it may be turned."""
    x = Single(length=24)
    weight = x.maps[0].weight.clone()

    def features(z, clamp):
        u = z @ weight
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), -1).clamp(min=clamp)

    def map_of(clamp):
        return SoftmaxMap(lambda z: features(z, clamp), weight, clamp)

    with torch.no_grad():
        clamp, map_q, map_k = 1e-6, map_of(1e-6), x.maps[1]
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, window=1)
        for t in range(10, 16):
            q, k, v, *_ = x.token(t)
            expected, _ = hybrid_attention_step(q, k, v, features(q, clamp), map_k, x.mix, settled(state), window=1)
            y, state = hybrid_attention_step(q, k, v, map_q, map_k, x.mix, state, window=1)
            assert (y - expected).abs().max() < 1e-6
            if t == 12 and change == "data":
                weight.data = -2 * weight.data
            elif t == 12 and change == "turned":
                weight.transpose_(1, 2)
            elif t == 12:
                clamp, map_q = 0.1, map_of(0.1)


def test_a_token_like_the_last_one_without_a_map_of_keys_is_refused():
    x = Single(length=30)
    options = dict(window=5, join="absolute", log_scale=x.log_scale)
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **options)
        q, k, v, phi_q, phi_k = x.cut(10, 11)
        _, state = hybrid_attention_step(q, k, v, phi_q, x.maps[1].make, x.mix, state, **options)
        with pytest.raises(ValueError, match="state: needs phi_k_fn"):
            hybrid_attention(q, k, v, phi_q, phi_k, x.mix, state=state, output_state=True, **options)
