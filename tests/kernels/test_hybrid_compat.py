"""`compat: lolcats_tk_v1`: the three defects of LoLCATs' terraced window as measured in facts/peers.md A.6, w = 64."""

import pytest
import torch
from torch import Tensor

from recipelin_kernels import hybrid_attention, hybrid_attention_step, teacher_attention, weight_transfer_loss
from tests.kernels.hybrid_inputs import EXACT, Inputs, attend

W = 64
OURS = {"window": W, "shape": "terraced"}
THEIRS = {**OURS, "compat": "lolcats_tk_v1"}


def published_masks(length: int) -> tuple[Tensor, Tensor]:
    """(softmax, linear) [T,T] bool. Whole blocks, each counted once for itself and once for the block that follows it,
    the first for the last; cut to the last T rows and columns; the linear mask is what 1 - count leaves unequal 0."""
    blocks = -(-length // W)
    block = torch.arange(blocks * W) // W
    count = (block[:, None] == block).long() + ((block[:, None] - 1) % blocks == block).long()
    count = count[-length:, -length:]
    return count.tril() != 0, (1 - count).tril() != 0


def published(x: Inputs, soft: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """(y, weights) of the `shared` join under two masks."""
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (x.k, x.v))
    scores = (x.q @ k.mT / x.q.shape[-1] ** 0.5).masked_fill(~soft, -torch.inf)
    a = x.mix[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    weights = a + (x.phi_q @ x.phi_k.mT) * linear
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v, weights


def test_the_published_masks_are_the_measured_ones():
    both = {}
    for length in (16, 64, 65, 100, 256):
        soft, linear = published_masks(length)
        assert torch.equal(soft | linear, torch.ones(length, length, dtype=torch.bool).tril())
        both[length] = int((soft & linear).sum())
    assert both == {16: 136, 64: 2080, 65: 0, 100: 0, 256: 0}


@pytest.mark.parametrize("kernel", ["reference", "chunked", "auto"])
@pytest.mark.parametrize("length", [1, 16, 64, 65, 100, 128, 200, 256])
def test_whole_rows_are_the_published_ones(length, kernel):
    x = Inputs((4, 2), length, batch=1)
    expected, _ = published(x, *published_masks(length))
    leaves = [t.clone().requires_grad_() for t in x.tensors()[:6]]
    y = hybrid_attention(*leaves, kernel=kernel, **THEIRS)
    assert (y - expected).abs().max() < EXACT
    for name, leaf in zip(Inputs.names, leaves, strict=False):
        setattr(x, name, leaf)
    soft, linear = published_masks(length)
    wanted = torch.autograd.grad(published(x, soft, linear)[0].square().sum(), leaves)
    for one, other in zip(torch.autograd.grad(y.square().sum(), leaves), wanted, strict=True):
        assert (one - other).abs().max() < 1e-9


@pytest.mark.parametrize("length", [16, 32, 64])
def test_short_rows_are_counted_twice(length):
    """The linear side holds keys that the window holds: y is not softmax. Ours is."""
    x = Inputs((4, 2), length, batch=1)
    y, parts = attend(x, components=True, **THEIRS)
    assert (parts.linear_share > 0).all()
    softmax, ours = attend(x, components=True, **OURS)
    assert not ours.linear_share.any() and (softmax - ours.window).abs().max() < EXACT
    assert (y - softmax).norm() > 0.1 * softmax.norm()  # 35 % measured with LoLCATs' own code at T = 32


def test_blocks_end_with_the_call():
    """The last output of a prefix against the same token of 256: differs but at lengths where the window is the same."""
    x = Inputs((4, 2), 256, batch=1)
    for options, differ in ((THEIRS, {63, 64, 200}), (OURS, set())):
        whole = attend(x, **options)
        for prefix in (63, 64, 65, 100, 128, 192, 200):
            last = hybrid_attention(*x.cut(0, prefix), x.mix, **options)[:, :, -1]
            error = float((last - whole[:, :, prefix - 1]).abs().max())
            assert error > 1e-3 if prefix in differ else error < EXACT, (options, prefix, error)


@pytest.mark.parametrize("prefill", [192, 40])
def test_decoding_slides(prefill):
    x = Inputs((4, 2), 200, batch=1)
    for options, whole, equal in (
        (THEIRS, attend(x, **THEIRS), False),
        (THEIRS, attend(x, window=W), True),  # one token at a time, it is a sliding window
        (OURS, attend(x, **OURS), True),
    ):
        _, state = hybrid_attention(*x.cut(0, prefill), x.mix, output_state=True, **options)
        found = []
        for t in range(prefill, 200):
            q, k, v, phi_q, _ = x.cut(t, t + 1)
            y, state = hybrid_attention_step(q, k, v, phi_q, x.features, x.mix, state, **options)
            found.append(y)
        error = float((torch.cat(found, 2) - whole[:, :, prefill:]).abs().max())
        assert error < EXACT if equal else error > 0.01


@pytest.mark.parametrize("length", [40, 100])
def test_weight_transfer_learns_the_published_row(length):
    x = Inputs((4, 2), length, batch=1)
    _, lse = teacher_attention(x.q, x.k, x.v)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (x.q @ x.k.repeat_interleave(2, 1).mT / x.q.shape[-1] ** 0.5).masked_fill(~causal, -torch.inf)
    _, weights = published(x, *published_masks(length))
    expected = -(scores.softmax(-1) * weights.clamp(min=1e-12).log()).sum(-1).mean()
    for kernel in ("reference", "chunked"):
        found = weight_transfer_loss(
            x.q, x.k, x.phi_q, x.phi_k, lse, target="hybrid", mix=x.mix, kernel=kernel, **THEIRS
        )
        assert abs(float(found - expected)) < EXACT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compat": "lolcats_tk_v2"}, "did you mean 'lolcats_tk_v1'"),
        ({"shape": "sliding"}, "shape='sliding', needs 'terraced'"),
        ({"cover": "all"}, "cover='all', needs 'outside'"),
        ({"join": "average", "sinks": 2}, "join='average', needs 'shared'; sinks=2, needs 0"),
        ({"window": 0}, "window=0"),
        ({"key_mask": torch.ones(1, 70, dtype=torch.bool)}, "takes no key_mask.*batch 1"),
        ({"segment_ids": torch.zeros(1, 70)}, "takes no segment_ids"),
    ],
)
def test_what_lolcats_does_not_have_is_refused(change, words):
    x = Inputs((4, 2), 70, batch=1)
    with pytest.raises(ValueError, match=words):
        attend(x, **{**THEIRS, **change})


def test_a_state_goes_on_one_token_at_a_time():
    x = Inputs((4, 2), 70, batch=1)
    _, state = attend(x, output_state=True, **THEIRS)
    with pytest.raises(ValueError, match="one token at a time, found 70"):
        attend(x, state=state, phi_k_fn=x.features, **THEIRS)
