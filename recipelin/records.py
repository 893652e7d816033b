"""The Record: one run with complete provenance; its rows, and its items in a sidecar (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Config


class Item(Config):
    """One scored item. `exposed`: share of its scored tokens whose linear set is not empty in the hybrid state."""

    id: str
    score: float
    length: int
    exposed: float


class Result(Config):
    """What one evaluation says of one state: a row of the Record, and its items in a fixed order (may be empty)."""

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


class StepTime(Config):
    """What one step cost. `reused`: its result came from an earlier run, whose cost is given."""

    step: str
    key: str
    seconds: float
    peak_memory: int | None = Field(None, description="bytes")
    reused: bool
    report: dict[str, object] = {}


class Record(Config):
    """DESIGN §7. `layers` and `window` give the reach layers x (window - 1) that splits recall into near and far."""

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
    threads: int
    dtype: str
    kernels: dict[str, str] = Field({}, description="operator: implementation that ran")
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
