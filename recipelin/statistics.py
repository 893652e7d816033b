"""Means, paired differences and ratios with bootstrap intervals, recoveries, Shapley values and Holm (no torch).

A quantity is held as its point and its bootstrap draws, 2000 unless told otherwise. All states of one metric share the
resamples, so that differences and ratios are paired item by item; students of the same seeds are paired, too.
"""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
Z = 1.959963984540054  # of a normal 95 % interval
Comparison = Literal["equal", "differs", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval over n items."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """The longer side: what is printed after ±."""
        return max(self.high - self.value, self.value - self.low)


@dataclass(frozen=True, eq=False)
class Draws:
    """A quantity: its point estimate, its bootstrap draws [resamples], and the items behind it. A draw is NaN where the
    quantity does not exist (a ratio without a positive denominator).
    """

    point: float
    draws: "Array"
    n: int

    def __add__(self, other: "Draws") -> "Draws":
        return Draws(self.point + other.point, self.draws + other.draws, min(self.n, other.n))

    def __sub__(self, other: "Draws") -> "Draws":
        return self + other * -1.0

    def __mul__(self, factor: float) -> "Draws":
        return Draws(self.point * factor, self.draws * factor, self.n)

    def shift(self, constant: float) -> "Draws":
        """The quantity plus a constant."""
        return Draws(self.point + constant, self.draws + constant, self.n)

    def interval(self) -> Interval:
        """Percentile interval, ends taken outwards; a NaN draw counts as beyond either end."""
        import numpy as np

        tail, lost = (1 - LEVEL) / 2, np.isnan(self.draws)
        low = float(np.quantile(np.where(lost, -np.inf, self.draws), tail, method="lower"))
        high = float(np.quantile(np.where(lost, np.inf, self.draws), 1 - tail, method="higher"))
        return Interval(self.point, min(low, self.point), max(high, self.point), self.n)

    def p_value(self) -> float:
        """Two-sided bootstrap p of "it is 0": 2 (1 + draws on the rarer side of 0) / (1 + draws), at most 1.

        The + 1 counts what was observed as one draw (Davison and Hinkley 1997, Bootstrap Methods, 4.2), so it is never
        below 2 / (1 + draws). A draw of exactly 0, and a NaN, counts on both sides. It inverts the percentile interval.
        """
        rarer = min(int((~(self.draws > 0)).sum()), int((~(self.draws < 0)).sum()))
        return min(1.0, 2 * (1 + rarer) / (1 + len(self.draws)))


def interval_of(draws: Draws | None) -> Interval | None:
    """The interval of what may not exist."""
    return None if draws is None else draws.interval()


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p (Holm 1979, Scandinavian Journal of Statistics 6), in the order given.

    The i-th smallest of m (from 0) becomes max over j <= i of (m - j) p_(j), at most 1. Whatever the dependence, rejecting
    where it is below alpha wrongly rejects anything with probability at most alpha.
    """
    m, highest, found = len(p_values), 0.0, [0.0] * len(p_values)
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        found[index] = highest
    return tuple(found)


@lru_cache(maxsize=32)
def _weights(count: int, stream: int, resamples: int) -> "Array":
    """How often each of `count` units is drawn in each resample, as shares [resamples, count]. Seed 0, a stream a metric."""
    import numpy as np

    generator = np.random.default_rng([0, stream])
    return generator.multinomial(count, [1 / count] * count, size=resamples) / count


@lru_cache(maxsize=32)
def _seed_weights(seeds: tuple[int, ...], resamples: int) -> "Array":
    """What each of k seeds adds to its share 1/k in each resample [resamples, k]; a row sums to 0, a stream the seeds.

    Resampling k seeds with replacement, as one resamples items, fails for few: its variance is (k - 1)/k of what it should
    be, and its tails are those of a normal at best, where the spread itself is known from k values only (with 5 seeds, a
    nominal 95 % covers about 84 %). So a row is u chi / sqrt(k), u of k normal numbers less their mean over sqrt(k - 1), chi the
    root of (k - 1)/chi-squared with k - 1 degrees of freedom: a mean over seeds then varies as s/sqrt(k) times a t of k - 1
    degrees of freedom, the textbook's interval, exact for students that differ normally. Beside items it is added as a
    draw of its own (as Behrens and Fisher combine two means), so that t's tails count by the part that seeds have.
    """
    import numpy as np

    k = len(seeds)
    generator = np.random.default_rng([1, zlib.crc32(repr(seeds).encode())])
    normal = generator.normal(size=(resamples, k))
    normal -= normal.mean(axis=1, keepdims=True)
    return normal / np.sqrt(k * generator.chisquare(k - 1, size=(resamples, 1)))


def mean(
    scores: "Array",
    *,
    metric: str,
    weights: "Array | None" = None,
    strata: "NDArray[np.intp] | None" = None,
    seeds: tuple[int, ...] | None = None,
    resamples: int = RESAMPLES,
) -> Draws:
    """Mean of scores [seeds, items] with bootstrap draws; with `weights` [items], sum(weight x score) / sum(weight).

    Items are resampled jointly for all seeds, since every student meets the same ones; the means of the seeds (trained
    students, named by `seeds`, default 0, 1, ...) vary around theirs as `_seed_weights` says. The variance is that of
    items and of seeds; noise of a single answer is in both parts, so it is slightly too large, never too small (Owen 2007,
    The pigeonhole bootstrap, Annals of Applied Statistics 1, whose resampling of both counts it three times).
    `metric` names the stream of items: states of one metric share it, different metrics do not. Students of the same
    seeds share theirs in every metric and recipe, so that their differences are paired. A weight is drawn with its item: the
    ratio of two sums, each resampled, as for a corpus of documents of different lengths. `strata` [items]: items are
    resampled within their stratum, as the subtasks of a benchmark have fixed sizes.
    """
    import numpy as np

    items = scores.shape[1]
    seeds = tuple(range(len(scores))) if seeds is None else seeds
    stream = zlib.crc32(metric.encode())
    pooled = scores.mean(0) if len(scores) > 1 else scores[0]
    each = np.average(scores, axis=1, weights=weights)
    if weights is None and strata is None:
        draws = pooled @ _weights(items, stream, resamples).T
    else:
        weights = np.ones(items) if weights is None else weights
        strata = np.zeros(items, dtype=np.intp) if strata is None else strata
        draws, total = np.zeros(resamples), np.zeros(resamples)
        for stratum in np.unique(strata):
            mine = np.flatnonzero(strata == stratum)
            drawn = _weights(len(mine), stream + 2**33 * int(stratum), resamples) * len(mine)
            draws += drawn @ (pooled[mine] * weights[mine])
            total += drawn @ weights[mine]
        draws /= total
    if len(scores) > 1:
        draws = draws + _seed_weights(seeds, resamples) @ each
    return Draws(float(each.mean()), draws, items)


def over_seeds(values: Sequence[float], seeds: tuple[int, ...], *, n: int, resamples: int = RESAMPLES) -> Draws:
    """Mean of one value a seed, with draws over seeds alone, as `_seed_weights` says: the items, if any, are held fixed.

    Students of the same seeds share their draws, so that differences are paired. Raises ValueError for fewer than two.
    """
    import numpy as np

    if len(values) < 2:
        raise ValueError(f"{len(values)} seed: how much seeds differ is not known from fewer than two")
    each = np.asarray(values, dtype=np.float64)
    return Draws(float(each.mean()), each.mean() + _seed_weights(seeds, resamples) @ each, n)


def mean_interval(
    scores: "Array",
    *,
    metric: str,
    weights: "Array | None" = None,
    strata: "NDArray[np.intp] | None" = None,
    seeds: tuple[int, ...] | None = None,
) -> Interval:
    """Interval of a mean. All scores 0, or all 1: no draw varies, so the Wilson bound stands on the open side."""
    found = mean(scores, metric=metric, weights=weights, strata=strata, seeds=seeds).interval()
    alike = found.value in (0.0, 1.0) and bool((scores == found.value).all())
    return opened(found, least=0.0, most=1.0) if alike else found


def opened(found: Interval, *, least: float, most: float) -> Interval:
    """The interval of outcomes that are all alike: z^2/(n + z^2) to either side, Wilson's bound, between least and most."""
    side = Z**2 / (found.n + Z**2)
    return Interval(found.value, max(least, found.value - side), min(most, found.value + side), found.n)


def compare(difference: Interval, margin: float) -> Comparison:
    """`equal`: the whole interval within the margin. `differs`: it excludes 0 and its point exceeds the margin."""
    if -margin <= difference.low and difference.high <= margin:
        return "equal"
    if (difference.low > 0 or difference.high < 0) and abs(difference.value) > margin:
        return "differs"
    return "undecided"


def ratio(numerator: Draws, denominator: Draws) -> Draws | None:
    """Paired ratio; None when the denominator's interval touches 0 (DESIGN §6: printed as a dash)."""
    import numpy as np

    if denominator.interval().low <= 0:
        return None
    draws = np.full(len(denominator.draws), np.nan)  # of the few (under 2.5 %) without a positive denominator
    np.divide(numerator.draws, denominator.draws, out=draws, where=denominator.draws > 0)
    return Draws(numerator.point / denominator.point, draws, min(numerator.n, denominator.n))


def recovery(state: Draws, teacher: Draws, chance: float | None = None) -> Draws | None:
    """state / teacher; with `chance` (state - chance)/(teacher - chance). None when the teacher touches that floor."""
    floor = chance or 0.0
    return ratio(state.shift(-floor), teacher.shift(-floor))


def retention(linear: Draws, none: Draws, teacher: Draws) -> Draws | None:
    """(none - linear)/(none - teacher) in log-loss; in scores, larger is better: (linear - none)/(teacher - none)."""
    return ratio(linear - none, teacher - none)


def gap(hybrid: Draws, window: Draws, teacher: Draws) -> Draws | None:
    """(window - hybrid)/(window - teacher) in log-loss: what of the window's loss comes back. Negative: harm."""
    return ratio(hybrid - window, teacher - window)


def shapley(values: Mapping[frozenset[str], Draws], players: Sequence[str]) -> dict[str, Draws]:
    """Shapley value of each player from v(S) of all subsets; raises KeyError for a missing subset.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S)). Their sum is checked against
    v(all) - v(none): ArithmeticError.
    """
    n = len(players)
    found: dict[str, Draws] = {}
    for player in players:
        others = [p for p in players if p != player]
        terms = [
            (values[frozenset(s) | {player}] - values[frozenset(s)])
            * (math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n))
            for size in range(n)
            for s in itertools.combinations(others, size)
        ]
        found[player] = sum(terms[1:], start=terms[0])
    whole = values[frozenset(players)].point - values[frozenset()].point
    if abs(sum(f.point for f in found.values()) - whole) > 1e-9 * max(1.0, abs(whole)):
        raise ArithmeticError("Shapley values do not add up to v(all) - v(none)")
    return found
