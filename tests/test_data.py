"""Text to batches: disjoint parts, purity, packing, labels, and clear words for files that are not as named."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from recipelin import data
from recipelin.data import IGNORED, Batches, documents, stream
from recipelin.sources import Data, LocalFile, Recall, SourceError, Stdlib, fingerprint, part_of, stdlib_modules

STDLIB = Stdlib(source="python-stdlib")
PARTS = ("training", "selection", "test")
CACHE = tempfile.TemporaryDirectory()  # tokenising the library takes seconds: once for the file


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([t for _, t in list(documents(STDLIB, "training", Path()))[:40]], 900)


def batches(tokenizer, mix, **extra):
    arguments = {
        "part": "training",
        "length": 64,
        "batch": 4,
        "seed": 5,
        "folder": Path(),
        "cache": Path(CACHE.name),
        **extra,
    }
    settings = {n: arguments.pop(n) for n in ("separate", "positions") if n in arguments}
    return Batches(Data(mix=mix, **settings), tokenizer, **arguments)


def test_parts_are_disjoint_and_split_by_name():
    names = {part: {n for n, _ in documents(STDLIB, part, Path())} for part in PARTS}
    assert all(len(names[p]) >= 10 for p in PARTS)
    assert sum(len(n) for n in names.values()) == len(set().union(*names.values())) == len(stdlib_modules())
    assert part_of("json.decoder") == part_of("json.decoder") and "json.decoder" in set().union(*names.values())
    assert fingerprint(STDLIB, Path()) == fingerprint(STDLIB, Path("/"))


def test_a_batch_is_a_pure_function(tokenizer, tmp_path):
    mix = (STDLIB, Recall(source="recall"))
    one, other = batches(tokenizer, mix, cache=None), batches(tokenizer, mix, cache=tmp_path)
    for step in range(5):
        other.batch(step)
    again = batches(tokenizer, mix, cache=tmp_path)  # from the cache
    for found in (other, again):
        assert torch.equal(one.batch(17, 0).input_ids, found.batch(17, 0).input_ids)
        assert torch.equal(one.batch(17, 0).labels, found.batch(17, 0).labels)
    assert not torch.equal(one.batch(17).input_ids, one.batch(18).input_ids)
    assert not torch.equal(one.batch(17).input_ids, batches(tokenizer, mix, seed=6).batch(17).input_ids)


def test_accumulated_micro_batches_are_the_large_batch(tokenizer):
    large = batches(tokenizer, (STDLIB,), batch=4).batch(3)
    small = batches(tokenizer, (STDLIB,), batch=1, accumulation=4)
    assert torch.equal(torch.cat([small.batch(3, m).input_ids for m in range(4)]), large.input_ids)


def test_an_epoch_reads_every_row_once(tokenizer, tmp_path):
    text = "\n\n".join(f"paragraph {i} says the number {i * 7} in words and no more" for i in range(300))
    (tmp_path / "t.txt").write_text(text)
    source = LocalFile(source="text", path="t.txt")
    made = batches(tokenizer, (source,), length=16, batch=1, folder=tmp_path)
    rows = [tuple(made.batch(i).input_ids[0].tolist()) for i in range(made.rows)]
    tokens = stream(source, tokenizer, part="training", folder=tmp_path, cache=None).tokens
    expected = [tuple(tokens[i * 16 : (i + 1) * 16].tolist()) for i in range(len(tokens) // 16)]
    assert sorted(rows) == sorted(expected) and rows != expected
    second = [tuple(made.batch(i).input_ids[0].tolist()) for i in range(made.rows, 2 * made.rows)]
    assert sorted(second) == sorted(expected) and second != rows


def test_packing_with_and_without_separation(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(f"text {i}" for i in range(400)))
    source = LocalFile(source="text", path="t.txt")
    run_on = batches(tokenizer, (source,), folder=tmp_path).batch(0)
    assert run_on.segment_ids is None and torch.equal(run_on.position_ids[0], torch.arange(64))
    assert torch.equal(run_on.labels, run_on.input_ids)
    apart = batches(tokenizer, (source,), folder=tmp_path, separate=True, positions="restart").batch(0)
    assert torch.equal(apart.input_ids, run_on.input_ids)
    segments, positions = apart.segment_ids[0], apart.position_ids[0]
    begins = [0] + [i for i in range(1, 64) if segments[i] != segments[i - 1]]
    assert len(begins) > 3 and all(positions[i] == 0 for i in begins)
    assert all(apart.input_ids[0, i] == tokenizer.bos_token_id for i in begins[1:])
    assert (
        all(apart.labels[0, i] == IGNORED for i in begins[1:])
        and int((apart.labels[0] == IGNORED).sum()) == len(begins) - 1
    )


def test_weights_are_respected(tokenizer):
    made = batches(
        tokenizer, (Stdlib(source="python-stdlib", weight=3.0), Recall(source="recall", weight=1.0)), batch=50
    )
    recall = np.mean([float((made.batch(i).labels == IGNORED).any(1).float().mean()) for i in range(20)])
    assert 0.2 < recall < 0.3


def test_recall_rows_score_only_what_was_seen(tokenizer):
    made = batches(tokenizer, (Recall(source="recall", spacing=4, pairs=6),), length=128, batch=6)
    batch, marker = made.batch(2), data.marker_id(tokenizer)
    late = 0
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        known: dict[int, int] = {}
        for place in (i for i, t in enumerate(ids[:-2]) if t == marker):
            key, value = ids[place + 1], ids[place + 2]
            assert labels[place + 2] == (value if key in known else IGNORED)
            assert known.setdefault(key, value) == value
            late += key not in known or place > 64
        scored = [i for i, y in enumerate(labels) if y != IGNORED]
        assert scored and all(ids[i] == labels[i] and ids[i - 2] == marker for i in scored)
    assert late, "keys must be born throughout the row"


def test_parts_of_generated_rows_differ(tokenizer):
    mix = (Recall(source="recall"),)
    rows = [batches(tokenizer, mix, part=p).batch(0).input_ids for p in PARTS]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])


def test_jsonl_and_parquet_hold_the_same(tokenizer, tmp_path):
    import datasets

    texts = [f"document {i} " * 20 for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts))
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "d.parquet"))
    found = [
        [t for part in PARTS for _, t in documents(LocalFile(source=kind, path=f"d.{kind}"), part, tmp_path)]
        for kind in ("jsonl", "parquet")
    ]
    assert sorted(found[0]) == sorted(found[1]) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content", "field", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "text", r"a.jsonl:2:\d+: not JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', "text", "a.jsonl:1: no text field 'text', found 'txt'; did you mean 'txt'"),
        ("a.jsonl", b'["x"]\n', "text", "a.jsonl:1: no text field"),
        ("a.jsonl", b'{"text": "\xff"}\n', "text", "not UTF-8 at byte"),
    ],
)
def test_files_that_are_not_as_named(tokenizer, tmp_path, name, content, field, words):
    (tmp_path / name).write_bytes(content)
    source = LocalFile(source="jsonl", path=name, field=field)
    with pytest.raises(SourceError, match=words):
        [list(documents(source, part, tmp_path)) for part in PARTS]


def test_what_is_too_short_is_said(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n\nthree\n\nfour\n\nfive")
    with pytest.raises(SourceError, match=r"fewer than one row of 64|holds no document"):
        batches(tokenizer, (LocalFile(source="text", path="t.txt"),), folder=tmp_path)
    with pytest.raises(SourceError, match="lower keys and values"):
        data.recall_words(tokenizer, 5000, 5000)
    plain = data.train_tokenizer(["a b c"] * 3, 262)
    assert data.marker_id(plain) == 3
