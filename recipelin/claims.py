"""A claims spec and published Records -> a table: the effect behind each claim, its interval, and how it reads (no torch)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .claimestimate import RESAMPLES, Bound, Estimate, Unit, agreement, combined, from_curves
from .claimspec import RATIOS, Claim, Claims, Expected, Other, Value, read_value
from .measures import Measure
from .mistakes import listed, nearest
from .published import Published, Source, TableError, find, provenance, source_of, to_run
from .render import DASH, Block, Cell, Number, Table, signed
from .runtable import scale
from .statistics import Draws, Interval, gap, holm, opened, recovery, retention
from .verdict import ENOUGH

Word = Literal["shown", "opposite", "equal", "undecided", "not testable", "not run"]

ALPHA = 0.05
FEW = 5  # seeds

RULE = (
    "shown: for greater, less: Holm's p is under 0.05 and the effect lies in that direction, beyond the margin; for equal: "
    "the whole interval lies within the margin. opposite: Holm's p is under 0.05 and the effect lies beyond the margin in the "
    "other direction (for equal: in either). equal: a difference was expected, and the whole interval lies within the margin. "
    "not testable: under 100 exposed items, a ratio whose denominator may be 0, or a budget that some seeds bound from below "
    "and some from above. Else undecided, which is no equality; so is what a bound (≥, ≤) leaves open."
)


@dataclass(frozen=True)
class Judged:
    """A claim and how it reads. `estimate` is None if it was not run or is not testable, for `reason`."""

    claim: Claim
    margin: float
    word: Word
    estimate: Estimate | None = None
    adjusted: float | None = None
    reason: str = ""
    missing: tuple[str, ...] = ()


def read(interval: Interval, adjusted: float, expected: Expected, margin: float, bound: Bound = "") -> Word:
    """How an effect reads against what was expected of it. See `RULE`; a bound speaks for its own side alone."""
    if bound and (interval.value > margin) != (bound == "at least"):
        return "undecided"
    within = -margin <= interval.low and interval.high <= margin
    if adjusted < ALPHA and abs(interval.value) > margin:
        up = interval.value > 0
        return "shown" if expected == ("greater" if up else "less") else "opposite"
    if within and not bound:
        return "shown" if expected == "equal" else "equal"
    return "undecided"


Sources = Mapping[tuple[str, int | None], Source]  # by recipe, and by where recall near ends


def sources_of(spec: Claims, records: Sequence[Published]) -> Sources:
    """What fills each recipe of the claims, at the `reach` of each claim and (None) at that of the Records.

    Raises RecordError for Records of one recipe that do not fit.
    """
    wanted = dict.fromkeys((name, _limit(claim)) for claim in spec.claims for name in claim.effect.recipes)
    wanted |= dict.fromkeys((name, None) for name in spec.recipes)
    return {(name, limit): source_of((name,), records, limit=limit) for name, limit in wanted}


def _limit(claim: Claim) -> int | None:
    return claim.effect.column.reach if claim.effect.column else None


def judge_claims(spec: Claims, sources: Sources) -> tuple[Judged, ...]:
    """Every claim, with Holm's adjustment over all that were run, whatever they expect; what is not testable counts as p = 1.

    Raises TableError for a state or a task that the Records do not have, or for recipes that did not meet the same items.
    """
    found: list[Judged] = []
    for claim in spec.claims:
        margin = spec.margin_of(claim)
        mine = [sources[name, _limit(claim)] for name in claim.effect.recipes]
        if missing := tuple(n for n, s in zip(claim.effect.recipes, mine, strict=True) if not s.chosen):
            found.append(Judged(claim, margin, "not run", missing=missing))
            continue
        effect = _estimate(claim, mine)
        if isinstance(effect, str):
            found.append(Judged(claim, margin, "not testable", reason=effect))
        else:
            found.append(Judged(claim, margin, "undecided", effect))
    run = [j for j in found if j.word != "not run"]
    adjusted = iter(holm([j.estimate.p if j.estimate else 1.0 for j in run]))
    return tuple(j if j.word == "not run" else _decided(j, next(adjusted)) for j in found)


def _decided(judged: Judged, adjusted: float) -> Judged:
    if judged.estimate is None:
        return judged
    estimate = judged.estimate
    word = read(estimate.interval, adjusted, judged.claim.expect, judged.margin, estimate.bound)
    return replace(judged, word=word, adjusted=adjusted)


def _estimate(claim: Claim, sources: Sequence[Source]) -> Estimate | str:
    """The effect, or why it cannot be tested."""
    effect, value = claim.effect, read_value(claim.effect.value)
    if effect.column is None:
        return agreement(claim, sources[0])
    if effect.column.of_curve:
        return from_curves(claim, sources)
    values = effect.values
    sides = [
        _measure(claim, name, source, each.states)
        for name, source, each in zip(effect.recipes, sources, values, strict=True)
    ]
    first = sides[0]
    for name, side in zip(effect.recipes, sides, strict=True):
        if side.items != first.items:
            common = len(set(first.items) & set(side.items))
            raise TableError(
                f"claim {claim.id}: {effect.recipes[0]} and {name} were not measured on the same items of "
                f"{effect.column}: {first.n} and {side.n}, {common} in common; they need the same suite, eval.seeds and, "
                "for recall near or far, window (or give reach)"
            )
    if effect.exposed:
        kept = first.are_exposed()
        for side in sides[1:]:
            kept = kept & side.are_exposed()
        if kept.sum() < ENOUGH:
            return f"{kept.sum()} of {first.n} items exposed (at least half of their scored tokens), {ENOUGH} needed"
        sides = [side.only(kept) for side in sides]
    drawn = []
    for side, each, name in zip(sides, values, effect.recipes, strict=True):
        # One name for the stream of items, also where one of the recipes has more suites, and so longer labels.
        draws = _draws(claim, replace(side, suite=first.suite, label=first.label), each)
        if draws is None:
            return f"{each.kind} of {name}: its denominator, the teacher's lead over its floor, may be 0"
        drawn.append(draws)
    ratio, loss = value.kind in RATIOS, first.kind == "log_loss"
    if len(drawn) > 1:
        found = combined(drawn)
    elif value.kind == "state" and loss:
        raise TableError(
            f"claim {claim.id}: a log-loss alone is compared with another state or recipe, not with a number"
        )
    else:
        found = drawn[0].shift(-_constant(claim, first))
    interval = found.interval()
    if not ratio and not loss and interval.high - interval.low < 1e-9:  # but for rounding, no draw varies
        interval = opened(interval, least=-1.0, most=1.0)
    unit: Unit = "%" if ratio else "nats" if loss else "points"
    return Estimate(interval, found.p_value(), unit, tuple(side.seeds for side in sides))


def _measure(claim: Claim, name: str, source: Source, states: Sequence[str]) -> Measure:
    """What the Records of a recipe say about the claim's column. Raises TableError if they do not."""
    assert claim.effect.column is not None
    measure = find(claim.effect.column, source.measures, where=f"claim {claim.id}: {claim.effect.column}")
    record = source.chosen[0].place.name
    if measure is None:
        known = dict.fromkeys(t for m in source.measures for t in ((m.label,) if m.kind == "recall" else m.tasks))
        near = nearest(claim.effect.column.task or str(claim.effect.column), known)
        raise TableError(f"claim {claim.id}: {record} has no {claim.effect.column}{near}; it has {listed(known)}")
    for state in states:
        if state not in measure.scores:
            near = nearest(state, measure.scores)
            raise TableError(
                f"claim {claim.id}: {record} has no items of state {state!r} of {name}{near}; it has {listed(measure.scores)}"
            )
    return measure


def _chance(claim: Claim, measure: Measure) -> float:
    if measure.chance is None:
        raise TableError(f"claim {claim.id}: no chance is known of {claim.effect.column}; give a number")
    return measure.chance


def _constant(claim: Claim, measure: Measure) -> float:
    minus = claim.effect.minus
    assert not isinstance(minus, Other)
    return _chance(claim, measure) if isinstance(minus, str) else minus


def _draws(claim: Claim, measure: Measure, value: Value) -> Draws | None:
    """A value of one recipe; larger is better. None: a ratio whose denominator may be 0."""
    of = [measure.draws(state, resamples=RESAMPLES) for state in value.states]
    if value.kind == "state":
        return of[0]
    if value.kind == "difference":
        return of[0] - of[1]
    if value.kind == "gap":
        return gap(*of)
    if value.kind == "retention":
        return retention(*of)
    if measure.kind == "log_loss":
        raise TableError(f"claim {claim.id}: the recovery of a log-loss has no meaning; see retention and gap")
    state, teacher = of
    return recovery(state, teacher, _chance(claim, measure) if value.kind == "corrected recovery" else None)


# --- the table --------------------------------------------------------------------------------------------------------

COLUMNS = ("claim", "effect [95 %]", "expected", "margin", "n", "seeds", "p", "p, Holm", "reads")
UNITS = {
    "points": (100.0, 1, "fraction"),
    "%": (100.0, 0, "fraction"),
    "nats": (1.0, 3, "nats"),
    "times": (1.0, 3, "nats"),
}


def claims_table(spec: Claims, records: Sequence[Published]) -> Table:
    """The claims as a table: a row a claim by group, then each in a sentence, then what the columns mean and the Records."""
    sources = sources_of(spec, records)
    judged = judge_claims(spec, sources)
    groups: dict[str, list[Judged]] = {}
    group = "Claims"
    for each in judged:
        group = each.claim.group or group
        groups.setdefault(group, []).append(each)
    used = {name: sources[name, None] for name in spec.recipes}
    chosen = [p for s in used.values() for p in s.chosen]
    return Table(
        title=spec.title,
        lead=tuple(filter(None, (*scale([p.record for p in chosen]), spec.about, _summary(judged)))),
        blocks=tuple(Block(g, COLUMNS, tuple(_row(j) for j in members)) for g, members in groups.items()),
        conclusions=tuple(_sentence(j) for j in judged),
        notes=(
            *_legend(judged),
            *(line for name, source in used.items() for line in provenance(name, source)),
            *to_run(dict.fromkeys(n for j in judged for n in j.missing)),
        ),
    )


def _summary(judged: Sequence[Judged]) -> str:
    words = [j.word for j in judged]
    counts = ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))
    return f"{len(judged)} claims: {counts}."


def _unit(judged: Judged) -> str:
    if judged.estimate:
        return judged.estimate.unit
    if judged.claim.effect.column and judged.claim.effect.column.tokens_to:
        return "times"
    return "%" if read_value(judged.claim.effect.value).kind in RATIOS else ""


def _row(judged: Judged) -> tuple[str, tuple[Cell, ...]]:
    claim, estimate = judged.claim, judged.estimate
    label = f"{claim.id} {claim.short}"
    if estimate is None:
        return label, (Cell(DASH), Cell(claim.expect), Cell(_margin(judged)), *[Cell(DASH)] * 4, Cell(judged.word))
    interval = estimate.interval
    assert judged.adjusted is not None
    return label, (
        Cell(_bracketed(judged), (Number(str(claim.effect), interval, UNITS[estimate.unit][2]),)),
        Cell(claim.expect),
        Cell(_margin(judged)),
        Cell(f"{interval.n}{' e' if claim.effect.exposed else ''}"),
        Cell(_seeds(estimate)),
        _p("p", estimate.p, interval.n),
        _p("p, Holm", judged.adjusted, interval.n),
        Cell(judged.word),
    )


def _p(quantity: str, value: float, n: int) -> Cell:
    text = f"{value:.4f}" if value < 0.01 else f"{value:.2f}"
    return Cell(text, (Number(quantity, Interval(value, value, value, n), "probability"),))


def _bracketed(judged: Judged) -> str:
    """`+12.5 [+10.2, +14.4] points`, `≥ x3.2 [2.8, 3.7]`"""
    assert judged.estimate is not None
    factor, digits, _ = UNITS[judged.estimate.unit]
    x = judged.estimate.interval
    if judged.estimate.unit == "times":
        low, high = (f"{math.exp(v):.3g}" for v in (x.low, x.high))
        mark = {"": "", "at least": "≥ ", "at most": "≤ "}[judged.estimate.bound]
        return f"{mark}x{math.exp(x.value):.3g} [{low}, {high}]"

    def shown(value: float) -> str:
        text = signed(value * factor, digits)
        return text if not math.isfinite(value) or text.startswith("-") or not float(text) else f"+{text}"

    return f"{shown(x.value)} [{shown(x.low)}, {shown(x.high)}] {judged.estimate.unit}"


def _margin(judged: Judged) -> str:
    unit = _unit(judged)
    if unit == "times":
        return f"x{math.exp(judged.margin):.3g}"
    return f"{judged.margin * UNITS[unit][0]:g}" if unit else f"{judged.margin:g}"


def _seeds(estimate: Estimate) -> str:
    counts = [len(seeds) for seeds in dict.fromkeys(estimate.seeds)]
    return ", ".join(f"{count}{'*' if count < FEW else ''}" for count in counts)


def _sentence(judged: Judged) -> str:
    """The claim whole, what was estimated, who claims it, and what the spec notes."""
    claim = judged.claim
    parts = [f"**{claim.id} {judged.word}**: {_ended(claim.claim)}", f"Effect: {_ended(str(claim.effect))}"]
    if judged.reason:
        parts.append(f"Not testable: {_ended(judged.reason)}")
    if judged.estimate and len(judged.estimate.seeds) > 1:
        same = len(set(judged.estimate.seeds)) == 1
        what = "" if claim.effect.column and claim.effect.column.of_curve else "items and "
        alike = f"Paired by {what}seeds."
        parts.append(alike if same else "Paired by items; the seeds are not the same." if what else "Not paired.")
    if judged.missing:
        parts.append(f"No Record of {', '.join(judged.missing)}.")
    parts += [f"Source: {_ended(claim.paper)}"] if claim.paper else []
    parts += [f"Note: {_ended(' '.join(claim.note.split()))}"] if claim.note else []
    return " ".join(parts)


def _ended(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _legend(judged: Sequence[Judged]) -> tuple[str, ...]:
    run = [j for j in judged if j.word != "not run"]
    smallest = 2 / (1 + RESAMPLES)
    most = math.ceil(ALPHA / smallest) - 1
    lines = [
        "effect: larger is better (a log-loss is negated, in nats); points: of a score in %; %: of a gap, retention or "
        "recovery. margin: in the unit of the effect.",
        f"[95 %]: percentile bootstrap over items, {RESAMPLES:,} resamples, seed 0, paired between states and between recipes, "
        "not adjusted for the number of claims. It speaks about other items of the same kind, and with several seeds about "
        "other seeds, whose part has the tails of t with seeds - 1 degrees of freedom; not about other teachers.",
        "n: items; e: exposed ones only (at least half of their scored tokens; in both recipes): of STATE - STATE, gap "
        "and retention, unless the spec says otherwise.",
        f"p: two-sided bootstrap p of no effect; the smallest possible is 2/{1 + RESAMPLES:,} = {smallest:.4f}, and small "
        f"ones are rough. p, Holm: step-down over the {len(run)} claims that were run, whatever they expect; 0.05 can be "
        f"reached with up to {most} claims.",
        f"reads: {RULE}",
        "an equality is decided by its own 95 % interval (two one-sided tests at 2.5 %), not adjusted for the number of "
        "claims; a single one wrong by more than the margin reads so in at most 2.5 % of repetitions.",
    ]
    columns = [j.claim.effect.column for j in judged]
    if any(c and c.of_curve for c in columns):
        lines.append(
            "after so many tokens, and budgets: measured while a stage trained, without items; [95 %] and p are over seeds alone "
            "(t, paired), n: the rows that were read, the same in every seed."
        )
    if any(c and c.tokens_to for c in columns):
        lines.append(
            "x: the other recipe's budget over this one's, geometric mean over seeds; above 1 this one needs less. A budget is "
            "read between checkpoints on a line in log-loss; ≥, ≤: the target was met at the first checkpoint, or not at the "
            "last, so the ratio is no less, or no more. FLOPs: the plan's estimates, without evaluations."
        )
    if None in columns:
        lines.append(
            "agreement of layers: share of layers kept as softmax that two seeds have in common, mean over pairs, less that of "
            "random choices; its p is against random choices, n: seeds."
        )
    if any(j.estimate and min(map(len, j.estimate.seeds)) < FEW for j in judged):
        lines.append(
            "*: under five seeds; of one seed the interval says nothing about other students trained in the same way."
        )
    return tuple(lines)
