"""Hybrid attention that goes on from a state: prefill in parts, one token at once, padding, the teacher's reach."""

import itertools

import pytest
import torch

from recipelin_kernels import empty_state, hybrid_attention, hybrid_attention_step
from recipelin_kernels.hybrid import state as states
from recipelin_kernels.hybrid.state import settled
from tests.kernels.hybrid_inputs import (
    COVERS,
    DIM,
    EXACT,
    FEATURES,
    JOINS,
    Double,
    Inputs,
    Single,
    attend,
    both_kinds,
    empty_is_nan,
)

GEOMETRIES = [
    (0, 0, "sliding", None),
    (1, 0, "sliding", None),
    (5, 0, "sliding", None),
    (5, 3, "sliding", None),
    (60, 2, "sliding", None),
    (1, 0, "terraced", None),
    (4, 0, "terraced", None),
    (5, 3, "terraced", None),
    (60, 2, "terraced", None),
    (5, 0, "sliding", 13),
    (5, 3, "terraced", 13),
    (9, 2, "sliding", 7),
    (5, 2, "sliding", 100),
]
# Half of the product, spread over every axis.
STATE_OPTIONS = [
    dict(window=w, sinks=s, shape=shape, reach=reach, join=j, cover=c)
    for i, ((w, s, shape, reach), (m, j), (n, c)) in enumerate(
        itertools.product(GEOMETRIES, enumerate(JOINS), enumerate(COVERS))
    )
    if (i // 10 + m + n) % 2 == 0
]
NAMES = {"ids": lambda o: "-".join(map(str, o.values()))}


@pytest.mark.parametrize("options", STATE_OPTIONS, **NAMES)
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
        state = settled(state)
        for name, one in state.tensors.items():
            other = whole.tensors[name]
            assert one.shape == other.shape and (one - other).abs().max() < EXACT if one.numel() else True, name


@pytest.mark.parametrize("options", [o for o in STATE_OPTIONS if o["window"] >= 4], **NAMES)
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


@pytest.mark.parametrize(
    ("shape", "reach", "ring"), [("sliding", None, 4), ("terraced", None, 9), ("terraced", 14, 13)]
)
def test_decoding_from_nothing_and_a_state_that_does_not_grow(shape, reach, ring):
    x = Inputs(length=29)
    geometry = dict(window=5, sinks=2, shape=shape, reach=reach)
    options = dict(log_scale=x.log_scale, join="absolute", **geometry)
    state = empty_state(2, 6, 2, DIM, FEATURES, like=x.q, **geometry)
    assert state.ring_k.shape[2] == ring
    found, sizes = [], []
    for t in range(29):
        q, k, v, phi_q, _ = x.cut(t, t + 1)
        before = {n: t.clone() for n, t in state.tensors.items()}
        y, following = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
        assert all(torch.equal(t, state.tensors[n]) for n, t in before.items())
        state = following
        found.append(y)
        sizes.append(state.bytes)
    assert (torch.cat(found, 2) - hybrid_attention(*x.cut(0, 29), x.mix, **options)).abs().max() < EXACT
    assert len(set(sizes[7:])) == 1 and len(set(sizes[:6])) == 1  # a room once the sinks are behind a sliding window


def test_a_state_of_other_options_is_refused():
    x = Inputs()
    _, state = attend(x, output_state=True)
    with pytest.raises(ValueError, match="window"):
        attend(x, window=9, state=state, phi_k_fn=x.features)
    for other in ({"shape": "terraced"}, {"reach": 9}, {"sinks": 1}):
        with pytest.raises(ValueError, match="made with other options"):
            attend(x, state=state, phi_k_fn=x.features, **other)
    with pytest.raises(ValueError, match="phi_k_fn"):
        attend(x, state=state)


@pytest.mark.parametrize("kernel", ["auto", "chunked"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_state_of_other_feature_heads_is_refused(sinks, kernel):
    x, other = Inputs(length=24), Inputs(length=24, per_key_head=True)
    options = dict(window=4, sinks=sinks, log_scale=x.log_scale)
    _, state = hybrid_attention(*x.cut(0, 15), x.mix, output_state=True, **options)
    for stop in (16, 20):
        q, k, v, phi_q, _ = x.cut(15, stop)
        with pytest.raises(ValueError, match="sums the features of 6 heads, phi_k has 2"):
            hybrid_attention(
                q,
                k,
                v,
                phi_q,
                None,
                x.mix,
                state=state,
                phi_k_fn=other.features,
                output_state=True,
                kernel=kernel,
                **options,
            )


def test_without_a_linear_branch_the_state_of_a_reach_is_the_windows():
    x = Inputs(length=29)
    options = dict(window=5, sinks=2, reach=23, ablate={"linear": "mass"}, log_scale=x.log_scale)
    _, state = hybrid_attention(*x.cut(0, 28), x.mix, output_state=True, **options)
    empty = empty_state(2, 6, 2, DIM, FEATURES, window=5, sinks=2, reach=23, linear=False, like=x.q)
    assert state.ring_k.shape == empty.ring_k.shape == (2, 2, 4, DIM)
    q, k, v, phi_q, _ = x.cut(28, 29)
    y, _ = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
    assert (y - hybrid_attention(*x.cut(0, 29), x.mix, **options)[:, :, 28:]).abs().max() < EXACT


def test_a_reach_that_cannot_bind_costs_nothing():
    """The ordinary path runs: the same numbers to the last bit."""
    x = Inputs(length=29)
    for reach in (29, 1000):
        assert torch.equal(attend(x, reach=reach, sinks=2), attend(x, sinks=2))
    real = torch.arange(29) >= torch.tensor([[9], [20]])
    assert torch.equal(attend(x, reach=20, key_mask=real), attend(x, key_mask=real))  # rows of 20 and 9 real tokens
    assert not torch.equal(attend(x, reach=28)[:, :, 28], attend(x)[:, :, 28])


@pytest.mark.parametrize("options", STATE_OPTIONS, **NAMES)
def test_one_token_at_once_equals_the_chunked_form(options):
    for per_key_head, ablate in (
        (False, None),
        (True, None),
        (True, {"window": "output"}),
        (False, {"linear": "mass"}),
    ):
        x = Inputs(length=24, per_key_head=per_key_head)
        keep = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) > 0.5 if ablate is None else None
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, :17] = False  # a row that begins in the middle of decoding
        mask[1, 19:21] = False  # and one that rests
        common = dict(options, log_scale=x.log_scale, ablate=ablate, window_keep=keep, on_drop="linear_outside")
        _, state = hybrid_attention(*x.cut(0, 15), x.mix, key_mask=mask[:, :15], output_state=True, **common)
        other = state
        _, beside = hybrid_attention(
            *x.cut(0, 15)[:4], x.each(x.k[:, :, :15]), x.mix, key_mask=mask[:, :15], output_state=True, **common
        )
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
            if per_key_head and keep is not None:  # beside a state of query heads, all of whose features are given
                expected, beside = hybrid_attention_step(q, k, v, phi_q, x.each, x.mix, beside, **now)
                assert (y - expected).abs().max() < EXACT
        assert state.positions.tolist() == [7, 22]
        assert state.sums.shape[1] == x.phi_k.shape[1]  # heads of phi_k: a state G times smaller for those of key heads
        for a, b in zip(settled(state).tensors.values(), other.tensors.values(), strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=EXACT, rtol=0)


@both_kinds
@pytest.mark.parametrize("per_key_head", [False, True])
@pytest.mark.parametrize("join", JOINS)
def test_late_keys_count_before_they_are_in_the_sums(join, per_key_head, kind, monkeypatch):
    """Decoding over several times as many tokens as may be late, and what goes on in between: steps, parts, a beam."""
    monkeypatch.setattr(states, "LATE_SHARE", 1)
    x = kind(length=75, per_key_head=per_key_head)
    options = dict(window=4, join=join, log_scale=x.log_scale)
    whole = x.whole(**options)
    state = hybrid_attention(*x.cut(0, 3), x.mix, output_state=True, **options)[1]
    plain, held, dim, size = state.bytes, set(), x.q.shape[3], x.q.element_size()
    for t in range(3, 60):
        y, state = hybrid_attention_step(*x.token(t), x.mix, state, **options)
        assert (y - whole[:, :, t : t + 1]).abs().max() < x.tolerance
        held.add(state.late_phi.shape[2])
        # a place in the room for each token until then: features of each head, key and value of each of two
        assert plain <= state.bytes <= plain + dim * size * 2 * (x.phi_k.shape[1] * x.phi_k.shape[3] + 2 * 2 * dim)
        if t % 19 == 0:
            rest = dict(options, phi_k_fn=x.features, state=state.select(torch.tensor([1, 0])))
            part = hybrid_attention(*(c.flip(0) for c in x.cut(t + 1, 75)), x.mix, **rest)
            assert (part.flip(0) - whole[:, :, t + 1 :]).abs().max() < x.tolerance
    assert held == (set(range(dim)) if join != "replace" else {0})


@both_kinds
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (5, 0), (4, 3)])
def test_a_state_from_which_decoding_goes_on_twice_stays_as_it_was(window, sinks, kind, monkeypatch):
    """States share the buffers that their keys are put into: each branch is what it is alone, in any order, with no place read
    before it is written.
    """
    monkeypatch.setattr(states, "LATE_SHARE", 2)
    x = kind(length=40)
    options = dict(window=window, sinks=sinks, join="absolute", log_scale=x.log_scale)
    order = {branch: [*range(12), *(t + branch for t in range(12, 24))] for branch in (0, 7, 14)}
    with empty_is_nan():
        state = hybrid_attention(*x.cut(0, 3), x.mix, output_state=True, **options)[1]
        held = {}
        for t in range(3, 12):
            _, state = hybrid_attention_step(*x.token(t), x.mix, state, **options)
            held[t] = {n: tensor.clone() for n, tensor in state.tensors.items()}, state
        found = {branch: (state, []) for branch in order}
        for at in range(12, 24):  # the branches take turns
            for branch, tokens in order.items():
                was, parts = found[branch]
                y, now = hybrid_attention_step(*x.token(tokens[at]), x.mix, was, **options)
                found[branch] = now, [*parts, y]
    for branch, tokens in order.items():
        expected = x.whole(tokens, **options)[:, :, 12:]
        assert (torch.cat(found[branch][1], 2) - expected).abs().max() < x.tolerance, branch
    for before, was in held.values():
        assert all(torch.equal(tensor, was.tensors[n]) for n, tensor in before.items())


def begun(monkeypatch, length, sinks=0, kind=Double):
    """(inputs, options, y of all, the state after 10 tokens), with late keys of eight tokens at once."""
    monkeypatch.setattr(states, "LATE_SHARE", 1)
    x = kind(length=length)
    options = dict(window=5, sinks=sinks, join="absolute", log_scale=x.log_scale)
    expected = x.whole(**options)
    return x, options, expected, hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **options)[1]


@both_kinds
def test_decoding_goes_on_outside_inference_mode(kind, monkeypatch):
    x, options, expected, state = begun(monkeypatch, 24, kind=kind)
    for t in range(10, 24):
        with torch.inference_mode(t % 3 > 0):
            y, state = hybrid_attention_step(*x.token(t), x.mix, state, **options)
        assert (y - expected[:, :, t : t + 1]).abs().max() < x.tolerance


@both_kinds
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_within_a_step_takes_no_place_of_it(fails, kind, monkeypatch):
    """As two threads that go on from one prompt would: the second finds its place taken before the first has filled it."""
    x, options, expected, state = begun(monkeypatch, 24, kind=kind)
    for t in range(10, 24):
        q, k, v, phi_q, _ = x.cut(t, t + 1)

        def features(keys, state=state):
            hybrid_attention_step(*x.token(0), x.mix, state, **options)
            return 1 / 0 if fails else x.features(keys)

        if fails:
            with pytest.raises(ZeroDivisionError):
                hybrid_attention_step(q, k, v, phi_q, features, x.mix, state, **options)
            features = x.features
        y, state = hybrid_attention_step(q, k, v, phi_q, features, x.mix, state, **options)
        assert (y - expected[:, :, t : t + 1]).abs().max() < x.tolerance


@both_kinds
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_beam_goes_on_token_by_token_and_bytes_are_those_in_memory(sinks, kind, monkeypatch):
    x, options, expected, state = begun(monkeypatch, 60, sinks, kind)
    order, sizes = [0, 1], set()
    for t in range(10, 60):
        if t % 7 == 0:
            state, order = state.select(torch.tensor([1, 0])), order[::-1]
        y, state = hybrid_attention_step(*x.token(t, order), x.mix, state, **options)
        assert (y - expected[order, :, t : t + 1]).abs().max() < x.tolerance
        for one in (state, settled(state)):
            memory = {s.data_ptr(): s.nbytes() for s in (n.untyped_storage() for n in one.tensors.values())}
            assert one.bytes == sum(memory.values())
        sizes.add(state.bytes)
    assert len(sizes) == 1 and state.room is not None


@pytest.mark.parametrize("options", STATE_OPTIONS, **NAMES)
def test_the_c_kernels_by_name_go_on_from_any_state(options):
    """A prompt, three tokens at once, then one by one: by C where it can, else by torch."""
    x = Single(length=24)
    options = dict(options, kernel="cpu", log_scale=x.log_scale)
    expected = x.whole(**{**options, "kernel": "auto"})
    y, state = hybrid_attention(*x.cut(0, 9), x.mix, output_state=True, **options)
    parts = [y]
    for t in (9, *range(12, 24)):
        stop = 12 if t == 9 else t + 1
        rest = dict(options, phi_k_fn=x.features, state=state, output_state=True)
        y, state = hybrid_attention(*x.cut(t, stop), x.mix, **rest)
        parts.append(y)
    assert (torch.cat(parts, 2) - expected).abs().max() < 3e-6 * max(1, float(expected.abs().max()))
