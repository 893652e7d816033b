"""End-to-end losses of a model on a batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .data import IGNORED, Batch
from .masks import hear_segments
from .steps import Loss

LOGIT_ROWS = 4096  # tokens whose logits are held at once; with more, each share is made again in the backward pass
NEXT_TOKEN = Loss()


def _arguments(batch: Batch) -> dict[str, Any]:
    found: dict[str, Any] = {"position_ids": batch.position_ids, "use_cache": False}
    if batch.attention_mask is not None:
        found["attention_mask"] = batch.attention_mask
    if batch.segment_ids is not None:
        found["segment_ids"] = batch.segment_ids
    return found


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The stream after the last layer, without logits; with `segment_ids`, each document by itself in every layer."""
    if batch.segment_ids is not None:
        hear_segments(model)
    return model.model(input_ids=batch.input_ids, **_arguments(batch)).last_hidden_state  # type: ignore[operator]


def token_loss(model: nn.Module, batch: Batch, loss: Loss = NEXT_TOKEN, teacher: nn.Module | None = None) -> Tensor:
    """`loss` in nats, mean over the tokens that have a label; logits are made LOGIT_ROWS tokens at a time."""
    hidden = hidden_states(model, batch)[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    scored = labels != IGNORED
    count = scored.sum()
    if not bool(count):
        return hidden.sum() * 0.0
    head = model.get_output_embeddings()  # type: ignore[operator]
    columns = [hidden[scored], labels[scored]]
    if loss.kl:
        assert teacher is not None
        with torch.no_grad():
            columns.append(hidden_states(teacher, batch)[:, :-1].flatten(0, 1)[scored])
        teacher_head = teacher.get_output_embeddings()  # type: ignore[operator]

    def part(h: Tensor, y: Tensor, *taught: Tensor) -> Tensor:
        logits = _exact(head(h))
        found = loss.lm * F.cross_entropy(logits, y, reduction="sum") if loss.lm else logits.new_zeros(())
        for stream in taught:
            with torch.no_grad():
                target = (_exact(teacher_head(stream)) / loss.temperature).log_softmax(-1)
            own = (logits / loss.temperature).log_softmax(-1)
            one, other = (target, own) if loss.direction == "forward" else (own, target)
            # F.kl_div(a, b) is KL(b || a).
            found = found + loss.kl * loss.temperature**2 * F.kl_div(other, one, reduction="sum", log_target=True)
        return found

    shares = list(zip(*(column.split(LOGIT_ROWS) for column in columns), strict=True))
    if len(shares) == 1:
        return part(*shares[0]) / count
    return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in shares]).sum() / count


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
