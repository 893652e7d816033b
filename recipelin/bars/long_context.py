"""Prefill, decoding and cache of a small student beside its teacher, 1k to 64k tokens, through transformers' own caches."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from .. import hf, swap
from ..attention.hybrid.config import Config
from ..bench.measure import Bar, Fact, Measured, on_one_thread, seconds_of
from ..cache import decoding_bytes
from ..families import Architecture
from ..linechart import Chart, Line, Point, png
from ..shipped import POCKET
from ..states import State
from ..steps import Swap

CONTEXTS = {"1k": 1024, "4k": 4096, "16k": 16384, "64k": 65536}
QUICK = 16  # a quick bench takes contexts so many times shorter
NEW_TOKENS = 16

# 3.4 M parameters; head_dim, grouping and MLP as small Llamas have them, positions enough for 64k and what is decoded.
ARCHITECTURE = Architecture(
    model_type="llama",
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=1024,
    max_position_embeddings=131072,
    rope_theta=5e5,
)


def models() -> dict[str, Any]:
    """The teacher, and its student as LoLCATs makes it: window 64, F 64, all layers. Random weights: time does not ask."""
    tokenizer = hf.load_tokenizer(POCKET)
    found = {name: hf.new_model(ARCHITECTURE, tokenizer, embedding_std=1.0, seed=0) for name in ("teacher", "student")}
    swap.swap(found["student"], Swap(form="hybrid", config=Config(), layers="all"), seed=0)
    swap.switch(found["student"], State(window=64))
    return found


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> DynamicCache:
    """The cache of ids [1, T], read in one call."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, cache: DynamicCache) -> None:
    """Tokens ids [1, n], one by one, from a cache that is used up."""
    for token in ids.split(1, dim=1):
        model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def measured(context: int) -> dict[str, float]:
    """Tokens a second (CPU time of the process, one thread) and bytes of the cache in decoding, of teacher and student.

    Up to 4,096 tokens a prefill is the median of three, beyond that one; `NEW_TOKENS` are decoded from a copy of the
    cache, once to warm up, and three times: the median.
    """
    both = models()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(ARCHITECTURE.vocab_size, (1, context + NEW_TOKENS), generator=draw)
    prompt, new = ids[:, :context], ids[:, context:]
    speed: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
    size = {}
    with on_one_thread():
        for model in both.values():
            decode(model, new, prefill(model, prompt[:, :128]))  # libraries
        for name, model in both.items():
            seconds = []
            for _ in range(3 if context <= 4096 else 1):
                cache, spent = seconds_of(partial(prefill, model, prompt))
                seconds.append(spent)
            speed["prefill"][name] = context / statistics.median(seconds)
            rounds = []
            for _ in range(4):
                used = copy.deepcopy(cache)
                rounds.append(seconds_of(partial(decode, model, new, used))[1])
            size[name] = decoding_bytes(cache, used)
            speed["decode"][name] = NEW_TOKENS / statistics.median(rounds[1:])
    return {
        "context": context,
        **{f"{what} {name}, tokens/s": value for what, found in speed.items() for name, value in found.items()},
        **{f"cache {name}, bytes": value for name, value in size.items()},
    }


def figure(found: Sequence[Measured]) -> bytes:
    """Prefill, decoding and cache by context, a PNG."""

    def chart(title: str, what: str, unit: str, shown: str, scale: float = 1.0) -> Chart:
        lines = (
            Line(name, tuple(Point(m.values["context"], m.values[f"{what} {name}, {unit}"] / scale) for m in found))
            for name in ("teacher", "student")
        )
        return Chart(title, "tokens in context", shown, tuple(lines), "xy")

    return png(
        (
            chart("Prefill: one row, one thread", "prefill", "tokens/s", "tokens/s"),
            chart("Decoding, token by token", "decode", "tokens/s", "tokens/s"),
            chart("Cache of one row", "cache", "bytes", "MB", 1e6),
        )
    )


FIGURES: Mapping[str, Callable[[Sequence[Measured]], bytes]] = {"long-context.png": figure}

_WHAT = "a Llama of 3.4 M parameters (4 layers, 4 heads over 2, d 64) and its student (F 64, window 64)"

BARS: list[Bar | Fact] = [
    Fact(f"long_context/{name}",
         f"{_WHAT if name == '1k' else 'the same'}, one thread, context {context:,} (quick: {context // QUICK:,})",
         partial(lambda context, quick: measured(context // QUICK if quick else context), context))
    for name, context in CONTEXTS.items()
]  # fmt: skip
