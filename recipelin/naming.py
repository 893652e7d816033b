"""How runs are named: a recipe, the values of a point of its grid, and the folder (no torch)."""

from functools import lru_cache


def values_of(name: str) -> set[str]:
    """The values of a point: {window=8, seed=1} of `pocket/windows/window=8,seed=1`."""
    last = name.rpartition("/")[2]
    return set(last.split(",")) if "=" in last else set()


@lru_cache(maxsize=4096)
def but_seed(name: str) -> tuple[str, frozenset[str]]:
    """What two runs have in common that differ in the seed alone: the recipe, and the values of its other axes."""
    values = values_of(name)
    base = name.rpartition("/")[0] if values else name
    return base, frozenset(v for v in values if not v.startswith("seed="))


def file_name(name: str) -> str:
    """A run's name as folders and Records begin with: `pocket/lolcats` -> `pocket-lolcats`."""
    return name.replace("/", "-")


def default_folder(name: str, plan_hash: str) -> str:
    """The folder of a run, under the home of runs: `pocket/lolcats` -> `pocket-lolcats--1a2b3c4d`."""
    return f"{file_name(name)}--{plan_hash[:8]}"
