"""Recipe text -> Recipe: strict YAML, `extends:`, errors with file:line:column, all of a file at once (no torch)."""

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from . import families, lookup
from .base import Config
from .recipe import Recipe, StateOf, Suite
from .schedule import Schedule
from .states import NAMES

LARGEST = 1 << 20  # bytes of a recipe; the longest of ours has two thousand
DEEPEST = 40  # levels of nesting
MOST_NODES = 20_000  # after aliases are followed

RECIPES = "recipes"
INSTALLED = Path(__file__).parent / "_recipes"
CHECKOUT = Path(__file__).parent.parent / RECIPES

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Mistake:
    """One thing that is wrong, and where."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class RecipeError(ValueError):
    """All mistakes of a recipe, in the order of its lines."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(sorted(set(mistakes)))
        super().__init__("\n".join(map(str, self.mistakes)))


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
    places: Mapping[Path_, Mistake] = field(default_factory=dict)


# --- text -> plain values, each with its place ------------------------------------------------------------------------

_NUMBER = re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?")


@dataclass(frozen=True)
class _Reader:
    """Turns YAML nodes into values and remembers where each one stands."""

    file: str
    places: dict[Path_, Mistake]
    mistakes: list[Mistake]

    def at(self, node: yaml.Node, text: str = "") -> Mistake:
        return Mistake(self.file, node.start_mark.line + 1, node.start_mark.column + 1, text)

    def wrong(self, node: yaml.Node, text: str) -> None:
        self.mistakes.append(self.at(node, text))

    def value(self, node: yaml.Node, path: Path_, budget: list[int], above: tuple[yaml.Node, ...] = ()) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise RecipeError([self.at(node, f"aliases expand to more than {MOST_NODES:,} values; write them out")])
        if node in above:
            raise RecipeError([self.at(node, "an alias contains itself")])
        if len(path) > DEEPEST:
            raise RecipeError([self.at(node, f"nested more than {DEEPEST} levels deep")])
        self.places[path] = self.at(node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, (*path, i), budget, (*above, node)) for i, item in enumerate(node.value))
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
                self.wrong(key_node, "found a key that is no plain word; expected a field's name")
                continue
            if key in found:
                first = self.places[(*path, key, "key")]
                self.wrong(key_node, f"the key {key!r} is given twice, first in line {first.line}")
                continue
            self.places[(*path, key, "key")] = self.at(key_node)
            found[key] = self.value(value_node, (*path, key), budget, (*above, node))
            self.places[(*path, key, "key")] = self.at(key_node)
        return found

    def scalar(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        if node.style is not None:
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _NUMBER.fullmatch(text):
            digits = text.replace("_", "")
            return int(digits) if re.fullmatch(r"[-+]?\d+", digits) else float(digits)
        if text.lower() in (".inf", "-.inf", "+.inf", ".nan"):
            self.wrong(node, f"found {text}; expected a finite number")
        return text


class _Loader(yaml.SafeLoader):
    """Every plain scalar stays text here: `_Reader.scalar` decides what is a number."""


_Loader.yaml_implicit_resolvers = {}


def read_yaml(path: Path, shown: str | None = None) -> tuple[dict[str, Any], dict[Path_, Mistake], str]:
    """(values, places, text) of a YAML file that holds a map. Raises RecipeError."""
    file = shown or str(path)
    text = _text(path, file)
    reader = _Reader(file, {}, [])
    try:
        node = yaml.compose(text, Loader=_Loader)
        _refuse_tags(node, reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = error.problem or "not YAML"
        lines = text.splitlines()
        if "\\t" in problem or (line <= len(lines) and "\t" in lines[line - 1][: column + 1]):
            problem = "found a tab; indent with spaces"
        raise RecipeError([Mistake(file, line, column, problem)]) from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "reason", None) or "nested too deeply"
        raise RecipeError([Mistake(file, 1, 1, f"not YAML: {reason}")]) from error
    if node is None:
        raise RecipeError(
            [Mistake(file, 1, 1, "the file is empty; expected a recipe (recipelin schema shows its fields)")]
        )
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else f"the text {node.value[:40]!r}"
        raise RecipeError([reader.at(node, f"found {kind}; expected a map of fields, `name: …` first")])
    values = reader.value(node, (), [MOST_NODES])
    if reader.mistakes:
        raise RecipeError(reader.mistakes)
    return values, reader.places, text


def _text(path: Path, file: str) -> str:
    if path.is_dir():
        raise RecipeError([Mistake(file, 1, 1, "is a folder; expected a YAML file (recipelin check takes folders)")])
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RecipeError([Mistake(file, 1, 1, f"no such file{hint}")])
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RecipeError([Mistake(file, 1, 1, f"has {size:,} bytes; a recipe has at most {LARGEST:,}")])
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError([Mistake(file, 1, 1, f"cannot be read: {error.strerror}")]) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise RecipeError([Mistake(file, line, column, f"not UTF-8: byte 0x{content[error.start]:02x}")]) from error


def _refuse_tags(node: yaml.Node | None, reader: _Reader) -> None:
    """No tags: a recipe names values, it does not make objects."""
    plain = {"tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}
    todo, seen = [node] if node is not None else [], set()
    while todo:
        here = todo.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if here.tag not in plain:
            raise RecipeError([reader.at(here, f"found the tag {here.tag}; a recipe holds plain values")])
        if isinstance(here, yaml.SequenceNode):
            todo += here.value
        elif isinstance(here, yaml.MappingNode):
            todo += [n for pair in here.value for n in pair]


# --- finding files ----------------------------------------------------------------------------------------------------


def find_recipe(name: str | Path, *, beside: Path | None = None) -> tuple[Path, str]:
    """(path, origin) of a recipe or suite by path or by name: an existing path, the checkout's, then the installed copy.

    Raises RecipeError with the nearest name.
    """
    given = Path(name)
    for base in ([beside] if beside else []) + [Path()]:
        for candidate in (base / given, base / f"{given}.yaml"):
            if candidate.is_file():
                return candidate, "file"
    if given.exists() and given.is_dir():
        raise RecipeError([Mistake(str(name), 1, 1, "is a folder; expected a recipe")])
    roots = [(CHECKOUT, "checkout"), (INSTALLED, "installed")]
    for root, origin in roots:
        for candidate in (root / given, root / f"{given}.yaml"):
            if candidate.is_file():
                return candidate, origin
    known = sorted({str(p.relative_to(r).with_suffix("")) for r, _ in roots if r.is_dir() for p in r.rglob("*.yaml")})
    siblings = [str(p) for p in (Path() / given).parent.glob("*.yaml")]
    near = difflib.get_close_matches(str(given), [*known, *siblings], 1) or difflib.get_close_matches(
        str(given.with_suffix("")).removeprefix(f"{RECIPES}/"), known, 1
    )
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    raise RecipeError([Mistake(str(name), 1, 1, f"no such recipe{hint}")])


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# --- plain values -> Recipe -------------------------------------------------------------------------------------------


def load(name: str | Path, *, allow_code: Sequence[str] = ()) -> Loaded:
    """Read a recipe by path or name. Raises RecipeError with every mistake of the file, and of the one it extends."""
    path, origin = find_recipe(name)
    raw, places, text = read_yaml(path, _shown(path))
    extends_text = None
    if "extends" in raw:
        raw, places, extends_text = _extended(raw, places, path)
    recipe = _build(raw, places, path, allow_code)
    loaded = Loaded(recipe, path, origin, text, extends_text, {}, raw, places)
    expand(loaded, allow_code=allow_code)
    return loaded


def _extended(
    raw: dict[str, Any], places: dict[Path_, Mistake], path: Path
) -> tuple[dict[str, Any], dict[Path_, Mistake], str]:
    """The recipe laid over the one it extends: maps merge, everything else replaces."""
    where = places[("extends",)]
    given = raw["extends"]
    if not isinstance(given, str):
        raise RecipeError([replace(where, text=f"extends: found {_describe(given)}; expected the path of a recipe")])
    parent = path.parent / given
    if parent.resolve() == path.resolve():
        raise RecipeError([replace(where, text="extends: the recipe extends itself")])
    try:
        base, base_places, text = read_yaml(parent, _shown(parent))
    except RecipeError as error:
        if not parent.is_file():
            problem = error.mistakes[0].text
            raise RecipeError([replace(where, text=f"extends: {given}: {problem}")]) from error
        raise
    if "extends" in base:
        at = base_places[("extends", "key")]
        raise RecipeError(
            [replace(where, text=f"extends: {given} itself extends another ({at.file}:{at.line}); one level only")]
        )
    own = {k: v for k, v in raw.items() if k != "extends"}
    merged_places = dict(base_places)

    def lay(below: dict[str, Any], above: dict[str, Any], at: Path_) -> dict[str, Any]:
        found = dict(below)
        for key, value in above.items():
            here = (*at, key)
            merges = isinstance(value, dict) and isinstance(below.get(key), dict)
            if merges and here == ("method",) and value.get("name", below[key].get("name")) != below[key].get("name"):
                merges = False
            if merges:
                found[key] = lay(below[key], value, here)
                merged_places[(*here, "key")] = places[(*here, "key")]
                continue
            for known in [p for p in merged_places if p[: len(here)] == here]:
                del merged_places[known]
            merged_places.update({p: m for p, m in places.items() if p[: len(here)] == here})
            found[key] = value
        return found

    merged = lay(base, own, ())
    merged_places[()] = places[()]
    return merged, merged_places, text


def _build(raw: Mapping[str, Any], places: Mapping[Path_, Mistake], path: Path, allow_code: Sequence[str]) -> Recipe:
    """Validate a recipe's values block by block, so that every mistake is found at once."""
    mistakes: list[Mistake] = []
    found = dict(raw)
    # What is wrong in a block is told by the block; an empty one stands in for it, so that the rest is still checked.
    method, stages = _method(found.get("method"), places, mistakes, allow_code)
    if "method" in found:
        found["method"] = method or Config()
    found["schedule"] = {} if stages is None else _schedule(found.get("schedule"), stages, places, mistakes)
    _architecture(found, places, path, mistakes)
    _suites(found, places, path, mistakes)
    _state_names(found, places, mistakes)
    try:
        recipe = Recipe.model_validate(found)
    except ValidationError as error:
        mistakes += _located(error, (), Recipe, places)
    if mistakes:
        raise RecipeError(mistakes)
    return recipe


def _method(
    given: Any, places: Mapping[Path_, Mistake], mistakes: list[Mistake], allow_code: Sequence[str]
) -> tuple[Config | None, Mapping[str, Schedule | None] | None]:
    if not isinstance(given, Mapping):
        if given is not None:
            mistakes.append(_at(places, ("method",), f"found {_describe(given)}; expected a map with a name"))
        return None, None
    name = given.get("name")
    if not isinstance(name, str):
        known = ", ".join(lookup.names("methods"))
        mistakes.append(_at(places, ("method", "name"), f"method: a name is missing; expected one of {known}"))
        return None, None
    try:
        module = lookup.lookup("methods", name, allow_code=tuple(allow_code))
    except lookup.LookupFailed as error:
        mistakes.append(_at(places, ("method", "name"), str(error)))
        return None, None
    try:
        return module.Config.model_validate(given), module.STAGES
    except ValidationError as error:
        mistakes += _located(error, ("method",), module.Config, places)
        return None, module.STAGES


def _schedule(
    given: Any, stages: Mapping[str, Schedule | None], places: Mapping[Path_, Mistake], mistakes: list[Mistake]
) -> dict[str, Schedule | None]:
    """Each stage of the method: what the recipe gives, laid over the method's default."""
    if given is None:
        return dict(stages)
    if not isinstance(given, Mapping):
        mistakes.append(_at(places, ("schedule",), f"found {_describe(given)}; expected a map of stages"))
        return dict(stages)
    for name in given:
        if name not in stages:
            mistakes.append(
                _at(
                    places,
                    ("schedule", name, "key"),
                    f"unknown stage {name!r}{_near(name, stages)}; the method has {_list(stages)}",
                )
            )
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
                _at(places, ("schedule", name), f"found {_describe(own)}; expected a map, or null to leave it out")
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
            mistakes += _located(error, ("schedule", name), Schedule, places)
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        found[key] = _over(below[key], value) if both else value
    return found


def _architecture(found: dict[str, Any], places: Mapping[Path_, Mistake], path: Path, mistakes: list[Mistake]) -> None:
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
        mistakes.append(_at(places, where, f"no such file {file}{hint}"))
    except (OSError, UnicodeDecodeError, ValueError, AttributeError, TypeError) as error:
        mistakes.append(_at(places, where, f"{file}: {error}"))
    if isinstance(found["model"]["architecture"], str):
        found["model"] = {k: v for k, v in model.items() if k != "architecture"}


def load_suite(name: str, recipe: Path) -> Suite:
    """A suite by its name under recipes/suites, or by a path beside the recipe. Raises RecipeError."""
    path, _ = find_recipe(f"suites/{name}") if not name.endswith(".yaml") else find_recipe(name, beside=recipe.parent)
    return read_suite(path)


def read_suite(path: Path) -> Suite:
    """A suite from its file. Raises RecipeError with every mistake of the file."""
    raw, places, _ = read_yaml(path, _shown(path))
    mistakes: list[Mistake] = []
    evals: list[Config] = []
    given = raw.get("evals")
    for index, entry in enumerate(given if isinstance(given, tuple) else ()):
        at: Path_ = ("evals", index)
        name = entry.get("eval") if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            mistakes.append(_at(places, at, f"expected a map with `eval:`, one of {', '.join(lookup.names('evals'))}"))
            continue
        try:
            config = lookup.lookup("evals", name).Config
            evals.append(config.model_validate(entry))
        except lookup.LookupFailed as error:
            mistakes.append(_at(places, (*at, "eval"), str(error)))
        except ValidationError as error:
            mistakes += _located(error, at, config, places)
    try:
        suite = Suite.model_validate({**raw, "evals": tuple(evals) if isinstance(given, tuple) and evals else given})
    except ValidationError as error:
        if not mistakes:
            mistakes += _located(error, (), Suite, places)
    if mistakes:
        raise RecipeError(mistakes)
    return suite


def _suites(found: dict[str, Any], places: Mapping[Path_, Mistake], path: Path, mistakes: list[Mistake]) -> None:
    evaluation = found.get("eval")
    if not isinstance(evaluation, Mapping) or not isinstance(evaluation.get("suites"), tuple):
        return
    suites: list[Suite] = []
    for index, name in enumerate(evaluation["suites"]):
        at = ("eval", "suites", index)
        if isinstance(name, Suite):
            suites.append(name)
        elif not isinstance(name, str):
            mistakes.append(_at(places, at, f"found {_describe(name)}; expected the name of a suite"))
        else:
            try:
                suites.append(load_suite(name, path))
            except RecipeError as error:
                if all(m.text.startswith("no such recipe") for m in error.mistakes):
                    known = sorted(p.stem for r in (CHECKOUT, INSTALLED) for p in (r / "suites").glob("*.yaml"))
                    mistakes.append(_at(places, at, f"no suite {name!r}{_near(name, known)}; there are {_list(known)}"))
                else:
                    mistakes += error.mistakes
    if not suites and evaluation["suites"]:
        suites.append(Suite(name="stand-in", evals=(Config(),)))
    found["eval"] = {**evaluation, "suites": tuple(suites)}


def _state_names(found: Mapping[str, Any], places: Mapping[Path_, Mistake], mistakes: list[Mistake]) -> None:
    """Names in eval.states and in what a stage's validation watches."""
    evaluation = found.get("eval")
    states = evaluation.get("states") if isinstance(evaluation, Mapping) else None
    for index, entry in enumerate(states if isinstance(states, tuple) else ()):
        name, at = entry, ("eval", "states", index)
        if isinstance(entry, (Mapping, StateOf)):
            name = entry.of if isinstance(entry, StateOf) else entry.get("of", "hybrid")
            at = ("eval", "states", index, "of")  # type: ignore[assignment]
        if isinstance(name, str) and name not in NAMES:
            mistakes.append(_at(places, at, f"unknown state {name!r}{_near(name, NAMES)}; states are {_list(NAMES)}"))
    schedule = found.get("schedule")
    for stage, value in schedule.items() if isinstance(schedule, Mapping) else ():
        if isinstance(value, Schedule) and value.validation:
            for index, watch in enumerate(value.validation.watch):
                at_watch = ("schedule", stage, "validation", "watch", index, "state")
                if watch.state not in (*NAMES, "transfer") or watch.state == "teacher":
                    hint = _near(watch.state, NAMES)
                    text = f"cannot watch the state {watch.state!r}{hint}; states are transfer, {_list(NAMES[1:])}"
                    mistakes.append(_at(places, at_watch, text))


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
            mistakes.append(_at(loaded.places, ("grid", axis, "key"), problem))
        if not values:
            mistakes.append(_at(loaded.places, ("grid", axis), "found an empty list; expected the values of the axis"))
    if mistakes:
        raise RecipeError(mistakes)
    last = [axis.rpartition(".")[2] for axis in grid]
    short = {axis: end if last.count(end) == 1 else axis for axis, end in zip(grid, last, strict=True)}
    found = []
    for choice in itertools.product(*(enumerate(values) for values in grid.values())):
        point = {axis: value for axis, (_, value) in zip(grid, choice, strict=True)}
        raw = {k: v for k, v in loaded.raw.items() if k != "grid"}
        places = dict(loaded.places)
        for axis, (index, value) in zip(grid, choice, strict=True):
            path = tuple(axis.split("."))
            raw = _set(raw, path, value)
            places[path] = loaded.places.get(("grid", axis, index), loaded.places[()])
            places[(*path, "key")] = places[path]
        label = ",".join(f"{short[axis]}={_label(value)}" for axis, value in point.items())
        raw["name"] = f"{loaded.recipe.name}/{label}"
        try:
            recipe = _build(raw, places, loaded.path, allow_code)
        except RecipeError as error:
            mistakes += error.mistakes
            continue
        found.append(replace(loaded, recipe=recipe, point=point, raw=raw, places=places))
    if mistakes:
        raise RecipeError(mistakes)
    return tuple(found)


def _set(values: Mapping[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    head, *rest = path
    found = dict(values)
    below = found.get(str(head))
    found[str(head)] = _set(below if isinstance(below, Mapping) else {}, tuple(rest), value) if rest else value
    return found


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
        if part not in known or axis in ("name", "grid", "extends"):
            before = ".".join(axis.split(".")[:depth]) or "a recipe"
            return f"{axis!r} is no field: {before} has no {part!r}{_near(part, known)}"
        here = here[part] if isinstance(here, Mapping) else getattr(here, part)
    return None


# --- saying what is wrong ---------------------------------------------------------------------------------------------


def _located(
    error: ValidationError, prefix: Path_, model: type[BaseModel], places: Mapping[Path_, Mistake]
) -> Iterator[Mistake]:
    """pydantic's errors with their lines; one mistake may come from several branches of a union: the deepest counts."""
    told: dict[Path_, list[str]] = {}
    for each in error.errors(include_url=False):
        path = (*prefix, *_real(each["loc"], prefix, places))
        told.setdefault(path, []).append(_say(each, model))
    paths = list(told)
    for path, texts in told.items():
        if any(p != path and p[: len(path)] == path for p in paths):
            continue
        unknown = any(t.startswith("unknown") for t in texts)
        place = (*path, "key") if unknown and (*path, "key") in places else path
        field_name = ".".join(str(p) for p in path)
        text = " or ".join(dict.fromkeys(texts))
        yield _at(places, place, f"{field_name}: {text}" if field_name else text)


def _real(loc: Sequence[str | int], prefix: Path_, places: Mapping[Path_, Mistake]) -> Path_:
    """The loc without the tags of unions that pydantic puts into it."""
    found: Path_ = ()
    for index, part in enumerate(loc):
        rest_known = (*prefix, *found, part) in places or (*prefix, *found, part, "key") in places
        tag = index + 1 < len(loc) or not isinstance(part, str) or not re.fullmatch(r"[a-z_]+|[a-z-]+", part)
        if rest_known or not tag:
            found = (*found, part)
        elif isinstance(part, str) and index + 1 < len(loc):
            nxt = loc[index + 1]
            if (
                (*prefix, *found, nxt) not in places
                and (*prefix, *found, nxt, "key") not in places
                and index + 2 < len(loc)
            ):
                continue
    return found


def _say(error: Any, model: type[BaseModel]) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx") or {}
    name = str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        known = _fields_at(model, error["loc"][:-1])
        return f"unknown key{_near(name, known)}; fields here: {_list(known)}" if known else "unknown key"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return f"found {_describe(given)}; expected {context.get('expected')}{_near(str(given), choices)}"
    if kind == "bool_type":
        return f"found {_describe(given)}; expected true or false"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        choices = re.findall(r"'([^']*)'", str(context.get("expected_tags", "")))
        tag = str(context.get("tag", ""))
        return (
            f"found {tag!r}; expected one of {_list(choices)}{_near(tag, choices)}"
            if tag
            else f"needs {context.get('discriminator')}"
        )
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"found {_describe(given)}; expected a map of fields"
    if kind == "tuple_type":
        return f"found {_describe(given)}; expected a list"
    if kind == "too_short":
        return "found an empty list; expected at least one entry"
    expected = str(error["msg"]).removeprefix("Input should be ")
    return f"found {_describe(given)}; expected {expected}"


def _fields_at(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Names of the fields of the model that `loc` leads to from `model`; of all models of a union."""
    here: list[type[BaseModel]] = [model]
    for part in loc:
        following: list[type[BaseModel]] = []
        for each in here:
            if isinstance(part, str) and part in each.model_fields:
                following += _models(each.model_fields[part].annotation)
        here = following or here
    return sorted({name for each in here for name in each.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [m for part in get_args(annotation) for m in _models(part)]


def _at(places: Mapping[Path_, Mistake], path: Path_, text: str) -> Mistake:
    """A mistake at a path, or at the nearest place above it that the file has."""
    here = path
    while here not in places and here:
        here = here[:-1]
    return replace(places[here], text=text)


def _near(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, [str(k) for k in known], 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _list(names: Any) -> str:
    return ", ".join(str(n) for n in names)


def _describe(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "nothing"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "a map"
    return str(value)
