"""Settings of the `usage` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...base import Config as Base
from ...base import RowName
from ...sources import Stdlib, Text


class Config(Base):
    """Where attention goes by layer, head and position. Shown; proves nothing alone (DESIGN §6).

    `linear_share`: of the joint normaliser, the linear branch's part. `output_share`: |b-part| / (|a-part| + |b-part|),
    norms of the two numerators, sum a v of the softmax set and sum b v of the linear set in the units of the join, for
    each query; the normaliser cancels. `outside_share`: the mass that causal softmax over all keys, of the student's own
    q and k, gives to keys outside the softmax set (window, and sinks where the state has them).
    Means over queries that have a linear set, for each layer in the Record, by head and position band in `usage.json.gz`.

    Sample YAML: `{eval: usage, rows: 8, length: 256, edges: [64, 128]}`
    """

    eval: Literal["usage"] = "usage"
    text: Text = Stdlib(source="python-stdlib")
    part: Literal["selection", "test"] = "test"
    rows: Annotated[int, Field(ge=1)] = 8
    length: Annotated[int, Field(ge=2)] = 256
    edges: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="tokens before a query at which a new position band begins, rising; the first band begins with the "
        "first query that has a linear set; null: the window, twice the window, four times ...",
    )
    batch: Annotated[int, Field(ge=1)] = 8

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, all layers and heads under one name."""
        return tuple(RowName((), "layers", metric) for metric in ("linear_share", "output_share", "outside_share"))

    @model_validator(mode="after")
    def _rising(self) -> "Config":
        if self.edges is not None and list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges must rise, found {', '.join(map(str, self.edges))}")
        if self.edges and self.edges[-1] >= self.length:
            raise ValueError(f"edge {self.edges[-1]} lies beyond a row of {self.length} tokens")
        return self

    def bands(self, first: int, window: int) -> tuple[int, ...]:
        """Where bands begin, from the query at position `first` on, and the end of the row; `first` < `length`."""
        if self.edges is None:
            wanted = [window << i for i in range(self.length.bit_length()) if window << i < self.length]
        else:
            wanted = list(self.edges)
        return (first, *(e for e in wanted if e > first), self.length)

    def tokens(self) -> int:
        """Tokens that one state and seed read."""
        return self.rows * self.length
