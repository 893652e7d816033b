"""The rows that an evaluation asks: pure in their arguments (no torch)."""

from typing import Any

import numpy as np

from ...facts import Row, Writer
from ...sources import PARTS
from .config import Config

FORMATS = ("associative", "needle", "passkey", "copy")  # their order is part of what rows are drawn by


def rows(config: Config, tokenizer: Any, haystack: np.ndarray, *, seed: int) -> tuple[Row, ...]:
    """The rows of one seed; the questions of a row take the distances in turn, in random order.

    `haystack`: the text's tokens, or the filler's. Raises SourceError for what does not fit.
    """
    stem = [seed, PARTS.index(config.part), FORMATS.index(config.format), config.length, 5]
    writer = Writer(
        config,
        tokenizer,
        haystack,
        part=config.part,
        length=config.length,
        from_start=config.text is None,
        stem=stem,
    )
    made = []
    for number in range(config.rows):
        first = number * config.queries
        asked = [divmod(first + i, len(config.distances)) for i in range(config.queries)]
        made.append(
            writer.asked(
                [(config.distances[which], item) for item, which in asked], np.random.default_rng([*stem, number])
            )
        )
    return tuple(made)
