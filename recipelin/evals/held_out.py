"""The held-out text that evaluations read: a part's tokens, or rows of them."""

from pathlib import Path
from typing import Any

import numpy as np

from ..files import home
from ..sources import SourceError
from ..spool import stream


def held_out_tokens(config: Any, tokenizer: Any, *, base: Path) -> np.ndarray:
    """Token ids of `config.part` of `config.text`, a memory map."""
    return stream(config.text, tokenizer, part=config.part, folder=base, cache=home() / "tokens").tokens


def held_out_rows(config: Any, tokenizer: Any, *, base: Path, seed: int) -> np.ndarray:
    """[rows, length] of them, spread evenly from an offset that the seed gives. Raises SourceError if there are too few."""
    tokens = held_out_tokens(config, tokenizer, base=base)
    count = len(tokens) // config.length
    if count < config.rows:
        raise SourceError(
            f"{config.eval}: the {config.part} part has {count} rows of {config.length} tokens, {config.rows} are asked for"
        )
    first = np.random.default_rng([seed, 4]).integers(0, len(tokens) - count * config.length + 1)
    chosen = first + np.linspace(0, count - 1, config.rows).astype(int) * config.length
    return np.stack([tokens[s : s + config.length] for s in chosen]).astype(np.int64)
