"""Retrieval of facts by distance and length: teacher-forced, and generated with the model's cache."""

import math
import sys
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...exposure import exposed_share
from ...facts import DIGITS, Question, Row, filler
from ...records import Item, Result
from ..greedy import cannot_generate, greedy
from ..held_out import held_out_tokens
from ..logits_at import logits_at
from ..over_items import over_items
from ..subject import Subject
from .config import Config
from .items import rows


def preflight(config: Config, *, tokenizer: Any, seeds: Sequence[int], base: Path) -> None:
    """Raises SourceError, before any work, for what the tokenizer, the text or the length of a row does not allow."""
    haystack = _haystack(config, tokenizer, base)
    for seed in seeds:
        rows(config, tokenizer, haystack, seed=seed)


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """A Result for each way of scoring, distance and metric, task `passkey@4096:3000`; an item is a question: 1 or 0, or the
    share of a string that was copied.

    A state that cannot generate (window `full` beside a linear branch keeps no cache) has no `generated` rows: said on
    stderr. Raises SourceError.
    """
    made = rows(config, subject.tokenizer, _haystack(config, subject.tokenizer, subject.base), seed=subject.seed)
    found: list[Result] = []
    name = config.task(0).rpartition(":")[0]
    for how in config.scoring:
        if how == "generate" and (why := cannot_generate(subject.model)):
            print(
                f"    {name}: state {subject.state.name}: {why}: likelihood only",
                file=sys.stderr,
            )
            continue
        hit = _likelihood if how == "likelihood" else _generate
        scored: list[tuple[Question, list[bool]]] = []
        bar = tqdm(
            range(0, len(made), config.batch),
            desc=f"{name} {how}",
            file=sys.stderr,
            disable=None,
            leave=False,
            mininterval=1.0,
        )
        for start in bar:
            batch = made[start : start + config.batch]
            ids = torch.from_numpy(np.stack([r.ids for r in batch])).to(subject.device)
            # The rows of a batch are laid out alike: only what is asked where differs.
            right = hit(subject.model, subject.tokenizer, ids, batch[0].questions).tolist()
            scored += [
                (q, r) for row, hits in zip(batch, right, strict=True) for q, r in zip(row.questions, hits, strict=True)
            ]
        found += [
            _result(config, metric, distance, [s for s in scored if s[0].distance == distance], subject.exposed_from)
            for distance in config.distances
            for metric in config.metrics(how)
        ]
    return tuple(found)


def _haystack(config: Config, tokenizer: Any, base: Path) -> np.ndarray:
    """Tokens of the part (a memory map), or the filler over and over."""
    if config.text is None:
        return filler(tokenizer, config.filler, config.length)
    return held_out_tokens(config, tokenizer, base=base)


def _likelihood(model: Any, tokenizer: Any, ids: torch.Tensor, questions: Sequence[Question]) -> torch.Tensor:
    """[rows, questions, size]: whether each token of an answer, given as continuation, is the argmax."""
    asked = torch.cat([torch.arange(q.answer, q.answer + q.size) for q in questions]).to(ids.device)
    logits = logits_at(model, ids, asked - 1)
    return (logits.argmax(-1) == ids[:, asked]).unflatten(1, (len(questions), -1))


def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, questions: Sequence[Question]) -> torch.Tensor:
    """[rows, questions, size]: whether each token of an answer is what greedy generation puts there, up to the first wrong one.

    Behind it no metric looks: where every row of a batch has one, generation ends.
    """
    answers = [ids[:, q.answer : q.answer + q.size] for q in questions]
    made = [
        greedy(model, tokenizer, ids[:, : q.answer], q.size, expected=answer)
        for q, answer in zip(questions, answers, strict=True)
    ]
    return torch.stack([m == a for m, a in zip(made, answers, strict=True)], 1)


def score(config: Config, metric: str, hits: Sequence[bool]) -> float:
    """Of one answer, from which of its tokens are right."""
    if metric == "prefix_match":
        return next((i for i, hit in enumerate(hits) if not hit), len(hits)) / len(hits)
    if metric == "token_accuracy" or metric in config.positions:
        hits = hits[config.positions.get(metric, slice(None))]
        return sum(hits) / len(hits)
    return float(all(hits))


def chance(config: Config, metric: str, question: Question) -> float:
    """Score of a guess that reads no key: among the values, or tokens, in context that did not yet come; see Config."""
    if config.copied is not None:
        each = [1 / (config.copied - i) for i in range(config.copied)]
        if metric == "generated":
            return math.prod(each)
        if metric == "prefix_match":
            return sum(accumulate(each, mul)) / config.copied
        each = each[config.positions.get(metric, slice(None))]
        return sum(each) / len(each)
    if config.pairs > 1:
        return 1 / (config.pairs - question.before)
    return 1 / (9 * 10 ** (DIGITS - 1)) if config.format == "passkey" else 0.0


def _result(
    config: Config,
    metric: str,
    distance: int,
    scored: list[tuple[Question, list[bool]]],
    exposed_from: int | None,
) -> Result:
    def exposed(q: Question) -> float:
        places = range(q.answer, q.answer + q.size)[config.positions.get(metric, slice(None))]
        return exposed_share(places, exposed_from)

    items = [
        Item(id=q.id, score=score(config, metric, hits), length=config.length, exposed=exposed(q)) for q, hits in scored
    ]
    guessed = sum(chance(config, metric, q) for q, _ in scored) / len(scored)
    return over_items(config.task(distance), metric, items, chance=guessed, distance=distance)


__all__ = ["Row", "preflight", "run"]
