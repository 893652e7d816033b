"""Rows of facts in text with questions at their end: exact in length, pure in their arguments (no torch)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .sources import Facts, Part, SourceError
from .spool import uncut
from .words import ADJECTIVES, CITIES, NOUNS

DIGITS = 5  # of a pass key; the first is not 0


@dataclass(frozen=True)
class Wording:
    """A fact and its question, each a line of text; the question ends in the fact's value."""

    fact: str
    question: str
    keys: tuple[str, ...]
    values: Callable[[np.random.Generator, int], tuple[str, ...]]
    """Those that may come, drawn; the number is of pass keys."""


WORDINGS: Mapping[str, Wording] = {
    "associative": Wording(
        "\nThe code of {key} is {value}.\n",
        "\nThe code of {key} is {value}.\n",
        NOUNS[0::2],
        lambda draw, _: NOUNS[1::2],
    ),
    "passkey": Wording(
        "\nThe pass key is {value}. Remember it.\n",
        "\nWhat is the pass key? The pass key is {value}.\n",
        ("",),
        lambda draw, count: tuple(
            str(n) for n in draw.choice(9 * 10 ** (DIGITS - 1), count, replace=False) + 10 ** (DIGITS - 1)
        ),
    ),
    "needle": Wording(
        "\nThe one thing to see in {key} is the {value}.\n",
        "\nWhat is the one thing to see in {key}? The one thing to see in {key} is the {value}.\n",
        CITIES,
        lambda draw, _: tuple(f"{a} {n}" for a in ADJECTIVES for n in draw.choice(NOUNS, 8, replace=False)),
    ),
}


@dataclass(frozen=True)
class _Copy:
    """What stands before a string and behind it, and before its copy; both lead to it in the same words."""

    fact: str
    end: str
    question: str


COPY = _Copy("\nThe list to remember is", ".\n", "\nWhat is the list? The list to remember is")


@dataclass(frozen=True)
class Question:
    """`answer`: position in the row of the first of `size` answer tokens; `fact`: position of the value's first token;
    `before`: questions asked earlier in the row."""

    id: str
    distance: int
    answer: int
    size: int
    fact: int
    before: int


@dataclass(frozen=True)
class Row:
    """`length` token ids, the answers included: it ends in the last answer."""

    ids: np.ndarray
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Layout:
    """Where values stand: every fact has `fact` tokens, its value at `head` .. `head + size`; a question alike."""

    fact: int
    head: int
    size: int
    question: int
    question_head: int
    lines: Callable[[np.random.Generator], tuple[list[list[int]], list[list[int]]]]
    """Facts and questions of a row, in one order, as token ids; fewer questions than facts."""


class Writer:
    """Writes rows of `length` tokens: facts somewhere in a text, their questions at the end, the answers included.

    `haystack`: token ids that fill what is neither fact nor question, from a random place of a text, or (`from_start`) from
    its first token; BOS and EOS are left out. `stem`: what the values are drawn by that rows then choose from, `numbers` of
    them for pass keys.
    Raises SourceError for a tokenizer, text, distance or number of pairs that does not fit.
    """

    def __init__(
        self,
        facts: Facts,
        tokenizer: Any,
        haystack: np.ndarray,
        *,
        part: Part,
        length: int,
        from_start: bool,
        stem: Sequence[int],
        numbers: int = 500,
    ) -> None:
        self.facts, self.tokenizer, self.haystack = facts, tokenizer, haystack
        self.part, self.length, self.from_start = part, length, from_start
        if facts.format == "copy":
            stated, self.layout = COPY.fact, _of_tokens(tokenizer, facts, haystack)
        else:
            wording = WORDINGS[facts.format]
            values = wording.values(np.random.default_rng(stem), numbers)
            stated, self.layout = wording.fact, _of_words(wording, tokenizer, facts, values)
        self.stated = stated.partition("{")[0].strip()  # what a fact begins with; the text between must not say it
        self.start = _start(tokenizer)
        tail = self.layout.question - self.layout.question_head - self.layout.size
        self.block = length - (facts.queries * self.layout.question - tail)  # where the questions begin
        self.answers = tuple(
            self.block + i * self.layout.question + self.layout.question_head for i in range(facts.queries)
        )

    def asked(self, asked: Sequence[tuple[int, int]], draw: np.random.Generator) -> Row:
        """Questions at the given (distance, item), in random order."""
        order, places = self._places(list(asked), draw)
        return self._row([f"{distance}-{item}" for distance, item in order], places, draw)

    def anywhere(self, draw: np.random.Generator) -> Row:
        """Every fact at a random place that is free: so all distances come that the row can hold."""
        return self._row([str(i) for i in range(self.facts.queries)], self._scattered([], draw), draw)

    def _row(self, ids: Sequence[str], places: Sequence[int], draw: np.random.Generator) -> Row:
        layout = self.layout
        facts, questions = layout.lines(draw)
        row = np.full(self.length, -1, dtype=np.int64)
        row[: len(self.start)] = self.start
        for place, fact in zip(places, facts, strict=True):
            row[place : place + layout.fact] = fact
        row[self.block :] = np.concatenate(questions)[: self.length - self.block]
        gaps = np.flatnonzero(row < 0)
        row[gaps] = self._between(len(gaps), draw)
        return Row(
            row,
            tuple(
                Question(
                    id=name,
                    distance=self.answers[i] - 1 - (places[i] + layout.head),
                    answer=self.answers[i],
                    size=layout.size,
                    fact=places[i] + layout.head,
                    before=i,
                )
                for i, name in enumerate(ids)
            ),
        )

    def _between(self, need: int, draw: np.random.Generator) -> np.ndarray:
        """So many tokens of the text."""
        if need > len(self.haystack):
            raise SourceError(
                f"retrieval, {self.facts.format}: the {self.part} part has {len(self.haystack)} tokens of text, "
                f"a row of {self.length} needs {need}"
            )
        marks = [
            t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if t is not None
        ]  # of where documents begin, end
        for _ in range(20):
            begin = 0 if self.from_start else int(draw.integers(0, len(self.haystack) - need + 1))
            between = np.asarray(self.haystack[begin : begin + 2 * need])
            between = between[~np.isin(between, marks)][:need]
            said = self.stated.lower() in " ".join(self.tokenizer.decode(between).lower().split())
            if len(between) == need and not said:
                return between
        why = f"says {self.stated!r} itself" if said else f"is shorter than {need} tokens"
        raise SourceError(f"retrieval, {self.facts.format}: the text {why}, wherever a row begins; take another")

    def _places(
        self, asked: list[tuple[int, int]], draw: np.random.Generator
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """The order of the questions, and where each fact of the row begins: the asked ones by their distance, the others at
        random where nothing is yet."""
        size, head, first = self.layout.fact, self.layout.head, len(self.start)
        least, most = self.answers[0] - 1 - (self.block - size + head), self.answers[-1] - 1 - head - first
        for distance, _ in asked:
            if not least <= distance <= most:
                raise SourceError(
                    f"retrieval, {self.facts.format}: distance {distance} does not fit a row of {self.length} tokens with "
                    f"this tokenizer; {least} to {most} do"
                )
        for _ in range(200):
            order = [asked[i] for i in draw.permutation(len(asked))]
            places = [answer - 1 - distance - head for answer, (distance, _) in zip(self.answers, order, strict=True)]
            apart = all(abs(a - b) >= size for i, a in enumerate(places) for b in places[:i])
            if apart and min(places) >= first and max(places) + size <= self.block:
                return order, self._scattered(places, draw)
        raise SourceError(
            f"retrieval, {self.facts.format}: distances {', '.join(str(d) for d, _ in asked)} do not fit together into a row "
            f"of {self.length} tokens; facts take {size} tokens each: lower queries, or take distances farther apart"
        )

    def _scattered(self, places: Sequence[int], draw: np.random.Generator) -> list[int]:
        """The places given, and random ones that are free for the other facts."""
        size, places = self.layout.fact, list(places)
        free = np.zeros(max(0, self.block - size + 1), dtype=bool)
        free[len(self.start) :] = True
        for place in places:
            free[max(0, place - size + 1) : place + size] = False
        while len(places) < self.facts.pairs:
            open_places = np.flatnonzero(free)
            if not len(open_places):
                raise SourceError(
                    f"retrieval, {self.facts.format}: a row of {self.length} tokens has no room for {self.facts.pairs} facts "
                    f"of {size}"
                )
            place = int(draw.choice(open_places))
            free[max(0, place - size + 1) : place + size] = False
            places.append(place)
        return places


def filler(tokenizer: Any, text: str, length: int) -> np.ndarray:
    """`length` tokens of a text repeated with a space between."""
    times = 1
    while len(ids := _encode(tokenizer, [" ".join([text] * times)])[0]) < length:
        times = max(times + 1, times * length // max(1, len(ids)) + 1)
    return np.asarray(ids[:length])


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    with uncut(tokenizer) as backend:
        return [e.ids for e in backend.encode_batch(list(texts), add_special_tokens=False)]


def _start(tokenizer: Any) -> list[int]:
    """The BOS of a row, where the tokenizer's own calls set one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _of_tokens(tokenizer: Any, config: Facts, haystack: np.ndarray) -> _Layout:
    """Strings of different tokens of the text, each drawn alike; of letters or digits, so that a string looks like words."""
    assert config.copied is not None
    lead, end, again = _encode(tokenizer, [COPY.fact, COPY.end, COPY.question])
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in (*lead, *end, *again):
        raise SourceError(f"retrieval, copy: this tokenizer has no tokens for {COPY.question + COPY.end!r}")
    found = np.setdiff1d(np.flatnonzero(np.bincount(haystack)), tokenizer.all_special_ids)
    spelt = tokenizer.batch_decode(found[:, None].tolist())
    tokens = found[[text.strip().isalnum() for text in spelt]]
    if len(tokens) <= config.copied:
        raise SourceError(
            f"retrieval, copy: the text has {len(tokens)} different tokens of letters or digits, a string of "
            f"{config.copied} needs more; lower copied, or take another text"
        )

    def lines(draw: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
        string = draw.choice(tokens, config.copied, replace=False).tolist()
        return [[*lead, *string, *end]], [[*again, *string]]

    return _Layout(
        fact=len(lead) + config.copied + len(end),
        head=len(lead),
        size=config.copied,
        question=len(again) + config.copied,
        question_head=len(again),
        lines=lines,
    )


def _of_words(wording: Wording, tokenizer: Any, config: Facts, values: Sequence[str]) -> _Layout:
    """Keys and values that all have the same number of tokens, so that length tells nothing and all rows look alike."""

    def line(key: str, value: str) -> tuple[str, str]:
        return wording.fact.format(key=key, value=value), wording.question.format(key=key, value=value)

    def alike(words: Sequence[str], of: Callable[[str], tuple[str, str]], need: int, what: str) -> dict[str, Any]:
        """The largest group of words of equal length in tokens, with the tokens of both their lines."""
        pairs = [of(word) for word in words]
        facts, questions = (_encode(tokenizer, [p[i] for p in pairs]) for i in (0, 1))
        unknown = getattr(tokenizer, "unk_token_id", None)
        known = {
            w: (f, q)
            for w, f, q in zip(words, facts, questions, strict=True)
            if unknown is None or unknown not in (*f, *q)
        }
        distinct = dict.fromkeys({tuple(f): w for w, (f, _) in reversed(known.items())}.values())
        sizes = Counter((len(known[w][0]), len(known[w][1])) for w in distinct)
        size, count = max(sizes.items(), key=lambda s: (s[1], -s[0][0]), default=(None, 0))
        if count < need:
            raise SourceError(
                f"retrieval, {config.format}: this tokenizer spells {count} of {len(words)} {what} with the same number of "
                f"tokens, {need} are needed; lower pairs"
            )
        return {w: known[w] for w in words if w in distinct and tuple(map(len, known[w])) == size}

    keys = tuple(alike(wording.keys, lambda k: line(k, values[0]), config.pairs, "keys"))
    chosen = alike(values, lambda v: line(keys[0], v), config.pairs + 1, "values")
    facts, questions = ([both[i] for both in chosen.values()] for i in (0, 1))
    head, question_head = _common(facts), _common(questions)
    size = len(facts[0]) - head - _common([f[::-1] for f in facts])
    found = {word: f[head : head + size] for word, f in zip(chosen, facts, strict=True)}
    if any(q[question_head : question_head + size] != found[w] for w, q in zip(chosen, questions, strict=True)):
        raise SourceError(
            f"retrieval, {config.format}: this tokenizer spells a value in its question otherwise than in its fact, as for "
            f"{next(iter(chosen))!r}; it cannot be asked for token by token"
        )
    lengths = len(facts[0]), len(questions[0])

    def lines(draw: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
        """Every line has the length and the value that the layout promises."""
        asked = [str(k) for k in draw.choice(keys, config.pairs, replace=False)]
        said = [str(v) for v in draw.choice(list(found), config.pairs, replace=False)]
        both = [line(k, v) for k, v in zip(asked, said, strict=True)]
        encoded = _encode(tokenizer, [text[i] for i in (0, 1) for text in both])
        made = encoded[: config.pairs], encoded[config.pairs :][: config.queries]
        for each, at, length in zip(made, (head, question_head), lengths, strict=True):
            for value, ids in zip(said, each, strict=False):
                if len(ids) != length or ids[at : at + size] != found[value]:
                    raise SourceError(
                        f"retrieval, {config.format}: this tokenizer spells {value!r} differently after different words; "
                        "its answers cannot be compared token by token"
                    )
        return made

    return _Layout(fact=lengths[0], head=head, size=size, question=lengths[1], question_head=question_head, lines=lines)


def _common(lines: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix."""
    return next((i for i, each in enumerate(zip(*lines, strict=True)) if len(set(each)) > 1), len(lines[0]))
