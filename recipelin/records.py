"""The Record: one run with complete provenance; its rows, and its items in a sidecar (no torch)."""

import gzip
import json
import math
import subprocess
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from .base import Config
from .files import write_atomically

SHRUNK = "shrunk/"  # begins the name of a Record whose recipe ran at tiny size (`run --shrink`)


class Item(Config):
    """One scored item. `exposed`: share of its scored tokens whose linear set is not empty in the hybrid state.

    `weight`: its part in the mean, sum(weight x score) / sum(weight): words of a document, or one over a subtask's items.
    `subtask`: which task of a group it is of; items are resampled within it.
    """

    id: str
    score: float
    length: int
    exposed: float
    weight: Annotated[float, Field(gt=0)] = 1.0
    subtask: str = ""


@dataclass(frozen=True, slots=True)
class ItemColumns:
    """The items of one line of a sidecar, in their order: a column a field of `Item`, all of one length.

    What is read back: the tables of results/ need a million items, and an object each costs more than all statistics.
    """

    id: tuple[str, ...]
    score: tuple[float, ...]
    length: tuple[int, ...]
    exposed: tuple[float, ...]
    weight: tuple[float, ...]
    subtask: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.id)

    @classmethod
    def of(cls, items: Iterable[Item]) -> "ItemColumns":
        """The columns of items."""
        rows = [(i.id, i.score, i.length, i.exposed, i.weight, i.subtask) for i in items]
        return cls(*zip(*rows, strict=True)) if rows else cls((), (), (), (), (), ())

    def sharing(self, held: dict[tuple[str, object], Any]) -> "ItemColumns":
        """The same, its columns but the scores those of `held` where they are equal: states meet the same items, held once."""
        names = [f.name for f in fields(self) if f.name != "score"]
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{name: held.setdefault((name, column), column) for name, column in columns.items()})

    @classmethod
    def joined(cls, parts: Sequence["ItemColumns"]) -> "ItemColumns":
        """The items of several lines, one after the other."""
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in fields(cls)]
        return cls(*(tuple(chain.from_iterable(getattr(part, name) for part in parts)) for name in names))


class Bands(Config):
    """A share by head and position band: `heads[h][b]` is the mean over `counts[b]` queries.

    Band b holds the queries with `edges[b]` to `edges[b + 1]` - 1 tokens before them.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    heads: tuple[tuple[float, ...], ...]


class Result(Config):
    """What one evaluation says of one state: a row of the Record, its items in a fixed order, its bands (if any)."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    exposed: float | None = Field(None, description="share of scored tokens with a non-empty linear set")
    chance: float | None = None
    higher_is_better: bool = True
    distance: int | None = Field(None, description="tokens between the asked pair and the question (recall)")
    items: tuple[Item, ...] = ()
    bands: Bands | None = None

    def row(self, *, state: str, suite: str, seed: int) -> "Row":
        """The line of the Record; items and bands go into files beside it."""
        return Row(state=state, suite=suite, seed=seed, **self.model_dump(exclude={"items", "bands"}))


class Row(Config):
    """A line of `Record.rows`."""

    state: str
    suite: str
    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    exposed: float | None
    chance: float | None
    seed: int
    higher_is_better: bool
    distance: int | None = None


class CurveRow(Row):
    """A line of `Record.curves`: the student as it stood within `stage`, which had read `tokens` training tokens by then."""

    stage: str
    tokens: int


class StepTime(Config):
    """What one step cost. `reused`: its result came from an earlier run, whose cost is given."""

    step: str
    key: str
    seconds: float
    peak_memory: int | None = Field(None, description="bytes")
    reused: bool
    report: dict[str, object] = Field({})


class Record(Config):
    """DESIGN §7. `layers` and `window` (most keys of one query) give the reach layers x (window - 1) that splits recall
    into near and far.
    """

    version: Literal[1] = 1
    name: str
    recipe: str = Field(description="text, verbatim")
    extends: str | None = Field(None, description="text of the extended recipe, verbatim")
    point: dict[str, object] = Field({}, description="the point of the grid")
    plan: dict[str, object]
    plan_hash: str
    status: Literal["finished", "failed", "interrupted"]
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    digests: dict[str, str] = Field(description="teacher, tokenizer, data, items")
    device: str
    processor: str | None = Field(None, description="model of the CPU; None in Records of before")
    threads: int
    dtype: str
    kernels: dict[str, str] = Field(
        {},
        description="operator: the kernels that ran, forward; where none did, as all was reused, the one that rows would take",
    )
    seed: int
    started: str
    seconds: float
    peak_memory: int | None = None
    layers: int
    window: int | None = None
    sinks: int = 0
    branches: tuple[str, ...] = ()
    margin: Annotated[float, Field(gt=0)]
    steps: tuple[StepTime, ...] = ()
    rows: tuple[Row, ...] = ()
    curves: tuple[CurveRow, ...] = Field((), description="measured while stages trained (schedule: curve)")


class RecordError(ValueError):
    """A Record or a sidecar that cannot be read; the message names the file and what is wrong with it."""


class ItemsOf(NamedTuple):
    """Which line of the sidecar: the items of one state on one task, for one draw of items."""

    state: str
    suite: str
    task: str
    metric: str
    seed: int


Items = Mapping[ItemsOf, ItemColumns]


def record_path(path: Path) -> Path:
    """The file of a Record: a run's folder holds `record.json`; a file is itself."""
    return path / "record.json" if path.is_dir() else path


def items_path(path: Path) -> Path:
    """The sidecar beside a Record: of `record.json` it is `items.jsonl.gz`, of `X.json` it is `X.items.jsonl.gz`."""
    file = record_path(path)
    return file.with_name("items.jsonl.gz" if file.name == "record.json" else f"{file.stem}.items.jsonl.gz")


def read_record(path: Path) -> Record:
    """Read a Record from its file or from a run's folder. Raises RecordError."""
    file = record_path(path)
    try:
        return Record.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        wanted = "a run's folder (with record.json) or a Record's .json file"
        raise RecordError(f"{file}: no such file; expected {wanted}") from error
    except ValidationError as error:
        raise RecordError(f"{file}: not a Record of version 1: {_first_of(error)}") from error


def write_record(path: Path, record: Record) -> None:
    """Write `record.json` atomically."""
    write_atomically(path, (record.model_dump_json(indent=1) + "\n").encode())


def write_items(path: Path, results: Iterable[tuple[Row, Result]]) -> None:
    """Write the sidecar atomically: one JSON line a row, `items` as [id, score, length, exposed], and weight
    and subtask where an item has them.

    The same results give the same bytes. Raises RecordError if two rows share a key.
    """
    lines: dict[ItemsOf, dict[str, object]] = {}
    for row, result in results:
        key = ItemsOf(row.state, row.suite, row.task, row.metric, row.seed)
        if key in lines:
            raise RecordError(f"{key}: two rows; tasks of one suite need different names (one a distance for recall)")
        lines[key] = key._asdict() | {"items": [_packed(i) for i in result.items]}
    text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines.values())
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def _packed(item: Item) -> list[object]:
    more = [item.weight, item.subtask] if item.weight != 1.0 or item.subtask else []
    return [item.id, item.score, item.length, item.exposed, *more]


def read_items(path: Path) -> dict[ItemsOf, ItemColumns]:
    """Read a sidecar; `path` is its file, or the Record's file or run folder. Raises RecordError."""
    file = path if path.name.endswith(".jsonl.gz") else items_path(path)
    found: dict[ItemsOf, ItemColumns] = {}
    held: dict[tuple[str, object], Any] = {}
    number = 0
    try:
        for number, text in enumerate(gzip.decompress(file.read_bytes()).splitlines(), start=1):
            line = json.loads(text.decode())
            if not isinstance(line, dict):
                raise TypeError(f"found {type(line).__name__}; expected a map of {', '.join(ItemsOf._fields)}, items")
            items = _columns(line.pop("items", None)).sharing(held)
            key = ItemsOf(**line)
            if key in found:
                raise RecordError(f"{file}:{number}: {key} is there twice")
            found[key] = items
    except FileNotFoundError as error:
        raise RecordError(f"{file}: no such file; it holds the items of the Record beside it") from error
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        if isinstance(error, RecordError):
            raise
        place = f"{file}:{number}" if number else str(file)
        raise RecordError(f"{place}: not a sidecar of items: {error}") from error
    return found


def _columns(packed: object) -> ItemColumns:
    """What `_packed` made of items, as columns. Raises ValueError, TypeError for what is none.

    Columns of the very types and of finite numbers are items as they stand; all else `Item` judges, one by one.
    """
    if not isinstance(packed, list):
        raise TypeError(f"items: found {type(packed).__name__}; expected a list")
    if set(map(type, packed)) == {list} and (widths := set(map(len, packed))) <= {4, 6}:
        rows = packed if len(widths) == 1 else [row if len(row) == 6 else [*row, 1.0, ""] for row in packed]
        unstated = (1.0,) * len(rows), ("",) * len(rows)
        found = ItemColumns(*[*zip(*rows, strict=True), *unstated][:6])
        if _plain(found):
            return found
    return ItemColumns.of(_item(number, values) for number, values in enumerate(packed, start=1))


def _plain(items: ItemColumns) -> bool:
    types = [set(map(type, getattr(items, name))) for name in Item.model_fields]
    if types != [{str}, {float}, {int}, {float}, {float}, {str}]:
        return False
    finite = math.isfinite(sum(items.score) + sum(items.exposed) + sum(items.weight))  # one that is not spoils the sum
    return finite and min(items.weight) > 0


def _item(number: int, values: object) -> Item:
    if not isinstance(values, list) or len(values) not in (4, 6):
        form = "[id, score, length, exposed] or [id, score, length, exposed, weight, subtask]"
        raise ValueError(f"item {number}: found {json.dumps(values)[:80]}; expected {form}")
    try:
        return Item(**dict(zip(Item.model_fields, values, strict=False)))
    except ValidationError as error:
        raise ValueError(f"item {number}: {_first_of(error)}") from error


def _first_of(error: ValidationError) -> str:
    """The first mistake in words: `score: Input should be a valid number (and 1 more)`."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(p) for p in first["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {first['msg']}{more}"


class BandsOf(Bands):
    """Bands and the row of the Record that they are of: an entry of `usage.json.gz`."""

    state: str
    suite: str
    task: str
    metric: str
    seed: int


def bands_path(path: Path) -> Path:
    """The bands beside a Record: of `record.json` it is `usage.json.gz`, of `X.json` it is `X.usage.json.gz`."""
    file = record_path(path)
    return file.with_name("usage.json.gz" if file.name == "record.json" else f"{file.stem}.usage.json.gz")


def picture_path(path: Path) -> Path:
    """The heat maps beside the bands: `usage.png`, `X.usage.png`."""
    return bands_path(path).with_suffix("").with_suffix(".png")


def write_bands(path: Path, results: Iterable[tuple[Row, Result]]) -> None:
    """Write the bands atomically, shares to six decimals, an entry a line.

    Packed, as the items are: in results/records what ends in .json is a Record.
    """
    lines = []
    for row, result in results:
        assert result.bands is not None
        heads = [[round(x, 6) for x in head] for head in result.bands.heads]
        of = row.model_dump(include={"state", "suite", "task", "metric", "seed"})
        lines.append(json.dumps(of | result.bands.model_dump() | {"heads": heads}, allow_nan=False))
    text = '{"version": 1, "bands": [\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, gzip.compress(text.encode(), mtime=0))


def read_bands(path: Path) -> tuple[BandsOf, ...]:
    """Read the bands; `path` is their file, or the Record's file or run folder. Raises RecordError."""
    file = path if path.name.endswith("usage.json.gz") else bands_path(path)
    try:
        found = json.loads(gzip.decompress(file.read_bytes()))
        return tuple(BandsOf.model_validate_json(json.dumps(x)) for x in found["bands"])
    except FileNotFoundError as error:
        raise RecordError(f"{file}: no such file; only runs with the evaluation `usage` have it") from error
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{file}: not the bands of a Record: {error}") from error


class Provenance(NamedTuple):
    """Which source ran. Both None: not a git checkout, or no git here."""

    commit: str | None
    dirty: bool | None


def provenance(root: Path) -> Provenance:
    """Commit of the checkout at `root`, and whether anything differs from it (changed, staged, or new and not ignored).

    A copy that git does not track (site-packages inside somebody's own repository) has no commit.
    """
    try:
        _git(root, "ls-files", "--error-unmatch", str(Path(__file__).relative_to(Path(__file__).parents[1])))
        return Provenance(_git(root, "rev-parse", "HEAD").strip(), bool(_git(root, "status", "--porcelain").strip()))
    except (FileNotFoundError, subprocess.CalledProcessError):
        return Provenance(None, None)


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout
