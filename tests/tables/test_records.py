"""Records and sidecars: written whole, read back equal, refused with clear words."""

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recipelin.records import (
    Item,
    ItemColumns,
    ItemsOf,
    Record,
    RecordError,
    Result,
    Row,
    provenance,
    read_items,
    read_record,
    write_items,
    write_record,
)

RESULT = Result(
    task="recall_96",
    metric="acc",
    value=0.5,
    stderr=None,
    n=2,
    items=(
        Item(id="a", score=1.0, length=256, exposed=1.0),
        Item(id="b", score=0.1 + 0.2, length=9, exposed=0.0, weight=1 / 3, subtask="anatomy"),
    ),
)


def row(state: str = "hybrid", seed: int = 0) -> Row:
    return RESULT.row(state=state, suite="pocket", seed=seed)


def test_a_record_reads_back_equal_from_its_folder_and_its_file(make: Any, tmp_path: Path) -> None:
    record, _ = make()
    write_record(tmp_path / "record.json", record)
    assert read_record(tmp_path) == read_record(tmp_path / "record.json") == record
    assert [f.name for f in tmp_path.iterdir()] == ["record.json"]


def test_items_read_back_equal_and_their_bytes_repeat(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    write_items(path, [(row(), RESULT), (row(seed=1), RESULT)])
    found = read_items(tmp_path)
    assert found[ItemsOf("hybrid", "pocket", "recall_96", "acc", 1)] == ItemColumns.of(RESULT.items)
    assert len(found) == 2
    before = path.read_bytes()
    assert before[4:8] == bytes(4)  # no time in the gzip header
    write_items(path, [(row(), RESULT), (row(seed=1), RESULT)])
    assert path.read_bytes() == before


def test_the_sidecar_has_the_form_of_the_contract(tmp_path: Path) -> None:
    write_items(tmp_path / "items.jsonl.gz", [(row(), RESULT)])
    line = json.loads(gzip.decompress((tmp_path / "items.jsonl.gz").read_bytes()))
    assert list(line) == ["state", "suite", "task", "metric", "seed", "items"]
    assert line["items"][0] == ["a", 1.0, 256, 1.0]


def test_two_rows_of_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="two rows"):
        write_items(tmp_path / "items.jsonl.gz", [(row(), RESULT), (row(), RESULT)])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, _ = make()
    write_record(tmp_path / "record.json", record)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_record(tmp_path / "record.json", record.model_copy(update={"status": "failed"}))
    assert read_record(tmp_path).status == "finished"
    assert [f.name for f in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 2}', b"\xff\xfe"])
def test_what_is_no_record_is_refused_with_its_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(RecordError, match=r"record\.json: not a Record"):
        read_record(tmp_path)


def test_missing_files_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file; expected a run's folder"):
        read_record(tmp_path)
    with pytest.raises(RecordError, match="no such file"):
        read_items(tmp_path)


def test_a_cut_sidecar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    write_items(path, [(row(), RESULT)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match="not a sidecar"):
        read_items(path)
    path.write_bytes(gzip.compress(b'{"state":"hybrid","items":[["a",1.0]]}\n'))
    with pytest.raises(RecordError, match=r":1: not a sidecar"):
        read_items(path)


HEAD = '{"state":"hybrid","suite":"pocket","task":"t","metric":"acc","seed":0,"items":'
GOOD = HEAD.replace("hybrid", "window") + '[["a",1.0,9,0.5]]}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('["b","x",9,0.5]]}', "item 2: score: Input should be a valid number"),
        ('["b",true,9,0.5]]}', "item 2: score: Input should be a valid number"),
        ('[7,1.0,9,0.5]]}', "item 2: id: Input should be a valid string"),
        ('["b",1.0,9.0,0.5]]}', "item 2: length: Input should be a valid integer"),
        ('["b",1.0,true,0.5]]}', "item 2: length: Input should be a valid integer"),
        ('["b",NaN,9,0.5]]}', "item 2: score: Input should be a finite number"),
        ('["b",1.0,9,Infinity]]}', "item 2: exposed: Input should be a finite number"),
        ('["b",1.0,9,0.5,0.0,""]]}', "item 2: weight: Input should be greater than 0"),
        ('["b",1.0,9,0.5,1.0,null]]}', "item 2: subtask: Input should be a valid string"),
        ('["b",null,9.5,0.5]]}', r"item 2: score: Input should be a valid number \(and 1 more\)"),
        ('["b",1.0]]}', r'item 2: found \["b", 1.0\]; expected \[id, score, length, exposed\]'),
        ('["b",1.0,9,0.5,2.0]]}', r"item 2: found \[.*2.0\]; expected .* or \[id, score, length, exposed, weight, subtask\]"),
        ('{"id":"b"}]}', r'item 2: found {"id": "b"}; expected \[id,'),
    ],
)  # fmt: skip
def test_a_wrong_item_is_named_with_its_file_and_line(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress(f'{GOOD}\n{HEAD}[["a",1.0,9,0.5],{line}\n'.encode()))
    with pytest.raises(RecordError, match=rf"items\.jsonl\.gz:2: not a sidecar of items: {words}"):
        read_items(path)


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    for line, words in (
        ("7", "found int; expected a map of state, suite, task, metric, seed, items"),
        ("", "Expecting value"),
        ('{"state":"hybrid"}', "items: found NoneType; expected a list"),
        (HEAD + '{"a":1}}', "items: found dict; expected a list"),
    ):
        path.write_bytes(gzip.compress(f"{GOOD}\n{line}\n".encode()))
        with pytest.raises(RecordError, match=rf"items\.jsonl\.gz:2: not a sidecar of items: {words}"):
            read_items(path)
    path.write_bytes(gzip.compress(f"{GOOD}\n{GOOD}\n".encode()))
    with pytest.raises(RecordError, match=r"items\.jsonl\.gz:2: .*is there twice"):
        read_items(path)
    spoiled = bytearray(gzip.compress(GOOD.encode() * 9))
    spoiled[12] ^= 255
    path.write_bytes(bytes(spoiled))
    with pytest.raises(RecordError, match="not a sidecar"):
        read_items(path)


def test_right_items_of_any_form_read_as_an_item_reads_them(tmp_path: Path) -> None:
    """Integers as numbers, letters beyond ASCII, weights on some alone, none at all; -0.0 and 1 stay what they are."""
    path = tmp_path / "items.jsonl.gz"
    packed = ([["a", 1, 9, 0], ["b", -0.0, 1, 1.0, 2, "x"]], [["é", 0.5, 1, 1.0]], [])
    for each in packed:
        path.write_bytes(gzip.compress((HEAD + json.dumps(each) + "}").encode()))
        (found,) = read_items(path).values()
        wanted = ItemColumns.of(Item(**dict(zip(Item.model_fields, values, strict=False))) for values in each)
        assert found == wanted and repr(found) == repr(wanted) and len(found) == len(each)


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_provenance_of_a_clean_a_dirty_and_a_foreign_tree(tmp_path: Path) -> None:
    assert provenance(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    (tmp_path / "other.txt").write_text("x")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert provenance(tmp_path) == (None, None)  # somebody's own repository around an installed copy
    (tmp_path / "recipelin").mkdir()
    (tmp_path / "recipelin" / "records.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "second")
    clean = provenance(tmp_path)
    assert clean.commit is not None and len(clean.commit) == 40 and clean.dirty is False
    (tmp_path / "new.yaml").write_text("name: x")
    assert provenance(tmp_path) == (clean.commit, True)


def test_a_record_is_frozen(make: Any) -> None:
    record: Record = make()[0]
    with pytest.raises(ValueError, match="frozen"):
        record.name = "other"  # type: ignore[misc]
