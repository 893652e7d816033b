"""The softmax mass outside a window, against whole rows of weights in float64."""

import importlib

import pytest
import torch

from recipelin_kernels import outside_mass

module = importlib.import_module("recipelin_kernels.outside_mass")  # its name in the package is the function


def dense(q, k, real, *, window, shape="sliding", sinks=0, reach=None, teacher_window=None):
    """Pair by pair."""
    batch, heads, length, width = q.shape
    found = torch.zeros(batch, heads, length, dtype=torch.float64)
    for b in range(batch):
        places = real[b].nonzero().flatten().tolist()
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1])]
            for p, i in enumerate(places):
                seen = [n for n in range(p + 1) if teacher_window is None or p - n < teacher_window]
                scores = torch.stack([q[b, h, i] @ keys[places[n]] for n in seen]) / width**0.5
                for n, weight in zip(seen, scores.softmax(0).tolist(), strict=True):
                    near = p - n < window if shape == "sliding" else p // window - n // window <= 1
                    near = near and (reach is None or p - n < reach)
                    found[b, h, i] += 0 if near or n < sinks else weight
    return found


CASES = [
    {"window": 1}, {"window": 5}, {"window": 5, "sinks": 2}, {"window": 4, "shape": "terraced"},
    {"window": 4, "shape": "terraced", "sinks": 3}, {"window": 5, "teacher_window": 9},
    {"window": 7, "reach": 4, "teacher_window": 4, "sinks": 1}, {"window": 99},
]  # fmt: skip


@pytest.mark.parametrize("pads", [None, "left", "right"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_it_is_the_sum_over_keys_outside(options, pads, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 19, 8, dtype=torch.float64), torch.randn(2, 2, 19, 8, dtype=torch.float64)
    real = torch.ones(2, 19, dtype=torch.bool)
    if pads:
        real[0, slice(0, 6) if pads == "left" else slice(13, 19)] = False
    expected = dense(q, k, real, **options)
    for x in (q, k):
        x[~real[:, None].expand(-1, x.shape[1], -1)] = torch.nan
    monkeypatch.setattr(module, "WEIGHTS", 2 * 4 * 19 * 7)  # blocks of seven queries
    found = outside_mass(q, k, key_mask=real if pads else None, **options)
    assert found.dtype == torch.float64 and (found - expected).abs().max() < 1e-12


def test_segments_begin_anew_and_a_tiny_mass_is_not_rounded_away():
    q = torch.zeros(1, 1, 10, 4)
    segments = torch.tensor([[0] * 4 + [1] * 6])
    found = outside_mass(q, q, window=2, segment_ids=segments)[0, 0]
    expected = [0, 0, 1 / 3, 2 / 4, 0, 0, 1 / 3, 2 / 4, 3 / 5, 4 / 6]
    assert torch.allclose(found, torch.tensor(expected))
    q[..., 0], k = 1.0, torch.zeros(1, 1, 10, 4)
    k[0, 0, 9, 0] = 40.0  # the last key takes all but 9 exp(-20) of the last query
    assert float(outside_mass(q, k, window=1)[0, 0, 9]) == pytest.approx(9 * 2.0611536e-9, rel=1e-5)


def test_the_published_window():
    """Rows of at most w tokens lie in it whole; else blocks end with the row."""
    q = torch.zeros(1, 1, 6, 4)
    published = {"shape": "terraced", "compat": "lolcats_tk_v1"}
    assert outside_mass(q, q, window=6, **published).abs().max() == 0
    found = outside_mass(q, q, window=4, **published)[0, 0]  # blocks 0 1 | 2 3 4 5
    assert found.tolist() == [0.0] * 6
    found = outside_mass(q, q, window=2, shape="terraced")[0, 0]  # 0 1 | 2 3 | 4 5
    assert torch.allclose(found, torch.tensor([0, 0, 0, 0, 2 / 5, 2 / 6]))
    found = outside_mass(q[:, :, :5], q[:, :, :5], window=2, **published)[0, 0]  # 0 | 1 2 | 3 4
    assert torch.allclose(found, torch.tensor([0, 0, 0, 1 / 4, 1 / 5]))


def test_what_does_not_fit_is_named():
    q = torch.zeros(1, 2, 6, 4)
    for given, message in (
        ({"k": q[:, :, 1:]}, r"k \(1, 2, 5, 4\): expected \(1, 2, 6, 4\)"),
        ({"sinks": -1}, "sinks=-1: expected integers of at least 0"),
        ({"teacher_window": 0}, "teacher_window=0: expected an integer of at least 1"),
        ({"shape": "slide"}, "did you mean 'sliding'"),
    ):
        with pytest.raises(ValueError, match=message):
            outside_mass(**{"q": q, "k": q, "window": 2} | given)
