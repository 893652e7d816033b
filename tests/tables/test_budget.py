"""Token curves in tables: tokens to a target, what a budget reached, and rows that no recipe fills yet."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from recipelin import budget
from recipelin.budget import Budget, Point, median, tokens_to
from recipelin.published import Published
from recipelin.records import CurveRow, Record
from recipelin.render import DASH
from recipelin.strict_yaml import RecipeError
from recipelin.tables import TableError, read_spec, tabulate
from recipelin.tablespec import Column, Printed, Target

SPECS = sorted((Path(__file__).parents[2] / "results" / "tables").glob("taylor-calibrate-*.yaml"))
LOSS = [Point(0, 5.0), Point(100, 4.0), Point(200, 3.0), Point(400, 3.4), Point(800, 2.0)]


def test_tokens_to_a_target_by_hand() -> None:
    assert tokens_to(LOSS, 3.5, larger=False) == Budget(150.0)
    assert tokens_to(LOSS, 4.0, larger=False) == Budget(100.0)
    assert tokens_to(LOSS, 3.0, larger=False) == Budget(200.0), "the first meeting counts, whatever follows"
    assert tokens_to(LOSS, 2.7, larger=False) == Budget(400 + 400 * 0.5)
    assert tokens_to(LOSS, 1.9, larger=False) == Budget(800, "more than")
    assert tokens_to(LOSS[1:], 4.5, larger=False) == Budget(100, "at most")
    assert tokens_to(LOSS, 6.0, larger=False) == Budget(0), "met before any training: exact"
    scores = [Point(10, 0.2), Point(30, 0.6)]
    assert tokens_to(list(reversed(scores)), 0.3, larger=True).tokens == pytest.approx(15.0)
    assert tokens_to(scores, 0.7, larger=True) == Budget(30, "more than")
    with pytest.raises(ValueError, match="without points"):
        tokens_to([], 1.0, larger=True)


def test_the_median_counts_what_was_not_reached_as_the_largest() -> None:
    found = [Budget(5.0), Budget(9.0, "more than"), Budget(7.0)]
    assert median(found) == Budget(7.0) and median([*found, Budget(9.0, "more than")]) == Budget(9.0, "more than")
    assert median([Budget(3.0, "at most"), Budget(4.0), Budget(5.0)]) == Budget(4.0)


# --- columns ----------------------------------------------------------------------------------------------------------


def with_curve(record: Record, losses: dict[int, float], stage: str = "tune", **changes: Any) -> Record:
    row = next(r for r in record.rows if r.state == "hybrid" and r.task == "perplexity").model_dump()
    line = next(r for r in record.rows if r.state == "hybrid" and r.task == "next_line_long").model_dump()
    curves = [CurveRow(**row | {"value": v}, stage=stage, tokens=t) for t, v in losses.items()]
    curves += [CurveRow(**line | {"value": 1.0 / v}, stage=stage, tokens=t) for t, v in losses.items()]
    return record.model_copy(update={"curves": tuple(curves), **changes})


SPEC = """\
name: x
title: x
columns:
  - {label: PPL, task: perplexity}
  - {label: to 33, task: perplexity, tokens_to: {value: 33.115452}}
  - {label: to 1.1, task: perplexity, tokens_to: {teacher: 1.1}}
  - {label: to 90, task: next_line_long, tokens_to: {teacher: 0.62}}
  - {label: at 2 M, task: perplexity, at_tokens: 1500000}
  - {label: at 9 M, task: perplexity, at_tokens: 9000000}
  - {label: both, tasks: [next_line_short, next_line_long]}
rows:
  - {label: ours, recipe: pocket/lolcats, state: hybrid, trust: T,
     printed: {to 33: 2.0, to 1.1: {value: 65.5, bound: at most}, both: {value: 32.1, files: 31.13}}}
  - {label: theirs, trust: F, printed: {to 33: 9.9}}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    (tmp_path / "x.yaml").write_text(SPEC)
    return read_spec(tmp_path / "x.yaml")


def cells(table: Any) -> dict[tuple[str, str, str], str]:
    block = table.blocks[0]
    return {
        (label, whose.text, column): cell.text
        for label, (whose, *rest) in block.rows
        for column, cell in zip(block.columns[2:], rest, strict=True)
    }


def test_a_table_shows_budgets_and_rows_without_a_recipe(spec: Any, make: Any) -> None:
    record, items = make()
    # perplexity 33.115452 is 3.5 nats; 1.1 x the teacher's exp(2.97)
    losses = {1_000_000: 4.0, 2_000_000: 3.0}
    table = tabulate(spec, [Published(with_curve(record, losses), items, Path("a.json"))])
    found = cells(table)
    assert found["ours", "ours", "to 33"] == "1.5" and found["ours", "ours - printed", "to 33"] == "-0.5"
    teacher = next(r.value for r in record.rows if r.state == "teacher" and r.task == "perplexity")
    wanted = 1 + (4.0 - teacher - math.log(1.1))
    assert found["ours", "ours", "to 1.1"] == f"{wanted:.4g}" and found["ours", "ours - printed", "to 1.1"] == DASH
    assert found["ours", "printed [T]", "to 1.1"] == "≤ 65.5"
    score = next(r.value for r in record.rows if r.state == "teacher" and r.task == "next_line_long")
    assert found["ours", "ours", "to 90"] == f"{1 + (0.62 * score - 1 / 4) / (1 / 3 - 1 / 4):.4g}"
    assert found["ours", "ours", "at 2 M"] == "20.09" and found["ours", "ours", "at 9 M"] == "not in Record"
    each = [r.value for r in record.rows if r.state == "hybrid" and r.task.startswith("next_line")]
    assert found["ours", "ours", "both"].startswith(f"{50 * sum(each):.1f} ±")
    assert found["ours", "printed [T]", "both"] == "32.1 / 31.13"
    assert found["theirs", "printed [F] (no recipe yet)", "to 33"] == "9.9"
    assert not [key for key in found if key[0] == "theirs" and "no recipe yet" not in key[1]]
    notes = " ".join(table.notes)
    assert (
        "no recipe yet: 1 of 2 rows" in notes
        and "linear in the tokens" in notes
        and "a / b: the paper prints a" in notes
    )
    assert "still to run" not in notes
    nothing = tabulate(spec, [])
    assert cells(nothing)["ours", "printed [T] (not run)", "to 33"] == "2.0"
    assert [n for n in nothing.notes if "still to run" in n] and not [n for n in nothing.notes if "run ," in n]


def test_seeds_give_a_median_and_a_curve_must_be_one(spec: Any, make: Any) -> None:
    curves = ({1_000_000: 4.0, 2_000_000: 3.0}, {1_000_000: 3.9, 2_000_000: 3.8}, {1_000_000: 3.2})
    published = []
    for seed, losses in enumerate(curves):
        record, items = make(seed=seed)
        published.append(Published(with_curve(record, losses), items, Path(f"{seed}.json")))
    assert cells(tabulate(spec, published))["ours", "ours", "to 33"] == "1.5 (1 to 2)"
    assert cells(tabulate(spec, published[1:2]))["ours", "ours", "to 33"] == "> 2"
    assert cells(tabulate(spec, published[2:]))["ours", "ours", "to 33"] == "≤ 1"
    record, items = make()
    assert cells(tabulate(spec, [Published(record, items, Path("a.json"))]))["ours", "ours", "to 33"] == "not in Record"
    twice = with_curve(record, curves[0])
    twice = twice.model_copy(update={"curves": (*twice.curves, *with_curve(record, curves[1], "refine").curves)})
    with pytest.raises(TableError, match=r"'to 33' fits tune: perplexity of pocket \(log_loss\), refine: perplexity"):
        tabulate(spec, [Published(twice, items, Path("a.json"))])
    column = Column(label="x", task="perplexity", tokens_to=Target(value=33), stage="refine")
    assert {r.stage for r in budget.curve(twice, column, "hybrid")} == {"refine"}
    alone = with_curve(record, curves[0], rows=tuple(r for r in record.rows if r.state != "teacher"))
    with pytest.raises(TableError, match="has no teacher, whose value the target multiplies"):
        tabulate(spec, [Published(alone, {k: v for k, v in items.items() if k.state != "teacher"}, Path("a.json"))])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tokens_to: {teacher: 1.1}", "tokens_to: {teacher: 1.1, value: 3}", "give exactly one of value and teacher"),
        (
            "at_tokens: 1500000",
            "at_tokens: 1500000, tokens_to: {value: 3}",
            "give one of tokens_to, at_tokens and value",
        ),
        ("{label: PPL, task: perplexity}", "{label: PPL, task: perplexity, stage: tune}", "`stage` says whose tokens"),
        ("tasks: [next_line_short, next_line_long]", "mean_of: [PPL, to 33]", "no task column 'to 33'"),
        ("tasks: [next_line_short, next_line_long]", "recovery_of: to 33", "no column 'to 33'"),
        ("recipe: pocket/lolcats, state: hybrid", "state: hybrid", "give recipe and state, or neither"),
        ("trust: F, printed: {to 33: 9.9}", "trust: F", "a row without a recipe shows what is printed"),
    ],
)
def test_mistakes_in_columns_of_curves(old: str, new: str, words: str, tmp_path: Path) -> None:
    assert old in SPEC
    (tmp_path / "x.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(RecipeError, match=words):
        read_spec(tmp_path / "x.yaml")


# --- arXiv 2606.16429 -------------------------------------------------------------------------------------------------


def test_every_number_of_the_paper_is_there_and_its_averages_follow() -> None:
    """Of the files: Avg-12 = (11 NLU-11 + MMLU) / 12 within the rounding, in every row that has the three."""
    numbers = averages = 0
    for spec in map(read_spec, SPECS):
        for row in spec.rows:
            assert row.trust in ("T", "F")
            value = {c: p if isinstance(p, Printed) else Printed(value=p) for c, p in row.printed.items()}
            numbers += sum(1 + (p.files is not None) for p in value.values())
            files = {c: float(p.value if p.files is None else p.files) for c, p in value.items()}
            if {"NLU-11", "MMLU", "Avg-12"} <= set(files):
                averages += 1
                expected = (11 * files["NLU-11"] + files["MMLU"]) / 12
                assert abs(expected - files["Avg-12"]) <= 0.11, (spec.name, row.label, expected)
    assert len(SPECS) == 16 and (averages, numbers) == (145, 1028)


def test_the_88_times_and_the_token_ratios_are_those_of_the_cells() -> None:
    def value(spec: Any, label: str, column: str) -> Decimal:
        printed = next(r for r in spec.rows if r.label.startswith(label)).printed[column]
        return Decimal(printed.value if isinstance(printed, Printed) else printed)

    specs = {path.stem.removeprefix("taylor-calibrate-"): read_spec(path) for path in SPECS}
    ablation = specs["ablation"]
    assert round(value(ablation, "Baseline", "PPL") / value(ablation, "Taylor-Calibrate", "PPL"), 1) == 88
    for name, policy, target, ratio in (
        ("tokens-qwen2.5-1.5b", "AR", "12.21", "9.2"),
        ("tokens-qwen2.5-1.5b", "Uniform", "12.50", "5.5"),
        ("tokens-qwen2.5-3b", "GA-S2", "10.70", "8.9"),
        ("tokens-llama-3.2-3b", "GA-S2", "13.26", "4.9"),
        ("tokens-qwen3-8b", "GA-S2", "10.33", "2.0"),
    ):
        one, other = (
            value(specs[name], f"{policy}: {arm}", f"to {target}") for arm in ("Baseline", "Taylor-Calibrate")
        )
        assert round(one / other, 1) == Decimal(ratio), (name, policy)
