"""The base of everything that a recipe can name: frozen, complete, and closed to unknown keys."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen piece of a recipe or of a plan.

    Strict: a string is never read as a number or a boolean, a float never as an integer (an integer is a valid float).
    Sequences are tuples; `load` turns YAML lists into tuples before validation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class RowName(NamedTuple):
    """A row that an evaluation makes, and the field of its settings that asks for it."""

    field: tuple[str | int, ...]
    task: str
    metric: str
