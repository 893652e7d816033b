"""The recipes that ship, read once for all the tests that walk them."""

from functools import cache
from pathlib import Path

from recipelin.load import Loaded, expand, load_base


@cache
def points_of(recipe: str | Path) -> tuple[Loaded, ...]:
    """Every point of a shipped recipe's grid."""
    return expand(load_base(recipe))
