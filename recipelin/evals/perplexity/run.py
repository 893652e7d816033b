"""Mean next-token log-loss on held-out rows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import data
from ...exposure import exposed_share
from ...files import home
from ...records import Item, Result
from ..standard_error import standard_error
from ..subject import Subject
from .config import Config


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """One Result: nats a token over all rows; an item is a row, its score the row's mean.

    Rows are spread evenly over the part, from an offset that the seed gives. Raises SourceError if it is too short.
    """
    rows = held_out_rows(config, subject.tokenizer, base=subject.base, seed=subject.seed)
    items = []
    for start in range(0, len(rows), config.batch):
        ids = torch.from_numpy(rows[start : start + config.batch]).to(subject.device)
        logits = subject.model(input_ids=ids, use_cache=False).logits
        for offset, (own, row) in enumerate(zip(logits, ids, strict=True)):
            losses = torch.nn.functional.cross_entropy(own[:-1].float(), row[1:], reduction="none")
            items.append(
                Item(
                    id=f"row{start + offset}",
                    score=float(losses.double().mean()),
                    length=config.length,
                    exposed=exposed_share(range(1, config.length), subject.exposed_from),
                )
            )
    scores = np.array([i.score for i in items])
    return (
        Result(
            task="perplexity",
            metric="log_loss",
            value=float(scores.mean()),
            stderr=standard_error(scores.tolist()),
            n=len(items),
            exposed=float(np.mean([i.exposed for i in items])),
            higher_is_better=False,
            items=tuple(items),
        ),
    )


def held_out_rows(config: Any, tokenizer: Any, *, base: Path, seed: int) -> np.ndarray:
    """[rows, length] token ids of a part, evenly spread."""
    tokens = data.stream(config.text, tokenizer, part=config.part, folder=base, cache=home() / "tokens").tokens
    count = len(tokens) // config.length
    if count < config.rows:
        raise data.SourceError(
            f"{config.eval}: the {config.part} part has {count} rows of {config.length} tokens, {config.rows} are asked for"
        )
    first = np.random.default_rng([seed, 4]).integers(0, len(tokens) - count * config.length + 1)
    chosen = first + np.linspace(0, count - 1, config.rows).astype(int) * config.length
    return np.stack([tokens[s : s + config.length] for s in chosen]).astype(np.int64)
