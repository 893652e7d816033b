"""Feature maps against written-out formulas; their sizes, starts and refusals."""

import pytest
import torch
from pydantic import ValidationError

from recipelin.attention.hybrid import feature_map
from recipelin.attention.hybrid.config import FeatureMap
from recipelin.attention.hybrid.feature_map import HeadFeatureMap

MAPS = {
    "t2r": FeatureMap(name="t2r", activation="relu", bias="feature", init="random", width=2),
    "t2r, LoLCATs' bias": FeatureMap(name="t2r", activation="relu", bias="head", init="random"),
    "relu as LoLCATs": FeatureMap(activation="relu", features="as_lolcats", width=2),
    "elu as LoLCATs": FeatureMap(activation="elu", features="as_lolcats", width=2),
    "fixed": FeatureMap(name="fixed", activation="elu", width=2),
    "fixed exp": FeatureMap(name="fixed", activation="exp", width=2),
    "token scale": FeatureMap(width=2, token_scale=True),
    "fixed with token scale": FeatureMap(name="fixed", width=2, token_scale=True),
}


def formula(config: FeatureMap, made: HeadFeatureMap, x: torch.Tensor) -> torch.Tensor:
    """One head at a time."""
    heads = []
    group = made.heads // x.shape[1]
    for head in range(made.heads):
        own = x[:, head // group]
        u = own if config.name == "fixed" else own @ made.weight[head]
        if config.bias != "none":
            u = u + made.bias[head]
        one_sign = config.name == "t2r" or config.features == "as_lolcats"
        sides = [u] if one_sign else [u, -u]
        act = {
            "softmax": lambda y: y.softmax(-1),
            "exp": lambda y: (y - y.amax(-1, True)).exp(),
            "relu": torch.relu,
            "elu": lambda y: torch.nn.functional.elu(y) + 1,
        }[config.activation]
        phi = torch.cat([act(side) for side in sides], -1).clamp(min=1e-12)
        if config.token_scale:
            phi = phi * (own @ made.log_scale[head]).exp()[..., None]
        heads.append(phi)
    return torch.stack(heads, 1)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MAPS)
def test_maps_are_their_formulas(name, key_heads):
    config = MAPS[name]
    made = HeadFeatureMap(config, 4, 8, seed=3).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    x = torch.randn(2, key_heads, 7, 8, dtype=torch.float64, generator=generator)
    phi = made(x)
    assert phi.shape == (2, 4, 7, config.size(8))
    assert (phi - formula(config, made, x)).abs().max() < 1e-12
    assert sum(p.numel() for p in made.parameters()) == 4 * config.parameters(8)
    if config.name != "fixed" or config.token_scale:
        phi.sum().backward()
        for parameter_name, parameter in made.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_features_as_lolcats_are_half():
    """LoLCATs' code takes one sign of relu and elu: a confound of arXiv 2510.05901 Table 4, if it was used there."""
    for activation in ("relu", "elu"):
        matched = FeatureMap(activation=activation, width=2)
        halved = FeatureMap(activation=activation, width=2, features="as_lolcats")
        assert matched.size(128) == 256 and halved.size(128) == 128
        assert matched.parameters(128) == halved.parameters(128)


def test_token_scales_start_at_one_and_stay_finite():
    plain, scaled = (HeadFeatureMap(FeatureMap(token_scale=on), 4, 8, seed=0) for on in (False, True))
    x = torch.randn(1, 4, 5, 8)
    assert torch.equal(plain(x), scaled(x))
    with torch.no_grad():
        scaled.log_scale.fill_(1e4)
    assert torch.isfinite(scaled(x)).all() and torch.isfinite(scaled(x).square()).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "t2r"}, "found activation 'softmax', expected relu"),
        ({"name": "fixed", "width": 1}, "found width 1"),
        ({"bias": "head"}, "belongs to t2r; found hedgehog"),
        ({"features": "as_lolcats"}, "concerns the activations relu and elu of hedgehog only"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        FeatureMap(**fields)


def test_features_do_not_hang_on_how_many_rows_are_taken_at_once(monkeypatch):
    made = HeadFeatureMap(FeatureMap(width=2), 4, 8, seed=3)
    x = torch.randn(5, 1, 7, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for rows in (1, 60, 10**6):  # of 28: one, two and all rows of the batch
        monkeypatch.setattr(feature_map, "ROWS_AT_ONCE", rows)
        phi = made(x)
        found.append((phi, *torch.autograd.grad((phi * phi.detach().cos()).sum(), made.parameters())))
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


@pytest.mark.parametrize(("heads", "x_heads", "width", "columns"), [(4, 4, 32, 32), (4, 2, 48, 48), (6, 1, 16, 64)])
@pytest.mark.parametrize("clamp", [1e-12, 0.02])
def test_the_c_kernels_make_the_map_and_its_gradients(heads, x_heads, width, columns, clamp, monkeypatch):
    """Against float64, in rows of any number, with heads beside each other in memory; the same bits for any threads."""
    calls = []
    kernel = feature_map.cpu_features.softmax_features_cpu
    monkeypatch.setattr(feature_map.cpu_features, "softmax_features_cpu", lambda *a: calls.append(1) or kernel(*a))
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    config = FeatureMap(width=columns * 2 // width, clamp=clamp)
    made = HeadFeatureMap(config, heads, width, seed=3)
    for length in (1, 37, 64):
        x = torch.randn(3, length, x_heads, width, generator=generator).transpose(1, 2).requires_grad_()
        weight = torch.randn(3, heads, length, 2 * columns, generator=generator)
        found = {}
        for count in (1, 2):
            torch.set_num_threads(count)
            phi = made(x)
            found[count] = phi, *torch.autograd.grad(phi, [x, made.weight], weight)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, found[1], found[2]))
        for given in ([x], [made.weight]):  # the other one's gradient is not asked for
            alone = torch.autograd.grad(made(x), given, weight)[0]
            assert torch.equal(alone, found[1][1 if given[0] is x else 2])
        exact = x.detach().double().requires_grad_()
        other = HeadFeatureMap(config, heads, width, seed=3).double()
        phi = other(exact)
        expected = phi, *torch.autograd.grad(phi, [exact, other.weight], weight.double())
        for one, both in zip(found[1], expected, strict=True):
            assert (one.double() - both).norm() < 1e-6 * both.norm()
    assert len(calls) == 3 * 4
