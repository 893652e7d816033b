"""What only a GPU can show of the Triton kernels: bf16, fp16, long rows, real layouts. Run by `make test-gpu` alone."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from triton.runtime.jit import JITFunction

from recipelin.bench.cuda import captured
from recipelin_kernels import hybrid_attention, hybrid_attention_step
from recipelin_kernels.hybrid import gpu_launch
from recipelin_kernels.hybrid.gpu_features import softmax_features_gpu
from recipelin_kernels.hybrid.step_state import FOLD, standing
from tests.kernels.gpu_device import COARSE, DEVICE, auto_is_gpu, on_device
from tests.kernels.hybrid_inputs import Inputs, assert_same, attend, empty_is_nan, padding, with_gradients
from tests.kernels.test_hybrid_gpu import compare
from tests.kernels.test_hybrid_gpu_step import FEW, MANY, close, decode, same, sizes_by_turns  # noqa: F401

# Each set of options is compiled anew, which takes longer than to run it: few sets, many lengths (`pytest -n` helps).
SETS = {
    "shared": dict(join="shared", sinks=4, window=100),
    "shared, cover all": dict(join="shared", cover="all", window=16, max_gradient="detached"),
    "absolute": dict(join="absolute", window=64, shape="terraced"),
    "absolute, cover all": dict(join="absolute", cover="all", sinks=4, window=1),
    "replace": dict(join="replace", sinks=1, window=64),
    "replace, cover all": dict(join="replace", cover="all", shape="terraced", window=33),
    "average": dict(join="average", sinks=4, window=64, shape="terraced"),
    "sum": dict(join="sum", cover="all", sinks=2, window=50),
    "reach": dict(join="absolute", reach=150, sinks=4, window=64),
    "no window": dict(window=0),
}  # fmt: skip


@pytest.mark.parametrize("alike", [True, False], ids=["plain", "padded"])
@pytest.mark.parametrize("name", SETS)
def test_equals_the_definition(name, alike):
    draw = random.Random(name)
    kinds = ["none"] if alike else ["left", "right", "segments"]
    for kind, length in itertools.product(kinds, [1, 63, 333, 1025]):
        x = Inputs((4, 2), length, 2, draw.random() < 0.5, seed=length, dim=64, features=64)
        compare(x, SETS[name] | padding(kind, 2, length))


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(
    ("dim", "features", "heads", "length", "join", "window"),
    [
        (80, 96, (4, 2), 333, "shared", 64),
        (64, 128, (4, 2), 4097, "shared", 64),
        (128, 128, (4, 1), 4097, "absolute", 64),
        (128, 256, (8, 1), 1025, "replace", 128),
        (256, 256, (4, 4), 1025, "average", 256),
        (32, 32, (8, 1), 700, "absolute", 256),
        (128, 512, (4, 1), 400, "shared", 64),
    ],
)
def test_widths_groups_windows_and_long_rows(dtype, dim, features, heads, length, join, window):
    x = Inputs(heads, length, 1, seed=length, dim=dim, features=features)
    x.log_scale -= 1.0
    compare(x, dict(window=window, join=join), dtype, COARSE.get(dtype, 2e-5))


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize("join", ["shared", "absolute"])
def test_scores_of_50_and_their_gradients_too(dtype, join):
    x = Inputs((4, 1), 333, 1, dim=64, features=64).with_scores_to(50.0)
    compare(x, dict(window=64, sinks=4, join=join), dtype, COARSE.get(dtype, 2e-5))


def test_float32_features_beside_bf16():
    x = Inputs((4, 2), 1000, 1, dim=64, features=128)
    mixed = x.like(torch.bfloat16, DEVICE)
    mixed.phi_q, mixed.phi_k = (t.to(DEVICE, torch.float32) for t in (x.phi_q, x.phi_k))
    exact = mixed.like(torch.float64, DEVICE)
    found = with_gradients(mixed, window=64, kernel="gpu")
    assert_same(found, with_gradients(exact, window=64, kernel="reference"), 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(
    ("dim", "features", "options"),
    [
        (128, 128, dict(window=64, sinks=4)),
        (128, 256, dict(window=64, join="replace")),
        (64, 128, dict(window=100, join="absolute")),
        (80, 96, dict(window=64)),
    ],
)
def test_results_repeat_bit_by_bit(dtype, dim, features, options):
    """A compiler's race shows here first: sums that were made in a pipeline once differed from call to call."""
    x = Inputs((4, 2), 2049, 2, dim=dim, features=features).like(dtype, DEVICE)
    once, *others = (with_gradients(x, kernel="gpu", **options) for _ in range(4))
    assert all(torch.equal(a, b) for again in others for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("length", [640, 333])
@pytest.mark.parametrize(
    ("wider", "shift"), [(0, 0), (8, 8), (3, 1)], ids=["aligned", "strides off 16", "off 16 bytes too"]
)
def test_known_launches_are_tritons_bit_by_bit(wider, shift, length, monkeypatch):
    """Triton launches; it launches again, and what it compiled is kept; then it is not asked."""
    x = Inputs((4, 2), length, 1, dim=64, features=64).like(torch.bfloat16, DEVICE)
    given = []
    for z in x.tensors()[:5]:
        wide = z.new_zeros(*z.shape[:3], z.shape[3] + wider)
        given.append(wide[..., shift : shift + z.shape[3]].copy_(z).requires_grad_())

    def call():
        y = hybrid_attention(*given, x.mix, window=64, kernel="gpu")
        return [y, *torch.autograd.grad(y, given, x.q)]

    with monkeypatch.context() as patch:
        patch.setattr(gpu_launch, "ordinary", lambda _: True)
        expected = call()
    again = call()
    monkeypatch.setattr(JITFunction, "run", None)
    assert all(torch.equal(b, a) and torch.equal(c, a) for a, b, c in zip(expected, again, call(), strict=True))


@pytest.mark.parametrize(
    ("dim", "columns", "length", "options"),
    [
        (128, 64, 4097, dict(window=64)),
        (64, 32, 1025, dict(window=100, join="absolute", sinks=4)),
        (80, 64, 333, dict(window=64, join="replace")),
        (256, 32, 1025, dict(window=33, join="average", cover="all")),  # in blocks of 64 features
    ],
)
def test_features_of_queries_are_made_where_they_are_used(dim, columns, length, options):
    """In bf16, whole rows; from a state on; the same bits each time."""
    x = Inputs((4, 2), length, 2, dim=dim).like(torch.bfloat16, DEVICE).by_maps(columns)
    exact, options = x.like(torch.float64, DEVICE), on_device({**options, "log_scale": x.log_scale})
    expected = attend(exact, kernel="reference", **options)
    asked = dict(options, phi_k_fn=x.maps[1], kernel="gpu")
    unmade = replace(x.maps[0], make=None)
    with empty_is_nan(DEVICE):
        found = [hybrid_attention(x.q, x.k, x.v, unmade, None, x.mix, **asked) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    close(found[0], expected, COARSE[torch.bfloat16])
    half = length // 2
    (q, k, v), late = ([z[:, :, a:b] for z in (x.q, x.k, x.v)] for a, b in ((0, half), (half, length)))
    _, state = hybrid_attention(q, k, v, unmade, None, x.mix, output_state=True, **asked)
    more = hybrid_attention(*late, unmade, None, x.mix, state=state, **asked)
    close(more, expected[:, :, half:], COARSE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(
    ("dim", "columns", "heads"),
    [(64, 32, (4, 4)), (128, 64, (8, 2)), (80, 96, (2, 1)), (256, 256, (2, 2)), (256, 512, (2, 1))],
)
def test_features_and_their_gradients(dtype, dim, columns, heads):
    """Against float64 of the same numbers; x's gradient is rounded to its dtype."""
    x = torch.randn(2, heads[1], 1025, dim, device=DEVICE).to(dtype)
    weight = torch.randn(heads[0], dim, columns, device=DEVICE) * dim**-0.5 * 3
    towards = torch.randn(2, heads[0], 1025, 2 * columns, device=DEVICE)
    found = []
    for exact in (False, True):
        one, w = ((z.double() if exact else z.clone()).requires_grad_() for z in (x, weight))
        if exact:
            u = torch.einsum("bhtd,hgdf->bhgtf", one, w.unflatten(0, (heads[1], -1))).flatten(1, 2)
            phi = torch.cat((u.softmax(-1), (-u).softmax(-1)), -1).clamp(min=1e-12)
        else:
            phi = softmax_features_gpu(one, w, 1e-12)
        found.append([phi.detach(), *torch.autograd.grad((phi * towards.to(phi.dtype)).sum(), (w, one))])
    assert_same(found[0][:2], found[1][:2], 1e-5, names=("phi", "d_weight"))
    assert_same(found[0][2:], found[1][2:], COARSE.get(dtype, 1e-5), names=("d_x",))


# decoding: keys enter the sums 16 at once, so rows of many tokens


def exactly(x: Inputs) -> Inputs:
    """The same numbers in float64; x gets features of keys that are made of them, in float32, as the forms' are."""
    exact = x.like(torch.float64, DEVICE)
    x.features = lambda k: exact.features(k.double()).float()
    x.phi_k, exact.phi_k = x.features(x.k), exact.features(exact.k)
    return exact


STEPS = {
    "shared": dict(join="shared", window=64),
    "absolute, sinks": dict(join="absolute", window=33, sinks=4),
    "absolute, terraced": dict(join="absolute", window=24, shape="terraced"),
    "replace, sinks": dict(join="replace", window=40, sinks=3),
    "average, cover all": dict(join="average", window=64, cover="all"),
    "sum, no window": dict(join="sum", window=0, sinks=2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *COARSE], ids=str)
@pytest.mark.parametrize(
    ("dim", "features", "heads", "per_key_head"),
    [(64, 64, (4, 2), False), (128, 128, (8, 1), True), (80, 96, (2, 1), False), (256, 256, (4, 4), True)],
)
@pytest.mark.parametrize("name", STEPS)
def test_decoding_equals_the_definition(name, dim, features, heads, per_key_head, dtype, sizes_by_turns):  # noqa: F811
    x = Inputs(heads, 200, 2, per_key_head, dim=dim, features=features).like(dtype, DEVICE)
    exact, options = exactly(x), on_device({**STEPS[name], "log_scale": x.log_scale})
    mask = torch.ones(2, 200, dtype=torch.bool, device=DEVICE)
    mask[0, :90], mask[1, 130] = False, False
    expected = []
    for row in (0, 1):
        real = mask[row].nonzero()[:, 0]
        alone = [z[row : row + 1, :, real] for z in exact.cut(0, 200)]
        expected.append(hybrid_attention(*alone, exact.mix, kernel="reference", **options)[0])
    _, state = hybrid_attention(
        *x.cut(0, 100), x.mix, key_mask=mask[:, :100], output_state=True, kernel="chunked", **options
    )
    for turns in (FEW, MANY):
        sizes_by_turns(turns)
        y, _ = decode(x, state, 100, 200, mask, **options)
        for row, found in enumerate(y):
            now = mask[row, 100:]
            close(found[:, now], expected[row][:, -int(now.sum()) :], COARSE.get(dtype, 1e-5))


@pytest.mark.parametrize("made", [False, True], ids=["features given", "features made"])
@pytest.mark.parametrize("batch", [1, 3, 64, 256])
@pytest.mark.parametrize("join", ["shared", "replace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decodes_under_a_graph(dtype, join, batch, made, monkeypatch):
    """One token is captured and replayed; beside it the eager step in torch. A row rests at times."""
    auto_is_gpu(monkeypatch, False)
    stop = 160 if batch < 256 else 80  # keys enter the sums 16 at once
    x = Inputs((8, 2), stop, batch, dim=128, features=128).like(dtype, DEVICE)
    if made:
        x.by_maps(64)
    else:
        exactly(x)
    options = on_device(dict(window=48, sinks=2, join=join, log_scale=x.log_scale))
    _, eager = hybrid_attention(*x.cut(0, 60), x.mix, output_state=True, kernel="chunked", **options)
    _, state = decode(x, eager, 60, 61, **options)
    eager = hybrid_attention(*x.cut(0, 61), x.mix, output_state=True, kernel="chunked", **options)[1]
    fixed = [z.clone() for z in x.cut(61, 62)[:4]]
    real = torch.ones(batch, 1, dtype=torch.bool, device=DEVICE)

    def token():
        q, k, v, phi_q = fixed
        given = replace(x.maps[0], make=None) if made else phi_q
        return hybrid_attention_step(q, k, v, given, x.features, x.mix, state, kernel="gpu", key_mask=real, **options)

    begun = {n: t.clone() for n, t in state.tensors.items()}
    again = captured(token)
    for n, t in begun.items():
        state.tensors[n].copy_(t)
    for t in range(61, stop):
        for into, z in zip(fixed, x.cut(t, t + 1)[:4], strict=True):
            into.copy_(z)
        real.fill_(True)
        real[0, 0] = t % 7 != 0
        y, after = again()
        assert after is state
        q, k, v, phi_q, _ = x.cut(t, t + 1)
        expected, eager = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, eager, key_mask=real, **options)
        close(y, expected.double(), COARSE.get(dtype, 2e-5))
    assert torch.equal(state.positions.long(), eager.positions)


@pytest.mark.parametrize("join", ["shared", "replace"])
@pytest.mark.parametrize("batch", [1, 41])
def test_decodes_many_tokens_in_one_graph(batch, join):
    """Launches of one state follow one another with nothing between, and each begins while the one ahead ends: it has to find
    what that wrote. As of few rows and as of many."""
    x = Inputs((8, 2), 93, batch, dim=128, features=128).like(torch.bfloat16, DEVICE).by_maps(64)
    options = on_device(dict(window=16, sinks=2, join=join, log_scale=x.log_scale))
    _, state = hybrid_attention(*x.cut(0, 60), x.mix, output_state=True, kernel="chunked", **options)
    _, state = decode(x, state, 60, 61, **options)
    given = [[z.clone() for z in x.cut(t, t + 1)[:3]] for t in range(61, 77)]
    maps = [replace(m, make=None) for m in x.maps]

    def tokens():
        return [
            hybrid_attention_step(*one, maps[0], maps[1], x.mix, state, kernel="gpu", **options)[0] for one in given
        ]

    begun = {n: t.clone() for n, t in state.tensors.items()}
    again = captured(tokens)
    for n, t in begun.items():
        state.tensors[n].copy_(t)
    found = []
    for start in (61, 77):
        for t, one in enumerate(given, start):
            for into, z in zip(one, x.cut(t, t + 1)[:3], strict=True):
                into.copy_(z)
        found += [z.clone() for z in again()]
    exact = x.like(torch.float64, DEVICE)
    expected = hybrid_attention(*exact.cut(0, 93), exact.mix, kernel="reference", **options)
    close(torch.cat(found, 2), expected[:, :, 61:], COARSE[torch.bfloat16])


def test_a_batch_of_256_decodes():
    x = Inputs((4, 1), 100, 256, dim=64, features=64).like(torch.bfloat16, DEVICE)
    exact, options = exactly(x), dict(window=32)
    expected = hybrid_attention(*exact.cut(0, 100), exact.mix, kernel="chunked", **options)
    _, state = hybrid_attention(*x.cut(0, 50), x.mix, output_state=True, kernel="chunked", **options)
    y, state = decode(x, state, 50, 100, **options)
    close(y, expected[:, :, 50:], COARSE[torch.bfloat16])
    assert state.held.fold == FOLD and state.counts.shape[2] == 1


def test_a_state_after_long_decoding_is_the_chunked_forms():
    x = Inputs((4, 2), 400, 1, dim=128, features=128).like(torch.float32, DEVICE)
    exact, options = exactly(x), dict(window=64, sinks=4, join="absolute", log_scale=x.log_scale)
    _, state = hybrid_attention(*x.cut(0, 100), x.mix, output_state=True, kernel="chunked", **options)
    _, state = decode(x, state, 100, 400, **options)
    same(standing(state, x.features), exact, 400, **options)
