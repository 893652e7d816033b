"""Publishing copies a whole, clean run once, and refuses everything else with the way out."""

import argparse
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from recipelin.publish import PublishError, publish, publish_command
from recipelin.records import (
    Bands,
    Item,
    RecordError,
    Result,
    read_bands,
    read_items,
    read_record,
    write_bands,
    write_items,
    write_record,
)
from recipelin.runtable import run_table


def lay(make: Any, folder: Path, **changes: Any) -> Path:
    record, items = make(**changes)
    write_record(folder / "record.json", record)
    pairs = []
    for row in record.rows:
        key = (row.state, row.suite, row.task, row.metric, row.seed)
        if key in items:
            fields = row.model_dump(exclude={"state", "suite", "seed"})
            each = zip(*astuple(items[key]), strict=True)
            mine = tuple(Item(**dict(zip(Item.model_fields, values, strict=True))) for values in each)
            pairs.append((row, Result(**fields, items=mine)))
    write_items(folder / "items.jsonl.gz", pairs)
    return folder


def test_a_clean_run_is_copied_as_it_is_and_only_once(make: Any, tmp_path: Path) -> None:
    run = lay(make, tmp_path / "run")
    path = publish(run, tmp_path / "results")
    assert path.parent == tmp_path / "results" / "records"
    stem, rand = path.stem.rsplit("-", 1)
    assert stem == "pocket-lolcats--1a2b3c4d--20261124T130000Z" and len(rand) == 4
    assert path.read_bytes() == (run / "record.json").read_bytes()
    assert read_record(path) == read_record(run) and read_items(path) == read_items(run)
    assert publish(run, tmp_path / "results") == path
    assert len(list(path.parent.iterdir())) == 2


def test_bands_are_copied_too_and_must_be_whole(make: Any, tmp_path: Path) -> None:
    run = lay(make, tmp_path / "run")
    bands = Bands(edges=(32, 64), counts=(8,), heads=((0.5,),))
    result = Result(task="layer_0", metric="linear_share", value=0.5, stderr=None, n=8, bands=bands)
    write_bands(run / "usage.json.gz", [(result.row(state="hybrid", suite="pocket", seed=0), result)])
    path = publish(run, tmp_path / "results")
    assert path.with_name(f"{path.stem}.usage.json.gz").read_bytes() == (run / "usage.json.gz").read_bytes()
    assert read_bands(path) == read_bands(run) and len(list(path.parent.iterdir())) == 3
    notes = run_table(read_record(path), read_items(path), place=path).notes
    assert f"the same by head and position: {path.with_name(f'{path.stem}.usage.json.gz')}." in notes
    (run / "usage.json.gz").write_text("{}")
    with pytest.raises(RecordError, match="not the bands of a Record"):
        publish(run, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dirty": True}, "differed from commit 0123456789.*commit the changes.*run it again"),
        ({"dirty": None}, "differed from commit"),
        ({"commit": None, "dirty": None}, "commit of the source that ran is unknown.*clone.*run it again"),
        ({"status": "interrupted"}, "this run is interrupted; run it to its end: recipelin run pocket/lolcats"),
    ],
)
def test_what_nobody_could_repeat_is_refused(changes: dict[str, Any], words: str, make: Any, tmp_path: Path) -> None:
    run = lay(make, tmp_path / "run", **changes)
    with pytest.raises(PublishError, match=words):
        publish(run, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_command(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = lay(make, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert publish_command(argparse.Namespace(runs=[run])) == 2
    assert "there is no results/" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    assert publish_command(argparse.Namespace(runs=[tmp_path / "nothing"])) == 2
    assert "no such file" in capsys.readouterr().err
    assert publish_command(argparse.Namespace(runs=[run])) == 0
    assert capsys.readouterr().out.startswith("results/records/pocket-lolcats--")


def test_a_run_without_its_items_is_refused(make: Any, tmp_path: Path) -> None:
    run = lay(make, tmp_path / "run")
    (run / "items.jsonl.gz").unlink()
    with pytest.raises(ValueError, match="no such file; it holds the items"):
        publish(run, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_several_runs_each_whole_or_not_at_all(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A folder of runs stands for those in it; a refused run is named and keeps no other back."""
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        lay(make, tmp_path / "runs" / str(number), seed=number, name=f"pocket/lolcats/seed={number}", dirty=number == 2)
    (tmp_path / "runs" / "steps").mkdir()
    single = tmp_path / "runs" / "3"
    assert publish_command(argparse.Namespace(runs=[tmp_path / "runs", single])) == 2
    out, err = capsys.readouterr()
    assert "2 of 3 runs are published" in out and err.count("\n") == 1 and "runs/2: the source that ran differed" in err
    assert [p.name[:22] for p in sorted((tmp_path / "results" / "records").glob("*Z-????.json"))] == [
        "pocket-lolcats-seed=1-",
        "pocket-lolcats-seed=3-",
    ]
    assert len(list((tmp_path / "results" / "records").iterdir())) == 4
    assert publish_command(argparse.Namespace(runs=[tmp_path / "runs" / "steps"])) == 2
    assert "no record.json in it, nor in a folder below it" in capsys.readouterr().err
