"""torch.func and forward-mode derivatives: the definition takes part in them, and the others say so."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from recipelin_kernels import hybrid_attention, hybrid_attention_step, teacher_attention, weight_transfer_loss
from recipelin_kernels.hybrid import cpu_features
from tests.kernels.hybrid_inputs import EXACT, Inputs

REFUSED = r"takes no part in torch\.func .*kernel='reference' does"


def attention(x: Inputs, kernel: str, **options):
    """y as a function of q, k and v."""
    options = {"window": 5, "sinks": 2, "kernel": kernel, **options}
    return lambda q, k, v: hybrid_attention(q, k, v, x.phi_q, x.phi_k, x.mix, **options)


def dual(function, *given):
    """As jvp, without torch.func."""
    with forward_ad.dual_level():
        y = function(*(forward_ad.make_dual(t, t.cos()) for t in given))
        return forward_ad.unpack_dual(y).tangent


TRANSFORMS = {
    "vmap": lambda f, *given: torch.func.vmap(f)(*(torch.stack((t, -t)) for t in given)),
    "grad": lambda f, *given: torch.func.grad(lambda *x: f(*x).cos().sum(), (0, 1, 2))(*given),
    "jvp": lambda f, *given: torch.func.jvp(f, given, tuple(t.cos() for t in given))[1],
    "dual": dual,
    "dual, of what learns": lambda f, *given: dual(f, *(t.detach().requires_grad_() for t in given)),
}


@pytest.mark.parametrize("window", [5, 60])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kernel", ["auto", "cpu", "chunked"])
def test_the_kernels_refuse(kernel, transform, window):
    x = Inputs(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"^hybrid_attention: {REFUSED}"):
        TRANSFORMS[transform](attention(x, kernel, window=window), x.q, x.k, x.v)


def test_the_definition_takes_part():
    x = Inputs()
    given, f = (x.q, x.k, x.v), attention(x, "reference")
    both = TRANSFORMS["vmap"](f, *given)
    assert (both - torch.stack((f(*given), f(*(-t for t in given))))).abs().max() < EXACT
    leaves = [t.detach().requires_grad_() for t in given]
    y = attention(x, "chunked")(*leaves)
    found = torch.autograd.grad(y.cos().sum(), leaves, retain_graph=True)
    assert all((a - b).abs().max() < EXACT for a, b in zip(TRANSFORMS["grad"](f, *given), found, strict=True))
    back = torch.autograd.grad(y, leaves, y.detach().sin())
    expected = sum((g * t.cos()).sum() for g, t in zip(back, given, strict=True))  # sin(y) . J t
    for name in ("jvp", "dual", "dual, of what learns"):
        tangent = TRANSFORMS[name](f, *given).detach()
        assert ((y.detach().sin() * tangent).sum() - expected).abs() < 1e-8


def test_a_token_is_refused_and_the_next_one_is_as_ever():
    """Also one that is like the last one, whose options are not looked at again."""
    x = Inputs((4, 2), 30, dtype=torch.float32, dim=16).by_maps(16)
    options = {"window": 5}
    with torch.no_grad():
        whole = hybrid_attention(*x.cut(0, 30), x.mix, **options)
        _, state = hybrid_attention(*x.cut(0, 20), x.mix, output_state=True, **options)
        for t in range(20, 30):
            q, k, v = x.cut(t, t + 1)[:3]

            def token(q, k=k, v=v, state=state, maps=x.maps):
                return hybrid_attention_step(q, k, v, *maps, x.mix, state, **options)[0]

            def of_weight(weight, token=token, q=q):
                return token(q, maps=(replace(x.maps[0], weight=weight), x.maps[1]))

            for transform in ("vmap", "jvp", "dual"):
                for function, of in ((token, q), (of_weight, x.maps[0].weight)):
                    with pytest.raises(RuntimeError, match=REFUSED):
                        TRANSFORMS[transform](function, of)
            with forward_ad.dual_level():  # of others
                y, state = hybrid_attention_step(q, k, v, *x.maps, x.mix, state, **options)
            assert (y - whole[:, :, t : t + 1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["chunked", "cpu", "transfer", "features"])
def test_batched_gradients_are_refused(name):
    x = Inputs(dtype=torch.float32, dim=16).by_maps(16)
    leaf = x.maps[0].weight.detach().requires_grad_() if name == "features" else x.phi_q.detach().requires_grad_()
    if name == "features":
        y = cpu_features.softmax_features_cpu(x.q, leaf, 1e-12)
    elif name == "transfer":
        y = weight_transfer_loss(x.q, x.k, leaf, x.phi_k, teacher_attention(x.q, x.k, x.v)[1], kernel="cpu")
    else:
        y = hybrid_attention(x.q, x.k, x.v, leaf, x.phi_k, x.mix, window=5, kernel=name)
    with pytest.raises(RuntimeError, match=f"^backward: {REFUSED}"):
        torch.autograd.grad(y, leaf, torch.stack((y, y)).detach(), is_grads_batched=True)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if "learns" not in t])
def test_losses_and_features_refuse(transform):
    x = Inputs(dtype=torch.float32, dim=16).by_maps(16)
    lse = teacher_attention(x.q, x.k, x.v)[1]
    run = TRANSFORMS[transform]
    for kernel in ("cpu", "chunked"):
        with pytest.raises(RuntimeError, match=f"^weight_transfer_loss: {REFUSED}"):
            run(
                lambda phi_q, phi_k, lse, kernel=kernel: weight_transfer_loss(
                    x.q, x.k, phi_q, phi_k, lse, kernel=kernel
                ),
                *(x.phi_q, x.phi_k, lse),
            )
    with pytest.raises(RuntimeError, match=f"^softmax features in C: {REFUSED}"):
        run(lambda q, *_: cpu_features.softmax_features_cpu(q, x.maps[0].weight, 1e-12), x.q, x.k, x.v)


@pytest.mark.parametrize("window", [5, 60])
def test_what_make_fx_records_is_the_operator(window):
    """A dispatch mode sees torch's operations alone: no C kernel is taken beneath it, and nothing is decided by numbers."""
    x = Inputs(length=20).like(torch.float32)
    given = attention(x, "auto", window=window, sinks=0)
    with torch.no_grad():
        graph = make_fx(given)(x.q, x.k, x.v)
        other = x.q.cos(), x.k.sin(), x.v + 1
        assert (graph(*other) - given(*other)).abs().max() < 2e-6


@pytest.mark.parametrize("name", ["key_mask", "window_keep"])
def test_masks_of_a_transform_are_refused_too(name):
    x = Inputs().like(torch.float32)
    mask = torch.ones(3, 2, {"key_mask": x.k.shape[2], "window_keep": x.q.shape[1]}[name], dtype=torch.bool)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.vmap(lambda m: attention(x, "auto", **{name: m})(x.q, x.k, x.v))(mask)
