"""Settings of the `decode` evaluation (no torch)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ...base import Config as Base
from ...base import RowName

STATES = ("teacher", "softmax", "hybrid")


class Config(Base):
    """What a generated token costs by length of context, in the states teacher, softmax and hybrid; others have no rows.

    A prompt of `context` tokens fills the cache. Then `new_tokens` are decoded, one by one, from a copy of that cache: once to
    warm up, `repeats` times measured; `tokens_per_second`, all rows of the batch together, is of the median. `cache_bytes`
    are those of the prompt's keys and values, and of states as decoding holds them. On a CPU: process time of one thread,
    which other processes do not lengthen; on a GPU: CUDA events. The tokens are random, and a context may be longer than the
    model learnt: time does not ask.
    Measured anew on every machine.

    Sample YAML: `{eval: decode, contexts: [64, 256, 1024], new_tokens: 16, repeats: 5}`
    """

    beyond_context: ClassVar[bool] = True  # time does not ask what a model has learnt
    eval: Literal["decode"] = "decode"
    contexts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (64, 256, 1024)
    new_tokens: Annotated[int, Field(ge=1)] = 16
    repeats: Annotated[int, Field(ge=1)] = 5
    batch: Annotated[int, Field(ge=1)] = 1

    @field_validator("contexts")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"contexts must rise, found {', '.join(map(str, value))}")
        return value

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.contexts[-1] + self.new_tokens

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes, with the field that each comes from."""
        return tuple(
            RowName(("contexts", i), f"decode@{context}", metric)
            for i, context in enumerate(self.contexts)
            for metric in ("tokens_per_second", "cache_bytes")
        )

    def tokens(self) -> int:
        """Tokens that one state and seed read and make."""
        return self.batch * (sum(self.contexts) + len(self.contexts) * self.new_tokens * (self.repeats + 1))
