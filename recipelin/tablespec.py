"""The schema of a table spec: rows, columns, what the paper printed, and which recipe fills a cell (no torch)."""

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from .base import Config
from .mistakes import among, located, placed
from .strict_yaml import Mistake, RecipeError, Where, read_yaml

Trust = Literal["T", "R", "M", "C", "F", "I"]
TRUST = {
    "T": "in the paper, through a third party",
    "R": "by a reviewer of the paper",
    "M": "by a machine-made summary",
    "C": "in the baseline's code",
    "F": "recomputed from the authors' raw result files",
    "I": "inferred",
}

EXPECTED = "a table spec (name, title, columns, rows; results/README.md)"


class Printed(Config):
    """A number as the paper prints it, with its decimals. Sample YAML: `{value: 92.26, footnote: 1}`, or, where the authors'
    raw result files say another, both: `{value: 32.1, files: 31.13}`; `{value: 65.5, bound: at most}`
    """

    value: Decimal | int
    files: Decimal | int | None = Field(None, description="the same, recomputed from the authors' raw result files")
    bound: Literal["at most", "more than"] | None = Field(
        None, description="the number is a bound (tokens to a target)"
    )
    trust: Trust | None = Field(None, description="how it is known; default: the row's")
    footnote: Annotated[int, Field(ge=1)] | None = None


class Measured(Config):
    """What was measured: a task, or recall near or far.

    Sample YAML: `{task: piqa}`, `{recall: far, of: passkey@4096}`
    """

    suite: str | None = Field(None, description="needed only where two suites have the task")
    task: str | None = None
    recall: Literal["near", "far"] | None = None
    of: str | None = Field(
        None, description="format of the recall, or format@length; needed only where there are several"
    )
    metric: str | None = Field(None, description="needed only where a task has two")

    @model_validator(mode="after")
    def _of_recall(self) -> "Measured":
        if self.of is not None and self.recall is None:
            raise ValueError("`of` is the format of a recall column; give recall: near or far beside it")
        return self


Positive = Annotated[Decimal, Field(gt=0)] | Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)]
"""A number as printed (a table spec keeps its decimals) or plain (a claims spec)."""


class Target(Config):
    """What is to be reached. Sample YAML: `{value: 12.5}` (a perplexity, or a score in percent), `{teacher: 1.1}`"""

    value: Positive | None = None
    teacher: Positive | None = Field(None, description="times the teacher's perplexity, or its score")

    @model_validator(mode="after")
    def _one(self) -> "Target":
        if (self.value is None) == (self.teacher is None):
            raise ValueError("give exactly one of value and teacher")
        return self


class OfCurve(Measured):
    """The same, and what was measured while a stage trained (schedule: curve): tokens to a target, or what a budget reached.

    Sample YAML: `{task: perplexity, tokens_to: {teacher: 1.1}}`, `{task: perplexity, at_tokens: 66000000, stage: tune}`
    """

    tokens_to: Target | None = Field(None, description="millions of training tokens to reach it, first met")
    at_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="the value once so many tokens were read")
    stage: str | None = Field(None, description="whose tokens; needed only where two stages have a curve")

    @model_validator(mode="after")
    def _of_a_stage(self) -> "OfCurve":
        if self.stage is not None and not self.of_curve:
            raise ValueError("`stage` says whose tokens; give tokens_to or at_tokens beside it")
        return self

    @property
    def of_curve(self) -> bool:
        """Whether it is read off what was measured while a stage trained."""
        return self.tokens_to is not None or self.at_tokens is not None


class Column(OfCurve):
    """What a column shows: a task, recall near or far, the mean of columns, or the recovery of a column; of a task that was
    measured while a stage trained (schedule: curve) also the training tokens to a target, or what a budget reached.

    `value: gap` or `retention` shows what the linear branch brings on that task, on exposed items, in rows of state `hybrid`.

    Scores and recoveries are shown in percent, a log-loss as perplexity; printed numbers are in the same unit.
    Sample YAML: `{label: PIQA, task: piqa}`, `{label: passkey far, recall: far, of: passkey@4096}`,
    `{label: AVG, mean_of: [PIQA, ARC-E]}`, `{label: NLU, tasks: [piqa, arc_easy]}`, `{label: Rec, recovery_of: AVG}`,
    `{label: gap, task: perplexity, value: gap}`, `{label: to 1.1 x, task: perplexity, tokens_to: {teacher: 1.1}}`,
    `{label: at 66 M, task: perplexity, at_tokens: 66000000}`
    """

    label: str
    value: Literal["gap", "retention"] | None = Field(
        None, description="of a task or recall: instead of the state's score"
    )
    mean_of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="the mean over these tasks, which need no columns of their own"
    )
    recovery_of: str | None = None
    corrected: bool = Field(False, description="recovery corrected for guessing")

    @model_validator(mode="after")
    def _one_kind(self) -> "Column":
        if sum(x is not None for x in (self.task, self.recall, self.mean_of, self.tasks, self.recovery_of)) != 1:
            raise ValueError("give exactly one of task, recall, mean_of, tasks and recovery_of")
        if self.value and not (self.task or self.recall):
            raise ValueError(f"{self.value} is of a task or of recall; found a mean or a recovery")
        curves = [n for n in ("tokens_to", "at_tokens", "value") if getattr(self, n) is not None]
        if len(curves) > 1 or (self.of_curve and self.task is None):
            raise ValueError("give one of tokens_to, at_tokens and value, the first two with a task")
        return self


class TableRow(Config):
    """One row. Several recipes (or one run with several seeds) are pooled as seeds. Without a recipe the row shows what was
    printed, and says that there is no recipe yet.

    Sample YAML: `{label: SWA only, recipe: untangling/mistral-lolcats, state: window, trust: T, printed: {AVG: 65.56}}`
    """

    label: str
    recipe: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    state: str | None = Field(None, description="of the recipe")
    trust: Trust | None = None
    printed: dict[str, Decimal | int | Printed] = Field({}, description="column: number as printed")

    @property
    def recipes(self) -> tuple[str, ...]:
        return (self.recipe,) if isinstance(self.recipe, str) else self.recipe or ()

    @model_validator(mode="after")
    def _something(self) -> "TableRow":
        if (self.recipe is None) != (self.state is None):
            raise ValueError("give recipe and state, or neither")
        if self.recipe is None and not self.printed:
            raise ValueError("a row without a recipe shows what is printed; give printed")
        return self


class Figure(Config):
    """A picture of the table, `X.png` beside `X.md`: a line a row, over columns that stand for numbers; what was printed
    in lines of its own, with hollow marks.

    Sample YAML: `{across: "distance, tokens", up: "recall, %", at: {"6": 6, "24": 24, "96": 96}, log: x}`
    """

    title: str | None = Field(None, description="where it is not the table's")
    across: str = Field(description="what the columns' numbers are, with their unit")
    up: str = Field(description="what the cells are, with their unit")
    at: Annotated[dict[str, float], Field(min_length=2)] = Field(description="column: its number")
    rows: tuple[str, ...] = Field((), description="rows that are drawn; none: all")
    log: Literal["", "x", "y", "xy"] = Field("", description="axes that are logarithmic")


class Spec(Config):
    """A table spec, whole."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    paper: str | None = None
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    rows: Annotated[tuple[TableRow, ...], Field(min_length=1)]
    footnotes: tuple[str, ...] = Field((), description="numbered from 1; the paper's own contradictions, for one")
    figure: Figure | None = None

    @property
    def recipes(self) -> tuple[str, ...]:
        """Every recipe that fills a row, once."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.recipes))


def read_spec(path: Path) -> Spec:
    """Read a spec. Raises RecipeError with every mistake of the file."""
    raw, places, _ = read_yaml(path, kind=EXPECTED, decimals=True)
    if {"method", "extends", "evals"} & raw.keys():
        kind = "suite" if "evals" in raw else "recipe"
        raise RecipeError([Mistake(str(path), 0, 0, f"is a {kind}; expected {EXPECTED}")])
    try:
        spec = Spec.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(list(located(error, (), Spec, places))) from error
    if unfit := [placed(places, where, text) for where, text in _unfit(spec)]:
        raise RecipeError(unfit)
    return spec


def _unfit(spec: Spec) -> Iterator[tuple[Where, str]]:
    """What names a column or a footnote that is not there, and where."""
    labels = [c.label for c in spec.columns]
    plain = [c.label for c in spec.columns if (c.task or c.recall) and not (c.value or c.of_curve)]
    scores = [c.label for c in spec.columns if not (c.value or c.of_curve)]
    for index, column in enumerate(spec.columns):
        if column.label in labels[:index]:
            yield ("columns", index, "label"), f"two columns are labelled {column.label!r}"
        for place, label in enumerate(column.mean_of or ()):
            if label not in plain:
                text = f"no task column {label!r}{among(label, plain)}"
                yield ("columns", index, "mean_of", place), f"mean_of of {column.label!r}: {text}"
        if column.recovery_of is not None and column.recovery_of not in scores:
            text = f"no column {column.recovery_of!r}{among(column.recovery_of, scores)}"
            yield ("columns", index, "recovery_of"), f"recovery_of of {column.label!r}: {text}"
    for label in spec.figure.at if spec.figure else ():
        if label not in labels:
            yield ("figure", "at", label, "key"), f"no column {label!r}{among(label, labels)}"
    names = [r.label for r in spec.rows]
    for place, name in enumerate(spec.figure.rows if spec.figure else ()):
        if name not in names:
            yield ("figure", "rows", place), f"no row {name!r}{among(name, names)}"
    for index, row in enumerate(spec.rows):
        for label, printed in row.printed.items():
            at: Where = ("rows", index, "printed", label)
            if label not in labels:
                text = f"printed has no column {label!r}{among(label, labels)}"
                yield (*at, "key"), f"row {row.label!r}: {text}"
            if isinstance(printed, Printed) and (printed.footnote or 0) > len(spec.footnotes):
                text = f"there is no footnote {printed.footnote}; the spec has {len(spec.footnotes)}"
                yield (*at, "footnote"), f"row {row.label!r}, {label!r}: {text}"
