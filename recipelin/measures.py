"""Records and their items -> aligned scores, one Measure a column of a table (no torch).

Kinds of rows, by their fields: `distance` given: recall, its format and length in the task's name (`recall@24`,
`passkey@4096:3000`); metric ending in `share`: usage, tokens per second and bytes: cost, `position_...`: parts of a copied
string, all no measure; task `agreement...`: agreement with the teacher's generation, in 0..1, no task; smaller is better: a
log-loss in nats; else a score in 0..1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from .records import ItemColumns, Items, ItemsOf, Record, RecordError, Row
from .statistics import RESAMPLES, Draws, Interval, Z, mean, mean_interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .statistics import Array

Kind = Literal["log_loss", "score", "agreement", "recall"]
COSTS = ("tokens_per_second", "cache_bytes")
POSITION = "position_"


class Recalled(NamedTuple):
    """What a recall measure pools: distances within reach or beyond it, of one format and length (None: not stated)."""

    format: str
    length: int | None
    part: Literal["near", "far"] | None


@dataclass(frozen=True)
class Measure:
    """One quantity measured in several states on the same items.

    `scores[state]`: [seeds, items], oriented so that larger is better (a log-loss is negated). `exposed`: [items].
    `weights`, `strata` (subtasks): [items], None where all are alike. `items`: which they are. `seeds`: those of the
    students, one a row of scores; the same seeds of two recipes are paired.
    `bare[state]`: (value, stderr, n) as recorded, for Records without items.
    """

    label: str
    kind: Kind
    suite: str
    tasks: tuple[str, ...]
    metric: str
    chance: float | None
    scores: dict[str, "Array"] = field(default_factory=dict)
    exposed: "Array | None" = None
    bare: dict[str, tuple[float, float | None, int]] = field(default_factory=dict)
    recalled: Recalled | None = None
    weights: "Array | None" = None
    strata: "NDArray[np.intp] | None" = None
    items: tuple[tuple[ItemsOf, str], ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        return len(self.exposed) if self.exposed is not None else max(n for _, _, n in self.bare.values())

    @property
    def sign(self) -> float:
        """-1 where the recorded value is a loss."""
        return -1.0 if self.kind == "log_loss" else 1.0

    @property
    def stream(self) -> str:
        """What the resamples of its items are named by."""
        return f"{self.suite}/{self.label}"

    def only(self, kept: "NDArray[np.bool_]") -> "Measure":
        """The same of a part of the items [items]; raises KeyError for a Record without items."""
        if self.exposed is None:
            raise KeyError(f"{self.label} has no items")
        return replace(
            self,
            scores={state: scores[:, kept] for state, scores in self.scores.items()},
            exposed=self.exposed[kept],
            weights=None if self.weights is None else self.weights[kept],
            strata=None if self.strata is None else self.strata[kept],
            items=tuple(item for item, keep in zip(self.items, kept, strict=True) if keep),
        )

    def at(self, task: str) -> "Measure | None":
        """The part that one of its tasks makes; None for a Record without items."""
        if self.exposed is None:
            return None
        import numpy as np

        kept = self.only(np.asarray([of.task == task for of, _ in self.items]))
        return replace(kept, label=task, tasks=(task,))

    def draws(self, state: str, *, exposed_only: bool = False, resamples: int = RESAMPLES) -> Draws:
        """Mean of a state's scores with bootstrap draws; raises KeyError for a state without items."""
        if exposed_only:
            return self.only(self.are_exposed()).draws(state, resamples=resamples)
        return mean(
            self.scores[state],
            metric=self.stream,
            weights=self.weights,
            strata=self.strata,
            seeds=self.seeds,
            resamples=resamples,
        )

    def interval(self, state: str) -> Interval | None:
        """Mean of a state, in the units of the record (a log-loss in nats); None if the state was not measured.

        Without items: value +- 1.96 standard errors, or no width where no standard error is recorded.
        """
        if state in self.scores:
            return mean_interval(
                self.scores[state] * self.sign,
                metric=self.stream,
                weights=self.weights,
                strata=self.strata,
                seeds=self.seeds,
            )
        if state not in self.bare:
            return None
        value, stderr, n = self.bare[state]
        half = Z * stderr if stderr is not None else float("nan")
        return Interval(value, value - half, value + half, n)

    def exposure(self) -> float | None:
        """Mean exposure of the items."""
        return None if self.exposed is None else float(self.exposed.mean())

    def are_exposed(self) -> "NDArray[np.bool_]":
        """Which items may speak about the linear branch [items]; none of a Record without items."""
        import numpy as np

        return np.zeros(0, dtype=bool) if self.exposed is None else self.exposed >= EXPOSED

    def exposed_items(self) -> int:
        """Items that may speak about the linear branch."""
        return int(self.are_exposed().sum())


EXPOSED = 0.5
"""An item counts as exposed if at least half of its scored tokens are."""


def kind_of(row: Row) -> Kind | None:
    """What a row is; None for what nothing is concluded from: usage, cost, and what another row has whole."""
    if row.metric.endswith("share") or row.metric in COSTS or row.metric.startswith(POSITION):
        return None
    if row.distance is not None:
        return "recall"
    if row.task.startswith("agreement"):
        return "agreement"
    return "score" if row.higher_is_better else "log_loss"


def reach(record: Record) -> int | None:
    """layers x (window - 1): how far back a stack of windows sees."""
    return None if record.window is None else record.layers * (record.window - 1)


def measures(records: Sequence[Record], items: Sequence[Items], *, limit: int | None = None) -> tuple[Measure, ...]:
    """Measures of Records of one recipe (several: students of different seeds, pooled as seeds), in their order.

    Recall of one format, length and metric is pooled over distances: near (at most `limit`; default: `reach`) and far.
    Item draws of several evaluation seeds are more items, since generated items are independent; a draw that only repeats
    another (the same held-out text) is left out. Raises RecordError where states or Records were not measured on the same items.
    """
    first = records[0]
    limit = reach(first) if limit is None else limit
    groups: dict[tuple[str, str, str | Recalled], list[Row]] = {}
    for row in first.rows:
        if kind_of(row) is not None:
            groups.setdefault((row.suite, row.metric, _recalled(row, limit) or row.task), []).append(row)
    suites = {suite for suite, _, _ in groups}
    found = []
    for (suite, metric, what), rows in groups.items():
        kind = kind_of(rows[0])
        assert kind is not None
        if isinstance(what, Recalled):
            label = _recall_label(
                what, metric, [(m, w) for s, m, w in groups if s == suite and isinstance(w, Recalled)]
            )
        else:
            label = what.replace("_", " ")
            if kind == "log_loss" and what != "perplexity":
                label = "perplexity" if what == metric else f"perplexity {label}"
        made = _measure(
            f"{suite}: {label}" if len(suites) > 1 else label, kind, suite, metric, rows, records=records, items=items
        )
        found.append(replace(made, recalled=what) if isinstance(what, Recalled) else made)
    order = {"log_loss": 0, "score": 1, "agreement": 2, "recall": 3}
    return tuple(
        sorted(found, key=lambda m: (m.suite, order[m.kind], m.recalled is not None and m.recalled.part == "far"))
    )


def _recalled(row: Row, limit: int | None) -> Recalled | None:
    """What a recall row is pooled with; None for another kind of row."""
    if row.distance is None:
        return None
    format, _, rest = row.task.partition("@")
    length, colon, _ = rest.partition(":")
    part: Literal["near", "far"] | None = None if limit is None else "near" if row.distance <= limit else "far"
    return Recalled(format, int(length) if colon else None, part)


def _recall_label(what: Recalled, metric: str, all_of_suite: Sequence[tuple[str, Recalled]]) -> str:
    """`passkey far`, with the length and the metric where the suite has the format in several."""
    alike = [(m, w) for m, w in all_of_suite if w.format == what.format]
    parts = [what.format]
    if what.length is not None and len({w.length for _, w in alike}) > 1:
        parts.append(str(what.length))
    parts += [what.part] if what.part else []
    if len({m for m, _ in alike}) > 1:
        parts.append(metric.replace("_", " "))
    return " ".join(parts)


def by_distance(record: Record, items: Items) -> tuple[tuple[Measure, ...], ...]:
    """Recall at each distance, nearest first: a group for each suite, metric, format and length."""
    groups: dict[tuple[str, str, Recalled], list[Row]] = {}
    for row in record.rows:
        if kind_of(row) == "recall" and (what := _recalled(row, None)) is not None:
            groups.setdefault((row.suite, row.metric, what), []).append(row)
    return tuple(
        tuple(
            _part(str(distance), what, [r for r in rows if r.distance == distance], record, items)
            for distance in sorted({r.distance for r in rows if r.distance is not None})
        )
        for (_, _, what), rows in sorted(groups.items(), key=lambda g: (*g[0][:2], g[0][2].format, g[0][2].length or 0))
    )


def by_position(record: Record, items: Items) -> tuple[tuple[Measure, ...], ...]:
    """Tokens of copied strings by their place in it: a group for each suite, format, length, and near or far."""
    groups: dict[tuple[str, Recalled], dict[str, list[Row]]] = {}
    for row in record.rows:
        if row.metric.startswith(POSITION) and (what := _recalled(row, reach(record))) is not None:
            groups.setdefault((row.suite, what), {}).setdefault(row.metric, []).append(row)
    return tuple(
        tuple(
            _part(metric.removeprefix(POSITION).replace("_", " to "), what, rows, record, items)
            for metric, rows in metrics.items()
        )
        for (_, what), metrics in groups.items()
    )


def _part(label: str, what: Recalled, rows: Sequence[Row], record: Record, items: Items) -> Measure:
    first = rows[0]
    made = _measure(label, "recall", first.suite, first.metric, rows, records=[record], items=[items])
    return replace(made, recalled=what)


def _measure(
    label: str,
    kind: Kind,
    suite: str,
    metric: str,
    rows: Sequence[Row],
    *,
    records: Sequence[Record],
    items: Sequence[Items],
) -> Measure:
    import numpy as np

    tasks = tuple(dict.fromkeys(r.task for r in rows))
    chances = [r.chance for r in rows if r.chance is not None]
    chance = sum(chances) / len(chances) if chances else None
    states = tuple(dict.fromkeys(r.state for r in rows))
    bare = {s: _pooled(rows, s) for s in states}
    if not all(_gather(state, rows, sidecar) for state in states for sidecar in items):
        return Measure(label, kind, suite, tasks, metric, chance, bare=bare)
    keep = _distinct(states, rows, items)
    sign = -1.0 if kind == "log_loss" else 1.0
    reference: list[tuple[ItemsOf, tuple[str, ...]]] = []
    scores: dict[str, Array] = {}
    exposed: Array | None = None
    weights: Array | None = None
    strata: NDArray[np.intp] | None = None
    for state in states:
        stack = []
        for record, sidecar in zip(records, items, strict=True):
            lines = [(key, each) for key, each in _gather(state, rows, sidecar) if key.seed in keep]
            names = [(key._replace(state=""), each.id) for key, each in lines]
            reference = reference or names
            if names != reference:
                raise RecordError(
                    f"{record.name}: the items of state {state!r} on {suite}/{label} are not those of the other "
                    "states or Records: they cannot be compared item by item"
                )
            got = ItemColumns.joined([each for _, each in lines])
            stack.append(got.score)
            if state != "teacher" or exposed is None:
                exposed = np.asarray(got.exposed)
            if any(weight != 1.0 for weight in got.weight):
                weights = np.asarray(got.weight)
            if any(got.subtask):
                strata = np.unique(got.subtask, return_inverse=True)[1]
        scores[state] = sign * np.asarray(stack, dtype=np.float64)
    return Measure(
        label,
        kind,
        suite,
        tasks,
        metric,
        chance,
        scores,
        exposed,
        bare,
        weights=weights,
        strata=strata,
        items=tuple((key, id) for key, ids in reference for id in ids),
        seeds=tuple(record.seed for record in records),
    )


def _gather(state: str, rows: Iterable[Row], sidecar: Items) -> list[tuple[ItemsOf, ItemColumns]]:
    """A state's items over the rows of a measure, a line a row; empty if those of any row are missing."""
    found = []
    for row in rows:
        if row.state == state:
            key = ItemsOf(state, row.suite, row.task, row.metric, row.seed)
            if not sidecar.get(key):
                return []
            found.append((key, sidecar[key]))
    return found


def _distinct(states: Sequence[str], rows: Sequence[Row], items: Sequence[Items]) -> set[int]:
    """Evaluation seeds whose items do not merely repeat those of another seed."""
    seeds = {r.seed for r in rows}
    if len(seeds) == 1:
        return seeds
    drawn: dict[object, int] = {}
    for seed in sorted(seeds):
        here = [r for r in rows if r.seed == seed]
        content = tuple(
            (state, key.task, each)
            for state in states
            for sidecar in items
            for key, each in _gather(state, here, sidecar)
        )
        drawn.setdefault(content, seed)
    return set(drawn.values())


def _pooled(rows: Sequence[Row], state: str) -> tuple[float, float | None, int]:
    """Value, standard error and n of a state's rows without items, weighted by n."""
    here = [r for r in rows if r.state == state]
    n = sum(r.n for r in here)
    value = sum(r.value * r.n for r in here) / n
    errors = [r.stderr for r in here if r.stderr is not None]
    if len(errors) < len(here):
        return value, None, n
    return value, sum((e * r.n / n) ** 2 for e, r in zip(errors, here, strict=True)) ** 0.5, n
