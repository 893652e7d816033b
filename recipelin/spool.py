"""Documents -> tokens on disk, written once and read through memory maps: a corpus is never held in memory.

A finished spool is a folder `<key>/` with spool.json and, for each part, three flat files:
`<part>.tokens` int32 [tokens], `<part>.starts` int64 [documents] (first token of each), `<part>.masked` int64 [2 x ranges]
(first, end, first, end, ... of tokens that carry no loss, in order). It is made in `<key>.partial/`, where state.json says
how much of it counts.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from . import chat
from .documents import Document, Reader
from .files import locked, write_atomically
from .sources import PARTS, Hub, LocalFile, Part, SourceError, Stdlib, fingerprint

FORMAT = 5  # of the folder, and of how documents become tokens: part of the key
BATCH_DOCUMENTS = 1_000  # tokenised and written at once, or
BATCH_CHARACTERS = 4_000_000  # whichever comes first
_FILES: Mapping[str, type[np.signedinteger[Any]]] = {"tokens": np.int32, "starts": np.int64, "masked": np.int64}


@dataclass(frozen=True)
class Stream:
    """Tokens of a source's part, where its documents start, and first, end, ... of the ranges that carry no loss."""

    tokens: np.ndarray
    starts: np.ndarray
    masked: np.ndarray

    def row(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, segments, scored) of a cut, [length] each: int64, int64 from 0 by document, bool."""
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        end = int(np.searchsorted(self.starts, start + length, "left"))
        segments = np.searchsorted(np.asarray(self.starts[first:end]), np.arange(start, start + length), "right") - 1
        scored = np.ones(length, dtype=bool)
        begin = int(np.searchsorted(self.masked, start, "right")) // 2
        stop = (int(np.searchsorted(self.masked, start + length, "left")) + 1) // 2
        for masked, until in np.asarray(self.masked[2 * begin : 2 * stop]).reshape(-1, 2).tolist():
            scored[max(masked - start, 0) : until - start] = False
        return np.asarray(self.tokens[start : start + length], dtype=np.int64), segments, scored

    def scored_rows(self, length: int, *, separate: bool) -> np.ndarray:
        """Numbers of the rows of `length` in which a token is predicted that carries loss; the remainder is no row.

        A row's first token is never predicted; with `separate`, neither is a document's.
        """
        count = len(self.tokens) // length
        if not separate and not len(self.masked):
            return np.arange(count)
        masked = np.asarray(self.masked).reshape(-1, 2)
        if separate:
            masked = np.concatenate([masked, np.stack([self.starts, self.starts + 1], 1)])
            masked = masked[np.argsort(masked[:, 0], kind="stable")]
        # What lies between the masked ranges is scored: [begin, last].
        begin = np.append(0, np.maximum.accumulate(masked[:, 1]))
        last = np.append(masked[:, 0], len(self.tokens)) - 1
        begin += begin % length == 0
        last -= last % length == 0
        scored = (begin <= last) & (begin < count * length)
        marks = np.zeros(count + 1, dtype=np.int64)
        np.add.at(marks, begin[scored] // length, 1)
        np.add.at(marks, np.minimum(last[scored] // length, count - 1) + 1, -1)
        return np.flatnonzero(np.cumsum(marks[:-1]))


@contextmanager
def uncut(tokenizer: Any) -> Iterator[Any]:
    """A fast tokenizer's backend without truncation and padding, which a tokenizer.json may hold and which the last call of
    the tokenizer leaves behind; afterwards they are as they were. Not a copy: of a large vocabulary that takes a second.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of a fast tokenizer's whole definition, but for truncation and padding, which nothing here uses."""
    with uncut(tokenizer) as backend:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()


def stream(source: Stdlib | LocalFile | Hub, tokenizer: Any, *, part: Part, folder: Path, cache: Path | None) -> Stream:
    """The tokenised part of a source, each document as [BOS] prompt text [EOS] where the tokenizer has them; a conversation
    as its chat template writes it.

    Kept under `cache` by fingerprint, settings and tokenizer; an interrupted spool goes on where it stopped. What streams
    is read once for all three parts. Raises SourceError if the part holds no text.
    """
    parts: Sequence[Part] = PARTS if isinstance(source, Hub) and source.streaming else (part,)
    if cache is None:
        with tempfile.TemporaryDirectory() as made:  # memory maps outlive the names of their files
            return _open(_spool(source, tokenizer, parts, folder, Path(made) / "spool"), source, part)
    place = cache / _key(source, tokenizer, parts, folder)
    if not (place / "spool.json").is_file():
        with locked(place.with_suffix(".lock")):
            if not (place / "spool.json").is_file():
                _spool(source, tokenizer, parts, folder, place)
    return _open(place, source, part)


def ready(source: Stdlib | LocalFile | Hub, folder: Path, cache: Path) -> None:
    """Opens a source before anything else is done, and reads its first row, unless its tokens are in `cache`.

    Raises SourceError with what is missing.
    """
    if not any(cache.glob(f"{_source_key(source, folder)}-*/spool.json")):
        next(Reader(source, folder).documents(PARTS), None)


def _key(source: Stdlib | LocalFile | Hub, tokenizer: Any, parts: Sequence[Part], folder: Path) -> str:
    facts = [tokenizer_digest(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, list(parts)]
    if not isinstance(source, Stdlib) and source.chat:
        facts += [tokenizer.chat_template, chat.probe(tokenizer)]  # a template may write the date
    return f"{_source_key(source, folder)}-{_short(facts)}"


def _source_key(source: Stdlib | LocalFile | Hub, folder: Path) -> str:
    facts = [FORMAT, source.model_dump(mode="json", exclude={"weight"}), fingerprint(source, folder)]
    if isinstance(source, Hub) and source.shuffle:
        facts.append(importlib.metadata.version("datasets"))  # its shuffle decides the order
    return _short(facts)


def _short(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _open(place: Path, source: Stdlib | LocalFile | Hub, part: Part) -> Stream:
    files = {name: place / f"{part}.{name}" for name in _FILES}
    if files["tokens"].stat().st_size == 0:
        raise SourceError(f"{source.label}: the {part} part holds no document")
    found = {
        name: np.asarray(np.memmap(path, dtype=_FILES[name], mode="r"))
        if path.stat().st_size
        else np.empty(0, _FILES[name])  # there is no memory map of nothing
        for name, path in files.items()
    }
    return Stream(**found)


def _spool(source: Stdlib | LocalFile | Hub, tokenizer: Any, parts: Sequence[Part], folder: Path, place: Path) -> Path:
    """Write a whole spool, or the rest of an interrupted one, and return its folder."""
    working = place.with_name(f"{place.name}.partial")
    working.mkdir(parents=True, exist_ok=True)
    known = working / "state.json"
    state = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
    reader = Reader(source, folder, state["reader"] if state else None)
    writing = _Writing(working, parts, state["bytes"] if state else None)
    limit = source.tokens if isinstance(source, Hub) else None
    used = reader.rows  # rows whose tokens count; the last batch may have more
    counts = (
        {"total": limit, "initial": writing.tokens} if limit else {"total": reader.length(), "initial": reader.rows}
    )
    with writing, tqdm(
        desc=f"tokens of {source.label}", unit="token" if limit else "row", unit_scale=True,
        file=sys.stderr, disable=None, mininterval=1.0, delay=1.0, **counts,
    ) as bar:  # fmt: skip
        for batch in () if limit and writing.tokens >= limit else _batches(reader.documents(parts)):
            for document, ids, masked in zip(batch, *_encode(batch, tokenizer), strict=True):
                if limit is not None and writing.tokens >= limit:
                    break
                used += 1
                left = ids if limit is None else ids[: limit - writing.tokens]
                writing.add(document.part, left, masked)
            sizes = writing.flush()
            write_atomically(known, json.dumps({"reader": reader.state(), "bytes": sizes}).encode())
            bar.update((writing.tokens if limit else reader.rows) - bar.n)
            if limit and writing.tokens >= limit:
                break
    if limit and writing.tokens < limit:
        raise SourceError(
            f"{source.label}: the stream ends after {writing.tokens:,} tokens, {limit:,} are asked for: lower tokens"
        )
    if limit and isinstance(source, Hub) and source.parts and used < source.parts.end:
        raise SourceError(
            f"{source.label}: {limit:,} tokens end at row {used - 1}, parts name rows up to {source.parts.end - 1}"
        )
    facts = {"format": FORMAT, "source": source.model_dump(mode="json"), "rows": reader.rows, "tokens": writing.tokens}
    write_atomically(working / "spool.json", json.dumps(facts, indent=1).encode())
    known.unlink(missing_ok=True)
    if place.exists():
        shutil.rmtree(place)
    working.rename(place)
    return place


def _batches(found: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += document.characters
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


Ranges = list[tuple[int, int]]


def _encode(batch: Sequence[Document], tokenizer: Any) -> tuple[list[list[int]], list[Ranges]]:
    """Tokens of each document, and the ranges that carry no loss. Prompt and text meet at a token boundary.

    Raises SourceError with the row whose conversation the tokenizer's chat template does not take.
    """
    if batch[0].turns:
        ends = chat.ends_of_turns(tokenizer)
        found = [_encode_chat(d, tokenizer, ends) for d in batch]
        return [ids for ids, _ in found], [masked for _, masked in found]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with uncut(tokenizer) as backend:
        prompts = backend.encode_batch_fast([d.prompt for d in batch], add_special_tokens=False)
        texts = backend.encode_batch_fast([d.text for d in batch], add_special_tokens=False)
    ids = [start + p.ids + t.ids + end for p, t in zip(prompts, texts, strict=True)]
    masked = [len(start) + len(p.ids) if d.masked else 0 for d, p in zip(batch, prompts, strict=True)]
    return ids, [[(0, n)] if n else [] for n in masked]


def _encode_chat(document: Document, tokenizer: Any, ends: frozenset[int]) -> tuple[list[int], Ranges]:
    try:
        text = chat.written(document.turns, tokenizer)
        with uncut(tokenizer) as backend:
            encoding = backend.encode(text, add_special_tokens=False)
        if not document.masked:
            return encoding.ids, []
        said = chat.said(encoding, text, chat.answers(text, document.turns, tokenizer), ends)
    except ValueError as error:
        raise SourceError(f"{document.place}: {error}") from error
    edges = [0, *(edge for span in said for edge in span), len(encoding.ids)]
    return encoding.ids, [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


class _Writing:
    """The open files of a spool under way. Bytes beyond those of the last state do not count and are cut off."""

    def __init__(self, folder: Path, parts: Sequence[Part], sizes: Mapping[str, int] | None) -> None:
        self._files = {}
        for part in parts:
            for name in _FILES:
                file = (folder / f"{part}.{name}").open("ab")
                file.truncate(sizes[f"{part}.{name}"] if sizes else 0)
                file.seek(0, os.SEEK_END)
                self._files[f"{part}.{name}"] = file
        self._counts = {part: self._files[f"{part}.tokens"].tell() // 4 for part in parts}

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    @property
    def tokens(self) -> int:
        """Tokens of all parts."""
        return sum(self._counts.values())

    def add(self, part: Part, ids: Sequence[int], masked: Ranges) -> None:
        """One document, cut off or whole; `masked` counts from its first token."""
        if not ids:
            return
        begin = self._counts[part]
        ranges = [begin + edge for a, b in masked if a < len(ids) for edge in (a, min(b, len(ids)))]
        for name, values in (("tokens", ids), ("starts", [begin]), ("masked", ranges)):
            self._files[f"{part}.{name}"].write(np.asarray(values, dtype=_FILES[name]).tobytes())
        self._counts[part] += len(ids)

    def flush(self) -> dict[str, int]:
        """Everything to disk; the bytes of each file."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}
