"""Mean next-token log-loss on held-out rows."""

import torch

from ...exposure import exposed_share
from ...records import Item, Result
from ..held_out import held_out_rows
from ..over_items import over_items
from ..subject import Subject
from .config import Config


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """One Result: nats a token over all rows; an item is a row, its score the row's mean.

    Raises SourceError for a part that is too short.
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
    return (over_items("perplexity", "log_loss", items, higher_is_better=False),)
