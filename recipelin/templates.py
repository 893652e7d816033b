"""From the columns of a row to prompt and response: templates by name, or written out in the recipe (no torch)."""

import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .base import Config
from .mistakes import among


def _pieces(text: str) -> list[tuple[str, str | None]]:
    """(literal, column after it) pairs. Raises ValueError for braces that do not fit or hold more than a name."""
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; a brace itself is written twice") from error
    for _, column, specification, conversion in found:
        if column == "" or specification or conversion:
            raise ValueError(
                f"{text!r}: braces hold the name of a column and nothing else; a brace itself is written twice"
            )
    return [(literal, column) for literal, column, _, _ in found]


def _columns(text: str) -> list[str]:
    return [column for _, column in _pieces(text) if column is not None]


def _filled(text: str, row: Mapping[str, Any]) -> str:
    return "".join(
        literal + ("" if column is None else plain(row[column], column)) for literal, column in _pieces(text)
    )


def plain(value: Any, column: str) -> str:
    """A column's value as text; null is empty. Raises ValueError for what is no text or number."""
    if value is None:
        return ""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"column {column!r} holds a {type(value).__name__}; expected text")


class Template(Config):
    """Texts with `{column}` where a row's column goes; `{{` and `}}` are braces.

    Prompt and response are tokenised apart: SentencePiece begins the response, too, with its space. Each document gets BOS and
    EOS where the tokenizer has them, also of a tokenizer that adds none by itself.
    Of several prompts the first is taken whose own columns (those that another prompt lacks) are all filled in the row,
    else the last: so a column may be optional. A null counts as empty.
    Sample YAML: `{prompt: "Question: {question}\\nAnswer:", response: " {answer}"}`, or a name: `alpaca`.
    """

    prompt: Annotated[
        tuple[str, ...], Field(min_length=1), BeforeValidator(lambda x: (x,) if isinstance(x, str) else x)
    ]
    response: str

    @field_validator("prompt", "response")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        for text in (value,) if isinstance(value, str) else value:
            _pieces(text)
        return value

    @model_validator(mode="after")
    def _has_columns(self) -> "Template":
        if not _columns(self.response):
            raise ValueError(f"the response {self.response!r} names no column; expected one as {{output}}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that a row must have, in order of appearance."""
        return tuple(dict.fromkeys(c for text in (*self.prompt, self.response) for c in _columns(text)))

    def render(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, response) of a row that has all columns. Raises ValueError for a column that is no text or number."""
        shared = set.intersection(*(set(_columns(text)) for text in self.prompt))
        chosen = next(
            (text for text in self.prompt if all(row[c] not in (None, "") for c in _columns(text) if c not in shared)),
            self.prompt[-1],
        )
        return _filled(chosen, row), _filled(self.response, row)


class Chat(Config):
    """Rows that hold a conversation: a column with a list of turns, which the tokenizer's own chat template writes.

    With `loss: response` the assistant's answers carry loss, each with the token that ends its turn, and nothing else does.
    A turn's other keys go to the template; a thought (`reasoning_content`, `thinking`) that it writes before an answer is said
    with it, what the template adds of its own is not. Templates that write a date get 26 Jul 2024, Llama 3.2's own.
    (sft.py of arXiv 2606.16429 scores the whole turn: the header with the role and the line's end behind it, too.)
    Sample YAML: `{column: messages}`, `{column: conversations, role: from, content: value, user: human, assistant: gpt}`
    """

    column: str = "messages"
    role: str = Field("role", description="key of who speaks")
    content: str = Field("content", description="key of what is said")
    system: str = Field("system", description="what the rows call it; other roles keep their names")
    user: str = Field("user", description="what the rows call it")
    assistant: str = Field("assistant", description="what the rows call it")

    @model_validator(mode="after")
    def _told_apart(self) -> "Chat":
        for names in (("role", "content"), ("system", "user", "assistant")):
            found = [getattr(self, name) for name in names]
            if len(set(found)) < len(found):
                given = ", ".join(f"{name}: {value}" for name, value in zip(names, found, strict=True))
                raise ValueError(f"found {given}; expected a name of its own for each")
        return self


# Stanford Alpaca's two prompts, with and without an input, as LoLCATs trains on them (facts/peers.md §A.5).
TEMPLATES: Mapping[str, Template] = {
    "alpaca": Template(
        prompt=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:\n",
        ),
        response="{output}",
    )
}


def _named(given: object) -> object:
    if not isinstance(given, str):
        return given
    if given not in TEMPLATES:
        raise ValueError(
            f"no template {given!r}{among(given, TEMPLATES, 'expected', also=', or a map with prompt and response')}"
        )
    return TEMPLATES[given]


NamedTemplate = Annotated[Template, BeforeValidator(_named, json_schema_input_type=Literal["alpaca"] | Template)]


def name_of(template: Template) -> str:
    """The template's name, or `own`: for the plan."""
    return next((name for name, known in TEMPLATES.items() if known == template), "own")
