"""Recipe text -> Recipe: strict YAML, `extends:`, errors with file:line:column, all of a file at once (no torch)."""

import difflib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from . import families, lookup
from .base import Config
from .finding import CHECKOUT, INSTALLED, find_recipe, kind_of, rebased, shown
from .mistakes import among, describe, located, nearest, placed
from .recipe import Recipe, StateOf, Student, Suite
from .schedule import Schedule
from .states import NAMES, State
from .strict_yaml import Mistake, RecipeError, Where, read_yaml
from .suites import load_suite

MOST_POINTS = 1_000  # of a grid; each one is a run


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it came from."""

    recipe: Recipe
    path: Path
    origin: str
    text: str
    extends_text: str | None = None
    point: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[Where, Mistake] = field(default_factory=dict)


# --- plain values -> Recipe -------------------------------------------------------------------------------------------


def load(name: str | Path, *, allow_code: Sequence[str] = ()) -> Loaded:
    """Read a recipe by path or name. Raises RecipeError with every mistake of the file, and of the one it extends."""
    loaded = load_base(name, allow_code=allow_code)
    expand(loaded, allow_code=allow_code)
    return loaded


def load_base(name: str | Path, *, allow_code: Sequence[str] = ()) -> Loaded:
    """`load` for a caller that expands: what is wrong with the points of a grid is told there."""
    path, origin = find_recipe(name)
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(
            [Mistake(str(name), 0, 0, f"is named {path.suffix or 'without an ending'}; expected a .yaml file")]
        )
    raw, places, text = read_yaml(path, shown(path))
    kind = kind_of(raw)
    if kind == "suite":
        text = "this is a suite, which recipes name in eval.suites; expected a recipe"
        raise RecipeError([placed(places, ("evals", "key"), text)])
    if kind != "recipe":
        text = f"this is a {kind} (recipelin table {path}); expected a recipe"
        raise RecipeError([placed(places, ("claims" if kind == "claims spec" else "columns", "key"), text)])
    extends_text = None
    if "extends" in raw:
        raw, places, extends_text = _extended(raw, places, path)
    recipe = _build(raw, places, path, allow_code)
    return Loaded(recipe, path, origin, text, extends_text, {}, raw, places)


def _extended(
    raw: dict[str, Any], places: dict[Where, Mistake], path: Path
) -> tuple[dict[str, Any], dict[Where, Mistake], str]:
    """The recipe laid over the one it extends, given by path or by name: maps merge, everything else replaces."""
    where = places[("extends",)]
    given = raw["extends"]
    if not isinstance(given, str):
        raise RecipeError(
            [replace(where, text=f"extends: found {describe(given)}; expected the path or the name of a recipe")]
        )
    try:
        parent, _ = find_recipe(given, beside=path.parent)
    except RecipeError as error:
        raise RecipeError([replace(where, text=f"extends: {given}: {error.mistakes[0].text}")]) from error
    if parent.resolve() == path.resolve():
        raise RecipeError([replace(where, text="extends: the recipe extends itself")])
    base, base_places, text = read_yaml(parent, shown(parent))
    if (kind := kind_of(base)) != "recipe":
        raise RecipeError([replace(where, text=f"extends: {given} is a {kind}; expected a recipe")])
    base = rebased(base, parent.parent, path.parent)
    if "extends" in base:
        at = base_places[("extends", "key")]
        raise RecipeError(
            [replace(where, text=f"extends: {given} itself extends another ({at.file}:{at.line}); one level only")]
        )
    own = {k: v for k, v in raw.items() if k != "extends"}
    merged_places = dict(base_places)

    def lay(below: dict[str, Any], above: dict[str, Any], at: Where) -> dict[str, Any]:
        found = dict(below)
        for key, value in above.items():
            here = (*at, key)
            merges = isinstance(value, dict) and isinstance(below.get(key), dict)
            if merges and here == ("method",) and value.get("name", below[key].get("name")) != below[key].get("name"):
                merges = False
            if merges:
                found[key] = lay(below[key], value, here)
                for place in ((*here, "key"), here):  # what is wrong with the whole map came with what was laid over it
                    merged_places[place] = places[place]
                continue
            for known in [p for p in merged_places if p[: len(here)] == here]:
                del merged_places[known]
            merged_places.update({p: m for p, m in places.items() if p[: len(here)] == here})
            found[key] = value
        return found

    merged = lay(base, own, ())
    merged_places[()] = places[()]
    return merged, merged_places, text


def _build(raw: Mapping[str, Any], places: Mapping[Where, Mistake], path: Path, allow_code: Sequence[str]) -> Recipe:
    """Validate a recipe's values block by block, so that every mistake is found at once."""
    mistakes: list[Mistake] = []
    found = dict(raw)
    # What is wrong in a block is told by the block; an empty one stands in for it, so that the rest is still checked.
    method, stages = _method(found.get("method"), places, mistakes, allow_code)
    if "method" in found:
        found["method"] = method or Config()
    found["schedule"] = {} if stages is None else _schedule(found.get("schedule"), stages, places, mistakes)
    _architecture(found, places, path, mistakes)
    _student(found, places, path, mistakes)
    _suites(found, places, path, mistakes)
    _names(found, places, path, mistakes)
    try:
        recipe = Recipe.model_validate(found)
    except ValidationError as error:
        mistakes += located(error, (), Recipe, places)
    if mistakes:
        raise RecipeError(mistakes)
    return recipe


def _method(
    given: Any, places: Mapping[Where, Mistake], mistakes: list[Mistake], allow_code: Sequence[str]
) -> tuple[Config | None, Mapping[str, Schedule | None] | None]:
    if not isinstance(given, Mapping):
        if given is not None:
            mistakes.append(
                placed(
                    places,
                    ("method",),
                    f"method: found {describe(given)}; expected a map with a name, as {{name: lolcats}}",
                )
            )
        return None, None
    name = given.get("name")
    if not isinstance(name, str):
        known = ", ".join(lookup.names("methods"))
        mistakes.append(placed(places, ("method", "name"), f"method: a name is missing; expected one of {known}"))
        return None, None
    try:
        module = lookup.lookup("methods", name, allow_code=tuple(allow_code))
    except lookup.LookupFailed as error:
        mistakes.append(placed(places, ("method", "name"), str(error)))
        return None, None
    try:
        return module.Config.model_validate(given), module.STAGES
    except ValidationError as error:
        mistakes += located(error, ("method",), module.Config, places)
        return None, module.STAGES


def _schedule(
    given: Any, stages: Mapping[str, Schedule | None], places: Mapping[Where, Mistake], mistakes: list[Mistake]
) -> dict[str, Schedule | None]:
    """Each stage of the method: what the recipe gives, laid over the method's default."""
    if given is None:
        return dict(stages)
    if not isinstance(given, Mapping):
        mistakes.append(placed(places, ("schedule",), f"found {describe(given)}; expected a map of stages"))
        return dict(stages)
    for name in given:
        if name not in stages:
            text = f"unknown stage {name!r}{among(name, stages, 'the method has')}"
            mistakes.append(placed(places, ("schedule", name, "key"), text))
    found: dict[str, Schedule | None] = {}
    for name, default in stages.items():
        if name not in given:
            found[name] = default
            continue
        own = given[name]
        if own is None:
            found[name] = None
            continue
        if not isinstance(own, Mapping):
            mistakes.append(
                placed(places, ("schedule", name), f"found {describe(own)}; expected a map, or null to leave it out")
            )
            continue
        values = dict(own)
        if default is not None:
            below = default.model_dump(exclude_unset=True)
            if any(k in own for k in ("steps", "tokens", "epochs")):
                below = {k: v for k, v in below.items() if k not in ("steps", "tokens", "epochs")}
            values = _over(below, own)
        try:
            found[name] = Schedule.model_validate(values)
        except ValidationError as error:
            mistakes += located(error, ("schedule", name), Schedule, places)
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        found[key] = _over(below[key], value) if both else value
    return found


def _architecture(found: dict[str, Any], places: Mapping[Where, Mistake], path: Path, mistakes: list[Mistake]) -> None:
    """`model.architecture` as the path of a config.json."""
    model = found.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("architecture"), str):
        return
    where = ("model", "architecture")
    file = path.parent / model["architecture"]
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
        found["model"] = {**model, "architecture": families.architecture(numbers)}
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.json")], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        mistakes.append(placed(places, where, f"model.architecture: no such file {file}{hint}"))
    except OSError as error:
        mistakes.append(placed(places, where, f"model.architecture: {file}: {error.strerror}"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        mistakes.append(
            placed(places, where, f"model.architecture: {file} is not JSON; expected a model's config.json")
        )
    except (ValueError, AttributeError, TypeError) as error:
        mistakes.append(placed(places, where, f"model.architecture: {file}: {error}"))
    if isinstance(found["model"]["architecture"], str):
        found["model"] = {k: v for k, v in model.items() if k != "architecture"}


def _student(found: dict[str, Any], places: Mapping[Where, Mistake], path: Path, mistakes: list[Mistake]) -> None:
    """`model.student` as the folder of an exported student; its numbers are the architecture where no teacher gives them."""
    model = found.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("student"), str):
        return
    given, where = model["student"], ("model", "student")
    rest = {k: v for k, v in model.items() if k != "student"}
    try:
        student, architecture = read_student(path.parent / given)
    except ValueError as error:
        mistakes.append(placed(places, where, str(error)))
        found["model"] = {"teacher": "pocket", **rest}  # stands in, so that the rest is still checked
        return
    found["model"] = {"architecture": architecture, **rest, "student": student.model_copy(update={"folder": given})}


def read_student(folder: Path) -> tuple[Student, families.Architecture]:
    """What the config.json of an exported folder says. Raises ValueError: no folder, no student, another version."""
    file = folder / "config.json"
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = [p.parent.name for p in folder.parent.glob("*/config.json")] if folder.parent.is_dir() else []
        raise ValueError(
            f"no exported student at {folder}: {file.name} is not there{nearest(folder.name, known)}"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    layout = numbers.get("recipelin") if isinstance(numbers, dict) else None
    if not isinstance(layout, dict):
        raise ValueError(
            f"{file} is no student of recipelin: it has no `recipelin` entry (a teacher goes to model.teacher)"
        )
    if layout.get("version") != families.LAYOUT:
        raise ValueError(
            f"{file}: layout version {layout.get('version')}; this recipelin reads version {families.LAYOUT}"
        )
    try:
        form = lookup.lookup("attention", layout["form"])
        student = Student(
            folder=str(folder),
            form=layout["form"],
            config=form.Config.model_validate_json(json.dumps(layout["config"])),
            layers=tuple(layout["layers"]),
            state=State.model_validate_json(json.dumps(layout["state"])),
        )
        base = {**numbers, "model_type": families.base_type(str(numbers.get("model_type")))}
        return student, families.architecture(base)
    except (KeyError, ValidationError, lookup.LookupFailed) as error:
        raise ValueError(f"{file}: not a student that this recipelin can read: {error}") from error


def _suites(found: dict[str, Any], places: Mapping[Where, Mistake], path: Path, mistakes: list[Mistake]) -> None:
    evaluation = found.get("eval")
    if not isinstance(evaluation, Mapping) or not isinstance(evaluation.get("suites"), tuple):
        return
    suites: list[Suite] = []
    for index, name in enumerate(evaluation["suites"]):
        at = ("eval", "suites", index)
        if isinstance(name, Suite):
            suites.append(name)
        elif not isinstance(name, str):
            mistakes.append(placed(places, at, f"found {describe(name)}; expected the name of a suite"))
        elif suite := _suite(name, path, at, places, mistakes):
            if any(suite.name == s.name for s in suites):
                text = f"a suite named {suite.name!r} is there already, and a Record knows rows by it; give it another name"
                mistakes.append(placed(places, at, text))
            suites.append(suite)
    if not suites and evaluation["suites"]:
        suites.append(Suite(name="stand-in", evals=(Config(),)))
    found["eval"] = {**evaluation, "suites": tuple(suites)}


def _suite(name: str, path: Path, at: Where, places: Mapping[Where, Mistake], mistakes: list[Mistake]) -> Suite | None:
    try:
        return load_suite(name, path)
    except RecipeError as error:
        if all(m.text.startswith("no such recipe") for m in error.mistakes):
            known = sorted(p.stem for r in (CHECKOUT, INSTALLED) for p in (r / "suites").glob("*.yaml"))
            mistakes.append(placed(places, at, f"no suite {name!r}{among(name, known)}"))
        else:
            mistakes += error.mistakes
    return None


def _names(found: Mapping[str, Any], places: Mapping[Where, Mistake], path: Path, mistakes: list[Mistake]) -> None:
    """Names in eval.states and in what a stage's validation watches."""
    evaluation = found.get("eval")
    states = evaluation.get("states") if isinstance(evaluation, Mapping) else None
    for index, entry in enumerate(states if isinstance(states, tuple) else ()):
        name, at = entry, ("eval", "states", index)
        if isinstance(entry, (Mapping, StateOf)):
            name = entry.of if isinstance(entry, StateOf) else entry.get("of", "hybrid")
            at = ("eval", "states", index, "of")  # type: ignore[assignment]
        if isinstance(name, str) and name not in NAMES:
            mistakes.append(placed(places, at, f"unknown state {name!r}{among(name, NAMES, 'states are')}"))
    schedule = found.get("schedule")
    for stage, value in schedule.items() if isinstance(schedule, Mapping) else ():
        for index, name in enumerate(value.curve.suites if isinstance(value, Schedule) and value.curve else ()):
            _suite(name, path, ("schedule", stage, "curve", "suites", index), places, mistakes)
        if isinstance(value, Schedule) and value.validation:
            for index, watch in enumerate(value.validation.watch):
                at_watch = ("schedule", stage, "validation", "watch", index, "state")
                if watch.state not in (*NAMES, "transfer") or watch.state == "teacher":
                    known = ("transfer", *NAMES[1:])
                    text = f"cannot watch the state {watch.state!r}{among(watch.state, known, 'states are')}"
                    mistakes.append(placed(places, at_watch, text))
                if watch.suite:
                    _suite(watch.suite, path, (*at_watch[:-1], "suite"), places, mistakes)


# --- the grid ---------------------------------------------------------------------------------------------------------


def expand(loaded: Loaded, *, allow_code: Sequence[str] = ()) -> tuple[Loaded, ...]:
    """Every point of a recipe's grid as a recipe of its own, `name/window=16,seed=1`; a recipe without a grid is itself.

    Raises RecipeError: an axis that is no field, or a value that is not valid there, at the axis's line.
    """
    grid = loaded.recipe.grid
    if not grid:
        return (loaded,)
    mistakes: list[Mistake] = []
    for axis, values in grid.items():
        problem = _no_field(loaded, axis)
        if problem:
            mistakes.append(placed(loaded.places, ("grid", axis, "key"), problem))
        if not values:
            mistakes.append(
                placed(loaded.places, ("grid", axis), "found an empty list; expected the values of the axis")
            )
    points = math.prod(len(values) for values in grid.values())
    if points > MOST_POINTS:
        mistakes.append(placed(loaded.places, ("grid",), f"found {points:,} points; expected at most {MOST_POINTS:,}"))
    if mistakes:
        right = {axis: values for axis, values in grid.items() if values and not _no_field(loaded, axis)}
        if len(right) < len(grid):  # the values of the other axes are tried all the same
            try:
                expand(replace(loaded, recipe=loaded.recipe.model_copy(update={"grid": right})), allow_code=allow_code)
            except RecipeError as error:
                mistakes += error.mistakes
        raise RecipeError(mistakes)
    last = [axis.rpartition(".")[2] for axis in grid]
    short = {axis: end if last.count(end) == 1 else axis for axis, end in zip(grid, last, strict=True)}
    labels = {axis: _labels(values) for axis, values in grid.items()}
    found: list[Loaded] = []
    for choice in itertools.product(*(enumerate(values) for values in grid.values())):
        point = {axis: value for axis, (_, value) in zip(grid, choice, strict=True)}
        raw = {k: v for k, v in loaded.raw.items() if k != "grid"}
        places = dict(loaded.places)
        for axis, (index, value) in zip(grid, choice, strict=True):
            path: Where = tuple(axis.split("."))
            raw = _set(raw, path, value)
            here: Where = ("grid", axis, index)
            own = {(*path, *p[3:]): m for p, m in loaded.places.items() if p[:3] == here}  # a map has places inside
            places = {p: m for p, m in places.items() if p[: len(path)] != path} | own
            places[(*path, "key")] = places[path]
            for depth in range(len(path)):
                places.setdefault(path[:depth], places[path])
        label = ",".join(f"{short[axis]}={labels[axis][index]}" for axis, (index, _) in zip(grid, choice, strict=True))
        raw["name"] = f"{loaded.recipe.name}/{label}"
        try:
            recipe = _build(raw, places, loaded.path, allow_code)
        except RecipeError as error:
            mistakes += error.mistakes
            continue
        if twin := next((p.point for p in found if p.recipe.name == recipe.name), None):
            axis = next((a for a in grid if twin[a] != point[a]), next(reversed(grid)))
            text = f"two points are named {recipe.name!r}; expected values that differ, in letters and digits too"
            mistakes.append(placed(loaded.places, ("grid", axis), text))
        found.append(replace(loaded, recipe=recipe, point=point, raw=raw, places=places))
    if mistakes:
        raise RecipeError(mistakes)
    return tuple(found)


def _set(values: Mapping[str, Any], path: Where, value: Any) -> dict[str, Any]:
    head, *rest = path
    found = dict(values)
    below = found.get(str(head))
    found[str(head)] = _set(below if isinstance(below, Mapping) else {}, tuple(rest), value) if rest else value
    return found


def _labels(values: Sequence[Any]) -> list[str]:
    """Names of an axis's values: a map is named by its keys, or by all of it where two have the same keys."""
    short = ["+".join(map(str, v)) if isinstance(v, Mapping) and v else v for v in values]
    found = [_label(v) for v in short]
    return found if len(set(found)) == len(found) else [_label(v) for v in values]


def _label(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^a-z0-9._+-]+", "-", text.lower()).strip("-") or "none"


def _no_field(loaded: Loaded, axis: str) -> str | None:
    """What is wrong with a dotted field; None if the recipe has it."""
    here: Any = loaded.recipe
    for depth, part in enumerate(axis.split(".")):
        known = (
            list(type(here).model_fields)
            if isinstance(here, BaseModel)
            else list(here)
            if isinstance(here, Mapping)
            else []
        )
        if axis in ("name", "grid", "about"):
            return f"{axis!r} is no axis: it does not change what a run does"
        if part not in known:
            before = ".".join(axis.split(".")[:depth]) or "a recipe"
            return f"{axis!r} is no field: {before} has no {part!r}{nearest(part, known)}"
        here = here[part] if isinstance(here, Mapping) else getattr(here, part)
    return None
