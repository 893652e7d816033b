"""Text -> packed token batches. Every batch is a pure function of (seed, step, micro-batch): resuming needs no more."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .documents import documents
from .facts import Writer
from .files import folder_atomically, locked
from .sources import PARTS, Data, Generated, Part, Recall, Retrieval, Slot, SourceError, text_of
from .spool import stream, uncut

MARKER = "<k>"  # one token before each key of a recall row; a special token of the pocket's tokenizer
IGNORED = -100  # label without loss, as torch's cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch, [B, T] each. `labels` are the tokens themselves (shifted by the loss), -100: no loss."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None

    def to(self, device: str) -> "Batch":
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return Batch(**moved)


class Batches:
    """Batches of a mixture; `batch(step, micro)` depends on nothing but its arguments and the constructor's.

    Row g = (step * accumulation + micro) * batch + row takes a source at random by weight, and that source's row g of a
    seeded permutation made anew for each epoch: one source alone is read completely before any row comes twice. Documents
    are concatenated and cut at `length`; the remainder is dropped, and so are rows in which no token with loss is predicted.
    `first_rows`: only so many rows of the draw, again and again. With `order: first` row g is the source's row `skip` + g.
    (LoLCATs keeps a row whose only label is its first token, which is never predicted, and drops the last row where the
    tokens are a multiple of the length: facts/peers.md §A.5, its packing.py.)
    """

    def __init__(
        self,
        data: Data,
        tokenizer: Any,
        *,
        part: Part,
        length: int,
        batch: int,
        seed: int,
        folder: Path,
        cache: Path | None = None,
        accumulation: int = 1,
        first_rows: int | None = None,
        skip: int = 0,
    ) -> None:
        self.data, self.tokenizer, self.part = data, tokenizer, part
        self.length, self.size, self.accumulation, self.seed = length, batch, accumulation, seed
        self.first_rows, self.skip = first_rows, skip
        self._streams = [stream(text_of(s), tokenizer, part=part, folder=folder, cache=cache) for s in data.mix]
        for source, found in zip(data.mix, self._streams, strict=True):
            if len(found.tokens) < length:
                raise SourceError(
                    f"{source.source}: the {part} part has {len(found.tokens)} tokens, fewer than one row of {length}"
                )
        self._scored = [found.scored_rows(length, separate=data.separate) for found in self._streams]
        for source, rows in zip(data.mix, self._scored, strict=True):
            if not len(rows):
                raise SourceError(
                    f"{source.source}: no row of {length} tokens of the {part} part has a token with loss"
                )
        self._writings = {
            i: writing(tokenizer, source.slot, source.keys, source.values)
            for i, source in enumerate(data.mix)
            if isinstance(source, Recall)
        }
        self._writers = {
            i: Writer(
                source,
                tokenizer,
                self._streams[i].tokens,
                part=part,
                length=length,
                from_start=False,
                stem=[seed, PARTS.index(part), i, length, 4],
                numbers=10_000,
            )
            for i, source in enumerate(data.mix)
            if isinstance(source, Retrieval)
        }
        weights = np.array([s.weight for s in data.mix])
        self._weights = weights / weights.sum()
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each source's part."""
        return tuple(len(found.tokens) for found in self._streams)

    @cached_property
    def rows(self) -> int:
        """Rows of one epoch: of the largest source that is read, not generated (else of the text around the slots)."""
        read = [
            rows for rows, source in zip(self._scored, self.data.mix, strict=True) if not isinstance(source, Generated)
        ]
        return self.first_rows or max(len(rows) for rows in read or self._scored)

    def batch(self, step: int, micro: int = 0) -> Batch:
        """The rows of one micro-batch of one optimiser step."""
        first = (step * self.accumulation + micro) * self.size
        rows = [self._row(first + i) for i in range(self.size)]
        tokens, labels, positions, segments = (np.stack(x) for x in zip(*rows, strict=True))
        return Batch(
            input_ids=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            segment_ids=torch.from_numpy(segments) if self.data.separate else None,
        )

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        index = index % self.first_rows if self.first_rows else index
        draw = np.random.default_rng([self.seed, index])
        which = int(draw.choice(len(self._weights), p=self._weights))
        source, found = self.data.mix[which], self._streams[which]
        positions = np.arange(self.length)
        if isinstance(source, Recall):
            start = int(draw.integers(0, len(found.tokens) - self.length + 1))
            tokens = found.tokens[start : start + self.length].astype(np.int64)
            labels = _scatter_pairs(tokens, source, self._writings[which], draw)
            return tokens, labels, positions, np.zeros_like(positions)
        if isinstance(source, Retrieval):
            row = self._writers[which].anywhere(draw)
            labels = np.full(self.length, IGNORED, dtype=np.int64)
            for question in row.questions:
                answer = slice(question.answer, question.answer + question.size)
                labels[answer] = row.ids[answer]
            return row.ids, labels, positions, np.zeros_like(positions)
        rows = self._scored[which]
        if self.data.order == "first":
            turn = (self.skip + index) % len(rows)
        else:
            turn = int(self._permutation(which, index // len(rows), len(rows))[index % len(rows)])
        tokens, segments, scored = found.row(int(rows[turn]) * self.length, self.length)
        if self.data.positions == "restart":
            positions = positions - np.searchsorted(segments, segments)
        labels = np.where(scored, tokens, IGNORED)
        if self.data.separate:
            labels[1:][segments[1:] != segments[:-1]] = IGNORED
        return tokens, labels, positions, segments

    def _permutation(self, which: int, epoch: int, count: int) -> np.ndarray:
        key = (which, epoch)
        if key not in self._permutations:
            self._permutations = {k: v for k, v in self._permutations.items() if k[0] != which}
            self._permutations[key] = np.random.default_rng([self.seed, which, epoch, 1]).permutation(count)
        return self._permutations[key]


# --- recall -----------------------------------------------------------------------------------------------------------


def marker_id(tokenizer: Any) -> int:
    """The token before each key. Raises SourceError if the tokenizer has no single token for it."""
    found = tokenizer.backend_tokenizer.token_to_id(MARKER)
    if found is None:
        raise SourceError(f"recall needs the token {MARKER!r}, which this tokenizer lacks (the pocket's has it)")
    return int(found)


def recall_words(tokenizer: Any, keys: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of ordinary word tokens: keys and values alternate through the vocabulary and share no token."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [
        i for word, i in vocabulary if len(word) >= 3 and word[0] == "Ġ" and word[1:].isascii() and word[1:].isalpha()
    ]
    need = 2 * max(keys, values)
    if len(words) < need:
        raise SourceError(
            f"recall: the tokenizer has {len(words)} word tokens, {need} are needed; lower keys and values"
        )
    rare = words[-need:]  # late merges are rarer in text than early ones
    return np.array(rare[0::2][:keys]), np.array(rare[1::2][:values])


@dataclass(frozen=True)
class Writing:
    """How a pair is written in tokens: `sign`, key, value."""

    sign: int
    keys: np.ndarray
    values: np.ndarray


def writing(tokenizer: Any, slot: Slot, keys: int = 64, values: int = 64) -> Writing:
    """A slot as this tokenizer writes it. Raises SourceError for a word or sign that it has no token of its own for."""
    if slot == "marked":
        return Writing(marker_id(tokenizer), *recall_words(tokenizer, keys, values))
    end = tokenizer.backend_tokenizer.token_to_id("Ċ")
    if end is None:
        raise SourceError("recall: slot line needs a token of its own for a line's end")
    second, first = recall_words(tokenizer, values, keys)
    return Writing(end, first, second)


def _scatter_pairs(tokens: np.ndarray, source: Recall, written: Writing, draw: np.random.Generator) -> np.ndarray:
    """Writes slots over a row in place and returns its labels.

    A slot introduces a key or asks an old one again. Keys are born throughout the row: if all came early, the model
    would learn recall of early pairs only (facts/pocket.md, trap 1).
    """
    length = len(tokens)
    slots = max(2, length // source.spacing)
    offset = int(draw.integers(0, 3))
    room = (length - offset) // 3
    places = np.sort(draw.choice(room, min(slots, room), replace=False)) * 3 + offset
    born = min(1.0, source.pairs * max(length / 256, 0.5) / slots)
    order = draw.permutation(written.keys)
    labels = tokens.copy() if source.loss == "all" else np.full(length, IGNORED, dtype=np.int64)
    known: list[tuple[int, int]] = []
    for place in places:
        fresh = not known or (draw.random() < born and len(known) < len(order))
        if fresh:
            known.append((int(order[len(known)]), int(draw.choice(written.values))))
        key, value = known[-1] if fresh else known[int(draw.integers(len(known)))]
        tokens[place : place + 3] = (written.sign, key, value)
        if source.loss == "all":
            labels[place : place + 3] = IGNORED
        if not fresh:
            labels[place + 2] = value
    return labels


@dataclass(frozen=True)
class RecallItem:
    """A row that ends in a slot without its value; `answer` is the value that was bound to the key `distance` tokens before."""

    id: str
    ids: np.ndarray
    answer: int
    distance: int


def recall_items(
    tokenizer: Any,
    tokens: np.ndarray,
    *,
    distances: Sequence[int],
    items: int,
    seed: int,
    length: int,
    pairs: int,
    slot: Slot = "marked",
) -> list[RecallItem]:
    """`items` questions at each distance (from the asked key to the same key in context), `pairs` - 1 distractors.

    Pure in its arguments. Raises SourceError for a distance that a row of `length` cannot hold.
    """
    written = writing(tokenizer, slot)
    found = []
    question = length - 2
    for distance in distances:
        target = question - distance
        if not 0 <= target <= question - 3:
            raise SourceError(f"recall: distance {distance} does not fit a row of {length} (3 to {length - 2})")
        for number in range(items):
            draw = np.random.default_rng([seed, distance, number, 2])
            start = int(draw.integers(0, len(tokens) - length + 1))
            row = tokens[start : start + length].astype(np.int64)
            chosen_keys = draw.choice(written.keys, pairs, replace=False)
            chosen_values = draw.choice(written.values, pairs, replace=False)
            free = [*range(target - 3, -1, -3), *range(target + 3, question - 2, 3)]
            if len(free) < pairs - 1:
                raise SourceError(f"recall: a row of {length} has no room for {pairs} pairs")
            for place, key, value in zip(
                draw.choice(free, pairs - 1, replace=False), chosen_keys[1:], chosen_values[1:], strict=True
            ):
                row[place : place + 3] = (written.sign, key, value)
            row[target : target + 3] = (written.sign, chosen_keys[0], chosen_values[0])
            row[question:] = (written.sign, chosen_keys[0])
            found.append(
                RecallItem(
                    id=f"{distance}-{number}",
                    ids=row,
                    answer=int(chosen_values[0]),
                    distance=distance,
                )
            )
    return found


# --- next line --------------------------------------------------------------------------------------------------------


def next_line_items(
    texts: Iterable[tuple[str, str]],
    tokenizer: Any,
    *,
    items: int,
    seed: int,
    context: tuple[int, int],
    answer: tuple[int, int],
    options: int,
) -> list[dict[str, Any]]:
    """Questions 'which line comes next?' as {id, context, choices, answer, tokens}.

    The context is whole consecutive lines of a file, `context` (least, most) tokens long, and ends in a newline; right is
    the true next line, of `answer` tokens; the distractors are lines of the same file outside the context, nearest to it in
    length: lines of other files would be told apart by their topic (facts/pocket.md §A). Raises SourceError if the texts do
    not give `items` questions.
    """
    draw = np.random.default_rng([seed, context[0], context[1], 3])
    files = []
    for name, text in texts:
        lines = text.splitlines()
        with uncut(tokenizer) as backend:
            sizes = [len(e.ids) for e in backend.encode_batch([x + "\n" for x in lines], add_special_tokens=False)]
        usable = [i for i, x in enumerate(lines) if x.strip() and answer[0] <= sizes[i] <= answer[1]]
        if len(usable) > options:
            files.append((name, lines, sizes, usable))
    if not files:
        raise SourceError("next line: no file has enough lines of the asked length")
    chance = np.array([len(f[3]) for f in files], dtype=float)
    found: list[dict[str, Any]] = []
    seen: set[tuple[str, int]] = set()
    for _ in range(200 * items):
        if len(found) == items:
            break
        name, lines, sizes, usable = files[int(draw.choice(len(files), p=chance / chance.sum()))]
        target = int(draw.choice(usable))
        goal = int(draw.integers(context[0], context[1] + 1))
        first, size = target, 0
        while first > 0 and size + sizes[first - 1] <= goal:
            first -= 1
            size += sizes[first]
        right = lines[target]
        others = {lines[i]: abs(sizes[i] - sizes[target]) for i in usable if not first <= i <= target}
        others.pop(right, None)
        if size < context[0] or len(others) < options - 1 or (name, target) in seen or right in lines[first:target]:
            continue
        seen.add((name, target))
        near = sorted(others, key=lambda x: (others[x], x))[: 4 * options]
        wrong = [near[i] for i in draw.choice(len(near), options - 1, replace=False)]
        place = int(draw.integers(options))
        found.append(
            {
                "id": f"{name}:{target + 1}",
                "context": "\n".join(lines[first:target]) + "\n",
                "choices": [*wrong[:place], right, *wrong[place:]],
                "answer": place,
                "tokens": size,
            }
        )
    if len(found) < items:
        raise SourceError(f"next line: the texts give {len(found)} questions of {items}; lower items or widen context")
    return found


# --- tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE with `<s>`, `</s>`, `<pad>` and the recall marker; deterministic in the order of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>", MARKER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[MARKER],
        clean_up_tokenization_spaces=False,
    )


def tokenizer_for(data: Data, vocab_size: int, *, folder: Path, cache: Path) -> Any:
    """The tokenizer of a model made from nothing: trained on the training part of the mixture's texts, kept in `cache`."""
    from transformers import PreTrainedTokenizerFast

    with locked(cache.with_name(cache.name + ".lock")):  # two runs may want the same one at the same time
        if not (cache / "tokenizer.json").is_file():
            sources = {s.model_dump_json(): s for s in map(text_of, data.mix)}
            texts = (text for s in sources.values() for _, text in documents(s, "training", folder))
            made = train_tokenizer(texts, vocab_size)
            with folder_atomically(cache) as partial:
                made.save_pretrained(partial)
    return PreTrainedTokenizerFast.from_pretrained(cache)
