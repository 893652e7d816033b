"""A finished table, and its four renderings: Markdown for the terminal, LaTeX, HTML, CSV (no torch)."""

import csv
import html
import io
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .statistics import Interval

Format = Literal["markdown", "latex", "html", "csv"]
FORMATS: tuple[Format, ...] = get_args(Format)
WIDTH = 130  # columns of running text in the terminal
DASH = "–"  # noqa: RUF001  (what cannot be said: an en dash, so that it is no minus sign)


@dataclass(frozen=True)
class Number:
    """A number behind a cell, for CSV: full precision, in `unit`."""

    quantity: str
    interval: Interval
    unit: str


@dataclass(frozen=True)
class Cell:
    """What is printed, and the numbers behind it."""

    text: str
    numbers: tuple[Number, ...] = ()


@dataclass(frozen=True)
class Block:
    """One grid: `columns[0]` heads the labels; each row is a label and its cells."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Table:
    """Title and lead lines, blocks, conclusions, and notes that explain every column."""

    title: str
    lead: tuple[str, ...]
    blocks: tuple[Block, ...]
    conclusions: tuple[str, ...]
    notes: tuple[str, ...]


def signed(value: float, digits: int) -> str:
    """A number with a fixed number of decimals, and no `-0.0`."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def plus_minus(interval: Interval | None, *, scale: float = 1.0, digits: int | None = None, sign: bool = False) -> str:
    """`41.8 ±2.9`: the value and the longer side of its interval; decimals by the interval's size unless given.

    No ± where the interval is not known or has no width.
    """
    if interval is None:
        return DASH
    value, half = interval.value * scale, interval.half * scale
    known = math.isfinite(half) and half > 1e-9
    if digits is None:
        digits = 0 if half >= 9.95 else 1 if half >= 0.95 else 2
    text = f"{'+' if sign and value > 0 else ''}{signed(value, digits)}"
    return f"{text} ±{half:.{digits}f}" if known else text


def render(table: Table, format: Format) -> str:
    """The table as text. Raises ValueError for an unknown format."""
    renderers = {"markdown": _markdown, "latex": _latex, "html": _html, "csv": _csv}
    if format not in renderers:
        raise ValueError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    return renderers[format](table)


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _markdown(table: Table) -> str:
    parts = [f"# {table.title}"]
    parts += [_wrapped(line) for line in table.lead]
    for block in table.blocks:
        parts.append(f"## {block.title}")
        parts.append(_grid(block))
    parts += [_wrapped(line) for line in table.conclusions]
    if table.notes:
        parts.append("\n".join(_wrapped(note, "- ", "  ") for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _grid(block: Block) -> str:
    lines = [list(block.columns)] + [[label, *(c.text for c in cells)] for label, cells in block.rows]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(2, *(len(line[i]) for line in lines)) for i in range(len(block.columns))]  # `-:` is the least rule

    def row(line: Sequence[str]) -> str:
        cells = [
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([row(lines[0]), f"| {' | '.join(rule)} |", *(row(line) for line in lines[1:])])


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    DASH: "--",
}


def _tex(text: str) -> str:
    text = "".join(_LATEX.get(c, c) for c in text)
    text = re.sub(r"\*\*(.+?)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text)


def _latex(table: Table) -> str:
    lines = [f"% {table.title}".replace("\n", " ")]
    for block in table.blocks:
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_tex(f'{table.title}. {block.title}')}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(block.columns) - 1)}}}", r"\hline"]
        lines += [" & ".join(_tex(c) for c in block.columns) + r" \\", r"\hline"]
        lines += [
            " & ".join(_tex(t) for t in (label, *(c.text for c in cells))) + r" \\" for label, cells in block.rows
        ]
        lines += [r"\hline", r"\end{tabular}", r"\end{table}", ""]
    texts = (*table.lead, *table.conclusions, *table.notes)
    return "\n".join(lines) + "".join(f"\\noindent {_tex(text)}\n\n" for text in texts)


def _web(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))


def _html(table: Table) -> str:
    title = html.escape(table.title)
    lines = ["<!DOCTYPE html>", '<html lang="en">', f'<head><meta charset="utf-8"><title>{title}</title>']
    lines += [
        "<style>body{font-family:sans-serif} td,th{padding:.2em .6em;text-align:right} th:first-child{text-align:left}"
    ]
    lines += [
        "table{border-collapse:collapse} tr{border-bottom:1px solid #ccc}</style></head>",
        f"<body><h1>{title}</h1>",
    ]
    lines += [f"<p>{_web(text)}</p>" for text in table.lead]
    for block in table.blocks:
        lines += [f"<h2>{html.escape(block.title)}</h2>", "<table><thead><tr>"]
        lines += [f"<th>{html.escape(c)}</th>" for c in block.columns]
        lines.append("</tr></thead><tbody>")
        for label, cells in block.rows:
            data = "".join(f"<td>{html.escape(c.text)}</td>" for c in cells)
            lines.append(f"<tr><th>{html.escape(label)}</th>{data}</tr>")
        lines.append("</tbody></table>")
    lines += [f"<p>{_web(text)}</p>" for text in table.conclusions]
    lines += ["<ul>", *(f"<li>{_web(text)}</li>" for text in table.notes), "</ul>", "</body></html>"]
    return "\n".join(lines) + "\n"


CSV_COLUMNS = ("block", "row", "column", "quantity", "value", "low", "high", "n", "unit", "text")


def _csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for block in table.blocks:
        for label, cells in block.rows:
            for column, cell in zip(block.columns[1:], cells, strict=True):
                for x in cell.numbers:
                    ends = [repr(v) if math.isfinite(v) else "" for v in (x.interval.low, x.interval.high)]
                    writer.writerow(
                        [
                            block.title,
                            label,
                            column,
                            x.quantity,
                            repr(x.interval.value),
                            *ends,
                            x.interval.n,
                            x.unit,
                            cell.text,
                        ]
                    )
                if not cell.numbers and cell.text:
                    writer.writerow([block.title, label, column, "", "", "", "", "", "", cell.text])
    for kind, texts in (
        ("title", (table.title,)),
        ("lead", table.lead),
        ("conclusion", table.conclusions),
        ("note", table.notes),
    ):
        for text in texts:
            writer.writerow([kind, "", "", "", "", "", "", "", "", text])
    return out.getvalue()
