"""Seconds a generated token, and bytes of the cache, by length of context."""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from ...cache import decoding_bytes
from ...records import Result
from ..greedy import cannot_generate
from ..subject import Subject
from .config import STATES, Config

TIMED = True  # its results hold for one machine


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """Two Results for each context, task `decode@1024`, see Config. A state that cannot generate is said on stderr."""
    if subject.state.name not in STATES:
        return ()
    if why := cannot_generate(subject.model):
        print(f"    decode: state {subject.state.name}: {why}: left out", file=sys.stderr)
        return ()
    found = []
    draw = torch.Generator().manual_seed(subject.seed)
    ids = torch.randint(subject.model.config.vocab_size, (config.batch, config.length), generator=draw).to(
        subject.device
    )
    threads = torch.get_num_threads()
    try:
        for context in config.contexts:
            cache = DynamicCache(config=subject.model.config)
            torch.set_num_threads(threads)
            subject.model(input_ids=ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
            if subject.device == "cpu":
                torch.set_num_threads(1)  # or the process's time would be the sum of all of them
            new = ids[:, context : context + config.new_tokens]
            seconds = []
            for _ in range(config.repeats + 1):
                used = copy.deepcopy(cache)
                seconds.append(_decode(subject.model, new, used, subject.device))
            size = decoding_bytes(cache, used)
            speed = new.numel() / statistics.median(seconds[1:])  # the first one warms up
            found += [
                _result(f"decode@{context}", "tokens_per_second", speed, config.repeats, better=True),
                _result(f"decode@{context}", "cache_bytes", size, 1, better=False),
            ]
    finally:
        torch.set_num_threads(threads)
    return tuple(found)


def _decode(model: Any, ids: torch.Tensor, cache: DynamicCache, device: str) -> float:
    """Seconds for the tokens ids [B, n], one by one, from a cache that is used up."""

    def steps() -> None:
        for i in range(ids.shape[1]):
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)

    return _seconds_on_gpu(steps) if device != "cpu" else _seconds_of_process(steps)


def _seconds_of_process(work: Callable[[], None]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def _seconds_on_gpu(work: Callable[[], None]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) / 1000


def _result(task: str, metric: str, value: float, n: int, *, better: bool) -> Result:
    return Result(task=task, metric=metric, value=value, stderr=None, n=n, higher_is_better=better)
