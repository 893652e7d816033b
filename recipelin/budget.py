"""Token curves: what a target takes in training tokens or in compute, and what a budget reaches (no torch)."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from .measures import kind_of
from .records import CurveRow, Record, Row
from .tablespec import OfCurve, Target

Bound = Literal["", "at most", "more than"]


class Budget(NamedTuple):
    """Training tokens. `bound`: the target was met at the first point already, or not met at the last."""

    tokens: float
    bound: Bound = ""


class Point(NamedTuple):
    """What a student reached after `tokens` training tokens; `value` as recorded (a log-loss in nats)."""

    tokens: int
    value: float


class Spent(NamedTuple):
    """What the steps before a stage read and cost, and what a token of the stage costs, in FLOPs by the plan's estimates."""

    tokens: float
    flops: float
    flops_a_token: float


def tokens_to(points: Sequence[Point], target: float, *, larger: bool) -> Budget:
    """The first budget at which the target is met; `larger`: whether larger values are better.

    Between the last point before it and the first that meets it the value is taken to be linear in the tokens, in the unit
    that is recorded: nats for a log-loss, so that a perplexity is interpolated in its logarithm. What comes after the
    first meeting does not matter. Raises ValueError without points.
    """
    if not points:
        raise ValueError("a curve without points")
    sign = 1.0 if larger else -1.0
    before: Point | None = None
    for point in sorted(points):
        if sign * (point.value - target) >= 0:
            if before is None:
                return Budget(point.tokens, "at most" if point.tokens else "")
            share = (target - before.value) / (point.value - before.value)
            return Budget(before.tokens + share * (point.tokens - before.tokens))
        before = point
    assert before is not None
    return Budget(before.tokens, "more than")


def median(budgets: Sequence[Budget]) -> Budget:
    """Of the budgets of several seeds: what was not reached counts as the largest; of an even number the upper one."""
    ordered = sorted(budgets, key=lambda b: (b.bound == "more than", b.tokens))
    return ordered[len(ordered) // 2]


def spent(record: Record, stage: str) -> Spent:
    """What a run had spent before `stage`: choosing layers, calibrating, earlier stages; evaluations while it trains are none
    of it. A stage that stopped early counts for what it read. Raises ValueError for a stage, or a cost, that is not known.
    """
    planned = record.plan.get("steps")
    assert isinstance(planned, list), "every Plan has steps"
    tokens = flops = 0.0
    for each, made in zip(planned, record.steps, strict=True):
        step, cost = each["step"], each["cost"]
        own = step.get("stage") == stage
        if cost["flops"] is None or not cost["tokens"]:
            if own or step["step"] in ("transfer", "tune", "calibrate"):
                raise ValueError(f"{record.name}: the plan does not know what {step.get('stage', step['step'])} costs")
            continue  # swaps and switches
        if own:
            return Spent(tokens, flops, cost["flops"] / cost["tokens"])
        read = made.report.get("tokens", cost["tokens"])
        assert isinstance(read, (int, float))
        tokens += read
        flops += cost["flops"] * read / cost["tokens"]
    raise ValueError(f"{record.name} has no stage {stage!r}")


def curve(record: Record, column: OfCurve, state: str) -> tuple[CurveRow, ...]:
    """The lines of a Record that a column asks for, by tokens."""
    found = [row for row in record.curves if row.state == state and _fits(row, column)]
    return tuple(sorted(found, key=lambda row: row.tokens))


def _fits(row: Row, column: OfCurve) -> bool:
    stage = column.stage is None or not isinstance(row, CurveRow) or row.stage == column.stage
    suite = column.suite is None or row.suite == column.suite
    metric = column.metric is None or row.metric == column.metric
    return stage and suite and metric and row.task == column.task


def series(rows: Sequence[CurveRow]) -> tuple[str, ...]:
    """Which curves the lines are of, in words: a column shows one."""
    return tuple(dict.fromkeys(f"{r.stage}: {r.task} of {r.suite} ({r.metric})" for r in rows))


def target(record: Record, wanted: Target, rows: Sequence[CurveRow]) -> float | None:
    """A target in the recorded unit; None where the Record has no teacher to multiply.

    `value`: a perplexity, or a score in percent. `teacher`: times the teacher's perplexity, or its score.
    """
    first = rows[0]
    loss = kind_of(first) == "log_loss"
    if (value := wanted.value) is not None:
        return math.log(value) if loss else float(value) / 100
    own = [r.value for r in record.rows if r.state == "teacher" and _same(r, first)]
    if not own:
        return None
    assert wanted.teacher is not None
    mean, times = sum(own) / len(own), float(wanted.teacher)
    return mean + math.log(times) if loss else mean * times


def _same(row: Row, other: Row) -> bool:
    return (row.suite, row.task, row.metric) == (other.suite, other.task, other.metric)


def reached(rows: Sequence[CurveRow], tokens: int) -> float | None:
    """The value at the first point that has read so many tokens, as shown: a perplexity, or percent; None beyond the last."""
    row = next((r for r in rows if r.tokens >= tokens), None)
    if row is None:
        return None
    return math.exp(row.value) if kind_of(row) == "log_loss" else 100 * row.value
