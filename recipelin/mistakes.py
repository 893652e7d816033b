"""From pydantic's errors to sentences: what was found, what was expected, the nearest valid name, and where (no torch)."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .strict_yaml import Mistake, Where


class PlanError(ValueError):
    """A recipe that is well formed but cannot be carried out; the message says what to change, and at `place` where."""

    def __init__(self, text: str, place: Mistake | None = None) -> None:
        self.located = place is not None
        super().__init__(str(replace(place, text=text)) if place else text)


def located(
    error: ValidationError, prefix: Where, model: type[BaseModel], places: Mapping[Where, Mistake]
) -> Iterator[Mistake]:
    """pydantic's errors with their lines; one mistake may come from several branches of a union: the deepest counts."""
    told: dict[Where, list[str]] = {}
    for each in error.errors(include_url=False):
        loc = each["loc"]
        absent = bool(loc) and (each["type"] == "missing" or loc[-1] in _fieldsat(model, loc[:-1]))
        path = (*prefix, *_real(loc, prefix, places, absent=absent))
        told.setdefault(path, []).append(_say(each, model))
    paths = list(told)
    for path, texts in told.items():
        if any(p != path and p[: len(path)] == path for p in paths):
            continue
        unknown = any(t.startswith("unknown") for t in texts)
        place = (*path, "key") if unknown and (*path, "key") in places else path
        field_name = ".".join(str(p) for p in path)
        found, expected, _ = texts[0].partition("; expected ")
        if expected and all(t.startswith(found + expected) for t in texts):  # branches of a union: told once
            texts = [texts[0], *(t.removeprefix(found + expected) for t in texts[1:])]
        text = " or ".join(dict.fromkeys(texts))
        yield placed(places, place, f"{field_name}: {text}" if field_name else text)


def _real(loc: Sequence[str | int], prefix: Where, places: Mapping[Where, Mistake], *, absent: bool) -> Where:
    """The loc without the tags of unions that pydantic puts into it; its end counts even if it is `absent` in the file."""
    found: Where = ()
    for index, part in enumerate(loc):
        here = (*prefix, *found, part)
        if here in places or (*here, "key") in places or (absent and index + 1 == len(loc)):
            found = (*found, part)
    return found


def _say(error: Any, model: type[BaseModel]) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx") or {}
    name = str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        known = _fieldsat(model, error["loc"][:-1])
        if inside := _inside(_modelsat(model, error["loc"][:-1]), name):
            return f"unknown key; {inside}: has a field of that name. Fields here: {listed(known)}"
        return f"unknown key{among(name, known, 'fields here:')}" if known else "unknown key"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return f"found {describe(given)}; expected {context.get('expected')}{nearest(str(given), choices)}"
    if kind == "bool_type":
        return f"found {describe(given)}; expected true or false"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        choices = re.findall(r"'([^']*)'", str(context.get("expected_tags", "")))
        tag = str(context.get("tag", ""))
        return (
            f"found {tag!r}; expected one of {listed(choices)}{nearest(tag, choices)}"
            if tag
            else f"needs {context.get('discriminator')}"
        )
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"found {describe(given)}; expected a map of fields"
    if kind == "tuple_type":
        return f"found {describe(given)}; expected a list"
    if kind == "too_short":
        return "found an empty list; expected at least one entry"
    if kind == "string_too_long":
        return f"found {len(given)} characters; expected at most {context.get('max_length')}"
    if kind == "string_pattern_mismatch":
        signs = re.search(r"\[a-z0-9([^]]*)\]\*", str(context.get("pattern")))
        words = f"small letters, digits and {' '.join(signs[1])}, a letter or digit first" if signs else error["msg"]
        return f"found {describe(given)}; expected {words}"
    if kind == "string_type" and isinstance(given, (int, float)):
        return f"found {describe(given)}; expected text: put it in quotes"
    expected = _EXPECTED.get(kind) or str(error["msg"]).removeprefix("Input should be ")
    return f"found {describe(given)}; expected {expected}"


# pydantic's words where plainer ones say more.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "is_instance_of": "a number",  # Decimal, the one class that a schema names
}


def _inside(models: Sequence[type[BaseModel]], name: str) -> str:
    """The nearest fields of the models whose maps have a field of that name, `a.b`; empty where there are none or several."""
    at: list[tuple[str, type[BaseModel]]] = [("", model) for model in models]
    known = set(models)
    while at:
        below = [
            (f"{path}.{field}".lstrip("."), each)
            for path, model in at
            for field, info in model.model_fields.items()
            for each in _models(info.annotation)
        ]
        found = {path for path, model in below if name in model.model_fields}
        if found:
            return found.pop() if len(found) == 1 else ""
        at = [(path, model) for path, model in below if model not in known]
        known |= {model for _, model in at}
    return ""


def _fieldsat(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Names of the fields of the model that `loc` leads to from `model`; of all models of a union without a tag."""
    return sorted({name for each in _modelsat(model, loc) for name in each.model_fields})


def _modelsat(model: type[BaseModel], loc: Sequence[str | int]) -> list[type[BaseModel]]:
    here: list[type[BaseModel]] = [model]
    for part in loc:
        following: list[type[BaseModel]] = []
        for each in here:
            if isinstance(part, str) and part in each.model_fields:
                following += _models(each.model_fields[part].annotation)
        here = following or [m for m in here if part in _tags(m)] or here
    return here


def _tags(model: type[BaseModel]) -> list[str]:
    """What tells a model from the others of its union: the values of its Literal fields."""
    return [tag for field in model.model_fields.values() for tag in get_args(field.annotation) if isinstance(tag, str)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [m for part in get_args(annotation) for m in _models(part)]


def placed(places: Mapping[Where, Mistake], path: Where, text: str) -> Mistake:
    """A mistake at a path, or at the nearest place above it that the file has."""
    here = path
    while here not in places and here:
        here = here[:-1]
    return replace(places[here], text=text)


def nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, [str(k) for k in known], 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def among(name: str, known: Any, lead: str = "there are", *, also: str = "") -> str:
    """The end of a message on an unknown name: the nearest one, then all of them."""
    hint = nearest(name, known)
    start = f"{hint} {lead[0].upper()}{lead[1:]}" if hint else f"; {lead}"
    return f"{start} {listed(known) or 'none'}{also}"


def listed(names: Any) -> str:
    return ", ".join(str(n) for n in names)


def describe(value: Any) -> str:
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
