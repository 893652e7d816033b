"""A conversation as the tokenizer's own chat template writes it, and which of its tokens the assistant says (no torch)."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from .mistakes import listed, nearest
from .sources import Rows, SourceError
from .templates import Chat

ASSISTANT = "assistant"
ROLES = ("system", "user", ASSISTANT, "tool")  # what published templates know
THOUGHTS = ("reasoning_content", "thinking")  # keys by which they know what an assistant thinks before it answers
DATE = "26 Jul 2024"  # Llama 3.2's own where it is told none: else tokens would hang on the day
_COMMON = {"human": "user", "prompter": "user", "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT}
_MARK = re.compile("\ue000(\\d+)\ue001")  # of Unicode's private use: in no text, and no template touches it


class Turn(NamedTuple):
    """One turn of a conversation; `more`: its other keys, for the template to write or to leave."""

    role: str
    content: str
    more: Mapping[str, Any] = MappingProxyType({})


def refuse_without_template(sources: Iterable[object], tokenizer: Any) -> None:
    """Raises SourceError where a source of conversations meets a tokenizer that has no chat template."""
    for source in sources:
        if isinstance(source, Rows) and source.chat and tokenizer.chat_template is None:
            raise SourceError(
                f"data: chat (column {source.chat.column!r}) needs the tokenizer's chat template, and this one has none; base "
                "models often lack it: take the instruct model's, or a `template` with prompt and response"
            )


def written(turns: Sequence[Turn], tokenizer: Any) -> str:
    """The whole conversation. Raises ValueError where the template refuses the turns (roles that do not alternate), or
    leaves out what another than the assistant says."""
    whole = _render(turns, tokenizer)
    for number, turn in enumerate(turns):
        if turn.role == ASSISTANT or turn.content.strip() in whole:
            continue
        marked = [*turns[:number], turn._replace(content=_mark(number)), *turns[number + 1 :]]
        if _mark(number) not in _render(marked, tokenizer):  # else it is there, written in another way
            raise ValueError(
                f"the tokenizer's chat template leaves out turn {number}, of role {turn.role!r}: leave it out of the rows if it "
                "is to be, or take another template"
            )
    return whole


def answers(whole: str, turns: Sequence[Turn], tokenizer: Any) -> list[tuple[int, int]]:
    """[start, end) of each of the assistant's answers in what is `written`, in characters, from its thought on if it has one.

    The template is asked once more with a mark in place of each: what a template adds to an answer (Qwen3: an empty thought,
    and only in the last turn) is none of it. Raises ValueError where it changes an answer by more than the white space at its
    ends, or writes calls of tools, which no mark can stand for.
    """
    texts = [(i, key, text) for i, turn in enumerate(turns) if turn.role == ASSISTANT for key, text in _texts(turn)]
    marks = {(i, key): _mark(number) for number, (i, key, _) in enumerate(texts)}
    marked = [
        Turn(turn.role, marks.get((i, ""), turn.content), {k: marks.get((i, k), v) for k, v in turn.more.items()})
        for i, turn in enumerate(turns)
    ]
    pieces = _MARK.split(_render(marked, tokenizer))  # text, number, text, number, ..., text
    numbers = [int(n) for n in pieces[1::2]]
    contents = [number for number, (_, key, _) in enumerate(texts) if not key]
    if sorted(set(numbers)) != numbers or [n for n in numbers if n in contents] != contents:
        raise ValueError("the tokenizer's chat template leaves answers out or moves them")
    found: dict[int, tuple[int, int]] = {}
    place = len(pieces[0])
    fits = whole.startswith(pieces[0])
    for number, after in zip(numbers, pieces[2::2], strict=True):
        turn, _, text = texts[number]
        said = next((c for c in _stripped(text) if whole.startswith(c + after, place)), None)
        if said is None or not fits:
            raise ValueError(f"the tokenizer's chat template changes turn {turn}, so that its tokens cannot be told")
        found[turn] = (found.get(turn, (place,))[0], place + len(said))
        place += len(said) + len(after)
    if place != len(whole):
        raise ValueError("the tokenizer's chat template writes other text around these answers than around others")
    _refuse_calls(whole, turns, tokenizer)
    return list(found.values())


def said(encoding: Any, text: str, spans: Sequence[tuple[int, int]], ends: frozenset[int]) -> list[tuple[int, int]]:
    """[first, end) of the tokens of each span, with the token of `ends` that closes the turn: what a model must learn to say.

    `encoding`: of the whole text, by the tokenizers library. A token that begins before a span is none of it, but for the
    template's spaces that a first word has taken into its own. Raises ValueError where no token closes an answer.
    """
    starts = [start for start, _ in encoding.offsets]
    found = []
    for start, end in spans:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        while first and encoding.offsets[first - 1][1] > start and not text[starts[first - 1] : start].strip(" "):
            first -= 1
        closing = next((i for i in range(last, len(starts)) if encoding.ids[i] in ends), None)
        if closing is None or text[end : starts[closing]].strip():
            behind = f"is {text[end : end + 20]!r}" if text[end:].strip() else "is nothing"
            raise ValueError(
                f"no token ends the answer {text[start:end][-20:]!r} (behind it {behind}), so that a model would never learn "
                "to stop: the tokenizer needs the token that its chat template writes there, or the template the EOS token"
            )
        found.append((first, closing + 1))
    return found


def ends_of_turns(tokenizer: Any) -> frozenset[int]:
    """Tokens that may end a turn: EOS, and those added to the vocabulary, special or not, that are more than white space."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return frozenset(added | {tokenizer.eos_token_id})


def probe(tokenizer: Any) -> str:
    """A small conversation as it is written today; of a template that takes none what it says: for keys of caches."""
    try:
        return _render((Turn("user", "a"), Turn(ASSISTANT, "b")), tokenizer)
    except ValueError as error:
        return str(error)


def turns_of(value: object, chat: Chat) -> tuple[Turn, ...]:
    """The turns of a row's column, as `Chat` says. Raises ValueError for what is no list of turns in text by known roles."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"column {chat.column!r} holds {'no turn' if value == [] else f'a {type(value).__name__}'}; expected turns"
        )
    found = []
    names = {chat.system: "system", chat.user: "user", chat.assistant: ASSISTANT}
    for number, turn in enumerate(value):
        where = f"column {chat.column!r}, turn {number}"
        if not isinstance(turn, dict):
            raise ValueError(
                f"{where}: a {type(turn).__name__}; expected a map with {chat.role!r} and {chat.content!r}"
            )
        for key in (chat.role, chat.content):
            if key not in turn:
                raise ValueError(f"{where}: no {key!r}, found {_quoted(turn) or 'no keys'}{nearest(key, list(turn))}")
            if not isinstance(turn[key], str):
                raise ValueError(f"{where}: {key!r} holds a {type(turn[key]).__name__}; expected text")
        # A table has every key in every turn, null where it was not given.
        more = {k: v for k, v in turn.items() if k not in (chat.role, chat.content) and v is not None}
        role: str = turn[chat.role]
        found.append(Turn(names.get(role, role), turn[chat.content], more))
    if unknown := list(dict.fromkeys(turn.role for turn in found if turn.role not in ROLES)):
        known = ", ".join(f"{_COMMON[r.lower()]}: {r}" for r in unknown if r.lower() in _COMMON)
        raise ValueError(
            f"column {chat.column!r}: unknown roles {_quoted(unknown)}, expected {listed(ROLES)}: say in `chat` what the "
            f"rows call them, as in {known or 'user: human, assistant: gpt'}"
        )
    return tuple(found)


def _quoted(names: Iterable[object]) -> str:
    return listed(map(repr, names))


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _texts(turn: Turn) -> list[tuple[str, str]]:
    """(key, text) of what an assistant says: its thoughts, and by no key its answer."""
    thoughts = [(k, v) for k in THOUGHTS if isinstance(v := turn.more.get(k), str) and v.strip()]
    return [*thoughts, ("", turn.content)]


def _stripped(text: str) -> list[str]:
    """As templates write a text: whole, or without the white space, or the ends of lines, on one side or both; longest first."""
    ways = {way(characters) for characters in (None, "\n") for way in (text.strip, text.lstrip, text.rstrip)}
    return sorted({text, *ways}, key=len, reverse=True)


def _refuse_calls(whole: str, turns: Sequence[Turn], tokenizer: Any) -> None:
    """Raises ValueError where the template writes what no text is: it would be said without loss, and the turn not end."""
    plain = [
        t._replace(more={k: v for k, v in t.more.items() if isinstance(v, str)}) if t.role == ASSISTANT else t
        for t in turns
    ]
    if plain != list(turns) and _render(plain, tokenizer) != whole:
        keys = listed(dict.fromkeys(k for t, p in zip(turns, plain, strict=True) for k in t.more if k not in p.more))
        raise ValueError(
            f"the tokenizer's chat template writes more of an answer than text ({keys}): loss is on text alone"
        )


def _render(turns: Sequence[Turn], tokenizer: Any) -> str:
    from jinja2.exceptions import TemplateError

    messages = [{**turn.more, "role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the tokenizer's chat template refuses the turns: {error}") from error
    return text
