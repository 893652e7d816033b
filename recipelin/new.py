"""A new recipe file that extends another: complete, so that `check`, `plan` and `run` take it at once (no torch)."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from .files import write_atomically
from .finding import CHECKOUT, INSTALLED, find_recipe, rebased
from .load import Loaded, expand, load, load_base
from .plan import plan
from .reads import texts
from .schedule import Schedule
from .sources import LocalFile
from .strict_yaml import read_yaml

NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")
WIDTH = 116  # of a line of values, before its `# `

HEAD = """\
# One line on what this recipe is for: `recipelin list` shows it.
name: {name}
extends: {extends}
about:
  claim: not stated yet  # what this run can show or refute, in one sentence
"""
FIELDS = """
# What one usually changes, with the values of {parent}:
# take the `# ` away where you change something. A map is laid over the parent's, a list replaces it; paths start at
# this file's folder. `recipelin schema` has every field, `recipelin list` every name.
"""
GRID = """
# Many runs in one file, a Record each; axes are dotted fields, here three training seeds:
# grid: {seed: [0, 1, 2]}
"""


class NewError(ValueError):
    """A recipe that cannot be written; nothing was. The message says what to change."""


def new_recipe(name: str, parent: str, *, allow_code: Sequence[str] = ()) -> Path:
    """Write a recipe that extends `parent` and return its path: `name` plus `.yaml`, below the current folder.

    Raises NewError for a bad name and for a file or a name that is there already; RecipeError, PlanError for the parent.
    """
    path, own_name = _target(name)
    base = load(parent, allow_code=allow_code)
    for point in expand(base, allow_code=allow_code):
        plan(point, allow_code=allow_code)
    write_atomically(path, _text(own_name, base, path.parent).encode())
    return path


def _target(given: str) -> tuple[Path, str]:
    """(file, name) of the new recipe: the name is the path inside recipes/, else the path as given, or its last part."""
    path = Path(given)
    if given.endswith(os.sep):
        raise NewError(f"{given} names a folder; expected the new recipe's name after it")
    if path.suffix in (".yml", ".json", ".txt", ".py"):
        raise NewError(f"{given}: found {path.suffix}; a recipe's file ends in .yaml, which may be left out")
    path = path.with_suffix("") if path.suffix == ".yaml" else path
    within = path.resolve().is_relative_to(CHECKOUT.resolve())
    if not NAME.fullmatch(path.name):
        better = re.sub(r"[^a-z0-9._+-]+", "-", path.name.lower()).strip("-._+")
        hint = f"; did you mean {better!r}?" if better else ""
        expected = "small letters, digits and . _ + -, a letter or digit first"
        raise NewError(f"{path.name!r} is no name for a recipe; expected {expected}{hint}")
    file = path.parent / f"{path.name}.yaml"
    if os.path.lexists(file):
        raise NewError(f"{file} is there already; take another name, or move it away")
    named = path.resolve().relative_to(CHECKOUT.resolve()) if within else path
    name = named.as_posix() if all(NAME.fullmatch(part) for part in named.parts) else path.name
    for root in (CHECKOUT, INSTALLED):
        if (root / f"{name}.yaml").is_file():
            raise NewError(
                f"{name} is the name of a recipe that recipelin ships; take another, for instance my-{path.name}"
            )
    above = next(p for p in file.absolute().parents if os.path.lexists(p))
    if not above.is_dir():
        raise NewError(f"{above} is a file; expected a folder to write {file} into")
    return file, name


def _text(name: str, base: Loaded, folder: Path) -> str:
    """The new file. A parent that extends another is copied, since `extends:` has one level."""
    own, _, _ = read_yaml(base.path)
    source = base.path
    copied: dict[str, Any] = {}
    if "extends" in own:
        source = find_recipe(own["extends"], beside=base.path.parent)[0]
        kept = {k: v for k, v in own.items() if k not in ("name", "extends", "about")}
        copied = rebased(kept, base.path.parent, folder)
    parts = [HEAD.format(name=name, extends=_extends(source, folder))]
    fields = rebased(usual(base), base.path.parent, folder)
    if copied:
        parts.append(f"\n# What {base.recipe.name} changes; `extends:` has one level, so it stands here again.\n")
        for key, value in copied.items():
            rest = (
                {k: v for k, v in fields.get(key, {}).items() if k not in value} if isinstance(value, Mapping) else {}
            )
            parts.append(f"{key}:\n{indent(_yaml(value), '  ')}" if rest else _yaml({key: value}))
            parts.append(indent(_yaml(rest), "#   ") if rest else "")
    parts.append(FIELDS.format(parent=base.recipe.name))
    for key, value in fields.items():
        if key not in copied:
            parts.append(indent(_yaml({key: value}), "# "))
    if not base.recipe.grid:
        parts.append(GRID)
    return "".join(parts)


def _extends(source: Path, folder: Path) -> str:
    """How the new recipe names its parent: a shipped one by name, wherever the file goes; another by a relative path."""
    for root in (CHECKOUT, INSTALLED):
        if source.resolve().is_relative_to(root.resolve()):
            return source.resolve().relative_to(root.resolve()).with_suffix("").as_posix()
    return Path(os.path.relpath(source.resolve(), folder.resolve())).as_posix()


def usual(base: Loaded) -> dict[str, Any]:
    """The fields that one usually changes, with their values in a recipe: written back, they change nothing."""
    recipe = base.recipe
    found: dict[str, Any] = {"seed": recipe.seed}
    if recipe.model.teacher:
        found["model"] = {"teacher": recipe.model.teacher, "dtype": recipe.model.dtype}
    found["method"] = recipe.method.model_dump(mode="json")
    sources = [s.model_dump(mode="json", exclude_unset=True) for s in recipe.data.mix]
    found["data"] = {"mix": base.raw.get("data", {}).get("mix", sources)}  # as written, where it is: names of templates
    found["schedule"] = {name: _stage(stage) for name, stage in recipe.schedule.items()}
    states = [s if isinstance(s, str) else s.model_dump(mode="json", exclude_unset=True) for s in recipe.eval.states]
    found["eval"] = {"states": states, "seeds": list(recipe.eval.seeds), "margin": recipe.eval.margin}
    return {key: value for key, value in found.items() if value != {}}


def _stage(stage: Schedule | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    duration = {n: v for n in ("steps", "tokens", "epochs") if (v := getattr(stage, n)) is not None}
    size = {n: getattr(stage, n) for n in ("batch", "accumulation", "length")}
    return {**duration, **size, "optimizer": {"name": stage.optimizer.name, "lr": stage.optimizer.lr}}


def _plain(value: Any) -> Any:
    """Tuples as lists, since YAML has no tuples."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _yaml(values: Mapping[str, Any]) -> str:
    flow = None if any(isinstance(v, (Mapping, list, tuple)) for v in values.values()) else False
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, default_flow_style=flow, width=WIDTH)


def new_command(arguments: argparse.Namespace) -> int:
    """`recipelin new NAME --from RECIPE`: write it, check it, say what comes next. Exit 2 with the reason when refused."""
    try:
        path = new_recipe(arguments.name, arguments.parent, allow_code=arguments.allow_code)
    except NewError as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 2
    points = expand(load_base(path, allow_code=arguments.allow_code), allow_code=arguments.allow_code)
    plans = [plan(point, allow_code=arguments.allow_code) for point in points]
    needed = {s.path for p in plans for s in texts((x.step for x in p.steps), path) if isinstance(s, LocalFile)}
    missing = sorted(file for file in needed if not (path.parent / file).is_file())
    shown = path.as_posix()
    options = "".join(f" --allow-code {package}" for package in arguments.allow_code)
    runs = "1 run" if len(points) == 1 else f"{len(points)} runs, its grid is the parent's"
    print(
        f"{shown} ({runs}): extends {arguments.parent}; as it stands it does the same\n"
        "next\n"
        f"  edit {shown}: the claim, and what differs\n"
        + "".join(f"  put {path.parent / file} there\n" for file in missing)
        + f"  recipelin check {shown}{options}\n"
        f"  recipelin plan {shown}{options}\n"
        f"  recipelin run {shown}{options}"
    )
    return 0
