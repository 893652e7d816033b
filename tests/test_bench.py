"""`recipelin bench`: its bars, its refusals, and a record of what was measured."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from recipelin import bench, lookup, memory
from recipelin.bars import long_context
from recipelin.bars.stages import LLAMA_LAYER, Stages
from recipelin.bench import apart, profile
from recipelin.bench.measure import Bar, Fact, Measured, figures, find_bars, measure, peak
from recipelin.bench.measure import apart as measure_apart
from recipelin.bench.record import Record, as_json, as_markdown, table
from recipelin.cli import main


def test_every_file_of_bars_has_some_and_every_bar_can_be_measured():
    bars = find_bars()
    names = [bar.name for bar in bars]
    assert len(set(names)) == len(names) >= 20
    assert {name.partition("/")[0] for name in names} == set(lookup.names("bars"))
    for bar in bars:
        if isinstance(bar, Bar):
            assert set(bar.ratio) <= {*bar.cases, *bar.floors} and (bar.reach or 1) > 0
            assert all(callable(case.make) and case.steps >= 1 for case in bar.cases.values())
        else:
            assert isinstance(bar, Fact)


def test_one_bar_from_the_command_line(capsys):
    assert main(["bench", "--quick", "--only", "hybrid/short-64"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| hybrid/short-64 |"))
    ratio = float(re.split(r" *\| *", row)[4])
    assert 0.1 < ratio < 10 and "sdpa" in row and "hybrid/short-128" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "hybrid/short-65"], "did you mean 'hybrid/short-64'"),
        (["--device", "cuda"], "no CUDA device"),
        (["--only", "gpu/floor"], "no bar 'gpu/floor' of --device cpu"),
        (["--write", "--quick"], "a record holds every bar"),
        (["--write", "--only", "decode/4k"], "a record holds every bar of a group"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("recipelin.bench.measure.measure", None)
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_torch_and_without_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench"]) == 2
    assert "pip install 'recipelin[run]'" in capsys.readouterr().err
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path / "recipes")
    assert main(["bench", "--write"]) == 2
    assert "of a checkout" in capsys.readouterr().err


def test_a_record_says_what_is_met_and_what_bounds_the_rest():
    bars = [
        Measured("a/fast", "times as fast", 2.0, False, "ms", 3.0, 2.9, 3.1, {"slow": 3.0, "ours": 1.0}, 11),
        Measured(
            "a/slow", "times as fast", 5.0, False, "ms", 3.0, 2.9, 3.1, {"slow": 3.0, "ours": 1.0}, 11, "products"
        ),
        Measured("a/small", "times the memory", 1.0, True, "MiB", 0.5, 0.5, 0.5, {"x": 1.0, "y": 2.0}),
        Measured("a/fact", "errors", values={"fp32": 1e-7}),
    ]
    assert [m.met for m in bars] == [True, False, True, None]
    record = Record.begin(quick=False).end(bars)
    page = as_markdown(record)
    assert "2 of 3 bars are met" in page and "**a/slow** (3.00 of 5): products" in page and "a/fast** (" not in page
    assert record.processor in page and f"torch {record.versions['torch']}" in page
    assert table(record).count("\n") == 5 and json.loads(as_json(record))["bars"][1]["ratio"] == 3.0


def test_a_group_has_a_record_of_its_own_until_the_whole_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path / "recipes")
    (tmp_path / "recipes").mkdir()
    fact = Fact("some/fact", "one", lambda quick: {"a": 1.0})
    other = Fact("other/fact", "two", lambda quick: {"b": 2.0})
    monkeypatch.setattr("recipelin.bench.measure.find_bars", lambda only="": [fact, other])
    folder = tmp_path / "kernels" / "bench"
    assert main(["bench", "--only", "some", "--write"]) == 0
    page = (folder / "record-some.md").read_text()
    assert "recipelin bench --only some --write" in page and "some/fact" in page and "other/fact" not in page
    assert not (folder / "record.md").exists() and "bars are met" not in page
    assert main(["bench", "--write"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["record.json", "record.md"]


def test_interrupted_it_shows_what_was_measured_and_writes_nothing(tmp_path, monkeypatch, capsys):
    one, two = (Fact(f"some/{n}", n, lambda quick: {"s": 2.0}) for n in ("done", "begun"))

    def measured(bar, *, quick):
        if bar is two:
            raise KeyboardInterrupt
        return measure(bar, quick=quick)

    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    monkeypatch.setattr("recipelin.bench.measure.find_bars", lambda only="": [one, two])
    monkeypatch.setattr("recipelin.bench.measure.measure", measured)
    assert main(["bench", "--write"]) == 130
    found = capsys.readouterr()
    assert "some/done" in found.out and "some/begun" not in found.out
    assert "interrupted after 1 of 2 bars; no record is written" in found.err and not list(tmp_path.iterdir())


def test_memory_is_that_of_one_call():
    """The quadratic definition holds several T x T matrices at once, and not a hundred."""
    from recipelin.bars.hybrid import Attention

    one = 2 * 1024**2 * 4 / 2**20
    assert 2 * one <= peak(Attention("reference", 1024, heads=2, key_heads=2)) < 30 * one


def test_times_are_of_a_step():
    from recipelin.bars.decode import Decode

    cases = {str(n): Decode("hybrid", 128, heads=2, key_heads=1, width=8, window=4, steps=n) for n in (8, 64)}
    found = measure(Bar("x/steps", "", cases, ("64", "8"), None, unit="us"), quick=True)
    assert 0.3 < found.ratio < 3 and found.rounds == 3 and set(found.values) == {"8", "64"}


# --- the whole job ----------------------------------------------------------------------------------------------------

RECIPE = """\
name: test/small
model: {teacher: pocket}
method: {name: lolcats, window: 16, form: {feature_map: {width: 2}}}
data: {mix: [{source: text, path: corpus.txt}]}
schedule:
  transfer: {steps: 9, batch: 2, accumulation: 1, length: 48, optimizer: {lr: 3e-2}}
  tune: {steps: 9, batch: 2, accumulation: 1, length: 48, clip: 1.0, optimizer: {lr: 1e-2}}
eval: {suites: [suite.yaml]}
"""
SUITE = """\
name: small
evals:
  - {eval: perplexity, rows: 2, length: 48, batch: 1, text: {source: text, path: corpus.txt}}
  - {eval: usage, rows: 2, length: 48, text: {source: text, path: corpus.txt}}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A recipe of the pocket teacher on a text of its own."""
    folder = tmp_path_factory.mktemp("stages")
    words = [f"def f{i}(x):\n    return x + {i}" for i in range(1500)]
    (folder / "corpus.txt").write_text("\n\n".join(words), encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return Stages(str(folder / "recipe.yaml"))


def whole(values):
    """The shares of a fact, which are together the whole."""
    found = {part: values[f"{part} %"] for part in profile.PARTS}
    assert sum(found.values()) == pytest.approx(100) and min(found.values()) >= 0
    assert all(math.isfinite(v) and v > 0 for name, v in values.items() if not name.endswith("%"))
    return found


@pytest.mark.parametrize("stage", ["transfer", "tune"])
def test_the_parts_of_a_training_step_are_together_the_step(small, stage):
    values = small.training(stage, 2)
    found = whole(values)
    assert values["tokens/s"] * values["ms a step"] == pytest.approx(2 * 48 * 1e3)
    # Attention of the teacher is in transfer alone: in tune every layer is swapped.
    absent = [] if stage == "transfer" else ["softmax attention"]
    assert [name for name, share in found.items() if share == 0] == absent


def test_the_parts_of_an_evaluation_are_together_the_evaluation(small):
    hybrid, teacher = (small.evaluation(state) for state in ("hybrid", "teacher"))
    assert hybrid["perplexity s"] > 0 and hybrid["usage s"] > 0
    assert whole(hybrid)["operator"] > 0 and whole(hybrid)["optimiser"] == 0
    assert whole(teacher)["operator"] == 0 and whole(teacher)["softmax attention"] > 0


def test_a_layer_of_a_large_model_in_small(monkeypatch, capsys):
    """As the process of its own finds it, in this one."""
    numbers = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = LLAMA_LAYER.model_copy(update={**numbers, "head_dim": 16}).model_dump(mode="json")
    given = {"architecture": small, "length": 128, "features": 16, "window": 32}
    monkeypatch.setattr("sys.argv", ["apart", json.dumps(["stages", "layer", given])])
    monkeypatch.setattr(memory, "tune_allocator", lambda: None)  # it would be so for the tests that follow
    apart.main()
    values = json.loads(capsys.readouterr().out)
    assert all(share > 0 for share in whole(values).values())
    assert 0 < values["GiB at the peak"] < 8 and values["tokens/s"] * values["s a step"] == pytest.approx(128)


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match=r'bench: apart \["stages", "layer", {}\] ended with 1'):
        measure_apart("stages", "layer", {})


def test_every_event_counts_once_and_a_node_of_the_backward_pass_goes_where_its_operation_went():
    def event(name, microseconds, *children, number=-1):
        return SimpleNamespace(
            name=name, self_cpu_time_total=microseconds, cpu_children=list(children), sequence_nr=number
        )

    def node(microseconds, *children, number=-1):
        return event("autograd::engine::evaluate_function: X", microseconds, *children, number=number)

    whole = event(
        "recipelin stretch", 1,
        event("aten::view", 2, number=9),  # makes no node: the number is that of the next operation
        event("recipelin part: data", 4, event("aten::mm", 8, number=9)),
        event("aten::exp", 16, number=10),
        event("_Hybrid", 32, event("aten::bmm", 64, number=12), number=11),
        node(128, event("aten::bmm", 256), number=11),
        node(512, number=10),
        node(1024, event("aten::mm", 2048), number=9),
        node(4096),  # adds a gradient to a parameter
        event("Optimizer.step#AdamW.step", 8192, event("aten::mul_", 16384)),
    )  # fmt: skip
    found = profile.by_part([event("before", 1e9), whole])
    expected = {
        "operator": 32 + 64 + 128 + 256,
        "data": 4 + 8 + 1024 + 2048,
        "rest of the model": 2 + 16 + 512 + 4096,
        "optimiser": 8192 + 16384,
        "Python and other": 1,
    }
    assert found == {part: pytest.approx(expected.get(part, 0) / (2**15 - 1)) for part in profile.PARTS}


def test_a_marked_model_computes_the_same_and_is_left_as_it_was(small):
    model = small.model()
    ids = torch.arange(40)[None]
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with profile.marked(model):
            assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_long_context_and_its_picture(monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    monkeypatch.setattr(long_context, "ARCHITECTURE", long_context.ARCHITECTURE.model_copy(update=small))
    found = [Measured(f"long_context/{n}", "", values=long_context.measured(n)) for n in (96, 192)]
    assert all(math.isfinite(v) and v > 0 for m in found for v in m.values.values())
    one, two = (m.values for m in found)
    # Keys and values of 2 layers and 2 heads of 8, in fp32, grow; states do not once the window is full.
    assert one["cache teacher, bytes"] == 96 * 2 * 2 * 2 * 8 * 4 and two["context"] == 192
    assert two["cache teacher, bytes"] == 2 * one["cache teacher, bytes"]
    assert two["cache student, bytes"] == one["cache student, bytes"]
    made = figures([Measured("hybrid/x", ""), *found])
    assert list(made) == ["long-context.png"] and made["long-context.png"][:4] == b"\x89PNG"
    page = as_markdown(Record.begin(quick=True).end(found), tuple(made))
    assert "![long-context](long-context.png)" in page
