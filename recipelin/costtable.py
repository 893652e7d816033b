"""What a run cost: its training stages, and a generated token in three states (no torch)."""

from .cost import count
from .records import Record
from .render import DASH, Block, Cell, Number
from .statistics import Interval

METRICS = {"tokens_per_second": "tokens/s", "cache_bytes": "cache"}


def cost_blocks(record: Record) -> tuple[Block, ...]:
    """`Cost of training` and `Cost of decoding`; a block that has nothing to say has no rows."""
    return _training(record), _decoding(record)


def cost_notes(record: Record) -> tuple[str, ...]:
    """How to read them, where they are there."""
    training, decoding = (b.rows for b in cost_blocks(record))
    notes = []
    if training:
        of = "of the GPU's tensors" if record.device != "cpu" else "resident, of the whole process"
        notes.append(
            f"cost of training: tokens/s of the stage's loop; seconds include loading and validation; memory: the peak {of}. "
            "window on: share of draws in which the window took part; merge rounding: what the weights' dtype lost of the "
            "merged adapters. (reused): measured when an earlier run made it."
        )
    if decoding:
        how = "CUDA events" if record.device != "cpu" else "process time of one thread"
        notes.append(
            f"cost of decoding: tokens/s of one-token steps behind that many tokens of context ({how}, median); cache: "
            "bytes that are kept for them, all rows of the batch together. Not comparable with another machine's."
        )
    return tuple(notes)


def _cell(quantity: str, value: object, text: str, unit: str, n: int = 1) -> Cell:
    if not isinstance(value, (int, float)):
        return Cell(DASH)
    return Cell(text, (Number(quantity, Interval(value, float("nan"), float("nan"), n), unit),))


def _training(record: Record) -> Block:
    steps = [s for s in record.steps if s.report and s.step != "evaluate"]
    merged = {s.step: m["rounding"] for s in steps if isinstance(m := s.report.get("merge"), dict)}
    dropped = any("window_on" in s.report for s in steps)
    rows = []
    for step in steps:
        report = step.report
        cells = [
            _cell("steps", report.get("steps"), f"{report.get('steps')}", "steps"),
            _counted("tokens", report.get("tokens")),
            _cell("seconds", step.seconds, f"{step.seconds:.1f}", "s"),
            _counted("tokens per second", report.get("tokens_per_second")),
            _cell("peak memory", step.peak_memory, count(step.peak_memory, "B"), "bytes"),
        ]
        if dropped:
            share = report.get("window_on")
            cells.append(_cell("window on", share, f"{share:.0%}" if isinstance(share, float) else "", "fraction"))
        if merged:
            lost = merged.get(step.step)
            cells.append(_cell("merge rounding", lost, f"{lost:.1%}" if isinstance(lost, float) else "", "fraction"))
        rows.append((step.step + (" (reused)" if step.reused else ""), tuple(cells)))
    columns = ["stage", "steps", "tokens", "seconds", "tokens/s", "peak memory"]
    columns += ["window on"] * dropped + ["merge rounding"] * bool(merged)
    place = record.device if record.device != "cpu" else _cpu(record, record.threads)
    return Block(f"Cost of training, {place}", tuple(columns), tuple(rows))


def _counted(quantity: str, value: object) -> Cell:
    return _cell(quantity, value, count(value) if isinstance(value, (int, float)) else "", "tokens")


def _cpu(record: Record, threads: int) -> str:
    return f"{record.processor or 'cpu'}, {threads} thread{'s' * (threads != 1)}"


def _decoding(record: Record) -> Block:
    """A column for each context and quantity; seeds are averaged."""
    values: dict[tuple[str, int, str], list[float]] = {}
    repeats: dict[tuple[str, int, str], int] = {}
    for row in record.rows:
        if row.metric in METRICS:
            key = (row.state, int(row.task.rpartition("@")[2]), row.metric)
            values.setdefault(key, []).append(row.value)
            repeats[key] = row.n
    contexts = sorted({context for _, context, _ in values})
    heads = [(context, metric) for metric in METRICS for context in contexts]
    rows = []
    for state in dict.fromkeys(state for state, _, _ in values):
        cells = []
        for context, metric in heads:
            found = values.get((state, context, metric))
            if found is None:
                cells.append(Cell(DASH))
                continue
            mean, unit = sum(found) / len(found), "B" if metric == "cache_bytes" else ""
            text = count(mean, unit) if unit else f"{mean:.0f}" if mean >= 100 else f"{mean:.1f}"
            cells.append(
                _cell(metric, mean, text, "bytes" if unit else "tokens per second", repeats[state, context, metric])
            )
        rows.append((state, tuple(cells)))
    place = record.device if record.device != "cpu" else _cpu(record, 1)
    columns = ("state", *(f"{METRICS[metric]} @{context}" for context, metric in heads))
    return Block(f"Cost of decoding by context, {place}", columns, tuple(rows))
