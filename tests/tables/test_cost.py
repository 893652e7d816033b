"""The cost of a run in its table: beside the scores, never among them."""

from typing import Any

from recipelin.cost import count
from recipelin.measures import measures
from recipelin.records import Record, Row, StepTime
from recipelin.render import DASH, Table, render
from recipelin.runtable import run_table
from recipelin.verdict import verdict

REPORT = {"steps": 300, "tokens": 1_228_800, "tokens_per_second": 20_480.0}
STEPS = (
    StepTime(step="swap", key="a", seconds=0.1, reused=False),
    StepTime(step="calibrate", key="b", seconds=2.0, peak_memory=1 << 29, reused=False, report={"layers": {"0": 1.0}}),
    StepTime(step="transfer", key="c", seconds=66.0, peak_memory=601_000_000, reused=True, report=REPORT),
    StepTime(
        step="tune", key="d", seconds=70.5, peak_memory=741_000_000, reused=False,
        report={**REPORT, "window_on": 0.283, "merge": {"dtype": "bfloat16", "rounding": 0.0125}},
    ),
    StepTime(step="evaluate", key="e", seconds=9.0, reused=False, report={"evaluations": {"none": 2}, "reused": {"none": 2}}),
)  # fmt: skip


def decoded(**values: tuple[float, float]) -> tuple[Row, ...]:
    return tuple(
        Row(state=state, suite="pocket", task=f"decode@{context}", metric=metric, value=value, stderr=None, n=n,
            exposed=None, chance=None, seed=0, higher_is_better=n > 1)
        for state, (speed, size) in values.items()
        for context in (64, 1024)
        for metric, value, n in (("tokens_per_second", speed / context, 5), ("cache_bytes", size * context, 1))
    )  # fmt: skip


def with_cost(record: Record, **changes: Any) -> Record:
    rows = (*record.rows, *decoded(teacher=(64_000, 768), hybrid=(12_800.0, 2)))
    return record.model_copy(update={"steps": STEPS, "rows": rows, "processor": "Quick 9000", **changes})


def block(table: Table, title: str) -> dict[str, list[str]]:
    (found,) = [b for b in table.blocks if b.title.startswith(title)]
    return {found.title: list(found.columns)} | {label: [c.text for c in cells] for label, cells in found.rows}


def test_stages_and_decoding(make: Any) -> None:
    record, items = make()
    table = run_table(with_cost(record), items)
    assert block(table, "Cost of training") == {
        "Cost of training, Quick 9000, 2 threads": [
            "stage", "steps", "tokens", "seconds", "tokens/s", "peak memory", "window on", "merge rounding"],
        "calibrate": [DASH, DASH, "2.0", DASH, "537 MB", DASH, DASH],
        "transfer (reused)": ["300", "1.23 M", "66.0", "20.5 k", "601 MB", DASH, DASH],
        "tune": ["300", "1.23 M", "70.5", "20.5 k", "741 MB", "28%", "1.2%"],
    }  # fmt: skip
    assert block(table, "Cost of decoding") == {
        "Cost of decoding by context, Quick 9000, 1 thread": [
            "state", "tokens/s @64", "tokens/s @1024", "cache @64", "cache @1024"],
        "teacher": ["1000", "62.5", "49.2 kB", "786 kB"],
        "hybrid": ["200", "12.5", "128 B", "2.05 kB"],
    }  # fmt: skip
    gpu = run_table(with_cost(record, device="NVIDIA H100"), items)
    assert "Cost of decoding by context, NVIDIA H100" in block(gpu, "Cost of decoding")
    assert any("CUDA events" in n for n in gpu.notes) and any("process time of one thread" in n for n in table.notes)
    lines = [x.split(",") for x in render(table, "csv").splitlines() if "tokens_per_second" in x]
    assert [x[-6] for x in lines if "teacher" in x] == ["1000.0", "62.5"]


def test_a_number_of_any_size_has_three_digits() -> None:
    found = [count(x) for x in (748.716, 7840.2, 999.6, 999_900, 12, 0.5, 0)]
    assert found == ["749", "7.84 k", "1 k", "1 M", "12", "0.5", "0"]


def test_cost_is_in_no_score_and_no_verdict(make: Any) -> None:
    record, items = make()
    costly = with_cost(record)
    assert measures([costly], [items])[0].label == measures([record], [items])[0].label
    assert [m.label for m in measures([costly], [items])] == [m.label for m in measures([record], [items])]
    assert verdict(costly, items) == verdict(record, items)
    plain, found = run_table(record, items), run_table(costly, items)
    assert found.blocks[: len(plain.blocks)] == plain.blocks and len(found.blocks) == len(plain.blocks) + 2


def test_a_run_that_trained_nothing_has_no_cost_of_training(make: Any) -> None:
    record, items = make()
    assert not [b for b in run_table(record, items).blocks if b.title.startswith("Cost")]
    fp32 = STEPS[3].model_copy(update={"report": REPORT})
    table = run_table(record.model_copy(update={"steps": (fp32,)}), items)
    assert block(table, "Cost of training, cpu, 2 threads")["tune"] == ["300", "1.23 M", "70.5", "20.5 k", "741 MB"]


def test_agreement_is_no_task_of_the_mean(make: Any) -> None:
    record, items = make()
    extra, more = [], dict(items)
    for key, each in items.items():
        if key.task == "next_line_long":
            new = key._replace(task="agreement@32", metric="prefix_match")
            more[new] = each
            (row,) = [r for r in record.rows if (r.state, r.task) == (key.state, key.task)]
            extra.append(row.model_copy(update={"task": new.task, "metric": new.metric, "chance": None}))
    table = run_table(record.model_copy(update={"rows": (*record.rows, *extra)}), more)
    recovered = block(table, "Recovered")
    plain = block(run_table(record, items), "Recovered")
    (columns, before) = (next(iter(x.values())) for x in (recovered, plain))
    assert "agreement@32" in columns and columns.index("mean of tasks") == len(before)
    assert [r[-1] for r in list(recovered.values())[1:]] == [r[-1] for r in list(plain.values())[1:]]
    assert any(n.startswith("agreement: tokens of a greedy continuation") for n in table.notes)


def test_old_records_have_usage_in_one_share_only(make: Any) -> None:
    record, items = make()
    heads = tuple(
        r.model_copy(update={"task": f"{r.task}_head_{h}"})
        for r in record.rows
        for h in (0, 1)
        if r.metric == "linear_share"
    )
    other = tuple(r.model_copy(update={"metric": "outside_share", "value": 0.5}) for r in heads)
    notes = run_table(record.model_copy(update={"rows": (*record.rows, *heads, *other)}), items).notes
    assert "linear share of the hybrid's normaliser: layer 0: 1.0%, layer 1: 0.0%, layer 2: 12.0%." in notes
    assert any("outside its window: layer 0: 50.0%" in n for n in notes)
    assert not any("norm of the hybrid's output" in n for n in notes)
