"""Ours beside what was printed: nothing invented, what is missing is listed, mistakes have a line."""

import argparse
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from recipelin.cost import suites_of
from recipelin.finding import kind_of
from recipelin.naming import but_seed
from recipelin.plan import Plan, plan
from recipelin.published import Published
from recipelin.records import ItemsOf, read_items, write_record
from recipelin.render import DASH, Cell, Table, render
from recipelin.runtable import run_table
from recipelin.steps import Evaluate
from recipelin.strict_yaml import RecipeError, read_yaml
from recipelin.tables import TableError, read_spec, table_command, tabulate
from recipelin.tablespec import Printed
from tests.shipped import points_of

SPEC = """\
name: paper-table1
title: Table 1
paper: arXiv 0000.00000
columns:
  - {label: PPL, task: perplexity}
  - {label: short, task: next_line_short}
  - {label: long, task: next_line_long}
  - {label: AVG, mean_of: [short, long]}
  - {label: Rec, recovery_of: AVG}
  - {label: Fixed, recovery_of: AVG, corrected: true}
  - {label: far, recall: far}
rows:
  - {label: base, recipe: pocket/lolcats, state: teacher, trust: T, printed: {long: 50.5, Rec: 100}}
  - {label: SWA, recipe: pocket/lolcats, state: window, trust: T,
     printed: {long: {value: 92.26, footnote: 1}, AVG: {value: 40.0, trust: M}}}
  - {label: other, recipe: pocket/absolute, state: hybrid, printed: {long: 33.3}}
footnotes: [its row recomputes to 92.65]
"""


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    (tmp_path / "x.yaml").write_text(SPEC)
    return read_spec(tmp_path / "x.yaml")


def texts(table: Table) -> dict[tuple[str, str], str]:
    """(row, column) -> text; printed and difference lines as `row: what the numbers are`."""
    block = table.blocks[0]
    assert block.columns[1] == "numbers"
    found = {}
    for label, (whose, *cells) in block.rows:
        name = label if whose.text in ("ours", "") else f"{label}: {whose.text}"
        found |= {(name, c): cell.text for c, cell in zip(block.columns[2:], cells, strict=True)}
    return found


def ours(table: Table, label: str) -> tuple[Cell, ...]:
    return next(cells[1:] for name, cells in table.blocks[0].rows if name == label and cells[0].text == "ours")


def test_ours_theirs_difference(spec: Any, make: Any) -> None:
    table = tabulate(spec, [Published(*make(), Path("a.json"))])
    found = texts(table)
    assert found["SWA", "long"] == "38.5 ±7.0"
    assert found["SWA: printed [T]", "long"] == "92.26 (1)"
    assert found["SWA: ours - printed", "long"] == "-53.8 ±7.0"
    assert found["SWA: printed [T]", "AVG"] == "40.0 [M]"
    assert found["SWA: printed [T]", "short"] == DASH
    assert found["base", "Rec"] == "100.0"
    assert found["base: ours - printed", "Rec"] == "0.0"
    assert found["(items n)", "long"] == "200"
    assert (found["(exposed %)", "long"], found["(exposed %)", "short"], found["(guessing)", "far"]) == (
        "90",
        "10",
        "12.5",
    )
    assert "(1) its row recomputes to 92.65" in table.notes
    assert any(n.startswith("[T]: ") for n in table.notes) and any(n.startswith("[M]: ") for n in table.notes)
    assert table.conclusions[0].startswith("**pocket/lolcats**: verdict used: ")


def test_the_average_and_its_recoveries(spec: Any, make: Any) -> None:
    record, items = make()
    table = tabulate(spec, [Published(record, items, Path("a.json"))])
    value = {(r.state, r.task): r.value for r in record.rows}

    def mean(state: str) -> float:
        return (value[state, "next_line_short"] + value[state, "next_line_long"]) / 2

    cells = ours(table, "SWA")
    average, plain, corrected = (cells[i].numbers[0].interval.value for i in (3, 4, 5))
    assert average == pytest.approx(mean("window"))
    assert plain == pytest.approx(mean("window") / mean("teacher"))
    assert corrected == pytest.approx((mean("window") - 0.25) / (mean("teacher") - 0.25))


def test_what_was_not_run_is_neither_zero_nor_the_papers(spec: Any, make: Any) -> None:
    table = tabulate(spec, [Published(*make(), Path("a.json"))])
    found = texts(table)
    assert found["other: printed (not run)", "long"] == "33.3"
    assert {found["other: printed (not run)", c] for c in ("PPL", "short", "AVG", "Rec", "far")} == {DASH}
    assert [cells[0].text for label, cells in table.blocks[0].rows if label == "other"] == ["printed (not run)"]
    assert [n.quantity for c in dict(table.blocks[0].rows)["other"] for n in c.numbers] == ["printed"]
    unprinted = tuple(r.model_copy(update={"printed": {}}) if r.label == "other" else r for r in spec.rows)
    bare = tabulate(spec.model_copy(update={"rows": unprinted}), [])
    whose, *rest = dict(bare.blocks[0].rows)["other"]
    assert whose.text == "not run" and {c.text for c in rest} == {DASH} and not any(c.numbers for c in rest)
    plain = tuple(r.model_copy(update={"printed": {}}) for r in spec.rows)
    rows = dict(tabulate(spec.model_copy(update={"rows": plain}), []).blocks[0].rows)
    assert {c.text for cells in rows.values() for c in cells} == {"not run"} and list(rows) == ["base", "SWA", "other"]
    assert bare.blocks[0].title.startswith("As printed") and "(guessing)" not in dict(bare.blocks[0].rows)
    assert [n for n in table.notes if n.startswith("still to run")] == [
        "still to run: recipelin run pocket/absolute, then recipelin publish with its folder"
    ]


def test_unfinished_records_fill_nothing_and_absent_states_are_named(spec: Any, make: Any) -> None:
    table = tabulate(spec, [Published(*make(status="failed"), Path("a.json"))])
    assert ("SWA", "long") not in texts(table) and texts(table)["SWA: printed [T] (not run)", "long"] == "92.26 (1)"
    figures = {"teacher": (2.9, 0.5, 0.5, 1.0, 1.0), "hybrid": (2.9, 0.5, 0.5, 1.0, 1.0)}
    table = tabulate(spec, [Published(*make(figures), Path("a.json"))])
    assert texts(table)["SWA", "long"] == "not in Record" and texts(table)["SWA: ours - printed", "long"] == DASH


def test_the_newest_plan_counts_and_its_seeds_are_pooled(spec: Any, make: Any) -> None:
    old = {"started": "2026-11-20T00:00:00+00:00", "plan": {"steps": [], "hybrid": None}}
    records = [
        Published(*make(seed=2, **old), Path("old.json")),
        Published(*make(seed=1, noise=0.3), Path("b.json")),
        Published(*make(seed=0, noise=0.3), Path("a.json")),
    ]
    table = tabulate(spec, records)
    assert any("2 seeds, resampled" in n for n in table.notes)
    assert any("1 older Records" in n for n in table.notes)
    assert not any("old.json" in n for n in table.notes)
    pooled, one = (ours(t, "SWA")[0].numbers[1].interval for t in (table, tabulate(spec, records[1:2])))
    assert pooled.value != one.value and pooled.n == one.n == 120


def test_a_field_that_came_later_does_not_part_seeds(spec: Any, make: Any) -> None:
    """At the value that says what was always done; at another one it does."""

    def left_out(**later: object) -> bool:
        plans = [{"steps": [{"step": {"step": "tune", **more}}], "hybrid": None} for more in ({}, later)]
        records = [
            Published(
                *make(seed=seed, noise=0.3, plan=plan, started=f"2026-11-2{seed}T00:00:00+00:00"), Path(f"{seed}.json")
            )
            for seed, plan in enumerate(plans)
        ]
        return any("older Records" in note for note in tabulate(spec, records).notes)

    assert not left_out(order="drawn", chat=None)
    assert left_out(order="first")


def test_a_recovery_of_perplexity_has_no_meaning(spec: Any, make: Any) -> None:
    columns = (*spec.columns[:3], spec.columns[4].model_copy(update={"recovery_of": "PPL"}))
    rows = tuple(r.model_copy(update={"printed": {}}) for r in spec.rows)
    with pytest.raises(TableError, match="has no meaning"):
        tabulate(spec.model_copy(update={"columns": columns, "rows": rows}), [Published(*make(), Path("a.json"))])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "task: next_line_short",
            "tsak: next_line_short",
            r"x.yaml:6:20: columns.1.tsak: unknown key; did you mean 'task'",
        ),
        (
            "mean_of: [short, long]",
            "mean_of: [short, lnog]",
            "8:35: .*no task column 'lnog'; did you mean 'long'. There are PPL, short",
        ),
        ("recovery_of: AVG}", "recovery_of: MEAN}", "9:31: .*no column 'MEAN'"),
        (
            "printed: {long: 33.3}",
            "printed: {lang: 33.3}",
            "16:70: .*printed has no column 'lang'; did you mean 'long'",
        ),
        ("footnote: 1", "footnote: 2", "15:47: .*there is no footnote 2; the spec has 1"),
        (
            "state: teacher, trust: T",
            "state: teacher, trust: X",
            r"x.yaml:13:66: rows.0.trust: found the text 'X'; expected 'T', 'R'",
        ),
        (
            "printed: {long: 33.3}",
            "printed: {long: high}",
            r"x.yaml:16:76: rows.2.printed.long: found the text 'high'; expected a number or",
        ),
        (
            "title: Table 1",
            "title: Table 1\ntitle: Table 2",
            r"x.yaml:3:1: the key 'title' is given twice, first in line 2",
        ),
        ("rows:", "rows: [", r"x.yaml"),
        ("task: next_line_short}", "task: next_line_short, of: passkey}", "`of` is the format of a recall column"),
        ("title: Table 1", "title: !!python/name:os.system x", r"x.yaml:2:8: found the tag"),
        ("title: Table 1", "title: {[a]: b}", r"x.yaml:2:9: found a key that is no plain word"),
        (
            "{label: PPL, task: perplexity}",
            "&a {label: PPL, task: perplexity}\n  - *a",
            "two columns are labelled 'PPL'",
        ),
    ],
)
def test_mistakes_in_a_spec(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in SPEC
    (tmp_path / "x.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        read_spec(tmp_path / "x.yaml")


def test_check_compares_with_the_committed_table(make: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "x.yaml"
    path.write_text(SPEC)
    check = argparse.Namespace(path=str(path), format="markdown", check=True, figure=False)
    assert table_command(check) == 1
    assert "to make it anew: recipelin table" in capsys.readouterr().err
    assert table_command(argparse.Namespace(path=str(path), format="markdown", check=False, figure=False)) == 0
    path.with_suffix(".md").write_text(capsys.readouterr().out)
    assert table_command(check) == 0
    path.with_suffix(".md").write_text(path.with_suffix(".md").read_text().replace("not run", "65.5", 1))
    capsys.readouterr()
    assert table_command(check) == 1
    shown = capsys.readouterr().out
    assert "\n-| base" in shown and "\n+| base" in shown
    assert (
        table_command(argparse.Namespace(path=str(tmp_path / "tables"), format="markdown", check=True, figure=False))
        == 1
    )
    path.with_suffix(".md").write_bytes(b"\xd0")
    with pytest.raises(OSError, match="not UTF-8; expected the Markdown that recipelin table"):
        table_command(check)


def test_specs_share_records_each_read_once_and_a_wrong_item_stops_all(
    make: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, items = make(rows=8, questions=8, recalls=4)
    write_record(tmp_path / "records" / "pocket-lolcats--1.json", record)
    sidecar = tmp_path / "records" / "pocket-lolcats--1.items.jsonl.gz"
    lines = [
        json.dumps(key._asdict() | {"items": list(zip(v.id, v.score, v.length, v.exposed, strict=True))})
        for key, v in items.items()
    ]
    sidecar.write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "tables").mkdir()
    specs = [tmp_path / "tables" / f"{name}.yaml" for name in "xyz"]
    for path in specs:
        path.write_text(SPEC)
    specs[2].write_text(SPEC.replace("pocket/lolcats", "pocket/hedgecats"))
    read: list[Path] = []
    monkeypatch.setattr("recipelin.published.read_items", lambda path: read.append(path) or read_items(path))

    def show(path: Path, **more: Any) -> tuple[int, Any]:
        asked = {"path": str(path), "format": "markdown", "check": False, "figure": False} | more
        return table_command(argparse.Namespace(**asked)), capsys.readouterr()

    alone = [show(path)[1].out for path in specs]
    assert alone[0] == alone[1] and "pocket-lolcats--1.json" in alone[0] and "pocket-lolcats--1" not in alone[2]
    read.clear()
    assert show(tmp_path / "tables") == (0, ("".join(alone), ""))
    assert len(read) == 1
    lines[1] = lines[1].replace("1.0", "true", 1).replace("0.0", "true", 1)
    sidecar.write_bytes(gzip.compress("\n".join(lines).encode()))
    code, shown = show(tmp_path / "tables", check=True)
    assert (code, shown.out) == (2, "") and shown.err.count("\n") == 1
    assert f"{sidecar}:2: not a sidecar of items: item " in shown.err


def test_the_command_shows_a_run(make: Any, tmp_path: Path, capsys: Any) -> None:
    write_record(tmp_path / "record.json", make()[0])
    assert table_command(argparse.Namespace(path=str(tmp_path), format="csv", check=False, figure=False)) == 0
    assert capsys.readouterr().out.startswith("block,row,column,")
    assert table_command(argparse.Namespace(path=str(tmp_path), format="csv", check=True, figure=False)) == 2
    assert table_command(argparse.Namespace(path=str(tmp_path / "no"), format="csv", check=False, figure=False)) == 2
    assert "no: found no such file; expected a table spec" in capsys.readouterr().err


SPECS = sorted(
    path
    for path in (Path(__file__).parents[2] / "results" / "tables").glob("*.yaml")
    if kind_of(read_yaml(path)[0]) == "table spec"
)


def test_the_shipped_specs_are_valid_and_fit_a_terminal() -> None:
    assert len(SPECS) >= 5
    for path in SPECS:
        assert read_spec(path).name == path.stem
        assert max(map(len, render(tabulate(read_spec(path), []), "markdown").splitlines())) <= 140


def test_every_cell_has_a_recipe_that_fills_it() -> None:
    """Of every row: its recipe is there, measures its state, and its suites have every task of the columns."""
    plans: dict[tuple[str, frozenset[str]], Plan] = {}
    covered = 0
    for spec in map(read_spec, SPECS):
        for row in spec.rows:
            for name in row.recipes:
                base, values = but_seed(name)
                if (base, values) not in plans:
                    for point in points_of(base):
                        # A recipe stands for all its seeds, and for its axes in whatever order.
                        found_at = but_seed(point.recipe.name)
                        plans |= dict.fromkeys((found_at, (base, frozenset[str]())), plan(point))
                step = plans[base, values].steps[-1].step
                assert isinstance(step, Evaluate)
                assert row.state in {s.name for s in step.states}, (spec.name, row.label)
                found = {n.task for s in suites_of(step) for e in s.evals if hasattr(e, "names") for n in e.names()}
                asked = {task for c in spec.columns for task in (c.task, *(c.tasks or ())) if task}
                assert asked <= found, (spec.name, row.label, asked - found)
                covered += 1
    assert covered >= 19 + 18 + 5 + 5 + 7 + 197 + 8


def test_printed_means_and_recoveries_follow_from_the_printed_cells() -> None:
    """Within the rounding of what is printed; a cell that contradicts its row has a footnote."""
    means = recoveries = 0
    for spec in map(read_spec, SPECS):
        teacher: dict[str, float] = {}
        for row in spec.rows:
            value = {c: p if isinstance(p, Printed) else Printed(value=p) for c, p in row.printed.items()}
            teacher = {c: float(p.value) for c, p in value.items()} if row.state == "teacher" else teacher
            for column in spec.columns:
                printed = value.get(column.label)
                if printed is None:
                    continue
                half = 0.5 * 10.0 ** int(Decimal(printed.value).as_tuple().exponent)
                if column.mean_of and set(column.mean_of) <= set(value):
                    means += 1
                    mean = sum(float(value[c].value) for c in column.mean_of) / len(column.mean_of)
                    assert abs(mean - float(printed.value)) <= half + 0.005 + 1e-9, (row.label, mean)
                if column.recovery_of and {column.recovery_of} <= set(value) & set(teacher):
                    recoveries += 1
                    ratio = 100 * float(value[column.recovery_of].value) / teacher[column.recovery_of]
                    fits = abs(ratio - float(printed.value)) <= half + 0.02
                    assert fits != bool(printed.footnote), (spec.name, row.label, ratio)
    assert (means, recoveries) == (33, 34)


def test_a_column_names_format_length_and_metric_of_recall(spec: Any, make: Any) -> None:
    record, items = make()
    for format, metric in (("passkey@512", "exact_match"), ("passkey@512", "generated"), ("needle@512", "exact_match")):
        for row in [r for r in record.rows if r.distance is not None and r.task.startswith("recall")]:
            task = f"{format}:{row.distance}"
            items[ItemsOf(row.state, row.suite, task, metric, 0)] = items[
                ItemsOf(row.state, row.suite, row.task, row.metric, 0)
            ]
            record = record.model_copy(
                update={"rows": (*record.rows, row.model_copy(update={"task": task, "metric": metric}))}
            )
    published = [Published(record, items, Path("a.json"))]

    def table(**column: str) -> Table:
        far = spec.columns[6].model_copy(update=column)
        return tabulate(spec.model_copy(update={"columns": (*spec.columns[:6], far)}), published)

    with pytest.raises(TableError, match=r"fits 4 measures: recall far of pocket .*say which by suite, metric or"):
        table()
    with pytest.raises(TableError, match="fits 2 measures"):
        table(of="passkey")
    texts_of = [texts(table(**c))["SWA", "far"] for c in (
        {"of": "recall"}, {"of": "passkey@512", "metric": "generated"}, {"of": "needle"})]  # fmt: skip
    assert len(set(texts_of)) == 1 and "not" not in texts_of[0]
    assert texts(table(of="needle@4096"))["SWA", "far"] == "not in Record"


def test_columns_of_gap_and_retention(make: Any, tmp_path: Path) -> None:
    columns = "[{label: loss, task: perplexity}, {label: gap, task: perplexity, value: gap}, VALUE]"
    rows = ", ".join(
        f"{{label: {x}, recipe: pocket/lolcats, state: {s}}}" for x, s in (("a", "hybrid"), ("b", "window"))
    )
    text = f"name: t\ntitle: T\ncolumns: {columns}\nrows: [{rows}]\n"
    path = tmp_path / "t.yaml"
    path.write_text(text.replace("VALUE", "{label: kept, task: perplexity, value: retention}"))
    record, items = make()
    table = tabulate(read_spec(path), [Published(record, items, Path("a.json"))])
    shown = dict(zip(table.blocks[0].columns[1:], dict(table.blocks[0].rows)["a"], strict=True))
    (own,) = (b for b in run_table(record, items).blocks if b.title.startswith("What the linear"))
    known = dict(zip(own.columns[1:], dict(own.rows)["log-loss, nats"], strict=True))
    assert (shown["gap"], shown["kept"]) == (known["gap %"], known["retention %"])
    assert [c.text for c in dict(table.blocks[0].rows)["b"][1:]] == [DASH, DASH]
    assert any(n.startswith("gap: (window - hybrid)") for n in table.notes)
    path.write_text(text.replace("VALUE", "{label: mean, mean_of: [gap]}"))
    with pytest.raises(RecipeError, match="no task column 'gap'"):
        read_spec(path)
    path.write_text(text.replace("VALUE", "{label: r, recovery_of: loss, value: gap}"))
    with pytest.raises(RecipeError, match="gap is of a task or of recall"):
        read_spec(path)


@pytest.mark.parametrize("name", ["pocket-joins", "pocket-beyond"])
@pytest.mark.parametrize("page", ["README.md", "results/absolute-join.md"])
def test_pages_show_the_tables_as_they_are(name: str, page: str) -> None:
    root = Path(__file__).parents[2]
    made = (root / "results" / "tables" / f"{name}.md").read_text().splitlines()
    rows = [line for line in made if line.startswith("|") and not line.startswith("| (")]
    shown = (root / page).read_text().splitlines()
    assert len(rows) > 10 and not [row for row in rows if row not in shown]
