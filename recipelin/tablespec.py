"""The schema of a table spec: rows, columns, what the paper printed, and which recipe fills a cell (no torch)."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from .base import Config

Trust = Literal["T", "R", "M", "C", "I"]
TRUST = {
    "T": "in the paper, through a third party",
    "R": "by a reviewer of the paper",
    "M": "by a machine-made summary",
    "C": "in the baseline's code",
    "I": "inferred",
}


class Printed(Config):
    """A number as the paper prints it, with its decimals. Sample YAML: `{value: 92.26, footnote: 1}`"""

    value: Decimal | int
    trust: Trust | None = Field(None, description="how it is known; default: the row's")
    footnote: Annotated[int, Field(ge=1)] | None = None


class Column(Config):
    """What a column shows: a task, recall near or far, the mean of columns, or the recovery of a column.

    Scores and recoveries are shown in percent, a log-loss as perplexity; printed numbers are in the same unit.
    Sample YAML: `{label: PIQA, task: piqa}`, `{label: passkey far, recall: far, of: passkey@4096}`,
    `{label: AVG, mean_of: [PIQA, ARC-E]}`, `{label: Rec, recovery_of: AVG}`
    """

    label: str
    suite: str | None = Field(None, description="needed only where two suites have the task")
    task: str | None = None
    recall: Literal["near", "far"] | None = None
    of: str | None = Field(
        None, description="format of the recall, or format@length; needed only where there are several"
    )
    metric: str | None = Field(None, description="needed only where a task has two")
    mean_of: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    recovery_of: str | None = None
    corrected: bool = Field(False, description="recovery corrected for guessing")

    @model_validator(mode="after")
    def _one_kind(self) -> "Column":
        if sum(x is not None for x in (self.task, self.recall, self.mean_of, self.recovery_of)) != 1:
            raise ValueError("give exactly one of task, recall, mean_of and recovery_of")
        if self.of is not None and self.recall is None:
            raise ValueError("`of` is the format of a recall column; give recall: near or far beside it")
        return self


class TableRow(Config):
    """One row. Several recipes (or one run with several seeds) are pooled as seeds.

    Sample YAML: `{label: SWA only, recipe: untangling/mistral-lolcats, state: window, trust: T, printed: {AVG: 65.56}}`
    """

    label: str
    recipe: str | Annotated[tuple[str, ...], Field(min_length=1)]
    state: str
    trust: Trust | None = None
    printed: dict[str, Decimal | int | Printed] = Field({}, description="column: number as printed")

    @property
    def recipes(self) -> tuple[str, ...]:
        return (self.recipe,) if isinstance(self.recipe, str) else self.recipe


class Spec(Config):
    """A table spec, whole."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    paper: str | None = None
    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    rows: Annotated[tuple[TableRow, ...], Field(min_length=1)]
    footnotes: tuple[str, ...] = Field((), description="numbered from 1; the paper's own contradictions, for one")

    @model_validator(mode="after")
    def _names_fit(self) -> "Spec":
        labels = [c.label for c in self.columns]
        plain = [c.label for c in self.columns if c.task or c.recall]
        if twice := [x for x in dict.fromkeys(labels) if labels.count(x) > 1]:
            raise ValueError(f"two columns {twice[0]!r}")
        for column in self.columns:
            for label in column.mean_of or ():
                if label not in plain:
                    raise ValueError(
                        f"mean_of of {column.label!r}: no task column {label!r}; there are {', '.join(plain)}"
                    )
            if column.recovery_of is not None and column.recovery_of not in labels:
                raise ValueError(f"recovery_of of {column.label!r}: no column {column.recovery_of!r}")
        for row in self.rows:
            for label, printed in row.printed.items():
                if label not in labels:
                    raise ValueError(
                        f"row {row.label!r}: printed has no column {label!r}; there are {', '.join(labels)}"
                    )
                if isinstance(printed, Printed) and (printed.footnote or 0) > len(self.footnotes):
                    raise ValueError(f"row {row.label!r}, {label!r}: there is no footnote {printed.footnote}")
        return self


class SpecError(ValueError):
    """A table spec that cannot be read: one line a mistake, each with file:line."""


def read_spec(path: Path) -> Spec:
    """Read a spec. Raises SpecError with all its mistakes."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        raise SpecError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if node is None:
        raise SpecError(f"{path}: empty; a table spec has name, title, columns and rows")
    mistakes: list[str] = []
    value = _value(node, path, mistakes, set())
    if mistakes:
        raise SpecError("\n".join(mistakes))
    try:
        return Spec.model_validate(value)
    except ValidationError as error:
        found = [
            f"{path}:{_line(node, e['loc'])}: {'.'.join(str(p) for p in e['loc']) or 'spec'}: {e['msg']}"
            for e in error.errors(include_url=False)
        ]
        raise SpecError("\n".join(dict.fromkeys(found))) from error


def _value(node: yaml.Node, path: Path, mistakes: list[str], seen: set[int]) -> Any:
    """A node as Python: lists become tuples. Keys given twice, aliases and tags are mistakes."""
    place = f"{path}:{node.start_mark.line + 1}"
    if id(node) in seen:
        mistakes.append(f"{place}: an anchor is used twice; write it out")
        return None
    seen.add(id(node))
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        mistakes.append(f"{place}: the tag {node.tag!r} has no place in a table spec")
        return None
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(n, path, mistakes, seen) for n in node.value)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                mistakes.append(f"{place}: a key must be a word")
            elif key.value in found:
                mistakes.append(f"{path}:{key.start_mark.line + 1}: {key.value!r} is given twice")
            else:
                found[key.value] = _value(value, path, mistakes, seen)
        return found
    value = yaml.SafeLoader("").construct_object(node)
    return Decimal(node.value) if isinstance(value, float) and math.isfinite(value) else value  # 78.40 keeps its 0


def _line(node: yaml.Node, place: tuple[int | str, ...]) -> int:
    """The line of a place in the file, or of the nearest thing around it."""
    for part in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            node = next((v for k, v in node.value if k.value == part), node)
    return int(node.start_mark.line) + 1
