"""Where text comes from: the `data:` block of a recipe, and fingerprints of what it names (no torch)."""

import hashlib
import os
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from .base import Config
from .files import digest_file
from .mistakes import nearest
from .templates import Chat, NamedTemplate, Template

Part = Literal["training", "selection", "test"]
PARTS: tuple[Part, ...] = ("training", "selection", "test")
_T = TypeVar("_T")


class Stdlib(Config):
    """The sources of the running Python's standard library, split by module name (DESIGN §8).

    Sample YAML: `{source: python-stdlib, weight: 1.0}`
    """

    source: Literal["python-stdlib"]
    weight: Annotated[float, Field(gt=0)] = 1.0

    @property
    def label(self) -> str:
        """As messages name it."""
        return self.source


class Parts(Config):
    """Rows [first, end) of the held-out parts, counted from 0 in the order they are read; all other rows are training.

    Sample YAML: `{selection: [0, 100], test: [100, 200]}`. Without it a row's part follows from the hash of its name.
    """

    selection: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]
    test: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]]

    @model_validator(mode="after")
    def _disjoint(self) -> "Parts":
        for name, (first, end) in (("selection", self.selection), ("test", self.test)):
            if first >= end:
                raise ValueError(f"{name} [{first}, {end}] holds no row; expected [first, end) with first < end")
        low, high = max(self.selection[0], self.test[0]), min(self.selection[1], self.test[1])
        if low < high:
            raise ValueError(
                f"selection and test share rows {low} to {high - 1}: what selects a model must not also judge it"
            )
        return self

    @property
    def end(self) -> int:
        """Rows that the source must have at least."""
        return max(self.selection[1], self.test[1])

    def of(self, number: int) -> Part:
        """The part of a row."""
        if self.selection[0] <= number < self.selection[1]:
            return "selection"
        return "test" if self.test[0] <= number < self.test[1] else "training"


class Rows(Config):
    """What all sources of rows share: which columns make a document, which tokens carry loss, which rows are held out."""

    field: str = Field("text", description="key or column that holds the text, where no template is given")
    template: NamedTemplate | None = Field(None, description="`alpaca`, or a map with prompt and response")
    chat: Chat | None = Field(None, description="a column of turns, written by the tokenizer's chat template")
    loss: Literal["all", "response"] = Field(
        "all", description="response: no loss on BOS and prompt (LoLCATs), of a chat on the assistant's answers alone"
    )
    parts: Parts | None = Field(None, description="held-out rows by number; null: by the hash of the row's name")
    weight: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("template")
    @classmethod
    def _instead_of_a_field(cls, value: Template | None, info: ValidationInfo) -> Template | None:
        if value is not None and info.data.get("field") != "text":
            raise ValueError(f"give one of field and template; found field {info.data.get('field')!r} and a template")
        return value

    @field_validator("chat")
    @classmethod
    def _instead_of_both(cls, value: Chat | None, info: ValidationInfo) -> Chat | None:
        if value is not None and (info.data.get("field") != "text" or info.data.get("template") is not None):
            raise ValueError("give one of field, template and chat")
        return value

    @field_validator("loss")
    @classmethod
    def _response_of_a_template(cls, value: str, info: ValidationInfo) -> str:
        given = [info.data.get(name) for name in ("template", "chat")]
        if value == "response" and "template" in info.data and "chat" in info.data and given == [None, None]:
            raise ValueError("response needs a template or a chat: without one a document has no prompt")
        return value

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        if self.chat:
            return (self.chat.column,)
        return self.template.columns if self.template else (self.field,)


class LocalFile(Rows):
    """A local file: one document a line (jsonl), a row (parquet), or a paragraph between empty lines (text).

    A relative path starts at the recipe's folder; in a suite at the suite's, where it leads to something there.
    Sample YAML: `{source: jsonl, path: corpus.jsonl, field: text}`,
    `{source: parquet, path: alpaca.parquet, template: alpaca, loss: response}`
    """

    source: Literal["jsonl", "parquet", "text"]
    path: str
    documents: Literal["paragraph"] = Field("paragraph", description="what one document is in a text file")

    @field_validator("documents", mode="before")
    @classmethod
    def _not_one_document(cls, value: object) -> object:
        if value == "file":
            raise ValueError(
                "a file that is one document leaves two of the three parts (training, selection, test) empty; "
                "write paragraph, or put the texts into a jsonl file, one a line"
            )
        return value

    @field_validator("source")
    @classmethod
    def _text_has_no_columns(cls, value: str, info: ValidationInfo) -> str:
        for name in ("template", "chat"):
            if value == "text" and info.data.get(name) is not None:
                raise ValueError(f"text has no columns for a {name}; use jsonl, parquet or hub")
        return value

    @property
    def label(self) -> str:
        """As messages name it."""
        return self.path


class Shuffle(Config):
    """How a stream is shuffled: its files in a seeded order, then rows through a buffer.

    Sample YAML: `{seed: 0, buffer: 10000}`
    """

    seed: Annotated[int, Field(ge=0)] = 0
    buffer: Annotated[int, Field(ge=2)] = Field(10_000, description="rows held in memory; one of them comes next")


class Hub(Rows):
    """A dataset of the Hugging Face hub at one commit, or a local folder that `datasets.load_dataset` reads.

    Sample YAML::

        # LoLCATs' data: masked prompts, rows 0 to 199 held out (facts/peers.md §A.5)
        {source: hub, dataset: yahma/alpaca-cleaned, revision: 12567cabf869d7c92e573c7c783905fc160e9639,
         template: alpaca, loss: response, parts: {selection: [0, 100], test: [100, 200]}}
        # Taylor-Calibrate's data, its first 200 M tokens (papers/taylor-calibrate.md); never held in memory
        {source: hub, dataset: HuggingFaceFW/fineweb-edu, revision: 87f09149ef4734204d70ed1d046ddc9ca3f2b8f9,
         name: sample-10BT, field: text, streaming: true, tokens: 200000000, shuffle: {seed: 0, buffer: 10000}}
        # togethercomputer/RedPajama-Data-1T-Sample comes with a loading script, which the datasets library refuses to run:
        # put its .jsonl files into a folder
        {source: hub, dataset: ./RedPajama-Data-1T-Sample, field: text, streaming: true, tokens: 20000000}

    A folder begins with `./`, `../` or `/` and starts at the recipe's folder; its files are fingerprinted instead of a revision.
    """

    source: Literal["hub"]
    dataset: str = Field(description="owner/name, or a folder: ./name")
    revision: str | None = Field(None, description="commit, 40 hexadecimal digits; none for a folder")
    name: str | None = Field(None, description="the dataset's configuration, where it has several")
    split: str = "train"
    streaming: bool = Field(False, description="read rows as they come, without the whole dataset on disk")
    tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="streaming: tokens to keep, of all three parts together; read once and kept on disk"
    )
    expected_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="about how many the training part has: for `plan`, before anything is here; a run counts them"
    )
    shuffle: Shuffle | None = Field(
        None,
        description="streaming: shuffle before `tokens` are cut off; a dataset read whole needs none, rows are drawn",
    )

    @field_validator("dataset")
    @classmethod
    def _owner_and_name(cls, value: str) -> str:
        if not is_folder(value) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
            raise ValueError(f"found {value!r}; expected owner/name on the hub, or a folder that begins with ./ or /")
        return value

    @field_validator("revision")
    @classmethod
    def _one_commit(cls, value: str | None, info: ValidationInfo) -> str | None:
        dataset = info.data.get("dataset", "")
        if is_folder(dataset):
            if value is not None:
                raise ValueError("a folder has none, its files are fingerprinted; leave revision out")
        elif value is None or not re.fullmatch(r"[0-9a-f]{40}", value):
            found = "none" if value is None else repr(value)
            raise ValueError(
                f"found {found}; expected the 40 hexadecimal digits of a commit: a branch such as main moves on, a tag can "
                "be moved, and the same recipe would then read other data; commits are listed at "
                f"https://huggingface.co/datasets/{dataset}/commits/main"
            )
        return value

    @field_validator("split")
    @classmethod
    def _one_split(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+", value) or value == "all":
            raise ValueError(
                f"found {value!r}; expected the name of one split: a slice or a sum of splits hides which rows are held out, "
                "`parts` says it"
            )
        return value

    @field_validator("tokens")
    @classmethod
    def _of_a_stream(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("streaming") and value is None:
            raise ValueError("streaming: true needs tokens: how many of the stream's first tokens are kept on disk")
        return _of_a_stream(value, info)

    @field_validator("shuffle")
    @classmethod
    def _of_a_shuffled_stream(cls, value: Shuffle | None, info: ValidationInfo) -> Shuffle | None:
        return _of_a_stream(value, info)

    @property
    def local(self) -> bool:
        """Whether `dataset` is a folder."""
        return is_folder(self.dataset)

    @property
    def label(self) -> str:
        """dataset@revision, as messages and plans name it."""
        return f"{self.dataset}@{self.revision[:8]}" if self.revision else self.dataset


def is_folder(dataset: str) -> bool:
    """Whether a `dataset` names a folder; else it is a hub id."""
    return dataset in (".", "..") or dataset.startswith(("./", "../", "/"))


def is_path(name: str) -> bool:
    """Whether a name can only be a path: no hub id begins so, or has two slashes."""
    return is_folder(name) or name.startswith("~") or name.count("/") > 1


def _of_a_stream(value: _T | None, info: ValidationInfo) -> _T | None:
    if value is not None and info.data.get("streaming") is False:
        raise ValueError("belongs to streaming: true; a dataset that is read whole is drawn in a seeded order")
    return value


def _all_scored(source: "Stdlib | LocalFile | Hub") -> "Stdlib | LocalFile | Hub":
    if isinstance(source, Rows) and source.loss != "all":
        raise ValueError("loss: response is for training data; here the whole text is read")
    if isinstance(source, Rows) and source.chat is not None:
        raise ValueError("chat is for training data; here plain text is read")
    return source


Text = Annotated[Stdlib | LocalFile | Hub, Field(discriminator="source"), AfterValidator(_all_scored)]
"""A source of plain text, for generated rows and evaluations."""


Slot = Literal["marked", "line"]
"""How a pair is written: `<k> key value`, or as a line of its own, `key value` after a line's end, with the words' roles
swapped, so that no key of one is a key of the other."""


class Generated(Config):
    """What all sources share that write rows of their own into a text."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    text: Text = Field(Stdlib(source="python-stdlib"), description="the text around what is written")


class Facts(Config):
    """What a row hides in text and asks for at its end, in the words of the evaluation `retrieval`."""

    format: Literal["associative", "passkey", "needle", "copy"]
    pairs: Annotated[int, Field(ge=1)] = Field(1, description="facts in a row")
    queries: Annotated[int, Field(ge=1)] = Field(
        1, description="questions of a row, at its end; the others' answers stand"
    )
    copied: Annotated[int, Field(ge=2)] | None = Field(None, description="tokens of the string of a copy")

    @model_validator(mode="after")
    def _asked(self) -> Self:
        if self.format == "associative" and self.pairs <= self.queries:
            raise ValueError(
                f"associative: {self.pairs} pairs and {self.queries} queries; give more pairs than queries, "
                "or the last answer is what is left"
            )
        if self.format in ("passkey", "copy") and (self.pairs, self.queries) != (1, 1):
            what = {"passkey": "number", "copy": "string"}[self.format]
            raise ValueError(f"{self.format}: a row holds one {what} and one question; leave pairs and queries out")
        if (self.format == "copy") != (self.copied is not None):
            raise ValueError("copied: the tokens of the string; give it with format: copy, and with no other")
        if self.queries > self.pairs:
            raise ValueError(f"{self.queries} queries of {self.pairs} pairs: every question needs a fact of its own")
        return self


class Recall(Generated):
    """Rows of slots, pairs of key and value, scattered in real text; a key comes back later and asks for its value.

    Sample YAML: `{source: recall, weight: 1.0, text: {source: python-stdlib}}`, `{source: recall, slot: line}`
    """

    source: Literal["recall"]
    keys: Annotated[int, Field(ge=2)] = Field(64, description="distinct keys (facts/pocket.md §A)")
    values: Annotated[int, Field(ge=2)] = Field(64, description="distinct values (facts/pocket.md §A)")
    pairs: Annotated[int, Field(ge=1)] = Field(8, description="pairs alive in a row of 256 tokens (facts/pocket.md §A)")
    spacing: Annotated[int, Field(ge=3)] = Field(10, description="tokens of a row for each slot")
    slot: Slot = Field("marked", description="marked: `<k> key value`; line: a line `key value`, no marker")
    loss: Literal["values", "all"] = Field("values", description="tokens that carry loss: recalled values only, or all")


class Retrieval(Generated, Facts):
    """Rows with facts hidden in real text and asked for at their end, as the evaluation `retrieval` asks, at all distances.

    The answers alone carry loss. Text is of the part that is read; strings and values are drawn anew for each row, pass keys
    from 10,000 numbers where an evaluation draws from 500.
    Sample YAML: `{source: retrieval, format: copy, copied: 16}`, `{source: retrieval, format: associative, pairs: 6, queries: 4}`
    """

    source: Literal["retrieval"]


Source = Annotated[Stdlib | LocalFile | Hub | Recall | Retrieval, Field(discriminator="source")]


def text_of(source: Stdlib | LocalFile | Hub | Generated) -> Stdlib | LocalFile | Hub:
    """What is read of a source: of generated rows the text around what is written."""
    return source.text if isinstance(source, Generated) else source


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
    only_part: Part | None = Field(
        None,
        description="everything that asks this block reads this part, held-out rows too; `test` does what a paper does that "
        "calibrates on what it reports. null: each its own",
    )
    first_rows: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="training on so many rows alone, again and again; stages with the same seed, length and number have the "
        "same rows (arXiv 2606.16429: 4 of 256 tokens)",
    )
    order: Literal["drawn", "first"] = Field(
        "drawn",
        description="first: rows come as they lie in the source, where they are else drawn by the seed; held-out rows that "
        "`only_part` takes from the same part follow those of `first_rows`",
    )

    @model_validator(mode="after")
    def _one_order(self) -> "Data":
        if self.order == "first" and (len(self.mix) > 1 or isinstance(self.mix[0], Generated)):
            raise ValueError("order: first is of one source that is read; a mixture and generated rows are drawn")
        return self


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
    raise SourceError(f"data: {source.source} file {lacking(path, 'file')}")


def dataset_folder(source: Hub, folder: Path) -> Path:
    """The folder of a local dataset; relative paths start at the recipe's folder. Raises SourceError with a near match."""
    path = (folder / source.dataset).resolve()
    if path.is_dir():
        return path
    raise SourceError(f"data: the dataset's folder {lacking(path, 'folder')}")


def refuse_absent(source: Stdlib | LocalFile | Hub, folder: Path) -> None:
    """Raises SourceError for a local file or dataset that is not there."""
    if isinstance(source, LocalFile):
        local_path(source, folder)
    elif isinstance(source, Hub) and source.local:
        dataset_folder(source, folder)


def lacking(path: Path, kind: Literal["file", "folder"]) -> str:
    """Of a path to no such file or folder: what is there in its place, or what is near it."""
    if path.exists():
        return f"{path} is a {'folder' if path.is_dir() else 'file'}; expected a {kind}"
    names = [p.name for p in path.parent.glob("*") if kind == "file" or p.is_dir()] if path.parent.is_dir() else []
    return f"{path} is not there{nearest(path.name, names)}"


def fingerprint(source: Stdlib | LocalFile | Hub | Generated, folder: Path) -> str:
    """What a source reads: a hub's dataset@revision, else the sha256 of names and contents; `absent` if it is not here."""
    source = text_of(source)
    if isinstance(source, Hub) and not source.local:
        return f"{source.dataset}@{source.revision}"
    if isinstance(source, Stdlib):
        return _stdlib_fingerprint()
    try:
        if isinstance(source, LocalFile):
            return digest_file(local_path(source, folder))
        root = dataset_folder(source, folder)
    except SourceError:
        return "absent"
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not _hidden(p.relative_to(root))):
        total.update(str(path.relative_to(root)).encode() + b"\0" + digest_file(path).encode())
    return total.hexdigest()


@cache
def _stdlib_fingerprint() -> str:
    """Of the running Python, whose library does not change while it runs: a run asks for it some twenty times."""
    total = hashlib.sha256()
    for name, path in stdlib_modules().items():
        total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _hidden(path: Path) -> bool:
    """`datasets` reads no such file: .git, .cache of a download."""
    return any(part.startswith((".", "__")) for part in path.parts)
