"""Settings of the `usage` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ...base import Config as Base
from ...base import RowName
from ...sources import Stdlib, Text


class Config(Base):
    """Share of the normaliser that the linear branch holds, by layer and head. Shown; proves nothing alone (DESIGN §6).

    Sample YAML: `{eval: usage, rows: 8, length: 256}`
    """

    eval: Literal["usage"] = "usage"
    text: Text = Stdlib(source="python-stdlib")
    part: Literal["selection", "test"] = "test"
    rows: Annotated[int, Field(ge=1)] = 8
    length: Annotated[int, Field(ge=2)] = 256
    batch: Annotated[int, Field(ge=1)] = 8

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, all layers and heads under one name."""
        return (RowName((), "layers", "linear_share"),)

    def tokens(self) -> int:
        """Tokens that one state and seed read."""
        return self.rows * self.length
