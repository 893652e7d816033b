"""The documents of a source, one after the other: names, parts, prompts and texts. Never holds a whole corpus (no torch)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .chat import Turn, turns_of
from .hub import open_dataset, reading
from .mistakes import nearest
from .sources import Hub, LocalFile, Part, SourceError, Stdlib, local_path, part_of, stdlib_modules
from .templates import plain

ROWS = 1_000  # of a table, read at once


@dataclass(frozen=True)
class Document:
    """One document of a part: `prompt`, then `text`, or the `turns` of a conversation.

    `name` decides its part, `place` says where it lies. `masked`: prompt and BOS carry no loss, of a conversation all but
    what the assistant says.
    """

    name: str
    place: str
    part: Part
    prompt: str
    text: str
    masked: bool = False
    turns: tuple[Turn, ...] = ()

    @property
    def characters(self) -> int:
        """Its size in characters."""
        return len(self.prompt) + len(self.text) + sum(len(turn.content) for turn in self.turns)


class Reader:
    """Walks through a source once. `rows` counts what was read; `state()` is where to go on, in a later process too.

    Raises SourceError: a file or dataset that is missing or not as named, fewer rows than `parts` names.
    """

    def __init__(self, source: Stdlib | LocalFile | Hub, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self.rows: int = state["rows"] if state else 0
        self._stream_state = state["stream"] if state else None
        self._path = local_path(source, folder) if isinstance(source, LocalFile) else None
        self._dataset: Any = open_dataset(source, folder) if isinstance(source, Hub) else None

    def documents(self, parts: Sequence[Part]) -> Iterator[Document]:
        """The documents of these parts from here on, in the source's order."""
        source = self.source
        held_out = None if isinstance(source, Stdlib) else source.parts
        masked = not isinstance(source, Stdlib) and source.loss == "response"
        for name, place, row in self._from_here():
            number, self.rows = self.rows, self.rows + 1
            part = held_out.of(number) if held_out else part_of(name)
            if part in parts:
                yield Document(name, place, part, *self._texts(place, row), masked, self._turns(place, row))
        if held_out and self.rows < held_out.end:
            raise SourceError(f"{source.label}: parts name rows up to {held_out.end - 1}, found {self.rows} rows")

    def state(self) -> dict[str, Any]:
        """What a new Reader takes to go on after the last document that was given; JSON."""
        return {"rows": self.rows, "stream": self._dataset.state_dict() if self._resumes_exactly() else None}

    def length(self) -> int | None:
        """Rows of the whole source, where that is quickly known."""
        if isinstance(self.source, Stdlib):
            return len(stdlib_modules())
        if isinstance(self.source, Hub):
            return None if self.source.streaming else len(self._dataset)
        assert self._path is not None
        if self.source.source == "jsonl":
            with self._path.open("rb") as file:
                return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return _parquet_file(self._path).metadata.num_rows if self.source.source == "parquet" else None

    def _resumes_exactly(self) -> bool:
        """The datasets library restores a stream in order, but refills the buffer of a shuffled one: that is read again."""
        return isinstance(self.source, Hub) and self.source.streaming and self.source.shuffle is None

    def _from_here(self) -> Iterator[tuple[str, str, Any]]:
        """(name, place, row) after the `rows` that are read already."""
        source, first = self.source, self.rows
        if isinstance(source, Stdlib):
            yield from ((name, name, path) for name, path in islice(stdlib_modules().items(), first, None))
        elif isinstance(source, LocalFile):
            assert self._path is not None
            found = islice(_rows(source, self._path), first, None)
            yield from ((f"{self._path.name}:{number}", *row) for number, row in enumerate(found, first))
        else:
            rows = self._streamed(source) if source.streaming else _table(source, self._dataset, first)
            for number, row in enumerate(rows, first):
                yield f"{source.dataset}:{number}", _row_of(source.label, number), row

    def _streamed(self, source: Hub) -> Iterator[Mapping[str, Any]]:
        if self._stream_state is not None:
            self._dataset.load_state_dict(self._stream_state)
        with reading(source):
            for row in islice(self._dataset, 0 if self._stream_state is not None else self.rows, None):
                _check_columns(source.label, source.columns, list(row))
                yield row

    def _texts(self, place: str, row: Any) -> tuple[str, str]:
        """(prompt, text) of a row; a source without a template has no prompt."""
        if isinstance(row, Path):
            return "", row.read_text(encoding="utf-8", errors="replace")
        if isinstance(row, str):
            return "", row
        assert not isinstance(self.source, Stdlib)
        if self.source.chat:
            return "", ""
        try:
            template = self.source.template
            return template.render(row) if template else ("", plain(row[self.source.field], self.source.field))
        except ValueError as error:
            raise SourceError(f"{place}: {error}") from error

    def _turns(self, place: str, row: Any) -> tuple[Turn, ...]:
        """The turns of a row of conversations; others have none."""
        if isinstance(self.source, Stdlib) or self.source.chat is None:
            return ()
        try:
            return turns_of(row[self.source.chat.column], self.source.chat)
        except ValueError as error:
            raise SourceError(f"{place}: {error}") from error


def documents(source: Stdlib | LocalFile | Hub, part: Part, folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents of one part, prompts included. Raises SourceError as Reader does, and for conversations."""
    if not isinstance(source, Stdlib) and source.chat is not None:
        raise SourceError(
            f"{source.label}: a chat has no text before a tokenizer's template writes it; here text is read"
        )
    for document in Reader(source, folder).documents((part,)):
        yield document.name, document.prompt + document.text


def _table(source: Hub, table: Any, first: int) -> Iterator[Mapping[str, Any]]:
    """Rows of a map-style dataset; it stays on disk."""
    _check_columns(source.label, source.columns, table.column_names)
    table = table.select_columns(list(source.columns))
    if first:
        table = table.skip(first)
    for block in table.iter(ROWS):
        for values in zip(*(block[c] for c in source.columns), strict=True):
            yield dict(zip(source.columns, values, strict=True))


def _row_of(table: str, number: int) -> str:
    """The place of a row, counted as `parts` counts."""
    return f"{table}, row {number} (counted from 0)"


def _rows(source: LocalFile, path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a local file: maps with the columns, or texts."""
    if source.source == "parquet":
        yield from ((_row_of(str(path), number), row) for number, row in enumerate(_parquet(source, path)))
    elif source.source == "jsonl":
        for number, line in _lines(path):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}:{number}:{error.colno}: not JSON: {error.msg}") from error
            _check_columns(f"{path}:{number}", source.columns, list(record) if isinstance(record, dict) else [])
            yield f"{path}:{number}", record
    else:
        yield from ((str(path), text) for text in _paragraphs(path))


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise SourceError("parquet needs the datasets library: pip install 'recipelin[data]'") from error
    try:
        return ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path}: not a parquet file: {error}") from error


def _parquet(source: LocalFile, path: Path) -> Iterator[Mapping[str, Any]]:
    with _parquet_file(path) as file:
        _check_columns(str(path), source.columns, file.schema_arrow.names)
        for batch in file.iter_batches(ROWS, columns=list(source.columns)):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its newline). Raises SourceError with the byte that is not UTF-8."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise SourceError(f"{path}:{number}: not UTF-8 at byte {place + error.start}") from error
            place += len(line)


def _paragraphs(path: Path) -> Iterator[str]:
    """Texts between empty lines."""
    found: list[str] = []
    for _, line in _lines(path):
        if line == "\n" and found and found[-1].endswith("\n"):
            text = "".join(found)[:-1]
            found = []
            if text.strip():
                yield text
        else:
            found.append(line)
    if "".join(found).strip():
        yield "".join(found)


def _check_columns(place: str, columns: Sequence[str], found: Sequence[str]) -> None:
    for column in columns:
        if column not in found:
            there = ", ".join(map(repr, found)) or "no columns"
            raise SourceError(f"{place}: no column {column!r}, found {there}{nearest(column, found)}")
