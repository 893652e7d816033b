"""End-to-end losses of a model on a batch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .data import IGNORED, Batch
from .head_loss import exact, head_loss, plain_loss
from .masks import hear_segments
from .steps import LOGITS, Loss

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
    """`loss` in nats, mean over the tokens that have a label.

    Logits of more than LOGITS numbers are never held: tokens are then taken in shares (`head_loss`), the teacher's logits too.
    """
    hidden = hidden_states(model, batch)[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    scored = labels != IGNORED
    count = scored.sum()
    if not bool(count):
        return hidden.sum() * 0.0
    head = _head(model)
    hidden, labels = hidden[scored], labels[scored]
    taught: Callable[[slice], Tensor] | None = None
    if loss.kl:
        assert teacher is not None
        with torch.no_grad():
            stream = hidden_states(teacher, batch)[:, :-1].flatten(0, 1)[scored]
        taught = _taught(_head(teacher), stream)
    rows = LOGITS // head.weight.shape[0]
    if len(labels) <= rows:
        return plain_loss(exact(head(hidden)), labels, taught(slice(None)) if taught else None, loss) / count
    return head_loss(hidden, head.weight, labels, taught, loss, max(1, rows)) / count


def _taught(head: nn.Linear, stream: Tensor) -> Callable[[slice], Tensor]:
    """The teacher's logits of a share of the tokens."""

    @torch.no_grad()
    def made(share: slice) -> Tensor:
        return exact(head(stream[share]))

    return made


def _head(model: nn.Module) -> nn.Linear:
    found = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(found, nn.Linear) and found.bias is None, "every supported family has a plain matrix as its head"
    return found
