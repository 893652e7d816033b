"""Windows that are dropped (`window_keep`) in a call that goes on from a state: split anywhere, it is the whole."""

import itertools

import pytest
import torch

from recipelin_kernels import hybrid_attention, hybrid_attention_step
from recipelin_kernels.hybrid.rows import DROPS
from tests.kernels.hybrid_inputs import COVERS, EXACT, JOINS, Inputs, assert_same, attend

KEEP = torch.tensor([[True, False, False, True], [False, True, False, False]])
LENGTH, STEPS = 29, 24  # from token STEPS on one by one


def decode(x: Inputs, state, start, stop, **options):
    """y of tokens one by one."""
    parts = []
    for t in range(start, stop):
        q, k, v, phi_q, _ = x.cut(t, t + 1)
        y, state = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
        parts.append(y)
    return torch.cat(parts, 2)


@pytest.mark.parametrize("on_drop", DROPS)
@pytest.mark.parametrize(("join", "cover"), list(itertools.product(JOINS, COVERS)))
def test_a_call_split_anywhere_is_the_whole(join, cover, on_drop):
    """Cuts before, within and behind the sinks and the ring; chunks that the sinks leave, and tokens."""
    geometries = [
        ("sliding", 5, None),
        ("sliding", 0, None),
        ("terraced", 4, None),
        ("sliding", 60, None),
        ("sliding", 5, 9),
    ]
    ablations = itertools.cycle([{}, {"sinks": "mass"}, {"window": "output"}])
    for number, ((shape, window, reach), ablate) in enumerate(zip(geometries, ablations, strict=False)):
        x = Inputs((4, 2), LENGTH, per_key_head=number % 2 == 0)
        options = dict(window=window, shape=shape, reach=reach, sinks=3, join=join, cover=cover, ablate=ablate)
        options |= {"window_keep": KEEP, "on_drop": on_drop, "log_scale": x.log_scale}
        whole = attend(x, kernel="reference", **options)
        for cut in (1, 4, 13):
            y, state = hybrid_attention(*x.cut(0, cut), x.mix, output_state=True, **options)
            rest = dict(options, kernel="chunked", chunk=8, state=state, phi_k_fn=x.features, output_state=True)
            more, state = hybrid_attention(*x.cut(cut, STEPS), x.mix, **rest)
            found = torch.cat((y, more, decode(x, state, STEPS, LENGTH, **options)), 2)
            assert (found - whole).abs().max() < EXACT, (shape, window, reach, ablate, cut)


@pytest.mark.parametrize("on_drop", DROPS)
def test_rows_that_begin_late_and_windows_that_are_dropped_now_and_then(on_drop):
    """Of a state all windows may be kept, then dropped: each call is what the whole is with its own."""
    x = Inputs((4, 2), LENGTH)
    mask = torch.arange(LENGTH) >= torch.tensor([[9], [2]])
    common = dict(window=4, sinks=2, on_drop=on_drop, log_scale=x.log_scale)
    state = None
    for number, (a, b) in enumerate([(0, 6), (6, 13), (13, 20), (20, 21), (21, 22), (22, LENGTH)]):
        options = dict(common, window_keep=KEEP.roll(number, 1) if number % 3 else None)
        whole = attend(x, kernel="reference", key_mask=mask, **options)
        rest = dict(options, key_mask=mask[:, a:b], state=state, phi_k_fn=x.features, output_state=True)
        y, state = hybrid_attention(*x.cut(a, b), x.mix, **rest)
        assert (y - whole[:, :, a:b]).abs().max() < EXACT


@pytest.mark.parametrize("join", JOINS)
def test_gradients_after_a_state_are_those_of_the_whole(join):
    """To what a call is given, whose ring holds none of it before: window 1. None go into the state."""
    found = []
    for cut in (0, 12):
        x = Inputs((4, 2), LENGTH, per_key_head=True)
        options = dict(window=1, sinks=3, join=join, window_keep=KEEP, log_scale=x.log_scale)
        x.map.requires_grad_()
        state = None
        if cut:
            q, k, v, phi_q, _ = x.cut(0, cut)
            _, state = hybrid_attention(q, k, v, phi_q, x.features(k), x.mix, output_state=True, **options)
            assert not any(t.requires_grad for t in state.tensors.values())
        late = [t.detach().clone().requires_grad_() for t in x.cut(12, LENGTH)]
        given = late if cut else [torch.cat(p, 2) for p in zip(x.cut(0, 12), late, strict=True)]
        kernel = "chunked" if cut else "reference"
        y = hybrid_attention(*given, x.mix, state=state, phi_k_fn=x.features, kernel=kernel, **options)[
            :, :, 12 - cut :
        ]
        found.append([y.detach(), *torch.autograd.grad(y.cos().sum(), late)])
    assert_same(found[1], found[0], names=("y", "d_q", "d_k", "d_v", "d_phi_q", "d_phi_k"))


def test_a_state_made_while_learning_goes_on_without():
    x = Inputs((4, 2), LENGTH)
    options = dict(window=1, sinks=2, join="replace", phi_k_fn=lambda k: x.features(k))
    x.map.requires_grad_()
    q, k, v, phi_q, _ = x.cut(0, 12)
    _, state = hybrid_attention(q, k, v, phi_q, x.features(k), x.mix, output_state=True, **options)
    for stop in (13, LENGTH):
        y = hybrid_attention(*(t.detach() for t in x.cut(12, stop)), x.mix, state=state, **options)
        assert (y - attend(x, **options)[:, :, 12:stop]).abs().max() < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked", "cpu"])
def test_window_keep_of_rows_or_heads_alone_is_spread(kernel):
    dtype = torch.float32 if kernel == "cpu" else torch.float64
    x = Inputs((4, 2), 300, dtype=dtype)
    for keep in (KEEP[:1], KEEP[:, 1:2]):
        options = dict(window=200, sinks=2, kernel=kernel)  # so wide that heads are taken one by one
        assert torch.equal(
            attend(x, window_keep=keep, **options), attend(x, window_keep=keep.expand(2, 4).clone(), **options)
        )
