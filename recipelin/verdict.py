"""The verdict on a hybrid: does its linear branch do anything that can be measured? (no torch)"""

from collections.abc import Sequence
from typing import Literal

from .base import Config
from .measures import Measure, measures
from .records import Items, Record
from .statistics import Interval, compare, gap, interval_of

Word = Literal["carries", "used", "bypassed", "undecided", "not testable"]

ENOUGH = 100  # exposed items that a verdict needs (DESIGN §6)
HALF = 0.5  # part of the window's loss that a branch must bring back to carry

RULE = (
    "d = hybrid - window, paired on exposed items. not testable: under 100 of them, or the teacher does not beat the "
    "window. bypassed: d's interval ends at or below the margin. used: d > margin and its interval excludes 0. "
    "carries: used, and the interval of gap = d/(teacher - window) starts at 50 % or more. Else undecided. Overall the "
    "first that any metric reads: carries, used, undecided, bypassed."
)


class Verdict(Config):
    """`word` overall, the metric that decides, a sentence with its figures, and the word of every metric."""

    class OfMetric(Config):
        """One metric: d = hybrid - window and teacher - window (larger is better; nats or 0..1), and their ratio."""

        metric: str
        word: Word
        reason: str
        n: int
        figure: str = ""
        difference: tuple[float, float, float] | None = None
        lost: tuple[float, float, float] | None = None
        gap: tuple[float, float, float] | None = None

    word: Word
    metric: str | None
    sentence: str
    per_metric: tuple[OfMetric, ...] = ()


def comparable(record: Record) -> bool:
    """Whether the student has a linear branch beside a window that it can be judged against; gated_delta has no window."""
    return "linear" in record.branches and not (record.branches == ("linear",) and record.window is None)


def verdict(record: Record, items: Items) -> Verdict:
    """The verdict of one Record from the items of its states `teacher`, `window` and `hybrid`. See `RULE`."""
    if "linear" not in record.branches:
        return Verdict(
            word="not testable", metric=None, sentence="not testable: this model has no linear branch to judge."
        )
    if not comparable(record):
        text = "its linear layers have no window beside them to be judged against; compare `hybrid` with `none` and `teacher`"
        return Verdict(word="not testable", metric=None, sentence=f"not testable: {text}.")
    return judge(measures([record], [items]), record.margin)


def judge(found: Sequence[Measure], margin: float) -> Verdict:
    """The verdict over measures."""
    each = tuple(_of_metric(measure, margin) for measure in found)
    words = [e.word for e in each]
    word: Word = "not testable"
    for candidate in ("carries", "used", "undecided", "bypassed"):
        if candidate in words:
            word = candidate
            break
    harmed = [f"{e.metric} ({e.figure})" for e in each if e.difference and e.difference[2] < -margin]
    harm = f" It harms {', '.join(harmed)}." if harmed else ""
    if word == "not testable":
        reasons = "; ".join(f"{e.metric}: {e.reason}" for e in each) or "nothing was measured"
        return Verdict(word=word, metric=None, sentence=f"not testable: {reasons}.{harm}", per_metric=each)
    deciding = max((e for e in each if e.word == word), key=lambda e: e.gap[1] if e.gap else float("-inf"))
    others = {other: _with(each, other, deciding) for other in ("used", "undecided", "bypassed")}
    rest = "; ".join(f"{other} on {', '.join(names)}" for other, names in others.items() if names)
    sentence = f"{word}: {_sentence(deciding)}" + (f" Elsewhere: {rest}." if rest else "") + harm
    return Verdict(word=word, metric=deciding.metric, sentence=sentence, per_metric=each)


def _with(each: Sequence[Verdict.OfMetric], word: str, but: Verdict.OfMetric) -> list[str]:
    return [e.metric for e in each if e.word == word and e is not but]


MEANING = {
    "carries": "the linear branch brings back at least half of what the window alone loses",
    "used": "there is a metric that the linear branch helps",
    "bypassed": "dropping the linear branch costs nothing",
    "undecided": "these items cannot tell whether the linear branch helps",
}


def _sentence(each: Verdict.OfMetric) -> str:
    return f"{MEANING[each.word]}. On {each.metric}: {each.reason}."


def _of_metric(measure: Measure, margin: float) -> Verdict.OfMetric:
    n = measure.exposed_items()
    missing = [s for s in ("teacher", "hybrid", "window") if s not in measure.scores]
    if missing:
        reason = f"no items of {', '.join(missing)}"
        return Verdict.OfMetric(metric=measure.label, word="not testable", reason=reason, n=n)
    if n < ENOUGH:
        reason = f"{n} of {measure.n} items exposed (at least half of their scored tokens), {ENOUGH} needed"
        return Verdict.OfMetric(metric=measure.label, word="not testable", reason=reason, n=n)
    teacher, hybrid, window = (measure.draws(s, exposed_only=True) for s in ("teacher", "hybrid", "window"))
    lost, difference = (teacher - window).interval(), (hybrid - window).interval()
    part = interval_of(gap(hybrid, window, teacher))
    word, reason = _word(measure, lost, difference, part, margin)
    return Verdict.OfMetric(
        metric=measure.label,
        word=word,
        reason=reason,
        n=n,
        figure=_say(difference, measure.kind),
        difference=_triple(difference),
        lost=_triple(lost),
        gap=_triple(part) if part else None,
    )


def _word(
    measure: Measure, lost: Interval, difference: Interval, part: Interval | None, margin: float
) -> tuple[Word, str]:
    unit, scale, digits = units(measure.kind)
    if part is None or lost.value <= margin:  # part is None where the interval of lost touches 0
        return (
            "not testable",
            f"teacher - window = {_say(lost, measure.kind)}, n = {lost.n}: nothing for a linear branch to win",
        )
    figures = (
        f"hybrid - window = {_say(difference, measure.kind)}, n = {difference.n}; "
        f"gap {part.value:.0%} [{part.low:.0%}, {part.high:.0%}] of the {lost.value * scale:.{digits}f} {unit} lost"
    )
    if difference.high <= margin:
        return "bypassed", figures
    if compare(difference, margin) == "differs":
        return ("carries" if part.low >= HALF else "used"), figures
    return "undecided", figures


def units(kind: str) -> tuple[str, float, int]:
    """Unit, factor and digits in which differences of a measure of this kind are shown."""
    return ("nats", 1.0, 3) if kind == "log_loss" else ("points", 100.0, 1)


def _say(x: Interval, kind: str) -> str:
    unit, scale, digits = units(kind)
    return f"{x.value * scale:+.{digits}f} {unit} [{x.low * scale:+.{digits}f}, {x.high * scale:+.{digits}f}]"


def _triple(x: Interval) -> tuple[float, float, float]:
    return (x.value, x.low, x.high)
