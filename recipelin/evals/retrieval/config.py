"""Settings of the `retrieval` evaluation (no torch)."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...base import RowName
from ...sources import Facts, Text

METRICS = {"likelihood": ("exact_match",), "generate": ("generated",)}
COPY_METRICS = {"likelihood": ("token_accuracy",), "generate": ("prefix_match", "generated")}
FILLER = (
    "The morning was quiet and the street was empty. A light wind moved the leaves. Nobody was in a hurry. "
    "The shop on the corner opened late, as it always did."
)


class Config(Facts):
    """Facts hidden in filler and asked for at the end of the row, with any fast tokenizer; an item is a question.

    `associative`: `pairs` lines "The code of lamp is river." of which `queries` are asked for. `passkey`: one number of
    five digits. `needle`: one sentence, as a rule in real text; with more pairs the others are distractors. `copy`: a
    string of `copied` random tokens, all different, each a word or part of one that the text has; it is to be said again.
    A row has exactly `length` tokens, the answers included. `distance` = position whose logits predict the answer's first
    token - position of the value's first token in the fact: beyond layers x (window - 1) no stack of windows sees it. In a
    copy it is that of every token of the string.
    Scoring: `likelihood` gives metric `exact_match`: the answer given as continuation, every token of it must be the
    argmax over the whole vocabulary. `generate` gives metric `generated`: greedy `model.generate()` with its cache, exact
    match of the tokens. Of a copy an item is a string. `likelihood` gives `token_accuracy`: the share of its tokens that are
    the argmax behind the right ones before, and the same by place in the string, metrics `position_1`, `position_2`,
    `position_3_4`, `position_5_8` ...: the first token needs the string's begin found, the others what follows what.
    `generate` gives `prefix_match`: the share of it that comes before the first wrong token, and `generated`.
    Chance: the guess among the values in context that were not yet asked for, 1 / (pairs - questions before), where there
    are several pairs; 1 / 90000 for a pass key; 0 for one needle. Of a copy: the guess among the tokens of the string that
    did not yet come, 1 / (copied - i) at place i from 0: what one scores who holds the set but no order.

    Sample YAML: `{eval: retrieval, format: associative, length: 4096, distances: [256, 1024, 3000], pairs: 16, queries: 3}`,
    `{eval: retrieval, format: needle, text: {source: python-stdlib}, length: 4096, distances: [256, 3000],
    scoring: [likelihood, generate]}`, `{eval: retrieval, format: copy, copied: 32, text: {source: python-stdlib},
    length: 4096, distances: [256, 3000]}` (its rows are called copy32@4096:256, and so on)
    """

    eval: Literal["retrieval"] = "retrieval"
    length: Annotated[int, Field(ge=32)] = Field(description="tokens of a row")
    distances: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    items: Annotated[int, Field(ge=1)] = Field(48, description="questions at each distance")
    text: Text | None = Field(None, description="real text around the facts; null: `filler`, over and over")
    filler: Annotated[str, Field(pattern=r"\S")] = FILLER
    part: Literal["selection", "test"] = "test"
    scoring: Annotated[tuple[Literal["likelihood", "generate"], ...], Field(min_length=1)] = ("likelihood",)
    batch: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.items * len(self.distances) % self.queries:
            raise ValueError(
                f"{self.items} items x {len(self.distances)} distances are no multiple of {self.queries} queries a row"
            )
        for name in ("distances", "scoring"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: one is given twice")
        if max(self.distances) >= self.length:
            raise ValueError(f"distance {max(self.distances)} does not fit a row of {self.length} tokens")
        if self.format in ("needle", "copy") and self.text is None and self.filler == FILLER:
            raise ValueError(f"{self.format}: needs a haystack; give `text` (or a `filler` of your own)")
        if self.text is not None and self.filler != FILLER:
            raise ValueError("give `text` or `filler`, not both")
        return self

    @property
    def rows(self) -> int:
        """Rows that one state and seed read."""
        return self.items * len(self.distances) // self.queries

    @property
    def positions(self) -> dict[str, slice]:
        """Metric -> places in the string of a copy, in doubling bands: the first, the second, the next two, the next four."""
        if self.copied is None:
            return {}
        edges = [0, *(2**i for i in range(self.copied.bit_length()) if 2**i < self.copied), self.copied]
        return {
            f"position_{first + 1}" + (f"_{last}" if last > first + 1 else ""): slice(first, last)
            for first, last in pairwise(edges)
        }

    def metrics(self, how: Literal["likelihood", "generate"]) -> tuple[str, ...]:
        """Of a way of scoring."""
        if self.format != "copy":
            return METRICS[how]
        return COPY_METRICS[how] + (tuple(self.positions) if how == "likelihood" else ())

    def task(self, distance: int) -> str:
        """Name of the rows at a distance: passkey@4096:3000, copy32@4096:3000."""
        return f"{self.format}{self.copied or ''}@{self.length}:{distance}"

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, with the field that each comes from."""
        return tuple(
            RowName(("distances", i), self.task(d), metric)
            for how in self.scoring
            for i, d in enumerate(self.distances)
            for metric in self.metrics(how)
        )

    def tokens(self) -> int:
        """Tokens that one state and seed read, at most: generation reads a row once for every question in it."""
        passes = sum(1 if how == "likelihood" else self.queries for how in self.scoring)
        return self.rows * self.length * passes
