"""Greedy continuations of held-out prompts, beside the teacher's own."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...exposure import exposed_share
from ...records import Item, Result
from ..greedy import cannot_generate, greedy
from ..held_out import held_out_rows
from ..over_items import over_items
from ..subject import Subject
from .config import Config


def preflight(config: Config, *, tokenizer: Any, seeds: Sequence[int], base: Path) -> None:
    """Raises SourceError, before any work, for a part that is too short."""
    held_out_rows(config, tokenizer, base=base, seed=seeds[0])


def reference(config: Config, *, model: Any, tokenizer: Any, seed: int, base: Path, device: str) -> list[list[int]]:
    """The teacher's continuations: for each prompt its tokens, the end of text included."""
    return _continued(config, model, tokenizer, "teacher", seed=seed, base=base, device=device)


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """Two Results, see Config. None without a teacher, or in a state that cannot generate: said on stderr."""
    why = "there is no teacher to agree with" if subject.reference is None else cannot_generate(subject.model)
    if subject.reference is None or why:
        print(f"    {config.eval}@{config.new_tokens}: state {subject.state.name}: {why}: left out", file=sys.stderr)
        return ()
    if subject.state.weights == "teacher":
        made = subject.reference
    else:
        made = _continued(
            config,
            subject.model,
            subject.tokenizer,
            subject.state.name,
            seed=subject.seed,
            base=subject.base,
            device=subject.device,
        )
    shares = [_equal(own, theirs) / len(theirs) for own, theirs in zip(made, subject.reference, strict=True)]
    lengths = [len(r) for r in subject.reference]
    return (
        _result(config, "agreement", "prefix_match", shares, lengths, subject.exposed_from),
        _result(
            config, "agreement_exact", "exact_match", [float(s == 1) for s in shares], lengths, subject.exposed_from
        ),
    )


def _continued(
    config: Config, model: Any, tokenizer: Any, name: str, *, seed: int, base: Path, device: str
) -> list[list[int]]:
    rows = held_out_rows(config, tokenizer, base=base, seed=seed)
    found: list[list[int]] = []
    what = f"{config.eval}@{config.new_tokens} {name}"
    starts = range(0, len(rows), config.batch)
    for start in tqdm(starts, desc=what, file=sys.stderr, disable=None, leave=False, mininterval=1.0):
        prompts = torch.from_numpy(rows[start : start + config.batch]).to(device)
        made = greedy(model, tokenizer, prompts, config.new_tokens)
        found += [[t for t in row if t >= 0] for row in made.tolist()]
    return found


def _equal(own: Sequence[int], theirs: Sequence[int]) -> int:
    """Equal tokens before the first difference."""
    pairs = zip(own, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(theirs)))


def _result(
    config: Config, task: str, metric: str, scores: list[float], lengths: list[int], exposed_from: int | None
) -> Result:
    items = [
        Item(
            id=f"prompt{i}",
            score=score,
            length=config.length + made,
            exposed=exposed_share(range(config.length, config.length + made), exposed_from),
        )
        for i, (score, made) in enumerate(zip(scores, lengths, strict=True))
    ]
    return over_items(f"{task}@{config.new_tokens}", metric, items)
