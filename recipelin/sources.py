"""Where text comes from: the `data:` block of a recipe, and fingerprints of what it names (no torch)."""

import difflib
import hashlib
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from .base import Config

Part = Literal["training", "selection", "test"]


class Stdlib(Config):
    """The sources of the running Python's standard library, split by module name (DESIGN §8).

    Sample YAML: `{source: python-stdlib, weight: 1.0}`
    """

    source: Literal["python-stdlib"]
    weight: Annotated[float, Field(gt=0)] = 1.0


class LocalFile(Config):
    """A local file: one document a line (jsonl), a row (parquet), or a paragraph or file (text).

    Sample YAML: `{source: jsonl, path: corpus.jsonl, field: text}`; a relative path starts at the recipe's folder.
    """

    source: Literal["jsonl", "parquet", "text"]
    path: str
    field: str = Field("text", description="key or column that holds the text (jsonl, parquet)")
    documents: Literal["paragraph", "file"] = Field("paragraph", description="what one document is in a text file")
    weight: Annotated[float, Field(gt=0)] = 1.0


class Recall(Config):
    """Rows of `<k> key value` slots scattered in real text; a key comes back later and asks for its value.

    Sample YAML: `{source: recall, weight: 1.0, text: {source: python-stdlib}}`
    """

    source: Literal["recall"]
    weight: Annotated[float, Field(gt=0)] = 1.0
    keys: Annotated[int, Field(ge=2)] = Field(64, description="distinct keys (facts/pocket.md §A)")
    values: Annotated[int, Field(ge=2)] = Field(64, description="distinct values (facts/pocket.md §A)")
    pairs: Annotated[int, Field(ge=1)] = Field(8, description="pairs alive in a row of 256 tokens (facts/pocket.md §A)")
    spacing: Annotated[int, Field(ge=3)] = Field(10, description="tokens of a row for each slot of three")
    text: Stdlib | LocalFile = Field(Stdlib(source="python-stdlib"), description="the text between the slots")
    loss: Literal["values", "all"] = Field("values", description="tokens that carry loss: recalled values only, or all")


Source = Annotated[Stdlib | LocalFile | Recall, Field(discriminator="source")]


class Data(Config):
    """A mixture of sources and how it is packed into rows.

    Sample YAML::

        data: {mix: [{source: python-stdlib}, {source: recall, weight: 1.0}], separate: false, positions: run_on}
    """

    mix: Annotated[tuple[Source, ...], Field(min_length=1)] = (Stdlib(source="python-stdlib"),)
    separate: bool = Field(False, description="documents in a row cannot see each other (LoLCATs: they can)")
    positions: Literal["run_on", "restart"] = Field(
        "run_on", description="positions across packed documents (LoLCATs: run_on)"
    )


# Packages of the standard library that are not code of its own kind: tests, character tables, games, bundled installers.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "__pycache__",
    }
)
_SPLIT: dict[Part, range] = {
    "training": range(0, 88),
    "selection": range(88, 94),
    "test": range(94, 100),
}  # shares of 100


def part_of(name: str) -> Part:
    """The part that a document belongs to, by the hash of its name: the same on every machine and version."""
    slot = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return next(part for part, slots in _SPLIT.items() if slot in slots)


def stdlib_modules() -> dict[str, Path]:
    """Module name -> file, of the running Python's standard library (pure Python, see `_SKIPPED`), sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED and not f.startswith("config-"))
        for file in files:
            if file.endswith(".py"):
                path = Path(folder) / file
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(parts)] = path
    if not found:
        raise SourceError(f"python-stdlib: no .py files under {root}; this Python ships its library without sources")
    return dict(sorted(found.items()))


class SourceError(ValueError):
    """A source that cannot be read: what was found, what was expected."""


def local_path(source: LocalFile, folder: Path) -> Path:
    """The file of a local source; relative paths start at the recipe's folder. Raises SourceError with a near match."""
    path = (folder / source.path).resolve()
    if path.is_file():
        return path
    near = difflib.get_close_matches(
        path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1
    )
    hint = f"; did you mean {near[0]}?" if near else ""
    raise SourceError(f"data: {source.source} file {path} is not there{hint}")


def fingerprint(source: Stdlib | LocalFile | Recall | Mapping[str, object], folder: Path) -> str:
    """sha256 of what a source reads: names and contents of the modules, or the file's bytes; `absent` if it is not here."""
    if isinstance(source, Mapping):
        source = TypeAdapter(Source).validate_python(dict(source))
    if isinstance(source, Recall):
        return fingerprint(source.text, folder)
    total = hashlib.sha256()
    if isinstance(source, Stdlib):
        for name, path in stdlib_modules().items():
            total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()
    try:
        path = local_path(source, folder)
    except SourceError:
        return "absent"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
