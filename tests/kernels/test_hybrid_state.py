"""Hybrid attention that goes on from a state: prefill in parts, one token at once, padding, the teacher's reach."""

import copy
import itertools

import pytest
import torch

from recipelin_kernels import empty_state, hybrid_attention, hybrid_attention_step
from recipelin_kernels.hybrid import cpu_step
from recipelin_kernels.hybrid import state as states
from recipelin_kernels.hybrid.state import settled
from tests.kernels.hybrid_inputs import COVERS, DIM, EXACT, FEATURES, JOINS, Inputs, attend, empty_is_nan


class Double(Inputs):
    tolerance = EXACT

    def token(self, t, rows=slice(None)):
        """A token's arguments before mix."""
        return *(x[rows] for x in self.cut(t, t + 1)[:4]), self.features

    def whole(self, at=slice(None), **options):
        """y of tokens in float64."""
        exact = self.like(torch.float64)
        x = (t[:, :, at] for t in exact.tensors()[:5])
        return hybrid_attention(*x, exact.mix, **{**options, "log_scale": exact.log_scale})


class Single(Double):
    """In fp32, of widths that the C function of a token takes, which makes their features by standard maps."""

    tolerance = 1e-5

    def __init__(self, **sizes):
        super().__init__(dim=16, **sizes)
        self.by_maps(16)
        vars(self).update(vars(self.like(torch.float32)))

    def token(self, t, rows=slice(None)):
        return *(x[rows] for x in self.cut(t, t + 1)[:3]), *self.maps


both_kinds = pytest.mark.parametrize("kind", [Double, Single])


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


@pytest.mark.parametrize("join", [j for j in JOINS if j != "replace"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (9, 0), (5, 3), (64, 2)])
def test_a_token_of_the_c_function_is_its_definition_for_any_threads(window, sinks, join, monkeypatch):
    """Rows of two lengths, one of whose windows is short at first; maps, and features that are made before."""
    monkeypatch.setattr(cpu_step, "WORTH_A_THREAD", 1)
    calls, threads, length = [], torch.get_num_threads(), window + 42
    first = window + sinks + 5 if sinks else 20  # sinks are soon behind the window of the shorter row
    step = cpu_step._token
    monkeypatch.setattr(cpu_step, "_token", lambda *a: calls.append(1) or step(*a))
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


@pytest.mark.parametrize("join", [j for j in JOINS if j != "replace"])
def test_tokens_of_signed_features(join, monkeypatch):
    """With rows at the floor of the denominator. What `chunked` has in float32 is the measure."""
    step, calls = cpu_step._token, []
    monkeypatch.setattr(cpu_step, "_token", lambda *a: calls.append(1) or step(*a))
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
    {"log_scale": torch.tensor([0.3])},
    {"log_scale": torch.linspace(-1, 1, 6).double()},
    {"signed": True},
)


@pytest.mark.parametrize("options", OTHERWISE, ids=lambda options: next(iter(options)))
def test_tokens_that_ask_the_same_are_prepared_once(options, monkeypatch):
    """From room to room. One that asks for something else, or comes in another precision, is not taken for one of them."""
    made, ran = ([] for _ in range(2))
    for name, calls in (("_prepare", made), ("_token", ran)):
        own = getattr(cpu_step, name)
        monkeypatch.setattr(cpu_step, name, lambda *a, own=own, calls=calls: calls.append(1) or own(*a))
    x = Single(length=24)
    same = dict(window=5, join="absolute", log_scale=x.log_scale)
    same |= dict(kernel="auto", cover="outside", ablate={}, key_mask=None, window_keep=None, scale=0.25, signed=False)
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **same)
        for t in range(10, 22):
            _, state = hybrid_attention_step(*x.token(t), x.mix, state, **same)
        assert len(made) == 1 and len(ran) == 12
        found, expected = copy.copy(state), settled(state)
        same["ablate"].update(options.get("ablate", {}))  # the caller's own
        for t in (22, 23):
            y, expected = hybrid_attention_step(*x.token(t), x.mix, settled(expected), **same | options)
            other, found = hybrid_attention_step(*x.token(t), x.mix, found, **same | options)
            assert (other - y).abs().max() < 1e-6
        expected = settled(state)
        same["ablate"].clear()
        for t in (22, 23):
            q, *others = x.token(t)
            y, expected = hybrid_attention_step(q, *others, x.mix, expected, **same)
            other, state = hybrid_attention_step(q.double(), *others, x.mix, state, **same)
            assert other.dtype == torch.float64 and (other - y).abs().max() < 1e-6


def test_a_token_like_the_last_one_without_a_map_of_keys_is_refused():
    x = Single(length=30)
    options = dict(window=5, join="absolute", log_scale=x.log_scale)
    with torch.no_grad():
        _, state = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, **options)
        q, k, v, phi_q, phi_k = x.cut(10, 11)
        _, state = hybrid_attention_step(q, k, v, phi_q, x.maps[1].make, x.mix, state, **options)
        with pytest.raises(ValueError, match="state: needs phi_k_fn"):
            hybrid_attention(q, k, v, phi_q, phi_k, x.mix, state=state, output_state=True, **options)
