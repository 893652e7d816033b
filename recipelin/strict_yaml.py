"""YAML with nothing surprising: each value with its place, and every mistake as file:line:column (no torch)."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20  # bytes of a file; the longest of ours has a few thousand
DEEPEST = 40  # levels of nesting
MOST_NODES = 20_000  # after aliases are followed
MOST_DIGITS = 300  # of a number; Python itself refuses to read whole ones above 4,300

Where = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Mistake:
    """One thing that is wrong, and where; line 0: the file as a whole."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        place = f":{self.line}:{self.column}" if self.line else ""
        return f"{self.file}{place}: {self.text}"


class RecipeError(ValueError):
    """All mistakes of a recipe, a suite or a table spec, in the order of its lines."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(sorted(set(mistakes)))
        super().__init__("\n".join(map(str, self.mistakes)))


_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?")


@dataclass(frozen=True)
class _Reader:
    """Turns YAML nodes into values and remembers where each one stands."""

    file: str
    places: dict[Where, Mistake]
    mistakes: list[Mistake]
    decimals: bool

    def at(self, node: yaml.Node, text: str = "") -> Mistake:
        return Mistake(self.file, node.start_mark.line + 1, node.start_mark.column + 1, text)

    def wrong(self, node: yaml.Node, text: str) -> None:
        self.mistakes.append(self.at(node, text))

    def value(self, node: yaml.Node, path: Where, budget: list[int], above: tuple[yaml.Node, ...] = ()) -> Any:
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
        if wrong := re.search("[\0\ud800-\udfff]", text):
            self.wrong(node, f"found the character \\u{ord(wrong[0]):04x}; no name, path or text holds one")
            return text
        if node.style is not None:
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _NUMBER.fullmatch(text):
            if len(text) > MOST_DIGITS:
                self.wrong(node, f"found a number of {len(text):,} characters; expected at most {MOST_DIGITS}")
                return text
            digits = text.replace("_", "")
            if re.fullmatch(r"[-+]?\d+", digits):
                return int(digits)
            return Decimal(digits) if self.decimals else float(digits)
        if text.lower() in (".inf", "-.inf", "+.inf", ".nan"):
            self.wrong(node, f"found {text}; expected a finite number")
        return text


class _Loader(yaml.SafeLoader):
    """Every plain scalar stays text here: `_Reader.scalar` decides what is a number."""


_Loader.yaml_implicit_resolvers = {}

# PyYAML's words for the mistakes that are made by hand, in words for the hand that made them.
_PLAIN = {
    "mapping values are not allowed here": "found a second `: ` on this line, or a field below a value; quote the text, or "
    "mend the indentation",
    "expected <block end>, but found": "this line is not indented as the lines that it belongs to",
    "could not find expected ':'": "found a line without `: `; expected `field: value`",
    "found unexpected end of stream": "found quotes that open here and never close",
    "found another document": "found a second document (`---`); expected one",
    "but found another document": "found a second document (`---`); expected one",
    "found character": "found a character that begins no plain text; quote the text",
    "found undefined alias": "found `*`, which refers to an anchor `&` that is not there; quote a text that begins with `*`",
    "found incompatible YAML document": "found another version of YAML; leave the line %YAML out",
}


def read_yaml(
    path: Path,
    shown: str | None = None,
    *,
    kind: str = "a recipe (recipelin schema shows its fields)",
    decimals: bool = False,
) -> tuple[dict[str, Any], dict[Where, Mistake], str]:
    """(values, places, text) of a YAML file that holds a map; `kind` says what it should be.

    With `decimals`, a number with a point keeps its digits: 78.40 is Decimal("78.40"). Raises RecipeError.
    """
    file = shown or str(path)
    text = read_text(path, file)
    return *parsed(text, file, kind=kind, decimals=decimals), text


def parsed(text: str, file: str, *, kind: str, decimals: bool = False) -> tuple[dict[str, Any], dict[Where, Mistake]]:
    """(values, places) of the YAML text of `file`, as for `read_yaml`. Raises RecipeError."""
    reader = _Reader(file, {}, [], decimals)
    try:
        node = _composed(text)
        _refuse_tags(node, reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "not YAML"
        if error.context_mark and problem.startswith("found unexpected end of stream"):
            mark = error.context_mark  # where the quotes open, not the end of the file
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = next((plain for start, plain in _PLAIN.items() if problem.startswith(start)), problem)
        lines = text.splitlines()
        if "\\t" in problem or (line <= len(lines) and "\t" in lines[line - 1][: column + 1]):
            problem = "found a tab; indent with spaces"
        raise RecipeError([Mistake(file, line, column, problem)]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        problem = f"found the control character U+{ord(text[error.position]):04X}; expected text"
        raise RecipeError([Mistake(file, line, column, problem)]) from error
    except RecursionError as error:
        raise RecipeError([Mistake(file, 1, 1, f"nested more than {DEEPEST} levels deep")]) from error
    if node is None:
        raise RecipeError([Mistake(file, 1, 1, f"the file is empty; expected {kind}")])
    if not isinstance(node, yaml.MappingNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else f"the text {node.value[:40]!r}"
        raise RecipeError([reader.at(node, f"found {found}; expected a map of fields, as {kind} is")])
    values = reader.value(node, (), [MOST_NODES])
    if reader.mistakes:
        raise RecipeError(reader.mistakes)
    return values, reader.places


@lru_cache(maxsize=256)
def _composed(text: str) -> yaml.Node | None:
    """The nodes of a text, which nothing changes: points of grids read the same suites, hundreds of times."""
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


def read_text(path: Path, file: str) -> str:
    """The text of a file that messages name `file`. Raises RecipeError: not there, not readable, too large, not UTF-8."""
    if os.path.isdir(path):
        raise RecipeError([Mistake(file, 0, 0, "is a folder; expected a YAML file")])
    if not os.path.exists(path):
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RecipeError([Mistake(file, 0, 0, f"no such file{hint}")])
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise RecipeError([Mistake(file, 0, 0, f"has {size:,} bytes; expected at most {LARGEST:,}")])
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError([Mistake(file, 0, 0, f"cannot be read: {error.strerror}")]) from error
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
            raise RecipeError([reader.at(here, f"found the tag {here.tag}; expected plain values")])
        if isinstance(here, yaml.SequenceNode):
            todo += here.value
        elif isinstance(here, yaml.MappingNode):
            todo += [n for pair in here.value for n in pair]
