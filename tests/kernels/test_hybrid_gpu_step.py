"""The Triton decode kernel is the definition, one token after the other; its state is HybridState's, moved on in place."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from recipelin.attention.hybrid.config import FeatureMap
from recipelin.attention.hybrid.feature_map import HeadFeatureMap
from recipelin_kernels import HybridState, SoftmaxMap, hybrid_attention, hybrid_attention_step
from recipelin_kernels.hybrid import gpu_step
from recipelin_kernels.hybrid.gpu_features import softmax_features_gpu
from recipelin_kernels.hybrid.state import settled
from recipelin_kernels.hybrid.step_state import StepState, standing
from tests.kernels.gpu_device import DEVICE, FP32, auto_is_gpu, on_device
from tests.kernels.hybrid_inputs import Inputs, empty_is_nan

pytestmark = pytest.mark.usefixtures("quick_interpreter")

FEW, MANY = (1,), (gpu_step.ENOUGH,)
BOTH = (1, gpu_step.ENOUGH, gpu_step.ENOUGH)


@pytest.fixture
def sizes_by_turns(monkeypatch):
    """A function: from then on tokens are decoded as of few rows or of many, by turns. They share a state, unless few rows let no
    key wait for others: then it is made anew at each change."""

    blocks_for = gpu_step.blocks_for

    def decoded_as(turns=BOTH):
        rows = itertools.cycle(turns)
        monkeypatch.setattr(gpu_step, "blocks_for", lambda _, width: blocks_for(next(rows), width))

    return decoded_as


def close(found, expected, tolerance=FP32):
    assert bool(found.isfinite().all())
    assert float((found.double() - expected).norm() / expected.norm().clamp(min=1e-2)) <= tolerance


def decode(x: Inputs, state, start, stop, mask=None, **options):
    """y [B,H,n,D] of the tokens from `start` on, and the state; what is not real is NaN."""
    found = []
    for t in range(start, stop):
        q, k, v, phi_q, _ = x.cut(t, t + 1)
        if mask is not None:
            real = mask[:, t : t + 1]
            q, k, v, phi_q = (torch.where(real[:, None, :, None], z, torch.nan) for z in (q, k, v, phi_q))
            options["key_mask"] = real
        given = x.maps[0] if x.maps else phi_q
        y, state = hybrid_attention_step(q, k, v, given, x.features, x.mix, state, **{"kernel": "gpu", **options})
        found.append(y)
    return torch.cat(found, 2), state


def poison(state: StepState):
    """NaN, in a state of one row, at every place of no key that counts. Returns how many there were."""
    (seen, folded), held = state.counts[0, 0, 0].tolist(), state.held
    least = min(folded, seen - held.span)
    newest = [seen - 1 - (seen - 1 - p) % held.ring for p in range(held.places)]
    unused = [p for p in range(held.sinks, held.places) if newest[p] < max(least, held.sinks)]
    for x in (state.ring_k, state.ring_v, *([state.ring_phi] if held.paired else [])):
        x[:, :, unused] = torch.nan
    if not held.paired:
        late = {j % held.fold for j in range(folded, seen - held.lag)}
        state.ring_phi[:, :, [p for p in range(held.fold) if p not in late]] = torch.nan
    if seen < held.lag:
        state.leaving.fill_(torch.nan)
    if held.fold == 1:
        known = (
            seen - held.lag
        )  # what leaves with the next token; if there is none, or it is in the sums or a sink, neither counts
        state.leaving_v[:, :, [(known + 1) % 2] if known >= max(folded, held.sinks) else [0, 1]] = torch.nan
    return len(unused) + (held.fold == 1)


# In the interpreter keys are folded two at once, and a tile has 16 features, columns and keys.
CASES = {
    "shared": dict(window=3, start=2),
    "shared, sinks, few rows": dict(window=3, sinks=2, start=2, stop=8, turns=FEW),
    "two programs of a head, few rows": dict(window=3, sinks=1, dim=24, start=2, stop=8, turns=FEW),
    "absolute, phi_k of key heads, 4:1": dict(
        heads=(4, 1), per_key_head=True, window=2, join="absolute", start=5, stop=8
    ),
    "replace, sinks": dict(window=2, sinks=2, join="replace", start=1),
    "average, cover all, sinks": dict(window=3, sinks=1, cover="all", join="average", start=3),
    "sum, terraced": dict(window=2, shape="terraced", join="sum", start=3),
    "no window, from the first token": dict(window=0, start=0, stop=5),
    "shared, cover all, the window not shown": dict(
        window=2, cover="all", ablate={"window": "output"}, start=3, stop=6
    ),
    "sinks alone, odd widths": dict(
        window=1, sinks=2, ablate={"window": "mass"}, dim=19, features=21, start=3, stop=6, heads=(1, 1)
    ),
    "features made, shared": dict(window=3, columns=20, dim=24, start=2, turns=FEW),
    "features made, shared, many rows": dict(window=3, columns=20, dim=24, start=2, turns=MANY),
    "features made, absolute, phi_k of key heads": dict(
        heads=(4, 1), per_key_head=True, columns=3, window=2, join="absolute", start=5, stop=9, turns=FEW
    ),
    "features made, replace, sinks": dict(window=2, sinks=2, join="replace", columns=16, start=1),
    "features made, several tiles of the ring": dict(window=17, columns=5, start=16, stop=20, turns=MANY),
    "the same, few rows": dict(window=17, columns=5, start=16, stop=20, turns=FEW),
    "features made, window 1": dict(window=1, columns=4, start=2, heads=(1, 1), turns=MANY),
    "features made, window 1, few rows": dict(window=1, columns=4, start=2, heads=(1, 1), turns=FEW),
    "features made, terraced": dict(window=2, shape="terraced", join="sum", columns=5, start=3),
    "without the linear branch": dict(window=17, ablate={"linear": "mass"}, start=16, stop=20, heads=(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_and_its_state_the_chunked_ones(name, sizes_by_turns):
    case = dict(CASES[name])
    sizes_by_turns(case.pop("turns", BOTH))
    sizes = {n: case.pop(n) for n in ("dim", "features") if n in case}
    start, stop = case.pop("start"), case.pop("stop", None)
    stop = stop or start + 5
    x = Inputs(case.pop("heads", (2, 1)), stop, 1, case.pop("per_key_head", False), **sizes).like(torch.float32, DEVICE)
    if columns := case.pop("columns", None):
        x.by_maps(columns)
    exact, options = x.like(torch.float64, DEVICE), {**case, "log_scale": x.log_scale}
    expected = hybrid_attention(*exact.cut(0, stop), exact.mix, kernel="reference", **options)
    _, state = hybrid_attention(*x.cut(0, start or 1), x.mix, output_state=True, kernel="chunked", **options)
    if not start:
        state = HybridState(**{n: torch.zeros_like(t) for n, t in state.tensors.items()})
    begun = {n: t.clone() for n, t in state.tensors.items()}
    y, moved = decode(x, state, start, start + 1, **options)
    assert poison(moved)
    if x.maps:  # by the kernel, and by nothing else
        x.maps = [replace(m, make=None) for m in x.maps]
        x.features = x.maps[1]
    found = [y]
    for t in range(start + 1, stop):
        y, moved = decode(x, moved, t, t + 1, **options)
        poison(moved)
        found.append(y)
    close(torch.cat(found, 2), expected[:, :, start:])
    assert all(torch.equal(t, begun[n]) for n, t in state.tensors.items()), (
        "the state that was given is not written into"
    )
    same(standing(moved, x.like(torch.float32, DEVICE).features), exact, stop, **options)


@pytest.mark.parametrize("join", ["shared", "absolute"])
@pytest.mark.parametrize("turns", [FEW, MANY], ids=["few rows", "many rows"])
def test_scores_of_50(turns, join, sizes_by_turns):
    sizes_by_turns(turns)
    x = Inputs((2, 1), 12, 1).with_scores_to(50.0).like(torch.float32, DEVICE)
    exact, options = x.like(torch.float64, DEVICE), dict(window=4, sinks=1, join=join, log_scale=x.log_scale)
    _, state = hybrid_attention(*x.cut(0, 7), x.mix, output_state=True, kernel="chunked", **options)
    y, _ = decode(x, state, 7, 12, **options)
    expected = hybrid_attention(*exact.cut(0, 12), exact.mix, kernel="reference", **options)
    close(y, expected[:, :, 7:], 2e-5)


def test_a_token_without_mass_is_zero(sizes_by_turns):
    """A head whose mix is 0 has nothing until a key has left the window; one whose log_scale is -inf never without a window."""
    sizes_by_turns()
    x = Inputs((2, 1), 6, 1).like(torch.float32, DEVICE)
    x.mix[1], x.log_scale[1] = 0, -torch.inf
    exact = x.like(torch.float64, DEVICE)
    for window, join, nothing in ((3, "shared", 2), (0, "absolute", 5)):
        options = dict(window=window, join=join, log_scale=x.log_scale)
        _, state = hybrid_attention(*x.cut(0, 1), x.mix, output_state=True, kernel="chunked", **options)
        y, _ = decode(x, state, 1, 6, **options)
        close(y, hybrid_attention(*exact.cut(0, 6), exact.mix, kernel="reference", **options)[:, :, 1:])
        assert not y[:, 1, :nothing].any() and bool(y[:, 0].any())


@pytest.mark.parametrize("moved", [False, True])
def test_a_state_of_other_feature_heads_is_refused(moved):
    x, other = (Inputs((4, 2), 8, 1, per_key_head).like(torch.float32, DEVICE) for per_key_head in (False, True))
    _, state = hybrid_attention(*x.cut(0, 5), x.mix, window=3, output_state=True, kernel="chunked")
    if moved:
        state = decode(x, state, 5, 6, window=3)[1]
    q, k, v, phi_q, _ = x.cut(6, 7)
    for kernel in ("gpu", "chunked", "auto"):
        with pytest.raises(ValueError, match="sums the features of 4 heads, phi_k has 2"):
            hybrid_attention_step(q, k, v, phi_q, other.features, x.mix, state, kernel=kernel, window=3)


def same(state: HybridState, exact: Inputs, stop: int, **options):
    """A state against the one that a call over all of the row leaves."""
    whole = settled(hybrid_attention(*exact.cut(0, stop), exact.mix, output_state=True, kernel="chunked", **options)[1])
    for name, other in whole.tensors.items():
        one = getattr(state, name)
        assert one.shape == other.shape
        if one.numel():
            assert float((one - other).abs().max() / other.abs().max().clamp(min=1.0)) < 1e-5, name


@pytest.mark.parametrize(
    ("per_key_head", "columns", "turns"), [(True, 0, BOTH), (True, 3, FEW), (False, 3, FEW), (False, 9, BOTH)]
)
def test_rows_that_begin_later_and_rest_and_what_goes_on_in_between(per_key_head, columns, turns, sizes_by_turns):
    """One row is padded on its left until after decoding has begun; the other rests for a token. Then a beam, three tokens at
    once, and again single ones. columns: of the map by which features are made."""
    sizes_by_turns(turns)
    x = Inputs((2, 1), 14, 2, per_key_head).like(torch.float32, DEVICE)
    if columns:
        x.by_maps(columns)
    exact = x.like(torch.float64, DEVICE)
    options = on_device(dict(window=3, sinks=2, log_scale=x.log_scale, join="absolute"))
    mask = torch.ones(2, 14, dtype=torch.bool, device=DEVICE)
    mask[0, :5], mask[1, 6] = False, False
    _, state = hybrid_attention(
        *x.cut(0, 4), x.mix, key_mask=mask[:, :4], output_state=True, kernel="chunked", **options
    )
    y, state = decode(x, state, 4, 9, mask, **options)
    assert state.positions.tolist() == [4, 8] and not y[0, :, 0].any() and not y[1, :, 2].any()
    for row in (0, 1):
        real = mask[row].nonzero()[:, 0]
        alone = [z[row : row + 1, :, real] for z in exact.cut(0, 14)]
        expected = hybrid_attention(*alone, exact.mix, kernel="reference", **options)[0]
        now = mask[row, 4:9]
        close(y[row][:, now], expected[:, (real >= 4) & (real < 9)])
    turned = state.select(torch.tensor([1, 0]))
    many = dict(options, state=turned, phi_k_fn=x.features, output_state=True)
    y, state = hybrid_attention(*(z.flip(0) for z in x.cut(9, 12)), x.mix, kernel="chunked", **many)
    assert isinstance(state, HybridState)
    x.q, x.k, x.v, x.phi_q = (z.flip(0) for z in (x.q, x.k, x.v, x.phi_q))
    last, state = decode(x, state, 12, 14, **options)
    for row in (0, 1):
        real = mask[1 - row].nonzero()[:, 0]
        alone = [z[1 - row : 2 - row, :, real] for z in exact.cut(0, 14)]
        expected = hybrid_attention(*alone, exact.mix, kernel="reference", **options)[0]
        close(torch.cat((y, last), 2)[row], expected[:, -5:])


@pytest.mark.parametrize("heads", [1, gpu_step.ENOUGH])
def test_the_state_stays_where_it_is_and_steps_repeat_bit_by_bit(heads, monkeypatch):
    blocks = gpu_step.blocks_for(heads, 24)
    monkeypatch.setattr(gpu_step, "blocks_for", lambda *_: blocks)
    x = Inputs((2, 1), 8, 1, dim=24).like(torch.float16, DEVICE)  # two programs share a head
    strided = x.like(torch.float16, DEVICE)
    for name in ("q", "k", "v", "phi_q"):
        z = getattr(strided, name)
        setattr(strided, name, z.transpose(2, 3).contiguous().transpose(2, 3))
    options = dict(window=3, log_scale=x.log_scale)
    _, state = hybrid_attention(*x.cut(0, 5), x.mix, output_state=True, kernel="chunked", **options)
    _, state = decode(x, state, 5, 6, **options)
    other = state.select(torch.tensor([0]))
    before, size = {n: t.data_ptr() for n, t in state.tensors.items()}, state.bytes
    y, following = decode(x, state, 6, 8, **options)
    assert following is state and before == {n: t.data_ptr() for n, t in state.tensors.items()} and size == state.bytes
    again, other = decode(strided, other, 6, 8, **options)
    assert torch.equal(y, again) and y.dtype == torch.float16
    assert all(torch.equal(a, b) for a, b in zip(state.tensors.values(), other.tensors.values(), strict=True))
    assert state.counts.shape[2] == 2 and state.batch == 1


def test_a_state_of_other_sizes_is_refused_and_what_it_does_not_take_goes_the_long_way():
    x = Inputs((2, 1), 7, 1).like(torch.float32, DEVICE)
    options = dict(window=3, log_scale=x.log_scale)
    _, plain = hybrid_attention(*x.cut(0, 4), x.mix, output_state=True, kernel="chunked", **options)
    _, state = decode(x, plain, 4, 5, **options)
    with pytest.raises(ValueError, match=r"state: batch 2 \(the call's: 1\)"):
        decode(x, state.select(torch.tensor([0, 0])), 5, 6, **options)
    with pytest.raises(ValueError, match="made with other options"):
        decode(x, state, 5, 6, **dict(options, window=4))
    _, limited = hybrid_attention(*x.cut(0, 4), x.mix, output_state=True, kernel="chunked", reach=4, **options)
    y, state = decode(x, limited, 4, 5, reach=4, **options)
    assert isinstance(state, HybridState)
    exact = x.like(torch.float64, DEVICE)
    close(y, hybrid_attention(*exact.cut(0, 5), exact.mix, kernel="reference", reach=4, **options)[:, :, 4:])


def test_by_auto_a_state_that_was_moved_on_is_refused(monkeypatch):
    """On a CPU a state may be used twice: where `auto` takes this kernel it gives the same numbers or an error, never others."""
    auto_is_gpu(monkeypatch)
    x = Inputs((2, 1), 9, 1).like(torch.float32, DEVICE)
    exact = x.like(torch.float64, DEVICE)
    options = dict(window=3, log_scale=x.log_scale, kernel="auto")
    expected = hybrid_attention(*exact.cut(0, 9), exact.mix, **{**options, "kernel": "reference"})
    _, begun = hybrid_attention(*x.cut(0, 4), x.mix, output_state=True, **{**options, "kernel": "chunked"})
    assert isinstance(begun, HybridState)
    y, first = decode(x, begun, 4, 5, **options)
    kept = copy.deepcopy(first)
    found, newest = decode(x, first, 5, 7, **options)
    assert isinstance(first, StepState) and isinstance(newest, StepState) and newest.value is first.value
    assert hash(first) != hash(newest)
    close(torch.cat((y, found), 2), expected[:, :, 4:7])
    for use in (
        lambda: decode(x, first, 5, 6, **options),
        lambda: decode(x, first, 5, 6, **{**options, "kernel": "gpu"}),
        lambda: decode(x, first, 5, 6, **{**options, "kernel": "chunked"}),
        lambda: first.select(torch.tensor([0])),
    ):
        with pytest.raises(ValueError, match=r"state: later tokens were written into it \(2\).*copy.deepcopy"):
            use()
    for state in (begun, kept, kept.select(torch.tensor([0]))):  # each as it was
        start = 4 if state is begun else 5
        close(decode(x, state, start, 7, **options)[0], expected[:, :, start:7])
    x.q.requires_grad_()
    y, last = decode(x, newest, 7, 8, **options)
    assert isinstance(last, HybridState) and bool(torch.autograd.grad(y.sum(), x.q)[0].any())
    x.q.requires_grad_(False)
    close(decode(x, newest, 7, 9, **options)[0], expected[:, :, 7:])


def test_what_makes_features_of_keys_gets_its_gradient_and_is_held_to_its_width():
    """`phi_k_fn` alone learns: the token goes the long way, whether it is a map or a function that closes over what learns."""
    x = Inputs((2, 1), 6, 1).like(torch.float32, DEVICE).by_maps(3)
    options = dict(window=3, cover="all", log_scale=x.log_scale)
    _, state = hybrid_attention(*x.cut(0, 4), x.mix, output_state=True, kernel="chunked", **options)
    _, state = decode(x, state, 4, 5, **options)
    q, k, v, phi_q, _ = x.cut(5, 6)
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    learns = SoftmaxMap(x.maps[1].make, x.maps[1].weight.requires_grad_(), x.maps[1].clamp)
    for made, learned in ((learns, learns.weight), (lambda k: x.maps[1](k).detach() * scale, scale)):
        y, after = hybrid_attention_step(q, k, v, phi_q, made, x.mix, state, kernel="gpu", **options)
        assert isinstance(after, HybridState) and bool(torch.autograd.grad(y.sum(), learned)[0].abs().sum() > 0)
    with torch.no_grad():
        assert isinstance(
            hybrid_attention_step(q, k, v, phi_q, made, x.mix, state, kernel="gpu", **options)[1], StepState
        )
        with pytest.raises(ValueError, match=r"phi_k_fn: expected 6 features of a key, found a tensor \(1, 2, 1, 2\)"):
            narrow = partial(lambda k: x.maps[1](k)[..., :2])
            hybrid_attention_step(q, k, v, phi_q, narrow, x.mix, state, kernel="gpu", **options)


@pytest.mark.parametrize(("dim", "width", "heads", "length", "clamp"), [(8, 1, 1, 9, 1e-3), (80, 2, 2, 33, 1e-12)])
def test_the_standard_map_is_the_forms(dim, width, heads, length, clamp):
    """Features and the gradients to x and W, against float64; two maps of a key head, or one of each."""
    x = torch.randn(2, length, heads, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(1, 2)
    config = FeatureMap(width=width, clamp=clamp)
    made, plain = (HeadFeatureMap(config, 2, dim, 0, kernel).to(DEVICE) for kernel in ("gpu", "auto"))
    for each in (made, plain):
        each.weight.data.mul_(9.0)  # so that some features are clamped
    found = []
    for each, one in ((made, x.clone()), (plain.double(), x.double())):
        with empty_is_nan(DEVICE), torch.autocast(DEVICE, torch.bfloat16, enabled=each is made):
            phi = each(one.requires_grad_())
            towards = (
                torch.cos(torch.arange(phi.numel(), dtype=torch.float64, device=DEVICE)).view_as(phi).to(phi.dtype)
            )
            found.append([phi, *torch.autograd.grad((phi * towards).sum(), (one, each.weight))])
    assert clamp < 1e-6 or bool((found[1][0] == clamp).any())
    for one, other in zip(*found, strict=True):
        close(one.detach(), other.detach())
    with torch.no_grad():
        assert torch.equal(made(x), found[0][0])


def test_what_the_clamp_costs_the_gradient():
    """Where a feature is clamped, the clamp stands for its softmax in the gradient: nothing at the default, and bounded."""
    u = torch.randn(1, 1, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    weight = torch.eye(16, dtype=torch.float64)[None]
    for clamp, least, most in ((1e-12, 0.0, 1e-9), (1e-4, 1e-6, 1e-2)):
        form = HeadFeatureMap(FeatureMap(width=2, clamp=clamp), 1, 16, 0).double()
        form.weight.data = weight
        grads = []
        for one in (u.clone().requires_grad_(), u.clone().requires_grad_()):
            plain = torch.cat((one.softmax(-1), (-one).softmax(-1)), -1).clamp(min=clamp)
            phi = plain if grads else form(one)
            grads.append(torch.autograd.grad((phi * torch.cos(torch.arange(phi.numel()).view_as(phi))).sum(), one)[0])
        assert least <= float((grads[0] - grads[1]).norm() / grads[1].norm()) <= most


@pytest.mark.parametrize("batch", [1, 17])
def test_features_of_a_token_are_made_by_one_launch(batch, monkeypatch):
    """Both maps in it, of few rows each by a program, of many by sixteen; y is what features give that each map has made."""
    x = Inputs((1, 1), 12, batch).like(torch.float32, DEVICE).by_maps(8)
    map_q, map_k = (
        SoftmaxMap(partial(softmax_features_gpu, weight=m.weight, clamp=clamp), m.weight, clamp)
        for m, clamp in zip(x.maps, (0.05, 0.02), strict=True)
    )
    options = dict(window=6, log_scale=x.log_scale)
    _, begun = hybrid_attention(*x.cut(0, 10), x.mix, output_state=True, kernel="chunked", **options)
    found, launched = [], []
    features_of_token = gpu_step.features_of_token
    monkeypatch.setattr(gpu_step, "features_of_token", lambda *a, **b: launched.append(a) or features_of_token(*a, **b))
    for made in (True, False):
        state = begun
        for t in range(10, 12):
            q, k, v, *_ = x.cut(t, t + 1)
            given = (map_q, map_k) if made else (map_q(q), lambda z: map_k(z))
            y, state = hybrid_attention_step(q, k, v, *given, x.mix, state, kernel="gpu", **options)
            found.append(y)
    assert len(launched) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[:2], found[2:], strict=True))
