"""Settings of the `retrieval` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...base import Config as Base
from ...base import RowName
from ...sources import Text

METRICS = {"likelihood": "exact_match", "generate": "generated"}
FILLER = (
    "The morning was quiet and the street was empty. A light wind moved the leaves. Nobody was in a hurry. "
    "The shop on the corner opened late, as it always did."
)


class Config(Base):
    """Facts hidden in filler and asked for at the end of the row, with any fast tokenizer; an item is a question.

    `associative`: `pairs` lines "The code of lamp is river." of which `queries` are asked for. `passkey`: one number of
    five digits. `needle`: one sentence, as a rule in real text; with more pairs the others are distractors.
    A row has exactly `length` tokens, the answers included. `distance` = position whose logits predict the answer's first
    token - position of the value's first token in the fact: beyond layers x (window - 1) no stack of windows sees it.
    Scoring: `likelihood` gives metric `exact_match`: the answer given as continuation, every token of it must be the
    argmax over the whole vocabulary. `generate` gives metric `generated`: greedy `model.generate()` with its cache, exact
    match of the tokens.
    Chance: the guess among the values in context that were not yet asked for, 1 / (pairs - questions before), where there
    are several pairs; 1 / 90000 for a pass key; 0 for one needle.

    Sample YAML: `{eval: retrieval, format: associative, length: 4096, distances: [256, 1024, 3000], pairs: 16, queries: 3}`,
    `{eval: retrieval, format: needle, text: {source: python-stdlib}, length: 4096, distances: [256, 3000],
    scoring: [likelihood, generate]}`
    """

    eval: Literal["retrieval"] = "retrieval"
    format: Literal["associative", "passkey", "needle"]
    length: Annotated[int, Field(ge=32)] = Field(description="tokens of a row")
    distances: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    items: Annotated[int, Field(ge=1)] = Field(48, description="questions at each distance")
    pairs: Annotated[int, Field(ge=1)] = Field(1, description="facts in a row")
    queries: Annotated[int, Field(ge=1)] = Field(
        1, description="questions of a row, at its end; the others' answers stand"
    )
    text: Text | None = Field(None, description="real text around the facts; null: `filler`, over and over")
    filler: Annotated[str, Field(pattern=r"\S")] = FILLER
    part: Literal["selection", "test"] = "test"
    scoring: Annotated[tuple[Literal["likelihood", "generate"], ...], Field(min_length=1)] = ("likelihood",)
    batch: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.format == "associative" and self.pairs <= self.queries:
            raise ValueError(
                f"associative: {self.pairs} pairs and {self.queries} queries; give more pairs than queries, "
                "or the last answer is what is left"
            )
        if self.format == "passkey" and (self.pairs, self.queries) != (1, 1):
            raise ValueError("passkey: a row holds one number and one question; leave pairs and queries out")
        if self.queries > self.pairs:
            raise ValueError(f"{self.queries} queries of {self.pairs} pairs: every question needs a fact of its own")
        if self.items * len(self.distances) % self.queries:
            raise ValueError(
                f"{self.items} items x {len(self.distances)} distances are no multiple of {self.queries} queries a row"
            )
        for name in ("distances", "scoring"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: one is given twice")
        if max(self.distances) >= self.length:
            raise ValueError(f"distance {max(self.distances)} does not fit a row of {self.length} tokens")
        if self.format == "needle" and self.text is None and self.filler == FILLER:
            raise ValueError("needle: needs a haystack; give `text` (or a `filler` of your own)")
        if self.text is not None and self.filler != FILLER:
            raise ValueError("give `text` or `filler`, not both")
        return self

    @property
    def rows(self) -> int:
        """Rows that one state and seed read."""
        return self.items * len(self.distances) // self.queries

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, with the field that each comes from."""
        return tuple(
            RowName(("distances", i), f"{self.format}@{self.length}:{d}", METRICS[how])
            for how in self.scoring
            for i, d in enumerate(self.distances)
        )

    def tokens(self) -> int:
        """Tokens that one state and seed read, at most: generation reads a row once for every question in it."""
        passes = sum(1 if how == "likelihood" else self.queries for how in self.scoring)
        return self.rows * self.length * passes
