"""`recipelin bench`: its bars, its refusals, and a record of what was measured."""

import json
import re

import pytest

from recipelin import bench, lookup
from recipelin.bench.measure import Bar, Fact, Measured, find_bars, measure, peak
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
        (["--write", "--only", "decode"], "a record holds every bar"),
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
