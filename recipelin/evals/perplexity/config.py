"""Settings of the `perplexity` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ...base import Config as Base
from ...base import RowName
from ...sources import Stdlib, Text


class Config(Base):
    """Mean next-token log-loss in nats on held-out rows; an item is a row.

    Sample YAML: `{eval: perplexity, text: {source: python-stdlib}, rows: 48, length: 256}`
    """

    eval: Literal["perplexity"] = "perplexity"
    text: Text = Stdlib(source="python-stdlib")
    part: Literal["selection", "test"] = "test"
    rows: Annotated[int, Field(ge=2)] = 48
    length: Annotated[int, Field(ge=2)] = 256
    batch: Annotated[int, Field(ge=1)] = 8

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, with the field that each comes from."""
        return (RowName((), "perplexity", "log_loss"),)

    def tokens(self) -> int:
        """Tokens that one state and seed read."""
        return self.rows * self.length
