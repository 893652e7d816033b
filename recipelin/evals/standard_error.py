"""The standard error of a mean over items."""

import math
from collections.abc import Sequence


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean of independent scores; 0 of a single one, whose spread is not known."""
    mean = sum(scores) / len(scores)
    spread = sum((s - mean) ** 2 for s in scores) / max(1, len(scores) - 1)
    return math.sqrt(spread / len(scores))
