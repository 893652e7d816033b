"""A conversation as the tokenizer's own chat template writes it, and which of its tokens the assistant says (no torch)."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from .mistakes import nearest
from .sources import Rows, SourceError
from .templates import Chat

Turn = tuple[str, str]
"""(role, content)"""
ASSISTANT = "assistant"
_MARK = re.compile("\ue000(\\d+)\ue001")  # of Unicode's private use: in no text, and no template touches it


def refuse_without_template(sources: Iterable[object], tokenizer: Any) -> None:
    """Raises SourceError where a source of conversations meets a tokenizer that has no chat template."""
    for source in sources:
        if isinstance(source, Rows) and source.chat and tokenizer.chat_template is None:
            raise SourceError(
                f"data: chat (column {source.chat.column!r}) needs the tokenizer's chat template, and this one has none; base "
                "models often lack it: take the instruct model's, or a `template` with prompt and response"
            )


def written(turns: Sequence[Turn], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation, and [start, end) of what the assistant says in it, in characters.

    The template is asked once more with a mark in place of each answer: what a template adds to an answer (Qwen3: an empty
    thought, and only in the last turn) is none of it. Raises ValueError where the template refuses the turns (roles that do
    not alternate), or changes an answer by more than the white space at its ends.
    """
    whole = _render(turns, tokenizer)
    marked = [(r, f"\ue000{i}\ue001" if r == ASSISTANT else c) for i, (r, c) in enumerate(turns)]
    pieces = _MARK.split(_render(marked, tokenizer))  # text, number, text, number, ..., text
    answers = [i for i, (role, _) in enumerate(turns) if role == ASSISTANT]
    if [int(n) for n in pieces[1::2]] != answers:
        raise ValueError("the tokenizer's chat template leaves answers out or moves them")
    spans = []
    place = len(pieces[0])
    fits = whole.startswith(pieces[0])
    for number, after in zip(answers, pieces[2::2], strict=True):
        content = turns[number][1]
        found = next((c for c in (content, content.strip()) if whole.startswith(c + after, place)), None)
        if found is None or not fits:
            raise ValueError(f"the tokenizer's chat template changes turn {number}, so that its tokens cannot be told")
        spans.append((place, place + len(found)))
        place += len(found) + len(after)
    if place != len(whole):
        raise ValueError("the tokenizer's chat template writes other text around these answers than around others")
    return whole, spans


def said(encoding: Any, text: str, spans: Sequence[tuple[int, int]], special: frozenset[int]) -> list[tuple[int, int]]:
    """[first, end) of the tokens of each span, with the special token that ends the turn: what a model must learn to say.

    `encoding`: of the whole text, by the tokenizers library. A token that begins before a span is none of it.
    """
    starts = [start for start, _ in encoding.offsets]
    found = []
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        closing = next((i for i in range(last, len(starts)) if encoding.ids[i] in special), None)
        if closing is not None and not text[end : starts[closing]].strip():
            last = closing + 1
        found.append((first, last))
    return found


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text: ends of turns and their like."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def turns_of(value: object, chat: Chat) -> tuple[Turn, ...]:
    """The turns of a row's column, as `Chat` says. Raises ValueError for what is no list of turns in text."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"column {chat.column!r} holds {'no turn' if value == [] else f'a {type(value).__name__}'}; expected turns"
        )
    found = []
    names = {chat.system: "system", chat.user: "user", chat.assistant: ASSISTANT}
    for number, turn in enumerate(value):
        for key in (chat.role, chat.content):
            keys = list(turn) if isinstance(turn, dict) else []
            if key not in keys:
                raise ValueError(f"column {chat.column!r}, turn {number}: no {key!r}{nearest(key, keys)}")
            if not isinstance(turn[key], str):
                raise ValueError(
                    f"column {chat.column!r}, turn {number}: {key!r} holds a {type(turn[key]).__name__}; expected text"
                )
        found.append((names.get(turn[chat.role], turn[chat.role]), turn[chat.content]))
    return tuple(found)


def _render(turns: Sequence[Turn], tokenizer: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        text: str = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the turns: {error}") from error
    return text
