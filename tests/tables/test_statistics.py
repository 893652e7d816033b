"""Intervals cover, pairing pays, seeds count, Shapley values add up, ratios know when to be silent."""

import math
from typing import Any

import numpy as np
import pytest

from recipelin.statistics import (
    RESAMPLES,
    Draws,
    Interval,
    compare,
    gap,
    holm,
    mean,
    mean_interval,
    recovery,
    retention,
    shapley,
)

T4 = 2.776  # 97.5 % of t with 4 degrees of freedom


def constant(value: float) -> Draws:
    return Draws(value, np.full(RESAMPLES, value), 10)


def test_interval_covers_the_true_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(400):
        found = mean_interval(rng.normal(3.0, 2.0, (1, 80)), metric=f"m{i % 4}")
        hits += found.low <= 3.0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_interval_is_that_of_the_normal_approximation_and_repeats() -> None:
    scores = np.random.default_rng(2).normal(0.0, 1.0, (1, 1000))
    found = mean_interval(scores, metric="m")
    assert found.half == pytest.approx(1.96 * scores.std() / math.sqrt(1000), rel=0.1)
    assert found == mean_interval(scores, metric="m")
    assert found.n == 1000 and found.value == scores.mean()


def test_metrics_have_their_own_resamples() -> None:
    scores = np.random.default_rng(3).normal(0.0, 1.0, (1, 50))
    assert not np.array_equal(mean(scores, metric="a").draws, mean(scores, metric="b").draws)


def test_paired_differences_beat_unpaired_ones() -> None:
    rng = np.random.default_rng(4)
    shared = rng.normal(0, 1, 200)
    a, b = shared + rng.normal(0, 0.05, 200) + 0.1, shared + rng.normal(0, 0.05, 200)
    paired = (mean(a[None], metric="m") - mean(b[None], metric="m")).interval()
    unpaired = (mean(a[None], metric="m") - mean(b[None], metric="other")).interval()
    assert paired.half < unpaired.half / 5
    assert paired.value == pytest.approx(unpaired.value)
    assert compare(paired, 0.01) == "differs" and compare(unpaired, 0.01) == "undecided"


def test_seeds_that_disagree_widen_the_interval() -> None:
    items = np.random.default_rng(5).normal(0, 0.1, 300)
    agreeing = np.stack([items] * 5)
    disagreeing = agreeing + np.array([-1.0, -0.5, 0.0, 0.5, 1.0])[:, None]
    one = mean_interval(items[None], metric="m").half
    # Five students alike are no more items than one student.
    assert mean_interval(agreeing, metric="m").half == pytest.approx(one, rel=0.1)
    spread = np.std([-1, -0.5, 0, 0.5, 1], ddof=1) / math.sqrt(5)
    assert mean_interval(disagreeing, metric="m").half == pytest.approx(T4 * spread, rel=0.05)


@pytest.mark.parametrize(
    ("seed_sd", "item_sd", "noise", "least", "most"),
    [
        (1.0, 0.0, 0.01, 0.92, 0.98),  # seeds alone: the textbook's t; resampling five seeds covers 84 %
        (0.2, 1.0, 0.3, 0.92, 0.99),
        (0.0, 1.0, 1.0, 0.92, 1.0),  # the noise of single answers is in both parts: too wide, never too narrow
    ],
)
def test_five_seeds_cover_the_true_mean(
    seed_sd: float, item_sd: float, noise: float, least: float, most: float, record_property: Any
) -> None:
    """300 data sets of 5 students on 60 items; the p of the true mean is under 0.05 as often as the interval misses it."""
    rng = np.random.default_rng(11)
    found = [
        mean(
            rng.normal(0, seed_sd, (5, 1)) + rng.normal(0, item_sd, 60) + rng.normal(0, noise, (5, 60)),
            metric="m",
            seeds=(1, 2, 3, 4, 5),
        )
        for _ in range(300)
    ]
    covered = sum(d.interval().low <= 0 <= d.interval().high for d in found) / 300
    rejected = sum(d.p_value() < 0.05 for d in found) / 300
    record_property(
        f"coverage of 95 % with 5 seeds, sd of seeds {seed_sd:g}, items {item_sd:g}, noise {noise:g}", covered
    )
    assert least <= covered <= most
    assert rejected == pytest.approx(1 - covered, abs=0.01)


def test_the_same_seeds_are_paired_and_others_are_not() -> None:
    items, students = np.zeros(40), np.array([-1.0, -0.4, 0.1, 0.5, 0.8])[:, None]
    scores = students + items

    def difference(seeds: tuple[int, ...]) -> Interval:
        return (
            mean(scores + 0.3, metric="m", seeds=(1, 2, 3, 4, 5)) - mean(scores, metric="m", seeds=seeds)
        ).interval()

    assert difference((1, 2, 3, 4, 5)).half == pytest.approx(0, abs=1e-9)
    spread = np.std(students, ddof=1) / math.sqrt(5)
    assert difference((6, 7, 8, 9, 10)).half == pytest.approx(T4 * spread * math.sqrt(2), rel=0.1)


def test_holm_by_hand() -> None:
    """0.01 x 4, then 0.02 x 3 = 0.06, then 0.03 x 2 = 0.06 (not below the one before), then 0.9 x 1; at most 1."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx((0.06, 0.04, 0.9, 0.06))
    assert holm([0.6, 0.7]) == (1.0, 1.0) and holm([]) == ()
    assert holm([0.01, 0.01, 0.04]) == pytest.approx((0.03, 0.03, 0.04))


def test_the_bootstrap_p() -> None:
    """Counted by hand, with what was observed as one more draw; a draw of 0, or one that does not exist, is on both sides."""

    def p(*draws: float) -> float:
        return Draws(1.0, np.array(draws), 10).p_value()

    assert p(*[1.0] * 9) == pytest.approx(2 / 10)
    assert p(-1.0, *[1.0] * 8) == pytest.approx(4 / 10) and p(1.0, *[-1.0] * 8) == pytest.approx(4 / 10)
    assert p(0.0, *[1.0] * 8) == pytest.approx(4 / 10) and p(math.nan, *[1.0] * 8) == pytest.approx(4 / 10)
    assert p(*[0.0] * 9) == 1.0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_or_all_wrong_is_no_certainty(value: float) -> None:
    found = mean_interval(np.full((1, 48), value), metric="m")
    assert found.half == pytest.approx(1.96**2 / (48 + 1.96**2), abs=1e-4)  # Wilson
    assert min(found.low, found.high) >= 0 and max(found.low, found.high) <= 1


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (-0.005, 0.0, 0.009, "equal"),
        (0.002, 0.005, 0.009, "equal"),
        (0.002, 0.02, 0.04, "differs"),
        (-0.04, -0.02, -0.002, "differs"),
        (-0.01, 0.02, 0.05, "undecided"),
        (0.001, 0.008, 0.015, "undecided"),  # excludes 0, but its point is within the margin
        (-0.05, 0.0, 0.05, "undecided"),  # no difference seen is not equality
    ],
)
def test_comparison_against_the_margin(low: float, value: float, high: float, said: str) -> None:
    assert compare(Interval(value, low, high, 100), 0.01) == said


def test_recovery_plain_and_corrected() -> None:
    assert recovery(constant(0.4), constant(0.5)).point == pytest.approx(0.8)  # type: ignore[union-attr]
    assert recovery(constant(0.4), constant(0.5), 0.25).point == pytest.approx(0.6)  # type: ignore[union-attr]


def test_recovery_is_silent_where_the_teacher_touches_chance() -> None:
    rng = np.random.default_rng(6)
    teacher = mean((rng.uniform(size=(1, 100)) < 0.29).astype(float), metric="m")
    assert teacher.point > 0.25 and teacher.interval().low < 0.25
    assert recovery(teacher, teacher, 0.25) is None
    assert recovery(teacher, teacher) is not None


def test_retention_and_gap_in_log_loss() -> None:
    """Figures of a prototype: none 6.58, linear 6.81, window 3.17, hybrid 3.12, teacher 2.97 nats."""
    none, linear, window, hybrid, teacher = (constant(-x) for x in (6.58, 6.81, 3.17, 3.12, 2.97))
    assert retention(linear, none, teacher).point == pytest.approx((6.58 - 6.81) / (6.58 - 2.97))  # type: ignore[union-attr]
    assert gap(hybrid, window, teacher).point == pytest.approx(0.25)  # type: ignore[union-attr]
    assert gap(constant(-3.3), window, teacher).point < 0  # type: ignore[union-attr]
    assert gap(hybrid, window, window) is None


def test_shapley_values_of_a_known_game_add_up() -> None:
    worth = {"": 0.0, "w": 6.0, "l": 1.0, "s": 0.0, "lw": 9.0, "sw": 6.0, "ls": 1.0, "lsw": 10.0}
    values = {frozenset(k): constant(v) for k, v in worth.items()}
    found = shapley(values, ("w", "l", "s"))
    # By hand over the orders wls wsl lws lsw swl slw: w 6 6 8 9 6 9, l 3 4 1 1 4 1, s 1 0 1 0 0 0.
    assert {k: v.point for k, v in found.items()} == pytest.approx({"w": 44 / 6, "l": 14 / 6, "s": 2 / 6})
    assert sum(v.point for v in found.values()) == pytest.approx(10.0)


def test_shapley_needs_every_subset() -> None:
    with pytest.raises(KeyError):
        shapley({frozenset(): constant(0.0), frozenset("wl"): constant(1.0)}, ("w", "l"))
