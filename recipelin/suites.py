"""A suite's name or file -> Suite: strict YAML, all mistakes of a file at once (no torch)."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from . import lookup
from .base import Config
from .finding import find_recipe, rebased, shown
from .mistakes import located, placed
from .recipe import Suite, twins
from .strict_yaml import Mistake, RecipeError, Where, parsed, read_text


def load_suite(name: str, recipe: Path) -> Suite:
    """A suite by its name under recipes/suites, or by a path beside the recipe. Raises RecipeError.

    Of a suite in another folder, a relative path to what is there still leads to it; else it starts at the recipe's folder.
    """
    if not name.endswith(".yaml"):
        return read_suite(find_recipe(f"suites/{name}")[0])
    return read_suite(find_recipe(name, beside=recipe.parent)[0], recipe.parent)


def read_suite(path: Path, folder: Path | None = None) -> Suite:
    """A suite from its file, as it reads from the recipe's `folder`. Raises RecipeError with every mistake of the file."""
    file = shown(path)
    own = path.parent.resolve()
    return _suite(file, read_text(path, file), own, folder.resolve() if folder else own)


@lru_cache(maxsize=256)
def _suite(file: str, text: str, own: Path, folder: Path) -> Suite:
    """The suite that a text holds, which nothing changes: the points of grids read the same ones, hundreds of times."""
    raw, places = parsed(text, file, kind="a suite (name, evals)")
    raw = rebased(raw, own, folder)
    if "method" in raw or "extends" in raw:
        raise RecipeError([Mistake(file, 0, 0, "is a recipe; expected a suite, a file with `evals:`")])
    mistakes: list[Mistake] = []
    evals: list[Config] = []
    given = raw.get("evals")
    for index, entry in enumerate(given if isinstance(given, tuple) else ()):
        at: Where = ("evals", index)
        name = entry.get("eval") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            mistakes.append(
                placed(places, at, f"expected a map with `eval:`, one of {', '.join(lookup.names('evals'))}")
            )
            continue
        try:
            config = lookup.lookup("evals", name).Config
            evals.append(config.model_validate(entry))
        except lookup.LookupFailed as error:
            mistakes.append(placed(places, (*at, "eval"), str(error)))
        except ValidationError as error:
            mistakes += located(error, at, config, places)
    if not mistakes:
        mistakes += [placed(places, ("evals", *at), text) for at, text in twins(evals)]
    try:
        suite = Suite.model_validate({**raw, "evals": tuple(evals) if isinstance(given, tuple) and evals else given})
    except ValidationError as error:
        if not mistakes:
            mistakes += located(error, (), Suite, places)
    if mistakes:
        raise RecipeError(mistakes)
    return suite
