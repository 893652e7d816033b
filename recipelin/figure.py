"""A finished table and its spec's `figure` -> a picture of it (no torch)."""

import math
from pathlib import Path

from .files import write_atomically
from .linechart import Chart, Line, Point, digest_of, png
from .plan import digest
from .render import Table
from .tablespec import Spec


def chart(spec: Spec, table: Table) -> Chart:
    """A line for each row that was run or printed, over the columns that `figure` gives a number; fractions in percent."""
    figure = spec.figure
    assert figure is not None
    block = table.blocks[0]
    lines: list[Line] = []
    for label, cells in block.rows:
        cell = dict(zip(block.columns[1:], cells, strict=True))
        whose = cell.pop("numbers").text if "numbers" in cell else "ours"
        printed = whose.startswith("printed")
        if (figure.rows and label not in figure.rows) or not (printed or whose == "ours"):
            continue
        points = []
        for column, x in figure.at.items():
            if not (numbers := cell[column].numbers):
                continue
            times = 100.0 if numbers[0].unit == "fraction" else 1.0
            found = numbers[0].interval
            known = math.isfinite(found.low + found.high)
            ends = (found.low * times, found.high * times) if known else (None, None)
            points.append(Point(x, found.value * times, *ends))
        if points:
            name = label.replace("**", "") + (", printed" if printed else "")
            lines.append(Line(name, tuple(sorted(points, key=lambda p: p.x)), hollow=printed))
    return Chart(figure.title or spec.title, figure.across, figure.up, tuple(lines), figure.log)


def drawn_from(chart: Chart) -> str:
    """A digest of all that a picture shows, of its numbers to six digits."""
    lines = [
        [line.label, *([None if v is None else f"{v:.6g}" for v in (p.x, p.y, p.low, p.high)] for p in line.points)]
        for line in chart.lines
    ]
    return digest([chart.title, chart.across, chart.up, chart.log, lines])


def write(path: Path, spec: Spec, table: Table) -> None:
    """Draw the figure of a spec. Raises ValueError where nothing of it was run or printed."""
    made = chart(spec, table)
    write_atomically(path, png([made], digest=drawn_from(made)))


def is_current(path: Path, spec: Spec, table: Table) -> bool:
    """Whether a picture shows what the table says now."""
    return path.is_file() and digest_of(path.read_bytes()) == drawn_from(chart(spec, table))
