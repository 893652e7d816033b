"""Greedy generation with a model's own cache, as several evaluations need it."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from ..swap import forms


def cannot_generate(model: Any) -> str:
    """Why the model keeps no cache in its state; empty where it does."""
    return next((why for form in forms(model) if (why := form.no_cache)), "")


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Tensor, new_tokens: int, *, expected: Tensor | None = None) -> Tensor:
    """[B, new_tokens]: what `model.generate()` puts behind prompts [B, T] without padding; -1 behind a row's end of text.

    expected [B, new_tokens]: generation ends once every row has said another token; -1 for what was not made any more.
    """
    end = getattr(model.generation_config, "eos_token_id", None)
    pad = next((p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id) if p is not None), 0)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=pad
    )
    more = {} if expected is None else {"stopping_criteria": [_AllWrong(prompts.shape[1], expected)]}
    made = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings, **more)
    made = made[:, prompts.shape[1] :]
    ends = torch.tensor(end if isinstance(end, list) else [] if end is None else [end], device=made.device)
    ended = torch.isin(made, ends).long()
    made = torch.where(ended.cumsum(1) - ended > 0, -1, made)
    # Where every row ended early, fewer tokens came back than were asked for.
    return torch.nn.functional.pad(made, (0, new_tokens - made.shape[1]), value=-1)


class _AllWrong(StoppingCriteria):
    """Ends all rows together, so that up to there each is generated as if nothing ended it."""

    def __init__(self, start: int, expected: Tensor) -> None:
        self.start, self.expected = start, expected

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        made = input_ids[:, self.start :]
        wrong = (made != self.expected[:, : made.shape[1]]).any(1)
        return wrong.all().expand(len(wrong))
