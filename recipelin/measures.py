"""Records and their items -> aligned scores, one Measure a column of a table (no torch).

Kinds of rows, by their fields: `distance` given: recall; metric ending in `share`: usage, no measure; smaller is
better: a log-loss in nats; else a score in 0..1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .records import Item, Items, ItemsOf, Record, RecordError, Row
from .statistics import Draws, Interval, Z, mean, mean_interval

if TYPE_CHECKING:
    from .statistics import Array

Kind = Literal["log_loss", "score", "recall"]


@dataclass(frozen=True)
class Measure:
    """One quantity measured in several states on the same items.

    `scores[state]`: [seeds, items], oriented so that larger is better (a log-loss is negated). `exposed`: [items].
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

    @property
    def n(self) -> int:
        return len(self.exposed) if self.exposed is not None else max(n for _, _, n in self.bare.values())

    @property
    def sign(self) -> float:
        """-1 where the recorded value is a loss."""
        return -1.0 if self.kind == "log_loss" else 1.0

    def draws(self, state: str, *, exposed_only: bool = False) -> Draws:
        """Mean of a state's scores with bootstrap draws; raises KeyError for a state without items."""
        scores = self.scores[state]
        if exposed_only:
            assert self.exposed is not None
            scores = scores[:, self.exposed >= EXPOSED]
        return mean(scores, metric=f"{self.suite}/{self.label}")

    def interval(self, state: str) -> Interval | None:
        """Mean of a state, in the units of the record (a log-loss in nats); None if the state was not measured.

        Without items: value +- 1.96 standard errors, or no width where no standard error is recorded.
        """
        if state in self.scores:
            return mean_interval(self.scores[state] * self.sign, metric=f"{self.suite}/{self.label}")
        if state not in self.bare:
            return None
        value, stderr, n = self.bare[state]
        half = Z * stderr if stderr is not None else float("nan")
        return Interval(value, value - half, value + half, n)

    def exposure(self) -> float | None:
        """Mean exposure of the items."""
        return None if self.exposed is None else float(self.exposed.mean())

    def exposed_items(self) -> int:
        """Items that may speak about the linear branch."""
        return 0 if self.exposed is None else int((self.exposed >= EXPOSED).sum())


EXPOSED = 0.5
"""An item counts as exposed if at least half of its scored tokens are."""


def kind_of(row: Row) -> Kind | None:
    """What a row is; None for a share of the normaliser."""
    if row.metric.endswith("share"):
        return None
    if row.distance is not None:
        return "recall"
    return "score" if row.higher_is_better else "log_loss"


def reach(record: Record) -> int | None:
    """layers x (window - 1): how far back a stack of windows sees."""
    return None if record.window is None else record.layers * (record.window - 1)


def measures(records: Sequence[Record], items: Sequence[Items]) -> tuple[Measure, ...]:
    """Measures of Records of one recipe (several: students of different seeds, pooled as seeds), in their order.

    Recall is pooled over distances: near (at most `reach`) and far. Item draws of several evaluation seeds are more
    items, since generated items are independent; a draw that only repeats another (the same held-out text) is left out.
    Raises RecordError where states or Records were not measured on the same items.
    """
    first = records[0]
    limit = reach(first)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in first.rows:
        if (kind := kind_of(row)) is None:
            continue
        if kind == "recall" and row.distance is not None:
            part = "" if limit is None else " near" if row.distance <= limit else " far"
            groups.setdefault((row.suite, row.metric, f"recall{part}"), []).append(row)
        else:
            groups.setdefault((row.suite, row.metric, row.task), []).append(row)
    suites = {suite for suite, _, _ in groups}
    found = []
    for (suite, metric, name), rows in groups.items():
        kind = kind_of(rows[0])
        assert kind is not None
        label = name.replace("_", " ")
        if kind == "log_loss" and name != "perplexity":
            label = "perplexity" if name == metric else f"perplexity {label}"
        found.append(
            _measure(
                f"{suite}: {label}" if len(suites) > 1 else label,
                kind,
                suite,
                metric,
                rows,
                records=records,
                items=items,
            )
        )
    order = {"log_loss": 0, "score": 1, "recall": 2}
    return tuple(sorted(found, key=lambda m: (m.suite, order[m.kind], m.label.endswith("far"))))


def by_distance(record: Record, items: Items) -> tuple[Measure, ...]:
    """Recall at each distance, nearest first."""
    found = []
    rows = [r for r in record.rows if kind_of(r) == "recall"]
    for suite, metric, distance in sorted({(r.suite, r.metric, r.distance or 0) for r in rows}):
        here = [r for r in rows if (r.suite, r.metric, r.distance) == (suite, metric, distance)]
        found.append(_measure(str(distance), "recall", suite, metric, here, records=[record], items=[items]))
    return tuple(found)


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
    reference: list[tuple[ItemsOf, str]] = []
    scores: dict[str, Array] = {}
    exposed: Array | None = None
    for state in states:
        stack = []
        for record, sidecar in zip(records, items, strict=True):
            got = [(key._replace(state=""), item) for key, item in _gather(state, rows, sidecar) if key.seed in keep]
            names = [(key, item.id) for key, item in got]
            reference = reference or names
            if names != reference:
                raise RecordError(
                    f"{record.name}: the items of state {state!r} on {suite}/{label} are not those of the other "
                    "states or Records: they cannot be compared item by item"
                )
            stack.append([sign * item.score for _, item in got])
            if state != "teacher" or exposed is None:
                exposed = np.asarray([item.exposed for _, item in got])
        scores[state] = np.asarray(stack, dtype=np.float64)
    return Measure(label, kind, suite, tasks, metric, chance, scores, exposed, bare)


def _gather(state: str, rows: Iterable[Row], sidecar: Items) -> list[tuple[ItemsOf, Item]]:
    """A state's items over the rows of a measure; empty if those of any row are missing."""
    found = []
    for row in rows:
        if row.state == state:
            key = ItemsOf(state, row.suite, row.task, row.metric, row.seed)
            if not sidecar.get(key):
                return []
            found += [(key, item) for item in sidecar[key]]
    return found


def _distinct(states: Sequence[str], rows: Sequence[Row], items: Sequence[Items]) -> set[int]:
    """Evaluation seeds whose items do not merely repeat those of another seed."""
    drawn: dict[object, int] = {}
    for seed in sorted({r.seed for r in rows}):
        here = [r for r in rows if r.seed == seed]
        content = tuple(
            (state, key.task, tuple(item.model_dump().values()))
            for state in states
            for sidecar in items
            for key, item in _gather(state, here, sidecar)
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
