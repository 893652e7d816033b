"""Which file a name means, what kind of file it is, and what its relative paths lead to (no torch)."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .shipped import SHIPPED
from .sources import is_folder
from .strict_yaml import Mistake, RecipeError

RECIPES = "recipes"
INSTALLED = Path(__file__).parent / "_recipes"
CHECKOUT = Path(__file__).parent.parent / RECIPES


def find_recipe(name: str | Path, *, beside: Path | None = None) -> tuple[Path, str]:
    """(path, origin) of a recipe or suite by path or by name: an existing path, the checkout's, then the installed copy.

    A path is looked for in `beside`, default the current folder. Raises RecipeError with the nearest name.
    """
    given = Path(name)
    here = (beside or Path()) / given
    for candidate in (here, Path(f"{here}.yaml")):
        if os.path.isfile(candidate):  # False, too, for a name that no file can have
            return candidate, "file"
    if os.path.isdir(here):
        inside = sorted(p.name for p in here.glob("*.yaml"))
        text = f"is a folder; expected a recipe{f', such as {here / inside[0]}' if inside else ''}"
        raise RecipeError([Mistake(str(name) or "''", 0, 0, text)])
    roots = [(CHECKOUT, "checkout"), (INSTALLED, "installed")]
    for root, origin in roots:
        for candidate in (root / given, root / f"{given}.yaml"):
            if os.path.isfile(candidate):
                return candidate, origin
    known = sorted({str(p.relative_to(r).with_suffix("")) for r, _ in roots if r.is_dir() for p in r.rglob("*.yaml")})
    siblings = [str(given.parent / p.name) for p in here.parent.glob("*.yaml")] if os.path.isdir(here.parent) else []
    near = difflib.get_close_matches(str(given), [*known, *siblings], 1) or difflib.get_close_matches(
        str(given.with_suffix("")).removeprefix(f"{RECIPES}/"), known, 1
    )
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    raise RecipeError([Mistake(str(name), 0, 0, f"no such recipe{hint}")])


def shown(path: Path) -> str:
    """A path as messages name it: from the current folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def kind_of(raw: Mapping[str, Any]) -> str:
    """What a file holds, by its keys: a recipe, a suite, a table spec or a claims spec."""
    if "method" in raw or "extends" in raw:
        return "recipe"
    if "claims" in raw:
        return "claims spec"
    return "suite" if "evals" in raw else "table spec" if "columns" in raw and "rows" in raw else "recipe"


# The fields that may hold a path, by their last word, and what the path leads to.
_PATHS = {
    **dict.fromkeys(("teacher", "student", "dataset"), os.path.isdir),
    **dict.fromkeys(("architecture", "distill", "finetune", "suites", "path"), os.path.isfile),
}


def rebased(value: Any, old: Path, new: Path, key: str = "") -> Any:
    """A recipe's values as they read from folder `new`: a relative path to what is there in `old` still leads to it.

    A path to nothing stays as it is, and so is looked for in `new`, as the recipe's own paths are.
    """
    if isinstance(value, dict):
        return {k: rebased(v, old, new, k) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(rebased(v, old, new, key) for v in value)
    name = key.rpartition(".")[2]
    is_there, dataset = _PATHS.get(name), name == "dataset"
    if is_there is None or not isinstance(value, str) or value in ("", *SHIPPED) or not is_there(old / value):
        return value
    if old.resolve() == new.resolve() or (dataset and not is_folder(value)):
        return value
    path = os.path.relpath((old / value).resolve(), new.resolve())
    return f"./{path}" if dataset and not is_folder(path) else path  # without a dot it would be a hub id
