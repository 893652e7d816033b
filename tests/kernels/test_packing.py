"""A row packed by cumulative lengths is its sequences, each alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from recipelin_kernels import (
    gated_delta_rule,
    hybrid_attention,
    log_scale_closed_form,
    outside_mass,
    segment_ids_of,
    teacher_attention,
    weight_transfer_loss,
)

ENDS = (0, 5, 5, 22, 41)  # one sequence is empty
CUTS = [slice(a, b) for a, b in itertools.pairwise(ENDS) if b > a]


@pytest.mark.parametrize("kernel", ["reference", "chunked", "cpu"])
def test_a_packed_row_is_its_sequences(kernel):
    make = torch.Generator().manual_seed(0)
    dtype = torch.float32 if kernel == "cpu" else torch.float64
    q, k, v = (torch.randn(1, 2, ENDS[-1], 8, generator=make, dtype=dtype) for _ in range(3))
    phi_q, phi_k = (torch.randn(1, 2, ENDS[-1], 6, generator=make, dtype=dtype).softmax(-1) for _ in range(2))
    mix, options = torch.tensor([0.3, 0.6], dtype=dtype), {"window": 4, "sinks": 2, "kernel": kernel}
    packed = segment_ids_of(torch.tensor(ENDS, dtype=torch.int32))
    assert packed.shape == (1, ENDS[-1]) and packed.dtype == torch.int64

    def both(*x, **where):
        y = hybrid_attention(*x, mix, **where, **options)
        lse = teacher_attention(*x[:3], **where)[1]
        transfer = {"target": "hybrid", "mix": mix, **where, **options}
        return y, lse, weight_transfer_loss(x[0], x[1], x[3], x[4], lse, **transfer) * x[0].shape[2]

    y, lse, loss = both(q, k, v, phi_q, phi_k, segment_ids=packed)
    alone = [both(*(x[:, :, cut] for x in (q, k, v, phi_q, phi_k))) for cut in CUTS]
    tolerance = 1e-5 if kernel == "cpu" else 1e-12
    for one, parts in ((y, 0), (lse, 1)):
        assert float((one - torch.cat([x[parts] for x in alone], 2)).abs().max()) < tolerance
    assert float(loss) == pytest.approx(float(sum(x[2] for x in alone)), rel=tolerance)


def test_the_gated_delta_rule_takes_it_too():
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, ENDS[-1], 8, generator=make) for _ in range(3))
    g, beta = -torch.rand(1, 2, ENDS[-1], generator=make), torch.rand(1, 2, ENDS[-1], generator=make)
    x = (q, F.normalize(k, dim=-1), v, g, beta)
    packed = gated_delta_rule(*x, segment_ids=segment_ids_of(torch.tensor(ENDS)))
    parts = [gated_delta_rule(*(t[:, :, cut] for t in x)) for cut in CUTS]
    assert float((packed - torch.cat(parts, 2)).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"segment_ids": torch.zeros(1, 4, dtype=torch.long)}, r"segment_ids \(1, 4\): expected \(2, 4\)"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, r"key_mask \(2, 5\): expected \(2, 4\)"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.long)}, r"key_mask of torch.int64: expected bool"),
    ],
)
def test_masks_of_other_sizes_and_kinds_are_refused(where, message):
    q, phi, mix = torch.randn(2, 1, 4, 8), torch.rand(2, 1, 4, 6), torch.ones(1)
    lse = teacher_attention(q, q, q)[1]
    for call in (
        lambda: hybrid_attention(q, q, q, phi, phi, mix, window=2, **where),
        lambda: weight_transfer_loss(q, q, phi, phi, lse, window=2, **where),
        lambda: teacher_attention(q, q, q, **where),
        lambda: outside_mass(q, q, window=2, **where),
        lambda: log_scale_closed_form(q, q, phi, phi, lse, window=2, **where),
        lambda: gated_delta_rule(q, q, q, -phi[..., 0], phi[..., 0], **where),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([0.0, 3.0]), r"float32 \(2,\): expected integers \[n \+ 1\]"),
        (torch.tensor([True]), r"bool \(1,\): expected integers"),
        (torch.tensor([[0, 3]]), r"\(1, 2\): expected integers"),
        (torch.tensor([], dtype=torch.long), r"\(0,\): expected integers"),
        (torch.tensor([1, 3]), "1 follows 0; expected 0, then the ends"),
        (torch.tensor([0, 5, 3]), "3 follows 5; expected 0"),
    ],
)
def test_other_lengths_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        segment_ids_of(given)


def test_no_sequences():
    assert segment_ids_of(torch.tensor([0])).shape == (1, 0)
