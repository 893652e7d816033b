"""What an evaluation says of items that are scored one by one."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..records import Item, Result


def over_items(task: str, metric: str, items: Sequence[Item], **more: Any) -> Result:
    """Their mean, its standard error as of independent scores (0 of a single one), and their mean exposure.

    `more`: further fields of the Result, as `chance`.
    """
    scores = [item.score for item in items]
    mean = fmean(scores)
    spread = sum((s - mean) ** 2 for s in scores) / max(1, len(scores) - 1)
    return Result(
        task=task,
        metric=metric,
        value=mean,
        stderr=math.sqrt(spread / len(scores)),
        n=len(items),
        exposed=fmean(item.exposed for item in items),
        items=tuple(items),
        **more,
    )
