"""Tokens on disk: a stream is spooled once, and an interrupted spool goes on bit-equal, whatever it was cut off in."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recipelin import data, spool
from recipelin.data import Batches
from recipelin.documents import Reader, documents
from recipelin.sources import PARTS, Data, Hub, LocalFile, SourceError

ROWS = 240


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([f"document {i} holds the number {i * 7}" for i in range(200)], 300)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    """What the datasets library prepares stays out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The same rows as three JSON-lines files in a folder, as one file, and as parquet."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "set").mkdir()
    rows = [{"text": f"document {i} holds the number {i * 7} " * (1 + i % 5), "n": i} for i in range(ROWS)]
    for shard in range(3):
        lines = "".join(json.dumps(r) + "\n" for r in rows[shard * 80 : (shard + 1) * 80])
        (folder / "set" / f"part-{shard}.jsonl").write_text(lines)
    (folder / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Dataset.from_list(rows).to_parquet(str(folder / "all.parquet"))
    return folder


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
STREAM = {"source": "hub", "dataset": "./set", "streaming": True, "tokens": 4_000}
SOURCES = {
    "stream": Hub(**STREAM),
    "shuffled stream": Hub(**STREAM, shuffle={"seed": 3, "buffer": 30}),
    "folder": Hub(source="hub", dataset="./set"),
    "jsonl": LocalFile(source="jsonl", path="all.jsonl"),
    "parquet": LocalFile(source="parquet", path="all.parquet", template={"prompt": "{n}: ", "response": "{text}"}),
}


def contents(cache: Path) -> dict[str, bytes]:
    (place,) = [p.parent for p in cache.glob("*/spool.json")]
    assert not list(cache.glob("*.partial"))
    return {p.name: p.read_bytes() for p in place.iterdir()}


class Killed(BaseException):
    """As KeyboardInterrupt: nothing between here and the test may catch it."""


@pytest.mark.parametrize(("name", "at"), [*((name, "flush") for name in SOURCES), ("stream", "encode")])
def test_an_interrupted_spool_goes_on_bit_equal(name, at, tokenizer, corpus, tmp_path, monkeypatch):
    """Cut off within its fourth batch, with half-written bytes behind the last state; three times in all."""
    source = SOURCES[name]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(spool, "BATCH_DOCUMENTS", 9)
    spool.stream(source, tokenizer, part="training", folder=corpus, cache=whole)
    encoded = []
    real_encode, real_flush = spool._encode, spool._Writing.flush

    def encode(batch, tokenizer):
        if at == "encode" and len(encoded) % 4 == 3:
            encoded.append(0)
            raise Killed
        encoded.append(len(batch))
        return real_encode(batch, tokenizer)

    def flush(writing):
        found = real_flush(writing)
        if at == "flush" and len(encoded) % 4 == 3:
            encoded.append(0)
            raise Killed  # the bytes are written, the state is not
        return found

    monkeypatch.setattr(spool, "_encode", encode)
    monkeypatch.setattr(spool._Writing, "flush", flush)
    for _ in range(3):
        with pytest.raises(Killed):
            spool.stream(source, tokenizer, part="training", folder=corpus, cache=broken)
        assert not list(broken.glob("*/spool.json"))
        (partial,) = broken.glob("*.partial")
        with (partial / "training.tokens").open("ab") as file:
            file.write(b"\xff" * 7)
    monkeypatch.setattr(spool, "_encode", real_encode)
    monkeypatch.setattr(spool._Writing, "flush", real_flush)
    read = []
    real_documents = Reader.documents

    def counted(self, parts):
        for document in real_documents(self, parts):
            read.append(document.name)
            yield document

    monkeypatch.setattr(Reader, "documents", counted)
    spool.stream(source, tokenizer, part="training", folder=corpus, cache=broken)
    assert contents(broken) == contents(whole)
    done = 9 * (9 if at == "encode" else 6)
    assert read[0] != (names := [d.name for d in real_documents(Reader(source, corpus), parts(source))])[0]
    assert read[0] == names[done], "it goes on where the last state stood"


def parts(source):
    return PARTS if isinstance(source, Hub) and source.streaming else ("training",)


def test_a_stream_is_its_first_tokens(tokenizer, corpus, tmp_path):
    """N tokens of all parts together, the last document cut; each part holds its own documents, in the stream's order."""
    source = SOURCES["stream"]
    found = {p: spool.stream(source, tokenizer, part=p, folder=corpus, cache=tmp_path) for p in PARTS}
    assert sum(len(s.tokens) for s in found.values()) == source.tokens
    assert len(list(tmp_path.glob("*/spool.json"))) == 1, "read once for the three parts"
    left = source.tokens
    expected = {p: [] for p in PARTS}
    for document in Reader(source, corpus).documents(PARTS):
        ids = [0, *tokenizer.backend_tokenizer.encode(document.text, add_special_tokens=False).ids, 1][:left]
        left -= len(ids)
        expected[document.part] += ids
    assert {p: s.tokens.tolist() for p, s in found.items()} == expected and left == 0
    ordered, shuffled = (
        spool.stream(SOURCES[n], tokenizer, part="training", folder=corpus, cache=tmp_path).tokens
        for n in ("stream", "shuffled stream")
    )
    assert sorted(set(ordered)) and ordered[:200].tolist() != shuffled[:200].tolist()


def test_nothing_of_a_corpus_is_held(tokenizer, corpus, tmp_path):
    masked = LocalFile(**{**SOURCES["parquet"].model_dump(), "loss": "response"})
    found = spool.stream(masked, tokenizer, part="training", folder=corpus, cache=tmp_path)
    for array in (found.tokens, found.starts, found.masked):
        base = array
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap) and not array.flags.writeable


def test_batches_of_a_stream_are_pure(tokenizer, corpus, tmp_path):
    def make():
        return Batches(
            Data(mix=(SOURCES["shuffled stream"],)),
            tokenizer,
            part="training",
            length=32,
            batch=2,
            seed=4,
            folder=corpus,
            cache=tmp_path,
        )

    one = make()
    late = [one.batch(step) for step in (40, 7)]
    again = [make().batch(step) for step in (40, 7)]
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(late, again, strict=True))


def test_a_spool_that_is_there_needs_no_source(tokenizer, corpus, tmp_path):
    """`ready` asks for no dataset whose tokens are kept: a run goes on without network."""
    commit = {"source": "hub", "dataset": "a/b", "revision": "0" * 40}
    source, cache = Hub(**commit), tmp_path / "cache"
    with pytest.raises(SourceError, match="a/b@0000"):
        spool.ready(source, corpus, cache)
    place = cache / spool._key(source, tokenizer, ("training",), corpus)
    place.mkdir(parents=True)
    (place / "spool.json").write_text("{}")
    spool.ready(source, corpus, cache)


def test_the_key_knows_what_changes_tokens(tokenizer, corpus):
    source = SOURCES["jsonl"]
    key = spool._key(source, tokenizer, ("training",), corpus)
    assert spool._key(source.model_copy(update={"weight": 3.0}), tokenizer, ("training",), corpus) == key
    for change in ({"field": "n"}, {"parts": {"selection": (0, 1), "test": (1, 2)}}):
        other = LocalFile(**{**source.model_dump(), **change})
        assert spool._key(other, tokenizer, ("training",), corpus) != key
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert spool._key(source, without, ("training",), corpus) != key
    assert spool._key(source, tokenizer, ("test",), corpus) != key


def test_truncation_and_padding_of_the_tokenizer_cut_nothing(tokenizer, corpus):
    """A tokenizer.json may hold both, and every call of the tokenizer leaves its own behind."""
    from recipelin.facts import filler

    def made(words):
        texts = documents(SOURCES["jsonl"], "training", corpus)
        asked = {"items": 2, "seed": 0, "context": (1, 40), "answer": (1, 40), "options": 2}
        lines = [(name, text.replace(" document", "\ndocument")) for name, text in texts]
        return (
            spool.stream(SOURCES["parquet"], words, part="training", folder=corpus, cache=None).tokens.tolist(),
            spool.tokenizer_digest(words),
            data.next_line_items(lines, words, **asked),
            filler(words, "document one holds the number", 100).tolist(),
        )

    expected = made(tokenizer)
    cut = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer), **SPECIAL)
    backend = cut.backend_tokenizer
    backend.enable_truncation(3, stride=1, direction="left")
    backend.enable_padding(length=7, pad_token="<pad>", pad_id=2)
    before = (backend.truncation, backend.padding, backend.to_str())
    assert made(cut) == expected
    assert (backend.truncation, backend.padding, backend.to_str()) == before, "left as it was"
    cut(["a b c d e f g"], truncation=True, max_length=2, padding="max_length")
    assert made(cut) == expected


def test_streams_that_are_too_short_are_said(tokenizer, corpus, tmp_path):
    def ask(**change):
        source = Hub(**{**STREAM, **change})
        return spool.stream(source, tokenizer, part="training", folder=corpus, cache=tmp_path)

    with pytest.raises(
        SourceError, match=r"the stream ends after [\d,]+ tokens, 9,000,000 are asked for: lower tokens"
    ):
        ask(tokens=9_000_000)
    with pytest.raises(SourceError, match=r"400 tokens end at row \d+, parts name rows up to 199"):
        ask(tokens=400, parts={"selection": (0, 100), "test": (100, 200)})
    with pytest.raises(SourceError, match="parts name rows up to 399, found 240 rows"):
        ask(tokens=9_000_000, parts={"selection": (0, 100), "test": (100, 400)})


@pytest.mark.parametrize("name", SOURCES)
def test_parts_are_disjoint_and_all_is_in_one(name, corpus):
    """By hash of the name and by rows; rows of a range are exactly the range."""
    source = SOURCES[name]
    names = [{n for n, _ in documents(source, part, corpus)} for part in PARTS]
    assert len(set().union(*names)) == sum(map(len, names)) == ROWS
    by_rows = type(source)(**{**source.model_dump(), "parts": {"selection": (200, 240), "test": (0, 10)}})
    texts = {part: [t for _, t in documents(by_rows, part, corpus)] for part in PARTS}
    everything = [d.prompt + d.text for d in Reader(source, corpus).documents(PARTS)]
    assert texts["test"] == everything[:10] and texts["selection"] == everything[200:]
    assert texts["training"] == everything[10:200]
