"""The table after a run: one Record and its items (no torch)."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from .costtable import cost_blocks, cost_notes
from .measures import Measure, by_distance, by_position, measures, reach
from .records import SHRUNK, Items, Record, bands_path, picture_path
from .render import DASH, WIDTH, Block, Cell, Number, Table, plus_minus
from .states import State, subsets
from .statistics import Draws, Interval, compare, gap, interval_of, ratio, recovery, retention, shapley
from .verdict import RULE, comparable, judge, units, verdict

MEANING = {
    "gap": "(window - hybrid)/(window - teacher) in log-loss, alike in scores: what of the window's loss comes back; negative: "
    "the linear branch harms.",
    "retention": "(none - linear)/(none - teacher) in log-loss, alike in scores: what the linear branch alone keeps.",
}
BROUGHT = {"gap": (("hybrid", "window", "teacher"), gap), "retention": (("linear", "none", "teacher"), retention)}
POCKET_PARAMETERS = 10_000_000  # below this a teacher is a pocket teacher; the shipped one has well under 2 M


def run_table(record: Record, items: Items, *, place: Path | None = None) -> Table:
    """Scores of every state, what they recover, what the linear branch brings, recall by distance, cost, and the verdict.

    `items` may be empty (an old Record): intervals then come from the recorded standard errors, and nothing is paired.
    """
    found = measures([record], [items])
    states = tuple(dict.fromkeys(row.state for row in record.rows))
    judged = verdict(record, items)
    blocks = [*_narrow(_scores(found, states)), *_narrow(_recovered(found, states))]
    if comparable(record):
        blocks += [_branches(record, found), _conversion(record, found)]
    blocks += _distances(by_distance(record, items), states)
    blocks += [narrow for block in _positions(by_position(record, items), states) for narrow in _narrow(block)]
    blocks += [narrow for block in cost_blocks(record) for narrow in _narrow(block)]
    return Table(
        title=f"{record.name}: what each state of the model can do",
        lead=tuple(filter(None, (*scale([record]), _unfinished(record)))),
        blocks=tuple(b for b in blocks if b.rows and len(b.columns) > 1),
        conclusions=(f"**Verdict: {judged.word}.** {_after_colon(judged.sentence)}", f"Rule: {RULE}"),
        notes=(
            *_legend(record, found, items),
            *_disagreements(found),
            *_usage(record, place),
            *cost_notes(record),
            _source(record, items, place),
        ),
    )


def _after_colon(sentence: str) -> str:
    text = sentence.partition(": ")[2]
    return text[:1].upper() + text[1:]


def scale(records: Sequence[Record]) -> tuple[str, ...]:
    """What a reader must know of the size of the models before any number of theirs."""
    found = []
    if any(r.name.startswith(SHRUNK) for r in records):
        text = "a tiny random model that trained three steps a stage. These numbers mean nothing but that it runs."
        found.append(f"**Shrunk**: {text}")
    whole = [r.plan.get("parameters") for r in records if not r.name.startswith(SHRUNK)]
    small = sorted({n for n in whole if isinstance(n, int) and n < POCKET_PARAMETERS})
    if small:
        of = "the teacher has" if len(small) == 1 else f"{len(small)} teachers have"
        size = " to ".join(f"{n / 1e6:.2f}" for n in dict.fromkeys((small[0], small[-1])))
        found.append(f"**Pocket scale**: {of} {size} M parameters. Nothing here is a result about a large model.")
    return tuple(found)


def _unfinished(record: Record) -> str:
    return (
        ""
        if record.status == "finished"
        else f"**This run is {record.status}**: what it had not measured is missing here."
    )


def score_cell(measure: Measure, state: str) -> Cell:
    """A state's score: perplexity, or percent."""
    interval = measure.interval(state)
    if interval is None:
        return Cell(DASH)
    if measure.kind == "log_loss":
        shown = Interval(math.exp(interval.value), math.exp(interval.low), math.exp(interval.high), interval.n)
        numbers = (Number("perplexity", shown, "exp(nats)"), Number("log-loss", interval, "nats"))
        return Cell(plus_minus(shown), numbers)
    return Cell(plus_minus(interval, scale=100, digits=1), (Number("score", interval, "fraction"),))


def _narrow(block: Block) -> list[Block]:
    """A block as several, each as wide as running text at most: suites with many formats have many columns."""
    widths = [max([len(c), *(len(cells[i].text) for _, cells in block.rows)]) for i, c in enumerate(block.columns[1:])]
    label = max(map(len, (block.columns[0], *(row for row, _ in block.rows))))
    groups: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if groups[-1] and label + sum(widths[j] + 3 for j in groups[-1]) + width + 3 > WIDTH:
            groups.append([])
        groups[-1].append(i)
    return [
        Block(
            block.title + (f" ({number} of {len(groups)})" if len(groups) > 1 else ""),
            (block.columns[0], *(block.columns[i + 1] for i in group)),
            tuple((row, tuple(cells[i] for i in group)) for row, cells in block.rows),
        )
        for number, group in enumerate(groups, start=1)
    ]


def _head(measure: Measure) -> str:
    return measure.label if measure.kind == "log_loss" else f"{measure.label} %"


def _guess(measure: Measure) -> Cell:
    return Cell(DASH if measure.chance is None else f"{measure.chance:.1%}".removesuffix("%"))


def _scores(found: Sequence[Measure], states: Sequence[str]) -> Block:
    rows = [(state, tuple(score_cell(m, state) for m in found)) for state in states]
    exposure = [(m.exposure(), m.n) for m in found]
    exposed = [
        Cell(DASH) if e is None else Cell(f"{e * 100:.0f}", (Number("exposed", Interval(e, e, e, n), "fraction"),))
        for e, n in exposure
    ]
    rows += [
        ("(guessing)", tuple(_guess(m) for m in found)),
        ("(exposed %)", tuple(exposed)),
        ("(items n)", tuple(Cell(str(m.n)) for m in found)),
    ]
    return Block("Scores, ± the 95 % interval", ("state", *(_head(m) for m in found)), tuple(rows))


def _recovered(found: Sequence[Measure], states: Sequence[str]) -> Block:
    """Plain and chance-corrected recovery; the average corrects the mean of the tasks, not their ratios."""
    kept = [m for m in found if m.kind != "log_loss" and "teacher" in m.scores]
    columns: list[tuple[str, Callable[[str], Draws | None], float | None]] = [
        (_head(m), lambda s, m=m: m.draws(s) if s in m.scores else None, m.chance)  # type: ignore[misc]
        for m in kept
    ]
    tasks = [m for m in kept if m.kind == "score"]
    if len(tasks) > 1:
        chances = [m.chance for m in tasks if m.chance is not None]
        chance = sum(chances) / len(chances) if len(chances) == len(tasks) else None
        columns.append(("mean of tasks %", lambda s: mean_of(tasks, s), chance))
    rows = []
    for state in states:
        if state == "teacher":
            continue
        cells = []
        for _, draws, chance in columns:
            own, teacher = draws(state), draws("teacher")
            if own is None or teacher is None:
                cells.append(Cell(DASH))
                continue
            plain = interval_of(recovery(own, teacher))
            corrected = interval_of(recovery(own, teacher, chance)) if chance is not None else None
            numbers = [Number(q, i, "fraction") for q, i in (("plain", plain), ("chance-corrected", corrected)) if i]
            text = " / ".join(plus_minus(i, scale=100, digits=0) for i in (plain, corrected))
            cells.append(Cell(text, tuple(numbers)))
        rows.append((state, tuple(cells)))
    title = "Recovered of the teacher, %: plain / corrected for guessing"
    return Block(title, ("state", *(c[0].removesuffix(" %") for c in columns)), tuple(rows))


def mean_of(found: Sequence[Measure], state: str) -> Draws | None:
    """Mean of several measures of one state; None if one of them is missing."""
    if any(state not in m.scores for m in found):
        return None
    each = [m.draws(state) for m in found]
    return sum(each[1:], start=each[0]) * (1 / len(each))


def _branches(record: Record, found: Sequence[Measure]) -> Block:
    """What the linear branch brings, on exposed items: one row a metric."""
    judged = {e.metric: e for e in judge(found, record.margin).per_metric}
    columns = (
        "metric",
        "n",
        "teacher - window",
        "hybrid - window",
        "reads",
        "gap %",
        "retention %",
        "Shapley %",
        "verdict",
    )
    rows = []
    for measure in found:
        unit, scale, digits = units(measure.kind)
        label = f"{measure.label.replace('perplexity', 'log-loss')}, {unit}"
        draws = exposed_draws(measure)
        cells = [Cell(str(measure.exposed_items()))]

        def difference(a: str, b: str, draws: dict[str, Draws] = draws) -> Interval | None:
            return (draws[a] - draws[b]).interval() if a in draws and b in draws else None

        def cell(quantity: str, interval: Interval | None, scale: float, digits: int, sign: bool, unit: str) -> Cell:
            numbers = (Number(quantity, interval, unit),) if interval else ()
            return Cell(plus_minus(interval, scale=scale, digits=digits, sign=sign), numbers)

        base = "nats" if unit == "nats" else "fraction"
        gained = difference("hybrid", "window")
        cells.append(cell("teacher - window", difference("teacher", "window"), scale, digits, True, base))
        cells.append(cell("hybrid - window", gained, scale, digits, True, base))
        cells.append(Cell(compare(gained, record.margin) if gained else DASH))
        for value in BROUGHT:
            cells.append(cell(value, brought(draws, value), 100, 0, False, "fraction"))
        cells.append(_shapley(record, draws, base))
        each = judged.get(measure.label)
        cells.append(Cell(each.word if each else DASH))
        rows.append((label, tuple(cells)))
    return Block("What the linear branch brings, on exposed items", columns, tuple(rows))


def _conversion(record: Record, found: Sequence[Measure]) -> Block:
    """hybrid - teacher in two parts, on exposed items: what training did to the weights, and what the form costs them."""
    rows = []
    for measure in found:
        draws = exposed_draws(measure)
        if not {"teacher", "softmax", "hybrid"} <= set(draws):
            continue
        unit, scale, digits = units(measure.kind)
        cells = [Cell(str(measure.exposed_items()))]
        for one, other in (("softmax", "teacher"), ("hybrid", "softmax")):
            each = (draws[one] - draws[other]).interval()
            number = Number(f"{one} - {other}", each, "nats" if unit == "nats" else "fraction")
            cells.append(Cell(plus_minus(each, scale=scale, digits=digits, sign=True), (number,)))
        cells.append(Cell(compare(each, record.margin)))
        rows.append((f"{measure.label.replace('perplexity', 'log-loss')}, {unit}", tuple(cells)))
    columns = ("metric", "n", "softmax - teacher", "hybrid - softmax", "reads")
    return Block(
        "What training did to the weights, and what the hybrid costs them, on exposed items", columns, tuple(rows)
    )


def brought(draws: Mapping[str, Draws], value: str) -> Interval | None:
    """gap or retention of `exposed_draws`; None where a state is missing or the denominator may be 0."""
    states, ratio_of = BROUGHT[value]
    return interval_of(ratio_of(*(draws[s] for s in states))) if all(s in draws for s in states) else None


def exposed_draws(measure: Measure) -> dict[str, Draws]:
    if not measure.exposed_items():
        return {}
    return {state: measure.draws(state, exposed_only=True) for state in measure.scores}


def subset_states(record: Record) -> dict[frozenset[str], str]:
    """The evaluated state of every subset of the hybrid's branches, by the plan; empty where the plan does not say."""
    hybrid, steps = record.plan.get("hybrid"), record.plan.get("steps")
    if not isinstance(hybrid, dict) or not isinstance(steps, list):
        return {}
    evaluated = [s["step"].get("states", []) for s in steps if s["step"]["step"] == "evaluate"]
    try:
        names = {_state(s["state"]): s["name"] for states in evaluated for s in states if s["state"]}
        wanted = subsets(_state(hybrid))
    except ValidationError:  # a plan of before State had its present fields
        return {}
    return {frozenset(b): names[n.state] for b, n in wanted.items() if n.state in names}


def _state(fields: object) -> State:
    return State.model_validate_json(json.dumps(fields))


def _shapley(record: Record, draws: dict[str, Draws], unit: str) -> Cell:
    names = subset_states(record)
    values = {branches: draws[name] for branches, name in names.items() if name in draws}
    if len(values) < 2 ** len(record.branches):
        return Cell(DASH)
    found = shapley(values, record.branches)
    numbers = [Number(f"Shapley value of {b}", d.interval(), unit) for b, d in found.items()]
    whole = values[frozenset(record.branches)] - values[frozenset()]
    shares = {b: interval_of(ratio(d, whole)) for b, d in found.items()}
    numbers += [Number(f"Shapley share of {b}", i, "fraction") for b, i in shares.items() if i]
    text = " / ".join(plus_minus(i, scale=100, digits=0) for i in shares.values())
    return Cell(text if all(shares.values()) else DASH, tuple(numbers))


def _distances(groups: Sequence[Sequence[Measure]], states: Sequence[str]) -> list[Block]:
    """A block for each suite, format, length and metric; its title says what the others differ in."""
    blocks = []
    keys = [(g[0].suite, g[0].metric) for g in groups]
    for group, (suite, metric) in zip(groups, keys, strict=True):
        what = group[0].recalled
        assert what is not None
        name = "Recall" if what.format == "recall" else what.format.capitalize()
        place = f" in {what.length} tokens" if what.length else ""
        notes = [suite] if len({s for s, _ in keys}) > 1 else []
        notes += [metric.replace("_", " ")] if len({m for _, m in keys}) > 1 else []
        extra = f" ({', '.join(notes)})" if notes else ""
        rows = [(state, tuple(score_cell(m, state) for m in group)) for state in states]
        columns = ("state", *(m.label for m in group))
        blocks.append(Block(f"{name}{place} by distance in tokens, %{extra}", columns, tuple(rows)))
    return blocks


def _positions(groups: Sequence[Sequence[Measure]], states: Sequence[str]) -> list[Block]:
    """A block for each suite, length of string and row, near and far; the first token first."""
    blocks = []
    suites = {g[0].suite for g in groups}
    for group in groups:
        what = group[0].recalled
        assert what is not None
        extra = f" ({group[0].suite})" if len(suites) > 1 else ""
        rows = [(state, tuple(score_cell(m, state) for m in group)) for state in states]
        rows.append(("(guessing)", tuple(_guess(m) for m in group)))
        title = " ".join(filter(None, (what.format.capitalize(), f"in {what.length} tokens,", what.part)))
        columns = ("state", *(m.label for m in group))
        blocks.append(Block(f"{title}: right tokens by place in the string, %{extra}", columns, tuple(rows)))
    return blocks


USAGE = {
    "linear_share": "linear share of the hybrid's normaliser",
    "output_share": "linear branch's share of the norm of the hybrid's output",
    "outside_share": "mass that full softmax of the hybrid's own q and k gives to keys outside its window",
}


def _usage(record: Record, place: Path | None) -> tuple[str, ...]:
    """Shares by layer, averaged over heads and seeds, in the hybrid; where they are by head and position."""
    lines = []
    for metric, what in USAGE.items():
        shares: dict[str, list[float]] = {}
        for row in record.rows:
            if row.metric == metric and row.state == "hybrid" and (layer := re.search(r"layer\D*(\d+)", row.task)):
                shares.setdefault(layer[1], []).append(row.value)
        by_layer = sorted(shares.items(), key=lambda x: int(x[0]))
        if by_layer:
            lines.append(f"{what}: {', '.join(f'layer {k}: {sum(v) / len(v):.1%}' for k, v in by_layer)}.")
    if not lines:
        return ("linear share of the normaliser: not measured.",)
    lines[-1] += " It proves nothing alone: mass is not use."
    if place and (beside := bands_path(place)).is_file():
        picture = picture_path(place)
        heat = f"; heat maps: {picture}" if picture.is_file() else ""
        lines.append(f"the same by head and position: {beside}{heat}.")
    return tuple(lines)


def _legend(record: Record, found: Sequence[Measure], items: Items) -> tuple[str, ...]:
    limit = reach(record)
    seeds = sorted({r.seed for r in record.rows})
    how = (
        "bootstrap over items, 2000 resamples, seed 0, paired between states"
        if items
        else "recorded standard errors x 1.96: this Record has no items, so nothing is paired and there is no verdict"
    )
    lines = [
        "states: teacher: original weights; softmax: the student's weights under full softmax; hybrid: the student; "
        "window, linear (over all keys), linear_outside (keys beyond the window), sinks: that part alone; none: no "
        "attention.",
        f"±: the longer side of the 95 % interval ({how}). No ±: all resamples agree. "
        f"n: items; item seeds {', '.join(map(str, seeds))}.",
        "perplexity: exp of the mean next-token log-loss on held-out text; smaller is better. Columns with %: right "
        "answers.",
        "(guessing): share right by a blind guess; for recall, a guess among the pairs in context not yet asked for; "
        "of a copy, among the tokens of the string that did not yet come.",
        "(exposed %): share of scored tokens at which the linear branch has anything to see. Where it is low, the "
        "window is all there is.",
        "recovered: state / teacher, and (state - guess)/(teacher - guess); a dash where the teacher's interval "
        "touches the guess.",
    ]
    if any(m.kind == "agreement" for m in found):
        lines.append(
            "agreement: tokens of a greedy continuation that equal the teacher's before the first difference, in % of its; "
            "exact: continuations that equal it whole. The teacher's own is 100 by definition."
        )
    if limit is not None:
        lines.append(
            f"recall near, far: distance up to, beyond {limit} tokens = {record.layers} layers x "
            f"(window {record.window} - 1), the farthest that a stack of windows can see."
        )
    if comparable(record):
        margin = f"{record.margin:g} ({record.margin * 100:g} points of a score, {record.margin:g} nats)"
        lines += [
            "exposed items: at least half of their scored tokens are exposed. Differences: larger is better (a "
            "log-loss is negated).",
            f"reads (of the difference before it): equal: its whole interval is within the margin {margin}; differs: it "
            "excludes 0 and the point exceeds the margin; else undecided.",
            f"gap: {MEANING['gap']}",
            f"retention: {MEANING['retention']} Read gap and retention together.",
            f"Shapley: {' / '.join(record.branches)}: a branch's mean contribution over all orders of adding branches, "
            f"in % of hybrid - none; they add up to 100. {DASH}: not every subset was evaluated, or none differs.",
        ]
    return tuple(lines)


def _disagreements(found: Sequence[Measure]) -> tuple[str, ...]:
    """Where the mean of the items is not the value in the Record's rows."""
    import numpy as np

    lines = []
    for measure in found:
        for state, (value, _, _) in measure.bare.items():
            if state not in measure.scores:
                continue
            mean = float(np.average(measure.scores[state][0], weights=measure.weights)) * measure.sign
            if abs(mean - value) > 1e-6:
                lines.append(
                    f"CAUTION: {measure.label}, {state}: the items' mean is {mean:.6g}, "
                    f"the Record's row says {value:.6g}."
                )
    return tuple(lines)


def _source(record: Record, items: Items, place: Path | None) -> str:
    commit = (
        "unknown" if record.commit is None else record.commit[:10] + (" + uncommitted changes" if record.dirty else "")
    )
    versions = ", ".join(f"{k} {v}" for k, v in record.versions.items() if k in ("python", "torch", "transformers"))
    return (
        f"{record.name}: plan {record.plan_hash[:8]}, recipe seed {record.seed}, {record.device}, "
        f"{record.threads} threads, {record.dtype}, {record.seconds:.0f} s, started {record.started}; commit {commit}; "
        f"{versions}. Record: {place if place else 'record.json of the run'}" + ("." if items else ", without items.")
    )
