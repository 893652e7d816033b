"""Retrieval of facts by distance and length: teacher-forced, and generated with the model's cache."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ... import data
from ...exposure import exposed_share
from ...files import home
from ...records import Item, Result
from ..greedy import cannot_generate, greedy
from ..subject import Subject
from .config import METRICS, Config
from .items import DIGITS, Question, Row, filler, rows


def preflight(config: Config, *, tokenizer: Any, seeds: Sequence[int], base: Path) -> None:
    """Raises SourceError, before any work, for what the tokenizer, the text or the length of a row does not allow."""
    haystack = _haystack(config, tokenizer, base)
    for seed in seeds:
        rows(config, tokenizer, haystack, seed=seed)


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """A Result for each way of scoring and each distance, task `passkey@4096:3000`; an item is a question, 1 or 0.

    A state that cannot generate (window `full` beside a linear branch keeps no cache) has no `generated` rows: said on
    stderr. Raises SourceError.
    """
    made = rows(config, subject.tokenizer, _haystack(config, subject.tokenizer, subject.base), seed=subject.seed)
    found: list[Result] = []
    for how in config.scoring:
        if how == "generate" and (why := cannot_generate(subject.model)):
            print(
                f"    {config.format}@{config.length}: state {subject.state.name}: {why}: likelihood only",
                file=sys.stderr,
            )
            continue
        score = _likelihood if how == "likelihood" else _generate
        scored: list[tuple[Question, bool]] = []
        bar = tqdm(
            range(0, len(made), config.batch),
            desc=f"{config.format}@{config.length} {how}",
            file=sys.stderr,
            disable=None,
            leave=False,
            mininterval=1.0,
        )
        for start in bar:
            batch = made[start : start + config.batch]
            ids = torch.from_numpy(np.stack([r.ids for r in batch])).to(subject.device)
            # The rows of a batch are laid out alike: only what is asked where differs.
            right = score(subject.model, subject.tokenizer, ids, batch[0].questions)
            scored += [
                (q, r) for row, hits in zip(batch, right, strict=True) for q, r in zip(row.questions, hits, strict=True)
            ]
        found += [
            _result(
                config, METRICS[how], distance, [s for s in scored if s[0].distance == distance], subject.exposed_from
            )
            for distance in config.distances
        ]
    return tuple(found)


def _haystack(config: Config, tokenizer: Any, base: Path) -> np.ndarray:
    """Tokens of the part (a memory map), or the filler over and over."""
    if config.text is None:
        return filler(tokenizer, config.filler, config.length)
    tokens: np.ndarray = data.stream(
        config.text, tokenizer, part=config.part, folder=base, cache=home() / "tokens"
    ).tokens
    return tokens


def _likelihood(model: Any, tokenizer: Any, ids: torch.Tensor, questions: Sequence[Question]) -> list[list[bool]]:
    """Whether each question's answer, given as continuation, is the argmax at every token: [rows][questions]."""
    asked = torch.cat([torch.arange(q.answer, q.answer + q.size) for q in questions]).to(ids.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=asked - 1).logits
    hits = logits.argmax(-1) == ids[:, asked]
    found: list[list[bool]] = hits.unflatten(1, (len(questions), -1)).all(-1).tolist()
    return found


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, questions: Sequence[Question]) -> list[list[bool]]:
    """Whether greedy generation after each question gives the answer's tokens: [rows][questions]."""
    columns = []
    for question in questions:
        answer = ids[:, question.answer : question.answer + question.size]
        made = greedy(model, tokenizer, ids[:, : question.answer], question.size)
        columns.append((made == answer).all(-1).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def chance(config: Config, question: Question) -> float:
    """Score of a guess that reads no key: among the values in context not yet asked for; see Config."""
    if config.pairs > 1:
        return 1 / (config.pairs - question.before)
    return 1 / (9 * 10 ** (DIGITS - 1)) if config.format == "passkey" else 0.0


def _result(
    config: Config, metric: str, distance: int, scored: list[tuple[Question, bool]], exposed_from: int | None
) -> Result:
    items = tuple(
        Item(
            id=q.id,
            score=float(right),
            length=config.length,
            exposed=exposed_share(range(q.answer, q.answer + q.size), exposed_from),
        )
        for q, right in scored
    )
    mean = sum(i.score for i in items) / len(items)
    return Result(
        task=f"{config.format}@{config.length}:{distance}",
        metric=metric,
        value=mean,
        stderr=math.sqrt(mean * (1 - mean) / max(1, len(items) - 1)),
        n=len(items),
        exposed=sum(i.exposed for i in items) / len(items),
        chance=sum(chance(config, q) for q, _ in scored) / len(scored),
        distance=distance,
        items=items,
    )


__all__ = ["Row", "preflight", "run"]
