"""Settings of the `recall` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ...base import Config as Base
from ...base import RowName
from ...sources import Slot, Stdlib, Text


class Config(Base):
    """Associative recall by distance: one asked pair at an exact distance among `pairs` in context; an item is a question.

    Right is the largest logit over the whole vocabulary. Chance is the in-context guess 1 / pairs.
    Sample YAML: `{eval: recall, distances: [6, 24, 96, 201], items: 48, pairs: 8, length: 256}`,
    `{eval: recall, slot: line}` (its rows are called line@24, and so on)
    """

    eval: Literal["recall"] = "recall"
    text: Text = Stdlib(source="python-stdlib")
    part: Literal["selection", "test"] = "test"
    distances: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (6, 24, 96, 150, 201)
    items: Annotated[int, Field(ge=1)] = Field(48, description="questions at each distance")
    pairs: Annotated[int, Field(ge=2)] = 8
    slot: Slot = Field("marked", description="how a pair is written, as in the source `recall`")
    length: Annotated[int, Field(ge=16)] = 256
    batch: Annotated[int, Field(ge=1)] = 16

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, with the field that each comes from."""
        return tuple(RowName(("distances", i), self.task(d), "accuracy") for i, d in enumerate(self.distances))

    def task(self, distance: int) -> str:
        """Name of the rows at a distance: recall@24, line@24."""
        return f"{'recall' if self.slot == 'marked' else self.slot}@{distance}"

    def tokens(self) -> int:
        """Tokens that one state and seed read."""
        return self.items * len(self.distances) * self.length
