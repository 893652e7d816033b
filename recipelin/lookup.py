"""Name -> module of a folder: the file name is the public name. The only dynamic import of the project (no torch)."""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal

from .mistakes import nearest

Folder = Literal["methods", "attention", "evals", "bars"]

# What a name stands for: a module of methods/, the torch-free config of a form or an evaluation, and their torch half.
_CONFIG = {"methods": "", "attention": ".config", "evals": ".config"}
_TORCH = {"attention": ".module", "evals": ".run", "bars": ""}


class LookupFailed(ValueError):
    """A name that no file has, with the nearest one and all that there are."""


@cache
def names(folder: Folder) -> tuple[str, ...]:
    """All names of a folder, sorted; read once in a process, which loads and plans thousands of points."""
    package = importlib.import_module(f"{__package__}.{folder}")
    packages = folder in ("attention", "evals")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg == packages))


def lookup(folder: Folder, name: str, *, allow_code: Sequence[str] = ()) -> ModuleType:
    """The torch-free module of a name. A dotted name is code outside recipelin: its first part must be in `allow_code`.

    Raises LookupFailed.
    """
    if "." in name:
        package = name.partition(".")[0]
        if package not in allow_code:
            raise LookupFailed(
                f"{name!r} is code outside recipelin and was not imported; it needs --allow-code {package}"
            )
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise LookupFailed(f"{name!r}: no module {error.name!r} here") from error
    _known(folder, name)
    return importlib.import_module(f"{__package__}.{folder}.{name}{_CONFIG[folder]}")


def implementation(folder: Folder, name: str) -> ModuleType:
    """The torch half of a form or an evaluation, or a file of bars. Raises LookupFailed."""
    _known(folder, name)
    return importlib.import_module(f"{__package__}.{folder}.{name}{_TORCH[folder]}")


def _known(folder: Folder, name: str) -> None:
    known = names(folder)
    if name not in known:
        kind = {"methods": "method", "attention": "attention form", "evals": "evaluation", "bars": "bars"}[folder]
        raise LookupFailed(f"no {kind} {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
