"""The table after a run: right numbers, legible, in four formats that parse."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from recipelin.measures import by_distance, measures
from recipelin.records import Item, ItemColumns, ItemsOf, Record, RecordError, Row
from recipelin.render import DASH, WIDTH, Block, Cell, Table
from recipelin.runtable import subset_states
from recipelin.tables import FORMATS, render, run_table


def cells(table: Table, title: str) -> dict[tuple[str, str], Cell]:
    block = next(b for b in table.blocks if b.title.startswith(title))
    return {(label, c): cell for label, row in block.rows for c, cell in zip(block.columns[1:], row, strict=True)}


def test_scores_are_means_of_items_and_perplexity_their_exponential(make: Any) -> None:
    record, items = make()
    found = cells(run_table(record, items), "Scores")
    row = next(r for r in record.rows if r.state == "hybrid" and r.task == "perplexity")
    assert found["hybrid", "perplexity"].numbers[0].interval.value == pytest.approx(math.exp(row.value))
    assert found["hybrid", "perplexity"].text == "22.7 ±1.9"
    assert found["hybrid", "perplexity"].numbers[1].interval.n == 120
    long = next(r for r in record.rows if r.state == "window" and r.task == "next_line_long")
    assert found["window", "next line long %"].numbers[0].interval.value == pytest.approx(long.value)
    assert found["(exposed %)", "next line short %"].text == "10"
    assert found["(guessing)", "recall far %"].text == "12.5"


def test_recall_splits_at_the_reach(make: Any) -> None:
    record, items = make()
    found = {m.label: m for m in measures([record], [items])}
    assert (found["recall near"].n, found["recall far"].n) == (96, 144)
    assert found["recall near"].tasks == ("recall@6", "recall@24")
    wider, _ = make(window=35)  # 3 x 34 = 102: distance 96 is now within reach
    assert {m.label: m.n for m in measures([wider], [items])}["recall near"] == 144
    assert [m.label for group in by_distance(record, items) for m in group] == ["6", "24", "96", "150", "201"]
    assert any("beyond 93 tokens = 3 layers" in n for n in run_table(record, items).notes)


def test_places_of_a_copied_string_are_shown_and_no_measures(make: Any) -> None:
    """Two strings at each of two distances, one on either side of 93; a place is part of what `token_accuracy` has whole."""
    record, items = make()
    found, scores = (
        list(record.rows),
        {"token_accuracy": (0.5, 1.0), "position_1": (0.0, 1.0), "position_3_4": (1.0, 1.0)},
    )
    for state in ("hybrid", "window"):
        for distance in (60, 130):
            for metric, each in scores.items():
                task = f"copy4@256:{distance}"
                each = each if distance == 60 else (0.0, 0.0)
                items[ItemsOf(state, "pocket", task, metric, 0)] = ItemColumns.of(
                    Item(id=f"{distance}-{i}", score=s, length=256, exposed=1.0) for i, s in enumerate(each)
                )
                found.append(
                    Row(state=state, suite="pocket", task=task, metric=metric, value=sum(each) / 2, stderr=0.1, n=2, exposed=1.0,
                        chance=0.25, seed=0, higher_is_better=True, distance=distance)
                )  # fmt: skip
    record = record.model_copy(update={"rows": tuple(found)})
    copies = [m for m in measures([record], [items]) if m.label.startswith("copy")]
    assert [(m.label, m.metric, m.n) for m in copies] == [
        ("copy4 near", "token_accuracy", 2),
        ("copy4 far", "token_accuracy", 2),
    ]
    table = run_table(record, items)
    blocks = [b.title for b in table.blocks if b.title.startswith("Copy4")]
    place = "right tokens by place in the string, %"
    assert blocks == ["Copy4 in 256 tokens by distance in tokens, % (token accuracy)",
                      f"Copy4 in 256 tokens, near: {place}", f"Copy4 in 256 tokens, far: {place}"]  # fmt: skip
    near = cells(table, f"Copy4 in 256 tokens, near: {place}")
    assert {column for _, column in near} == {"1", "3 to 4"}
    assert near["hybrid", "1"].text.startswith("50.0") and near["hybrid", "3 to 4"].text.startswith("100.0")
    assert near["(guessing)", "1"].text == "25.0" and near["teacher", "1"].text == DASH
    assert cells(table, f"Copy4 in 256 tokens, far: {place}")["hybrid", "1"].text.startswith("0.0")


def test_recoveries_and_their_dash(make: Any) -> None:
    record, items = make()
    found = cells(run_table(record, items), "Recovered")
    plain, corrected = (n.interval.value for n in found["hybrid", "next line long"].numbers)
    scores = cells(run_table(record, items), "Scores")
    hybrid, teacher = (scores[s, "next line long %"].numbers[0].interval.value for s in ("hybrid", "teacher"))
    assert plain == pytest.approx(hybrid / teacher)
    assert corrected == pytest.approx((hybrid - 0.25) / (teacher - 0.25))
    poor = {
        "teacher": (3.0, 0.27, 0.5, 1.0, 1.0),
        "hybrid": (3.0, 0.27, 0.5, 1.0, 1.0),
        "window": (3.1, 0.2, 0.4, 1.0, 0.0),
    }
    found = cells(run_table(*make(poor)), "Recovered")
    assert found["hybrid", "next line short"].text == f"100 / {DASH}"
    assert "/ 100" in found["hybrid", "next line long"].text
    assert not any("perplexity" in column for _, column in found)


def test_the_mean_corrects_the_mean_and_not_the_ratios(make: Any) -> None:
    record, items = make()
    table = run_table(record, items)
    scores, found = cells(table, "Scores"), cells(table, "Recovered")

    def mean(state: str) -> float:
        each = [scores[state, f"next line {x} %"].numbers[0].interval.value for x in ("short", "long")]
        return float(np.mean(each))

    corrected = found["window", "mean of tasks"].numbers[1].interval.value
    assert corrected == pytest.approx((mean("window") - 0.25) / (mean("teacher") - 0.25))


def test_gap_retention_and_shapley(make: Any) -> None:
    record, items = make()
    found = cells(run_table(record, items), "What the linear branch")

    def value(column: str, number: int = 0) -> float:
        return found["log-loss, nats", column].numbers[number].interval.value

    loss = {r.state: r.value for r in record.rows if r.task == "perplexity"}
    window, hybrid, teacher = loss["window"], loss["hybrid"], loss["teacher"]
    assert value("gap %") == pytest.approx((window - hybrid) / (window - teacher))
    assert value("retention %") == pytest.approx((loss["none"] - loss["linear"]) / (loss["none"] - teacher))
    shapley = found["log-loss, nats", "Shapley %"].numbers
    assert [n.quantity for n in shapley[:2]] == ["Shapley value of window", "Shapley value of linear"]
    assert sum(n.interval.value for n in shapley[:2]) == pytest.approx(loss["none"] - hybrid)
    assert sum(n.interval.value for n in shapley[2:]) == pytest.approx(1.0)
    by_hand = (loss["none"] - loss["linear_outside"] + window - hybrid) / 2
    assert shapley[1].interval.value == pytest.approx(by_hand)
    assert found["next line short, points", "gap %"].text == DASH
    assert found["next line short, points", "verdict"].text == "not testable"


def test_what_the_hybrid_costs_the_trained_weights(make: Any) -> None:
    """hybrid - teacher = (softmax - teacher) + (hybrid - softmax), larger is better; nothing without the state softmax."""
    record, items = make()
    title = "What training did to the weights"
    found = cells(run_table(record, items), title)
    loss = {r.state: r.value for r in record.rows if r.task == "perplexity"}
    row = [found["log-loss, nats", c].numbers[0].interval.value for c in ("softmax - teacher", "hybrid - softmax")]
    assert row == pytest.approx([loss["teacher"] - loss["softmax"], loss["softmax"] - loss["hybrid"]])
    assert found["log-loss, nats", "n"].text == "120" and found["log-loss, nats", "reads"].text == "differs"
    assert found["recall far, points", "hybrid - softmax"].numbers[0].unit == "fraction"
    bare = record.model_copy(update={"rows": tuple(r for r in record.rows if r.state != "softmax")})
    assert not [b for b in run_table(bare, items).blocks if b.title.startswith(title)]


def test_subsets_are_found_by_the_plan(make: Any) -> None:
    record, _ = make()
    assert subset_states(record) == {
        frozenset(): "none",
        frozenset({"window"}): "window",
        frozenset({"linear"}): "linear_outside",
        frozenset({"window", "linear"}): "hybrid",
    }
    assert subset_states(record.model_copy(update={"plan": {}})) == {}


def test_pooled_seeds_of_one_recipe(make: Any) -> None:
    one, two = make(seed=0, noise=0.2), make(seed=1, noise=0.2)
    pooled = measures([one[0], two[0]], [one[1], two[1]])[0]
    assert pooled.scores["hybrid"].shape == (2, 120)
    alone = [measures([r], [i])[0].scores["hybrid"][0] for r, i in (one, two)]
    assert np.array_equal(pooled.scores["hybrid"], np.stack(alone))


def test_a_repeated_draw_is_no_new_item_and_a_new_draw_is(make: Any) -> None:
    record, items = make(seeds=(0, 1))
    found = {m.label: m.n for m in measures([record], [items])}
    assert found == {
        "perplexity": 120,
        "next line short": 400,
        "next line long": 400,
        "recall near": 192,
        "recall far": 288,
    }


def test_states_on_other_items_are_not_compared(make: Any) -> None:
    record, items = make()
    key = next(k for k in items if k.state == "window" and k.task == "next_line_long")
    with pytest.raises(RecordError, match="items of state 'window' on pocket/next line long are not those"):
        run_table(record, {**items, key: replace(items[key], id=items[key].id[::-1])})


def test_a_row_that_its_items_contradict_is_called_out(make: Any) -> None:
    record, items = make()
    rows = tuple(
        r.model_copy(update={"value": 0.9}) if r.state == "hybrid" and r.task == "next_line_long" else r
        for r in record.rows
    )
    notes = run_table(record.model_copy(update={"rows": rows}), items).notes
    assert [n for n in notes if n.startswith("CAUTION")] == [
        "CAUTION: next line long, hybrid: the items' mean is 0.43, the Record's row says 0.9."
    ]
    assert not any(n.startswith("CAUTION") for n in run_table(record, items).notes)


def test_an_old_record_still_renders(make: Any) -> None:
    """Only the fields without a default, and no items: scores with their standard errors, no verdict."""
    record, _ = make()
    required = {n for n, f in Record.model_fields.items() if f.is_required()}
    old = {k: v for k, v in json.loads(record.model_dump_json()).items() if k in required | {"rows", "branches"}}
    old["plan"] = {}
    for row in old["rows"]:
        del row["distance"]
    for state in {r["state"] for r in old["rows"]}:
        assert state
    table = run_table(Record.model_validate_json(json.dumps(old)), {})
    found = cells(table, "Scores")
    row = next(r for r in record.rows if r.state == "hybrid" and r.task == "next_line_long")
    interval = found["hybrid", "next line long %"].numbers[0].interval
    assert interval.value == pytest.approx(row.value) and interval.half == pytest.approx(
        1.96 * (row.stderr or 0), rel=1e-3
    )
    assert "not testable" in table.conclusions[0]
    assert any("standard errors" in n for n in table.notes)
    for format in FORMATS:
        assert render(table, format)


def test_an_unfinished_run_and_one_without_hybrid_render(make: Any) -> None:
    record, items = make({"softmax": (2.9, 0.5, 0.5, 1.0, 1.0)}, status="interrupted", window=None, branches=())
    text = render(run_table(record, items), "markdown")
    assert "This run is interrupted" in text and "no linear branch" in text
    assert "What the linear branch brings" not in text and "recall %" in text
    empty, _ = make(rows=1)
    assert "not testable" in render(run_table(empty.model_copy(update={"rows": ()}), {}), "markdown")


def test_pocket_scale_is_said_of_small_teachers_only(make: Any) -> None:
    record, items = make()
    assert "Pocket scale" in render(run_table(record, items), "markdown")
    large = record.model_copy(update={"plan": record.plan | {"parameters": 8_030_000_000}})
    assert "Pocket scale" not in render(run_table(large, items), "markdown")


def test_markdown_is_aligned_and_fits_a_terminal(make: Any) -> None:
    text = render(run_table(*make()), "markdown")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 140
    grids = [list(g) for g in _grids(lines)]
    assert len(grids) == 5
    for grid in grids:
        assert len({len(line) for line in grid}) == 1
        assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in grid}) == 1
    assert all(len(line) <= WIDTH for line in lines if not line.startswith("|"))
    for word in (
        "gap:",
        "retention:",
        "Shapley:",
        "recovered:",
        "(exposed %)",
        "Verdict:",
        "Rule:",
        "plan 1a2b3c4d",
        "seed 0",
        "cpu",
    ):
        assert word in text


def test_markdown_escapes_what_would_break_a_row() -> None:
    grid = next(_grids(render(ODD, "markdown").splitlines()))
    assert grid[0].startswith("| s\\|t")
    assert len({len(re.sub(r"\\\|", "", line).split("|")) for line in grid}) == 1


def _grids(lines: list[str]) -> Any:
    grid: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            grid.append(line)
        elif grid:
            yield grid
            grid = []


ODD = Table(
    title="a & b_c <d> 100% #1 ~^ {x} \\y $z",
    lead=("**bold** <script>",),
    blocks=(Block("t|u", ("s|t", "x_1 %"), (("r & <b>", (Cell("1.0 ±0.2"),)), ('"q", s', (Cell("-0.1"),)))),),
    conclusions=("a-b -1",),
    notes=("line\nbreak",),
)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.rows += tag == "tr"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("odd", [True, False])
def test_html_parses_and_escapes(odd: bool, make: Any) -> None:
    table = ODD if odd else run_table(*make())
    reader = _Reader()
    reader.feed(render(table, "html"))
    reader.close()
    assert reader.open == []
    assert reader.rows == sum(len(b.rows) + 1 for b in table.blocks)
    assert table.title in reader.text
    if odd:
        assert "<script>" in reader.text and "r & <b>" in reader.text and "**" not in reader.text


def test_csv_reads_back_every_number(make: Any) -> None:
    table = run_table(*make())
    read = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    want = [n for b in table.blocks for _, row in b.rows for c in row for n in c.numbers]
    got = [r for r in read if r["value"]]
    assert [float(r["value"]) for r in got] == [n.interval.value for n in want]
    assert [float(r["low"]) for r in got] == [n.interval.low for n in want]
    assert {r["n"] for r in got if r["column"] == "perplexity"} == {"120"}
    assert list(csv.reader(io.StringIO(render(ODD, "csv"))))[2][1] == '"q", s'


@pytest.mark.parametrize("odd", [True, False])
def test_latex_is_balanced_and_escaped(odd: bool, make: Any) -> None:
    table = ODD if odd else run_table(*make())
    text = "\n".join(line for line in render(table, "latex").splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[\\&%#_{}$]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert not re.search(r"[#~^<>|]|_(?!\w*})", bare)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(table.blocks)
    for line in text.splitlines():
        if line.endswith(r"\\"):
            width = len(re.findall(r"(?<!\\)&", line)) + 1
            assert width in {len(b.columns) for b in table.blocks}
    assert text.isascii()
    if odd:
        assert r"1.0 $\pm$0.2" in text and "& $-$0.1" in text and r"\textbackslash{}y \$z" in text


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of markdown, latex, html, csv"):
        render(ODD, "pdf")  # type: ignore[arg-type]


def test_formats_lengths_and_metrics_of_recall_are_not_pooled(make: Any) -> None:
    record, items = make()
    extra = []
    for format, length, metric in (
        ("passkey", 512, "exact_match"), ("passkey", 4096, "exact_match"), ("passkey", 4096, "generated"),
        ("needle", 4096, "exact_match"),
    ):  # fmt: skip
        for row in record.rows:
            if row.distance is not None:
                task = f"{format}@{length}:{row.distance}"
                extra.append(row.model_copy(update={"task": task, "metric": metric}))
                items[ItemsOf(row.state, row.suite, task, metric, 0)] = items[
                    ItemsOf(row.state, row.suite, row.task, row.metric, 0)
                ]
    record = record.model_copy(update={"rows": (*record.rows, *extra)})
    found = {m.label: m for m in measures([record], [items])}
    assert [x for x in found if x.endswith(("near", "near exact match", "near generated"))] == [
        "recall near", "passkey 512 near exact match", "passkey 4096 near exact match", "passkey 4096 near generated",
        "needle near",
    ]  # fmt: skip
    assert found["passkey 4096 far generated"].n == found["needle far"].n == found["recall far"].n == 144
    table = run_table(record, items)
    titles = [b.title for b in table.blocks if "by distance" in b.title]
    assert titles == [
        "Recall by distance in tokens, % (acc)",
        "Needle in 4096 tokens by distance in tokens, % (exact match)",
        "Passkey in 512 tokens by distance in tokens, % (exact match)",
        "Passkey in 4096 tokens by distance in tokens, % (exact match)",
        "Passkey in 4096 tokens by distance in tokens, % (generated)",
    ]
    scores = [b for b in table.blocks if b.title.startswith("Scores")]
    assert [b.title[-8:] for b in scores] == ["(1 of 3)", "(2 of 3)", "(3 of 3)"] and {len(b.rows) for b in scores} == {
        10
    }
    columns = [c for b in scores for c in b.columns[1:]]
    assert len(columns) == len(set(columns)) == 3 + 2 * 5
    assert cells(table, "Needle")["window", "201"].text == cells(table, "Recall by")["window", "201"].text


def test_a_weighted_mean_is_the_ratio_of_two_sums(make: Any) -> None:
    """Items of two subtasks, 150 right of 160 and 10 of 40: the mean of the subtasks is 59.4 %, of the items 80 %."""
    record, items = make()
    right = np.r_[np.ones(150), np.zeros(10), np.ones(10), np.zeros(30)]
    weights = np.r_[np.full(160, 0.5 / 160), np.full(40, 0.5 / 40)] * 200
    mean = float(np.average(right, weights=weights))
    for key, each in list(items.items()):
        if key.task == "next_line_long":
            subtasks = ("a",) * 160 + ("b",) * 40
            items[key] = replace(each, score=tuple(right), weight=tuple(weights), subtask=subtasks)
    rows = tuple(r.model_copy(update={"value": mean}) if r.task == "next_line_long" else r for r in record.rows)
    record = record.model_copy(update={"rows": rows})
    table = run_table(record, items)
    interval = cells(table, "Scores")["teacher", "next line long %"].numbers[0].interval
    assert interval.value == pytest.approx((150 / 160 + 10 / 40) / 2)
    by_hand = 0.5 * np.sqrt(150 / 160 * 10 / 160 / 160 + 0.25 * 0.75 / 40)  # two binomials, halved
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(by_hand, rel=0.1)
    assert not any("CAUTION" in n for n in table.notes)
    differences = cells(table, "What the linear branch")["next line long, points", "hybrid - window"].text
    assert differences == "0.0"
