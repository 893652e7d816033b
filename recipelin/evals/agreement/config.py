"""Settings of the `agreement` evaluation (no torch)."""

from typing import Annotated, Literal

from pydantic import Field

from ...base import Config as Base
from ...base import RowName
from ...sources import Stdlib, Text


class Config(Base):
    """Greedy generation beside the teacher's: whether a state goes on as the teacher does; an item is a prompt.

    Both continue held-out prompts by `generate()` with their caches. The teacher's m tokens are those up to its end of
    text, at most `new_tokens`. Task `agreement@32`: the tokens that are equal before the first difference, over m; task
    `agreement_exact@32`: whether all m are. There is no chance level. The teacher's continuations are made once and kept;
    its own rows are 1 by definition. One early difference of two near-equal logits costs all that follows: read it
    beside the log-loss.

    Sample YAML: `{eval: agreement, rows: 48, length: 128, new_tokens: 32}`
    """

    eval: Literal["agreement"] = "agreement"
    text: Text = Stdlib(source="python-stdlib")
    part: Literal["selection", "test"] = "test"
    rows: Annotated[int, Field(ge=2)] = Field(48, description="prompts")
    length: Annotated[int, Field(ge=1)] = Field(128, description="tokens of a prompt")
    new_tokens: Annotated[int, Field(ge=1)] = 32
    batch: Annotated[int, Field(ge=1)] = 16

    def names(self) -> tuple[RowName, ...]:
        """Of the rows that it makes."""
        at = self.new_tokens
        return (
            RowName(("new_tokens",), f"agreement@{at}", "prefix_match"),
            RowName(("new_tokens",), f"agreement_exact@{at}", "exact_match"),
        )

    def tokens(self) -> int:
        """Tokens that one state and seed read and make."""
        return self.rows * (self.length + self.new_tokens)
