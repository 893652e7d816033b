"""Means, paired differences and ratios with bootstrap intervals, recoveries and Shapley values (no torch).

A quantity is held as its point and its 2000 bootstrap draws. All states of one metric share the resamples, so that
differences and ratios are paired item by item.
"""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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
    """A quantity: its point estimate, its bootstrap draws [2000], and the items behind it."""

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
        """Percentile interval, ends taken outwards."""
        import numpy as np

        tail = (1 - LEVEL) / 2
        low = float(np.quantile(self.draws, tail, method="lower"))
        high = float(np.quantile(self.draws, 1 - tail, method="higher"))
        return Interval(self.point, min(low, self.point), max(high, self.point), self.n)


@cache
def _weights(count: int, stream: int) -> "Array":
    """How often each of `count` units is drawn in each resample, as shares [2000, count]. Seed 0, a stream a metric."""
    import numpy as np

    generator = np.random.default_rng([0, stream])
    return generator.multinomial(count, [1 / count] * count, size=RESAMPLES) / count


def mean(
    scores: "Array", *, metric: str, weights: "Array | None" = None, strata: "NDArray[np.intp] | None" = None
) -> Draws:
    """Mean of scores [seeds, items] with bootstrap draws; with `weights` [items], sum(weight x score) / sum(weight).

    Items are resampled jointly for all seeds, and seeds (trained students, if there are several) independently of them:
    the pigeonhole bootstrap (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1), since every student
    meets the same items. `metric` names the stream: states of one metric share it, different metrics do not.
    With k seeds the seed part of the variance is (k - 1)/k of what it should be. A weight is drawn with its item: the
    ratio of two sums, each resampled, as for a corpus of documents of different lengths. `strata` [items]: items are
    resampled within their stratum, as the subtasks of a benchmark have fixed sizes.
    """
    import numpy as np

    seeds, items = scores.shape
    stream = zlib.crc32(metric.encode())
    if weights is None and strata is None:
        draws = scores @ _weights(items, stream).T
    else:
        weights = np.ones(items) if weights is None else weights
        strata = np.zeros(items, dtype=np.intp) if strata is None else strata
        draws, total = np.zeros((seeds, RESAMPLES)), np.zeros(RESAMPLES)
        for stratum in np.unique(strata):
            mine = np.flatnonzero(strata == stratum)
            drawn = _weights(len(mine), stream + 2**33 * int(stratum)) * len(mine)
            draws += (scores[:, mine] * weights[mine]) @ drawn.T
            total += drawn @ weights[mine]
        draws /= total
    draws = draws[0] if seeds == 1 else (_weights(seeds, stream + 2**32).T * draws).sum(axis=0)
    point = float(scores.mean()) if weights is None else float(np.average(scores.mean(0), weights=weights))
    return Draws(point, draws, items)


def mean_interval(
    scores: "Array", *, metric: str, weights: "Array | None" = None, strata: "NDArray[np.intp] | None" = None
) -> Interval:
    """Interval of a mean. All scores 0, or all 1: no draw varies, so the Wilson bound stands on the open side."""
    found = mean(scores, metric=metric, weights=weights, strata=strata).interval()
    if found.value in (0.0, 1.0) and (scores == found.value).all():
        open_side = Z**2 / (found.n + Z**2)
        low, high = (0.0, open_side) if found.value == 0.0 else (1.0 - open_side, 1.0)
        return Interval(found.value, low, high, found.n)
    return found


def compare(difference: Interval, margin: float) -> Comparison:
    """`equal`: the whole interval within the margin. `differs`: it excludes 0 and its point exceeds the margin."""
    if -margin <= difference.low and difference.high <= margin:
        return "equal"
    if (difference.low > 0 or difference.high < 0) and abs(difference.value) > margin:
        return "differs"
    return "undecided"


def ratio(numerator: Draws, denominator: Draws) -> Interval | None:
    """Paired ratio; None when the denominator's interval touches 0 (DESIGN §6: printed as a dash)."""
    import numpy as np

    if denominator.interval().low <= 0:
        return None
    positive = denominator.draws > 0
    # The few draws (under 2.5 %) without a positive denominator count as the worst ratio.
    draws = np.full(RESAMPLES, -np.inf)
    np.divide(numerator.draws, denominator.draws, out=draws, where=positive)
    return Draws(numerator.point / denominator.point, draws, min(numerator.n, denominator.n)).interval()


def recovery(state: Draws, teacher: Draws, chance: float | None = None) -> Interval | None:
    """state / teacher; with `chance` (state - chance)/(teacher - chance). None when the teacher touches that floor."""
    floor = chance or 0.0
    return ratio(state.shift(-floor), teacher.shift(-floor))


def retention(linear: Draws, none: Draws, teacher: Draws) -> Interval | None:
    """(none - linear)/(none - teacher) in log-loss; in scores, larger is better: (linear - none)/(teacher - none)."""
    return ratio(linear - none, teacher - none)


def gap(hybrid: Draws, window: Draws, teacher: Draws) -> Interval | None:
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
