"""Which runs a name stands for: a recipe, all points of its grid, or the points that a name's last part picks (no torch)."""

import os
from collections.abc import Sequence
from pathlib import Path

from .load import Loaded, expand, load_base
from .mistakes import listed, nearest
from .naming import values_of
from .strict_yaml import Mistake, RecipeError


def points(
    name: str | Path, *, allow_code: Sequence[str] = (), grids: dict[str, tuple[Loaded, ...]] | None = None
) -> tuple[Loaded, ...]:
    """`pocket/windows`: every point of the grid. `pocket/windows/window=8`: those with this value, whatever the other axes.

    `grids`: those expanded before, by the recipe's name, for callers that ask for many points of one; new ones are added.

    Raises RecipeError, with the nearest name for a point that the grid does not have.
    """
    base, _, choice = str(name).rpartition("/")
    if not base or "=" not in choice or os.path.isfile(name):
        return expand(load_base(name, allow_code=allow_code), allow_code=allow_code)
    grids = {} if grids is None else grids
    if base not in grids:
        grids[base] = expand(load_base(base, allow_code=allow_code), allow_code=allow_code)
    every = grids[base]
    found = tuple(p for p in every if set(choice.split(",")) <= values_of(p.recipe.name))
    if not found:
        known = [f"{base}/{p.recipe.name.rpartition('/')[2]}" for p in every if p.point]
        text = f"the grid has no such point{nearest(str(name), known)}; there are {listed(known)}"
        if not known:
            text = f"no such point: {base} has no grid"
        raise RecipeError([Mistake(str(name), 0, 0, text)])
    return found
