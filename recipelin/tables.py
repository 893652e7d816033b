"""A table spec and published Records -> a table: ours beside what the paper printed (no torch).

A spec (results/tables/<paper>-table<N>.yaml) says which recipe, state and task fill each cell. What was not run is
shown as not run: never as zero, never as the paper's number.
"""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from . import budget, figure
from .budget import Budget, Point
from .claims import claims_table
from .claimspec import Claims, read_claims
from .committed import is_current
from .finding import kind_of
from .measures import Measure
from .published import Published, Source, TableError, find, provenance, read_published, run_of, source_of, to_run
from .records import RecordError, items_path, read_items, read_record, record_path
from .render import DASH, FORMATS, Block, Cell, Format, Number, Table, plus_minus, render
from .runtable import MEANING, brought, exposed_draws, mean_of, run_table, scale, score_cell
from .statistics import Draws, Interval, interval_of, recovery
from .strict_yaml import read_yaml
from .tablespec import EXPECTED, TRUST, Column, Printed, Spec, TableRow, read_spec
from .verdict import RULE, comparable, judge

CURVES = (
    "tokens to a target: millions of training tokens of the stage until it is first met; between two points the value is "
    "linear in the tokens (a perplexity in its logarithm). ≤: met at the first point already; >: not met at the last. Of "
    "several seeds the median (least to most)."
)
ABOUT = (("(guessing)", "chance"), ("(exposed %)", "exposed"), ("(items n)", "n"))  # lines below the rows


def tabulate(spec: Spec, records: Sequence[Published]) -> Table:
    """Ours, what was printed, the difference and the interval; what was not run is listed.

    A row of a paper takes three lines: ours, printed, ours - printed; one that was not run takes one, and says so.
    Raises TableError for a column that names what its Records do not have, RecordError for Records that do not fit.
    """
    sources = {names: source_of(names, records) for names in dict.fromkeys(row.recipes for row in spec.rows)}
    columns = {c.label: c for c in spec.columns}
    beside = any(row.printed for row in spec.rows)
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    missing: dict[str, None] = {}

    def line(label: str, whose: str, cells: Sequence[Cell]) -> None:
        rows.append((label, (Cell(whose), *cells) if beside else tuple(cells)))

    for row in spec.rows:
        source = sources[row.recipes]
        ours = [_interval(columns, label, row.state, source) for label in columns]
        trust = f" [{row.trust}]" if row.trust else ""
        if not source.chosen:
            missing.update(dict.fromkeys(row.recipes))
        absent = "not run" if row.recipes else "no recipe yet"
        if source.chosen or not beside:
            line(row.label, "ours", [_ours(source, column, x) for column, x in zip(spec.columns, ours, strict=True)])
        elif not row.printed:
            line(row.label, absent, [Cell(DASH)] * len(spec.columns))
        if row.printed:
            printed, differences = _beside(row, spec.columns, ours)
            line(row.label, f"printed{trust}" + ("" if source.chosen else f" ({absent})"), printed)
            if source.chosen:
                line(row.label, "ours - printed", differences)
    for label, about in ABOUT:
        cells = [Cell(_about(c, about, list(sources.values()))) for c in spec.columns]
        if any(c.text for c in cells):
            line(label, "", cells)
    ran = any(s.chosen for s in sources.values())
    title = "Ours, ± the 95 % interval" if ran or not beside else "As printed: nothing of it was run here"
    return Table(
        title=spec.title,
        lead=scale([p.record for s in sources.values() for p in s.chosen]),
        blocks=(Block(title, ("row", *(["numbers"] if beside else []), *columns), tuple(rows)),),
        conclusions=_verdicts(sources),
        notes=(*_notes(spec, sources), *_without_recipe(spec), *to_run(missing)),
    )


def _find(column: Column, found: Sequence[Measure]) -> Measure | None:
    return find(column, found, where=f"column {column.label!r}")


def _draws(
    columns: dict[str, Column], label: str, state: str, found: Sequence[Measure]
) -> tuple[Draws | None, float | None]:
    """A score column's mean and its chance; (None, None) where anything is missing."""
    column = columns[label]
    if column.recovery_of is not None:
        raise TableError(f"column {label!r} is a recovery: it has no recovery of its own")
    if column.tasks:
        each = [column.model_copy(update={"tasks": None, "task": task}) for task in column.tasks]
    else:
        each = [columns[x] for x in column.mean_of] if column.mean_of else [column]
    members = [_find(x, found) for x in each]
    known = [m for m in members if m is not None]
    if len(known) < len(members):
        return None, None
    if any(m.kind == "log_loss" for m in known):
        raise TableError(f"column {label!r}: a mean or a recovery of a log-loss has no meaning; see retention and gap")
    chances = [m.chance for m in known if m.chance is not None]
    return mean_of(known, state), sum(chances) / len(chances) if len(chances) == len(known) else None


class _Ours(NamedTuple):
    """A cell of ours: its text and numbers, and the interval in the unit of the printed numbers."""

    cell: Cell
    shown: Interval
    bound: str = ""


def _interval(columns: dict[str, Column], label: str, state: str | None, source: Source) -> _Ours | None:
    column, found = columns[label], source.measures
    if state is None or not source.chosen:
        return None
    if column.of_curve:
        return _of_curve(column, state, source)
    if column.value:
        measure = _find(column, found)
        interval = brought(exposed_draws(measure), column.value) if measure and state == "hybrid" else None
        if interval is None:
            return None
        text = plus_minus(interval, scale=100, digits=0)
        return _Ours(Cell(text, (Number(column.value, interval, "fraction"),)), _times(interval, 100.0))
    if column.task or column.recall:
        measure = _find(column, found)
        cell = score_cell(measure, state) if measure else None
        if measure is None or cell is None or not cell.numbers:
            return None
        first = cell.numbers[0].interval
        return _Ours(cell, _times(first, 1.0 if measure.kind == "log_loss" else 100.0))
    if column.mean_of or column.tasks:
        draws, _ = _draws(columns, label, state, found)
        interval = draws.interval() if draws else None
        quantity = "mean"
    else:
        assert column.recovery_of is not None
        own, chance = _draws(columns, column.recovery_of, state, found)
        teacher, _ = _draws(columns, column.recovery_of, "teacher", found)
        if own is None or teacher is None or (column.corrected and chance is None):
            return None
        interval = interval_of(recovery(own, teacher, chance if column.corrected else None))
        quantity = "recovery, corrected" if column.corrected else "recovery"
    if interval is None:
        return None
    text = plus_minus(interval, scale=100, digits=1)
    return _Ours(Cell(text, (Number(quantity, interval, "fraction"),)), _times(interval, 100.0))


def _of_curve(column: Column, state: str, source: Source) -> _Ours | None:
    """Tokens to a target in millions, or the value at a budget: the median over seeds, with the least and the most.

    Raises TableError for a column that fits several curves.
    """
    found: list[Budget] = []
    for record in (p.record for p in source.chosen):
        rows = budget.curve(record, column, state)
        if len(several := budget.series(rows)) > 1:
            raise TableError(f"column {column.label!r} fits {', '.join(several)}; say which by suite, metric or stage")
        if not rows:
            return None
        if column.at_tokens is not None:
            value = budget.reached(rows, column.at_tokens)
            found += [] if value is None else [Budget(value)]
            continue
        assert column.tokens_to is not None
        wanted = budget.target(record, column.tokens_to, rows)
        if wanted is None:
            raise TableError(
                f"column {column.label!r}: {record.name} has no teacher, whose value the target multiplies"
            )
        points = [Point(r.tokens, r.value) for r in rows]
        reached = budget.tokens_to(points, wanted, larger=rows[0].higher_is_better)
        found.append(Budget(reached.tokens / 1e6, reached.bound))
    if len(found) < len(source.chosen):
        return None
    middle, ends = budget.median(found), sorted(b.tokens for b in found)
    text = _bounded(f"{middle.tokens:.4g}", middle.bound)
    if len(found) > 1:
        text += f" ({ends[0]:.4g} to {ends[-1]:.4g})"
    unit = "millions of tokens" if column.tokens_to else "as printed"
    interval = Interval(middle.tokens, ends[0], ends[-1], len(found))
    alone = Interval(middle.tokens, float("nan"), float("nan"), 0)
    return _Ours(Cell(text, (Number(column.label, interval, unit),)), alone, middle.bound)


def _bounded(text: str, bound: str | None) -> str:
    return {"at most": "≤ ", "more than": "> "}.get(bound or "", "") + text


def _times(x: Interval, factor: float) -> Interval:
    return Interval(x.value * factor, x.low * factor, x.high * factor, x.n)


def _ours(source: Source, column: Column, ours: _Ours | None) -> Cell:
    if ours is not None:
        return ours.cell
    if not source.chosen:
        return Cell("not run")
    # A ratio whose denominator touches 0 is a dash; a state or task that the Record lacks is named.
    return Cell(DASH if column.recovery_of or column.value else "not in Record")


def _beside(row: TableRow, columns: Sequence[Column], ours: Sequence[_Ours | None]) -> tuple[list[Cell], list[Cell]]:
    """The printed numbers, and ours minus printed with our interval."""
    printed_cells, differences = [], []
    for column, own in zip(columns, ours, strict=True):
        given = row.printed.get(column.label)
        if given is None:
            printed_cells.append(Cell(DASH))
            differences.append(Cell(DASH))
            continue
        printed = given if isinstance(given, Printed) else Printed(value=given)
        tag = f" [{printed.trust}]" if printed.trust and printed.trust != row.trust else ""
        mark = f" ({printed.footnote})" if printed.footnote else ""
        theirs = float(printed.value)
        known = Interval(theirs, float("nan"), float("nan"), 0)
        text = _bounded(f"{Decimal(printed.value):f}", printed.bound)
        text += tag if printed.files is None else f" / {Decimal(printed.files):f}"
        printed_cells.append(Cell(text + mark, (Number("printed", known, "as printed"),)))
        if own is None or own.bound or printed.bound:  # a bound has no difference
            differences.append(Cell(DASH))
        else:
            x = own.shown
            shifted = Interval(x.value - theirs, x.low - theirs, x.high - theirs, x.n)
            text = plus_minus(shifted, digits=1, sign=True)
            differences.append(Cell(text, (Number("ours - printed", shifted, "as printed"),)))
    return printed_cells, differences


def _about(column: Column, what: str, sources: Sequence[Source]) -> str:
    """Chance, exposure or number of items of a task column; a range where the recipes differ."""
    if column.of_curve:
        return ""
    found = [m for s in sources if (m := _find(column, s.measures))] if column.task or column.recall else []
    if what == "n":
        values = {float(m.n) for m in found}
    else:
        each = [m.chance if what == "chance" else m.exposure() for m in found]
        values = {round(x * 100, 1) for x in each if x is not None}
    return " to ".join(f"{x:g}" for x in sorted({min(values), max(values)})) if values else ""


def _verdicts(sources: dict[tuple[str, ...], Source]) -> tuple[str, ...]:
    """One line a recipe that has a linear branch, and the rule."""
    lines = []
    for names, source in sources.items():
        if source.chosen and comparable(source.chosen[0].record):
            found = judge(source.measures, source.chosen[0].record.margin)
            lines.append(f"**{', '.join(names)}**: verdict {found.sentence}")
    return (*lines, f"Rule: {RULE}") if lines else ()


def _without_recipe(spec: Spec) -> tuple[str, ...]:
    count = sum(not row.recipes for row in spec.rows)
    return (f"no recipe yet: {count} of {len(spec.rows)} rows, which no run can fill so far.",) if count else ()


def _notes(spec: Spec, sources: dict[tuple[str, ...], Source]) -> tuple[str, ...]:
    chosen = [p for s in sources.values() for p in s.chosen]
    lines = []
    if chosen:
        lines += [
            "scores in %, ± the longer side of the 95 % interval (bootstrap over items, paired); perplexity: smaller is "
            "better.",
            "(guessing): share right by a blind guess. (exposed %): share of scored tokens at which the linear branch has "
            "anything to see.",
        ]
    margins = sorted({p.record.margin for p in chosen})
    if margins:
        lines.append(
            f"margin of the rule: {', '.join(f'{m:g}' for m in margins)} (of a score in 0..1; nats of log-loss)."
        )
    if any(c.of_curve for c in spec.columns):
        lines.append(CURVES)
    if any(s.recall for s in spec.columns):
        lines.append(
            "recall near, far: distance up to, beyond layers x (window - 1) tokens, the reach of a stack of windows."
        )
    lines += [f"{x}: {MEANING[x]}" for x in dict.fromkeys(c.value for c in spec.columns) if x]
    for column in spec.columns:
        if members := column.mean_of or column.tasks:
            lines.append(f"{column.label}: mean of {', '.join(members)}.")
        elif column.recovery_of:
            ratio = "(state - guess)/(teacher - guess)" if column.corrected else "state / teacher"
            lines.append(f"{column.label}: {ratio} of {column.recovery_of}, in %.")
    tags = {r.trust for r in spec.rows} | {
        p.trust for r in spec.rows for p in r.printed.values() if isinstance(p, Printed)
    }
    if any(isinstance(p, Printed) and p.files is not None for r in spec.rows for p in r.printed.values()):
        tags.add("F")
        lines.append("a / b: the paper prints a, the authors' raw result files give b; ours is held against a.")
    if any(r.printed for r in spec.rows):
        paper = spec.paper or "the paper"
        lines.append(f"printed: what {paper} prints" + ("; ours - printed has our interval." if chosen else "."))
        lines += [f"[{t}]: {TRUST[t]}." for t in TRUST if t in tags]
    lines += [f"({number}) {text}" for number, text in enumerate(spec.footnotes, start=1)]
    for names, source in sources.items():
        lines += provenance(", ".join(names), source)
        if len(source.chosen) > 1:
            lines.append(f"{', '.join(names)}: {len(source.chosen)} seeds, resampled beside the items.")
    return tuple(lines)


def table_command(arguments: argparse.Namespace) -> int:
    """`recipelin table [PATH] [--format F] [--check] [--figure]`; PATH is a spec, a folder of specs, a run's folder or a Record.

    `arguments`: path (str; None: results/tables), format, check, figure. --check compares a spec's table with the .md beside
    it, and its figure with the .png, and prints the difference: exit 1. --figure draws the .png. Exit 2 with the reason for
    what cannot be read or drawn.
    """
    path = Path(arguments.path or "results/tables")
    try:
        is_spec = path.suffix == ".yaml"
        specs = [path] if is_spec else sorted(path.glob("*.yaml")) if path.is_dir() else []
        if arguments.figure:
            if not is_spec:
                raise TableError(f"{path}: --figure draws one table spec (results/tables/*.yaml)")
            return _draw(path)
        if specs:
            read = {each: read_table(each) for each in specs}
            records = records_for(read.values(), specs[0])
            same = [
                _show_spec(each, spec, records, arguments.format, check=arguments.check) for each, spec in read.items()
            ]
            return 0 if all(same) else 1
        if arguments.check:
            raise TableError(
                f"{path}: --check compares specs (results/tables/*.yaml) with their .md; there is none here"
            )
        if not record_path(path).exists():
            near = difflib.get_close_matches(path.stem, [p.stem for p in Path("results/tables").glob("*.yaml")], 1)
            hint = f"; did you mean results/tables/{near[0]}.yaml?" if near else ""
            expected = "a table spec (.yaml), a folder of them, a run's folder (with record.json) or a Record's .json"
            raise TableError(f"{path}: found no {'table' if path.exists() else 'such file'}; expected {expected}{hint}")
        record = read_record(path)
        items = read_items(path) if items_path(path).exists() else {}
        print(render(run_table(record, items, place=record_path(path)), arguments.format), end="")
    except (TableError, RecordError) as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 2
    return 0


def read_table(path: Path) -> Spec | Claims:
    """A table spec or a claims spec. Raises RecipeError."""
    kind = kind_of(read_yaml(path, kind=EXPECTED)[0])
    return read_claims(path) if kind == "claims spec" else read_spec(path)


def records_for(specs: Iterable[Spec | Claims], path: Path) -> tuple[Published, ...]:
    """The Records that specs need, each read once, from `../records` beside the folder of `path`. Raises RecordError."""
    return read_published(path.resolve().parent.parent / "records", {name for spec in specs for name in spec.recipes})


def table_of(spec: Spec | Claims, records: Sequence[Published]) -> Table:
    """The table of a spec, or of claims, from Records that may be those of other specs, too."""
    wanted = run_of(spec.recipes)
    mine = [p for p in records if wanted(p.record.name)]
    return claims_table(spec, mine) if isinstance(spec, Claims) else tabulate(spec, mine)


def _draw(path: Path) -> int:
    """Draw the figure of a table spec beside it."""
    spec = read_table(path)
    if isinstance(spec, Claims) or spec.figure is None:
        raise TableError(f"{path} has no figure; give `figure: {{across: ..., up: ..., at: {{column: number}}}}`")
    table = table_of(spec, records_for([spec], path))
    try:
        figure.write(path.with_suffix(".png"), spec, table)
    except ValueError as error:
        raise TableError(f"{path}: {error}") from error
    print(path.with_suffix(".png"))
    return 0


def _show_spec(path: Path, spec: Spec | Claims, records: Sequence[Published], format: Format, *, check: bool) -> bool:
    """Print the table, or with `check` compare it with the committed one; False where they differ."""
    table = table_of(spec, records)
    if not check:
        print(render(table, format), end="")
        return True
    made, picture = render(table, "markdown"), path.with_suffix(".png")
    if not is_current(path.with_suffix(".md"), lambda: made, source="the Records", command=f"recipelin table {path}"):
        return False
    if isinstance(spec, Spec) and spec.figure and not figure.is_current(picture, spec, table):
        print(f"{picture} does not show its table; to draw it anew: recipelin table {path} --figure", file=sys.stderr)
        return False
    return True


__all__ = [
    "FORMATS",
    "Spec",
    "TableError",
    "read_spec",
    "read_table",
    "records_for",
    "render",
    "run_table",
    "table_command",
    "table_of",
    "tabulate",
]
