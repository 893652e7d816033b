"""What a claim estimates; effects without items: read off curves, and how far seeds agree on layers (no torch)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from . import budget, layers
from .budget import Budget, Point
from .claimspec import Asked, Claim, Other
from .measures import kind_of
from .published import Source, TableError
from .records import CurveRow, Record
from .statistics import Draws, Interval, opened, over_seeds

RESAMPLES = 10_000  # the smallest p, 2/10,001, stays below 0.05 after Holm over 250 claims; with 2,000 over 50
SIGNS = (1.0, -1.0, -1.0, 1.0)  # of an effect's recipes

Unit = Literal["points", "nats", "%", "times"]
Bound = Literal["", "at least", "at most"]


@dataclass(frozen=True)
class Estimate:
    """An effect: its interval (of `times` in logarithms), its p, and the seeds of each recipe. `bound`: some seeds met a
    target at the first checkpoint already, or not at the last, so that the effect is no less, or no more, than this.
    """

    interval: Interval
    p: float
    unit: Unit
    seeds: tuple[tuple[int, ...], ...]
    bound: Bound = ""


def combined(drawn: Sequence[Draws]) -> Draws:
    """The effect of the values of its recipes, in their order."""
    found = drawn[0]
    for draws, sign in zip(drawn[1:], SIGNS[1:], strict=False):
        found = found + draws * sign
    return found


# --- curves -----------------------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """What one recipe's curves say: a value a seed, larger is better, of so many items; seeds of either bound."""

    values: tuple[float, ...]
    seeds: tuple[int, ...]
    unit: Unit
    n: int
    bounds: frozenset[Bound] = frozenset()


def from_curves(claim: Claim, sources: Sequence[Source]) -> Estimate | str:
    """An effect of a column that is read off curves, or why it cannot be tested.

    A curve keeps no items: the interval is over seeds alone, on items that are held fixed. A budget counts in logarithms,
    turned so that less is better: ln(other / own) is the mean over seeds of its logarithm.
    Raises TableError for a curve that the Records do not have.
    """
    effect = claim.effect
    assert effect.column is not None
    sides = [
        _read(claim, effect.column, name, source, value.states[0])
        for name, source, value in zip(effect.recipes, sources, effect.values, strict=True)
    ]
    seeds = tuple(side.seeds for side in sides)
    if min(map(len, seeds)) < 2:
        return "one seed; a curve has no items, and how much seeds differ is not known from one"
    drawn = [over_seeds(side.values, side.seeds, n=side.n, resamples=RESAMPLES) for side in sides]
    found = combined(drawn)
    if not isinstance(effect.minus, Other):
        if sides[0].unit == "nats":
            raise TableError(f"claim {claim.id}: a log-loss alone is compared with another recipe, not with a number")
        if isinstance(effect.minus, str):
            raise TableError(f"claim {claim.id}: a curve's chance is not kept; give a number")
        found = found.shift(-effect.minus)
    if len(set(seeds)) == 1 and sides[0].unit == "times" and float(found.draws.std()) < 1e-12 and found.point:
        return "the same budgets in every seed: the curve has too few points to tell them apart"
    # A budget that is smaller than known makes the value larger.
    bounds = {b if sign > 0 else _TURNED[b] for side, sign in zip(sides, SIGNS, strict=False) for b in side.bounds}
    if len(bounds) > 1:
        return "some seeds bound it from below and some from above: other targets, or more points, would decide"
    bound: Bound = bounds.pop() if bounds else ""
    return Estimate(found.interval(), found.p_value(), sides[0].unit, seeds, bound)


_TURNED: dict[Bound, Bound] = {"": "", "at least": "at most", "at most": "at least"}


def _read(claim: Claim, column: Asked, name: str, source: Source, state: str) -> _Read:
    values, bounds, unit, n = [], set[Bound](), "nats", 0
    for record in (p.record for p in source.chosen):
        rows = budget.curve(record, column, state)
        if len(several := budget.series(rows)) > 1:
            text = f"{column} of {name} fits {', '.join(several)}"
            raise TableError(f"claim {claim.id}: {text}; say which by suite, metric or stage")
        if not rows:
            raise TableError(f"claim {claim.id}: {record.name} has no curve of {column} in state {state!r}")
        n = rows[0].n
        if column.tokens_to is None:
            assert column.at_tokens is not None
            row = next((r for r in rows if r.tokens >= column.at_tokens), None)
            if row is None:
                text = f"{record.name} was measured up to {rows[-1].tokens:,} tokens, not at {column.at_tokens:,}"
                raise TableError(f"claim {claim.id}: {text}")
            unit = "nats" if kind_of(row) == "log_loss" else "points"
            values.append(row.value if row.higher_is_better else -row.value)
            continue
        took = _took(claim, column, record, rows)
        unit = "times"
        values.append(-math.log(took.tokens))
        if took.bound:
            bounds.add("at least" if took.bound == "at most" else "at most")
    seeds = tuple(p.record.seed for p in source.chosen)
    return _Read(tuple(values), seeds, unit, n, frozenset(bounds))  # type: ignore[arg-type]


def _took(claim: Claim, column: Asked, record: Record, rows: Sequence[CurveRow]) -> Budget:
    """Tokens or FLOPs to the target; above 0, so that it has a logarithm."""
    assert column.tokens_to is not None
    wanted = budget.target(record, column.tokens_to, rows)
    if wanted is None:
        text = f"{record.name} has no teacher on the suite of {column}, whose value the target multiplies"
        raise TableError(f"claim {claim.id}: {text}")
    points = [Point(r.tokens, r.value) for r in rows]
    found = budget.tokens_to(points, wanted, larger=rows[0].higher_is_better)
    before, each = 0.0, 1.0
    if column.counted != "stage":
        try:
            spent = budget.spent(record, rows[0].stage)
        except ValueError as error:
            raise TableError(f"claim {claim.id}: {error}") from error
        compute = column.counted == "compute"
        before, each = (spent.flops, spent.flops_a_token) if compute else (spent.tokens, 1.0)
    if before + found.tokens * each > 0:
        return Budget(before + found.tokens * each, found.bound)
    first = next((p.tokens for p in points if p.tokens > 0), None)
    if first is None:
        raise TableError(f"claim {claim.id}: {record.name} was measured before training only")
    return Budget(first * each, "at most")  # met before any training: less than any budget that was measured


# --- layers -----------------------------------------------------------------------------------------------------------


def agreement(claim: Claim, source: Source) -> Estimate | str:
    """How far the seeds of a recipe agree on the layers that stay softmax, less what random choices would.

    The share that two seeds have in common, mean over pairs, U (`layers.overlap`). Its interval is that of a mean over seeds
    of 2 a_s, a_s the share that seed s has in common with the others: the first-order part of a mean over pairs (Hoeffding
    1948). p: how often seeds that choose at random from the candidates agree as much, or as little, two-sided.
    Raises TableError for Records that chose nothing.
    """
    import numpy as np

    lists, candidates = [], 0
    for record in (p.record for p in source.chosen):
        report = next((s.report for s in record.steps if s.step == "select" and "scores" in s.report), None)
        if report is None:
            raise TableError(f"claim {claim.id}: {record.name} chose no layers by a score")
        kept, scores = report["layers"], report["scores"]
        assert isinstance(kept, list) and isinstance(scores, dict)
        lists.append(tuple(kept))
        candidates = len(scores)
    seeds = tuple(p.record.seed for p in source.chosen)
    observed = layers.overlap(lists)
    if observed is None:
        return "one seed has nothing to agree with"
    keep = len(lists[0])
    shared = [[len(set(a) & set(b)) / keep for b in lists] for a in lists]
    with_others = [(sum(row) - 1) / (len(lists) - 1) for row in shared]
    drawn = over_seeds(with_others, seeds, n=len(lists), resamples=RESAMPLES)
    spread = Draws(observed, observed + 2 * (drawn.draws - drawn.point), len(lists))
    interval = spread.interval()
    if interval.high - interval.low < 1e-9:
        interval = opened(interval, least=0.0, most=1.0)
    random = np.random.default_rng([2, len(lists), keep, candidates])
    order = random.random((RESAMPLES, len(lists), candidates)).argsort(-1).argsort(-1) < keep  # a random choice each
    times = order.sum(1)  # how many seeds keep a layer
    by_chance = (times * (times - 1)).sum(-1) / (keep * len(lists) * (len(lists) - 1))
    rarer = min(int((by_chance >= observed - 1e-9).sum()), int((by_chance <= observed + 1e-9).sum()))
    p = min(1.0, 2 * (1 + rarer) / (1 + RESAMPLES))
    chance = keep / candidates
    less = Interval(observed - chance, max(interval.low, 0.0) - chance, min(interval.high, 1.0) - chance, len(lists))
    return Estimate(less, p, "points", (seeds,))
