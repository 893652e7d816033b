"""Associative recall by distance: a key is asked again, right is its value over the whole vocabulary."""

import numpy as np
import torch

from ... import data
from ...exposure import exposed_share
from ...records import Item, Result
from ..held_out import held_out_tokens
from ..logits_at import logits_at
from ..over_items import over_items
from ..subject import Subject
from .config import Config


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """A Result for each distance; an item is a question, its score 1 or 0; chance is the in-context guess 1 / pairs."""
    tokens = held_out_tokens(config, subject.tokenizer, base=subject.base)
    questions = data.recall_items(
        subject.tokenizer,
        tokens,
        distances=config.distances,
        items=config.items,
        seed=subject.seed,
        length=config.length,
        pairs=config.pairs,
        slot=config.slot,
    )
    right: list[float] = []
    for start in range(0, len(questions), config.batch):
        batch = questions[start : start + config.batch]
        ids = torch.from_numpy(np.stack([q.ids for q in batch])).to(subject.device)
        logits = logits_at(subject.model, ids, torch.tensor([config.length - 1]))[:, 0]
        right += [float(a == q.answer) for a, q in zip(logits.argmax(-1).tolist(), batch, strict=True)]
    exposed = exposed_share([config.length], subject.exposed_from)
    found = []
    for distance in config.distances:
        items = [
            Item(id=q.id, score=score, length=config.length, exposed=exposed)
            for q, score in zip(questions, right, strict=True)
            if q.distance == distance
        ]
        found.append(over_items(config.task(distance), "accuracy", items, chance=1 / config.pairs, distance=distance))
    return tuple(found)
