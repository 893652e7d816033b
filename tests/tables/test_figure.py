"""A picture shows its table: every number, intervals, and a digest by which an old one is found out."""

import argparse
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipelin import figure
from recipelin.linechart import Chart, Line, Point, digest_of, png, ticks
from recipelin.published import Published
from recipelin.strict_yaml import RecipeError
from recipelin.tables import read_spec, table_command, tabulate
from recipelin.tablespec import Spec
from tests.tables.conftest import FIGURES

ROOT = Path(__file__).resolve().parents[2]
SPEC = """\
name: distances
title: Recall
columns:
  - {label: "24", task: recall@24}
  - {label: "6", task: recall@6}
  - {label: far, task: recall@150}
  - {label: PPL, task: perplexity}
rows:
  - {label: student, recipe: pocket/lolcats, state: hybrid}
  - {label: its window, recipe: pocket/lolcats, state: window}
  - {label: not run, recipe: pocket/absolute, state: hybrid}
figure: {across: tokens, up: "%", at: {"24": 24, "6": 6, far: 150}}
"""


def read(tmp_path: Path, text: str = SPEC) -> Spec:
    (tmp_path / "x.yaml").write_text(text)
    return read_spec(tmp_path / "x.yaml")


def test_lines_are_the_rows_that_were_run(make: Any, tmp_path: Path) -> None:
    record, items = make()
    spec = read(tmp_path)
    made = figure.chart(spec, tabulate(spec, [Published(record, items, tmp_path / "r.json")]))
    assert [line.label for line in made.lines] == ["student", "its window"]
    rows = {(r.state, r.task): r.value for r in record.rows}
    for line, state in zip(made.lines, ("hybrid", "window"), strict=True):
        assert [p.x for p in line.points] == [6, 24, 150]
        for point in line.points:
            assert point.y == pytest.approx(100 * rows[state, f"recall@{point.x:g}"])
            assert point.low is not None and point.high is not None and point.low <= point.y <= point.high
    printed = SPEC.replace("state: window}", 'state: window, trust: T, printed: {"6": 99, far: 2.5}}')
    spec = read(tmp_path, printed)
    made = figure.chart(spec, tabulate(spec, [Published(record, items, tmp_path / "r.json")]))
    assert [(line.label, line.hollow) for line in made.lines][1:] == [
        ("its window", False),
        ("its window, printed", True),
    ]
    assert made.lines[2].points == (Point(6, 99), Point(150, 2.5))
    spec, path = read(tmp_path), tmp_path / "x.png"
    table = tabulate(spec, [Published(record, items, tmp_path / "r.json")])
    figure.write(path, spec, table)
    assert figure.is_current(path, spec, table)
    other, others = make({**FIGURES, "window": (3.17, 0.48, 0.44, 0.98, 0.1)})
    assert not figure.is_current(path, spec, tabulate(spec, [Published(other, others, tmp_path / "r.json")]))
    with pytest.raises(ValueError, match="no point to draw"):
        figure.write(path, spec, tabulate(spec, []))


def test_a_picture_that_is_missing_or_old_fails_the_check(tmp_path: Path, capsys: Any) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    (tmp_path / "records").mkdir()
    (tables / "x.yaml").write_text(SPEC)
    asked = {"path": str(tables / "x.yaml"), "format": "markdown", "check": False, "figure": False}
    assert table_command(argparse.Namespace(**asked)) == 0
    (tables / "x.md").write_text(capsys.readouterr().out)
    assert table_command(argparse.Namespace(**asked | {"check": True})) == 1
    assert "does not show its table; to draw it anew: recipelin table" in capsys.readouterr().err
    assert table_command(argparse.Namespace(**asked | {"figure": True})) == 2
    assert "no point to draw" in capsys.readouterr().err
    (tables / "x.yaml").write_text(SPEC.partition("figure:")[0])
    assert table_command(argparse.Namespace(**asked | {"figure": True})) == 2
    assert "has no figure; give `figure: {across" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('at: {"24": 24, "60": 6}', r"x\.yaml:12:.*no column '60'"),
        ('at: {"24": 24, "6": 6}, rows: [studnt]', r"x\.yaml:12:.*no row 'studnt'; did you mean 'student'"),
        ('at: {"24": 24}', r"x\.yaml:12:.*figure\.at"),
    ],
)
def test_what_a_figure_names_must_be_there(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, SPEC.replace('at: {"24": 24, "6": 6, far: 150}', change))
    assert re.search(said, str(caught.value)), caught.value


def test_every_point_is_drawn_in_its_colour_where_it_belongs() -> None:
    line = Line("a", (Point(1, 1), Point(10, 2), Point(100, 3, 2.5, 3.5)))
    content = png([Chart("t", "x", "y", (line,), "x"), Chart("t", "x", "y", (line, line))], digest="d")
    assert digest_of(content) == "d"
    image = Image.open(io.BytesIO(content)).convert("RGB")
    assert image.size == (960, 2 * 540)
    blue = {(x, y) for x in range(76, 675) for y in range(540) if image.getpixel((x, y)) == (0, 114, 178)}
    xs = sorted({x for x, _ in blue})
    assert xs[0] < 130 and xs[-1] > 630  # from the first point to the last
    middle = [y for x, y in blue if abs(x - 375) <= 2]  # 10 is half way from 1 to 100 on a logarithmic axis
    assert middle and max(middle) - min(middle) < 14
    with pytest.raises(ValueError, match="a logarithmic axis takes no 0"):
        png([Chart("t", "x", "y", (Line("a", (Point(0, 1), Point(1, 1))),), "x")])


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 100, False, (0, 20, 40, 60, 80, 100)),
        (-0.3, 0.4, False, (-0.2, 0, 0.2, 0.4)),
        (900, 70000, True, (1000, 2000, 5000, 10000, 20000, 50000)),
        (1, 1e6, True, (1, 10, 100, 1000, 1e4, 1e5, 1e6)),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, expected: tuple[float, ...]) -> None:
    assert ticks(low, high, log=log) == pytest.approx(expected)


def test_shipped_figures_lie_beside_their_tables() -> None:
    specs = [p for p in sorted((ROOT / "results" / "tables").glob("*.yaml")) if "\nfigure:" in p.read_text()]
    assert len(specs) >= 1
    for path in specs:
        assert digest_of(path.with_suffix(".png").read_bytes()), path
