"""Which branches take part while a stage trains: dropped windows and windows that change (no torch)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from .base import Config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Rate(Config):
    """A rate up to a share of the stage's optimiser steps. Sample YAML: `{until: 0.5, value: 0.9}`"""

    until: Annotated[float, Field(gt=0, le=1)]
    value: Annotated[float, Field(ge=0, le=1)]


class Width(Config):
    """A window in tokens up to a share of the stage's optimiser steps. Sample YAML: `{until: 0.5, value: 32}`"""

    until: Annotated[float, Field(gt=0, le=1)]
    value: Annotated[int, Field(ge=1)]


class RandomWidth(Config):
    """A window drawn anew for each optimiser step; after `until` the method's own (SWAX, arXiv 2509.24552).

    Sample YAML: `{random: [8, 16, 32], until: 0.9}`
    """

    random: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    until: Annotated[float, Field(gt=0, le=1)] = 1.0


class BranchSchedule(Config):
    """The window branch over a training stage: scheduled sliding-window dropout (SSD, arXiv 2510.05901) and its rivals.

    `dropout` is the probability that the window is dropped (its keys leave the softmax set; `on_drop` says whether the
    linear branch then covers them); `window` its width. Both are lists of {until, value} over the share of the stage
    that is done, counted in optimiser steps. `between: step` holds each value until its `until`; `linear` and `cosine`
    go from knot to knot, the first value standing from the start to its own. Nothing is dropped in evaluation.

    Sample YAML::

        branches:
          dropout: [{until: 0.33, value: 0.9}, {until: 0.66, value: 0.75}, {until: 1.0, value: 0.5}]
          window: [{until: 0.5, value: 16}, {until: 1.0, value: 32}]
          granularity: layer
          on_drop: linear_covers_all
    """

    dropout: tuple[Rate, ...] = Field((), description="empty: the window is never dropped")
    window: tuple[Width, ...] | RandomWidth = Field((), description="empty: the method's own window throughout")
    between: Literal["step", "linear", "cosine"] = "step"
    granularity: Literal["step", "layer", "head", "sequence"] = Field(
        "layer", description="what one draw decides for: a whole optimiser step, or one micro-batch by layer, head, row"
    )
    on_drop: Literal["linear_covers_all", "linear_outside"] = Field(
        "linear_covers_all", description="keys of the linear branch where the window is dropped: all, or as ever"
    )

    @model_validator(mode="after")
    def _ends(self) -> "BranchSchedule":
        for name, points in (("dropout", self.dropout), ("window", self.window)):
            if isinstance(points, RandomWidth) or not points:
                continue
            ends = [p.until for p in points]
            if ends != sorted(set(ends)) or ends[-1] != 1:
                raise ValueError(f"{name}: `until` must rise to 1, found {', '.join(f'{e:g}' for e in ends)}")
        return self


# arXiv 2510.05901 Fig. 4a, through a reviewer: dropout 0.9, then 0.75, then 0.5; where they change was not found: thirds.
RATES = (Rate(until=0.33, value=0.9), Rate(until=0.66, value=0.75), Rate(until=1.0, value=0.5))


def dropout_at(schedule: BranchSchedule, step: int, total: int) -> float:
    """The dropout rate at optimiser step `step` (from 0) of `total`."""
    return _value(schedule.dropout, schedule.between, step / total) if schedule.dropout else 0.0


def window_at(schedule: BranchSchedule, own: int, *, seed: int, step: int, total: int) -> int:
    """The window at an optimiser step; `own` is the method's."""
    if isinstance(schedule.window, RandomWidth):
        if step / total >= schedule.window.until:
            return own
        draw = int(_generator(seed, _WIDTH, step).integers(len(schedule.window.random)))
        return schedule.window.random[draw]
    return max(1, round(_value(schedule.window, schedule.between, step / total))) if schedule.window else own


def kept(
    schedule: BranchSchedule, *, seed: int, step: int, total: int, micro: int, layer: int, rows: int, heads: int
) -> "NDArray[np.bool_]":
    """Where the window takes part, [rows, heads]: a pure function of its arguments.

    Rows are numbered within their micro-batch: seed, optimiser step, micro-batch, layer, head and row decide, so that
    gradient checkpointing and resuming draw the same.
    """
    import numpy as np

    rate = dropout_at(schedule, step, total)
    match schedule.granularity:
        case "step":
            drawn = np.full((rows, heads), _generator(seed, _STEP, step).random())
        case "layer":
            drawn = np.full((rows, heads), _generator(seed, _LAYER, step, micro, layer).random())
        case "head":
            drawn = np.broadcast_to(_generator(seed, _HEAD, step, micro, layer).random(heads), (rows, heads))
        case "sequence":
            drawn = np.broadcast_to(_generator(seed, _ROW, step, micro).random((rows, 1)), (rows, heads))
    return drawn >= rate


_STEP, _LAYER, _HEAD, _ROW, _WIDTH = range(5)  # keep the draws of each kind apart


def _generator(*key: int) -> "np.random.Generator":
    import numpy as np

    return np.random.default_rng([11, *key])


def _value(points: Sequence[Rate] | Sequence[Width], between: str, done: float) -> float:
    if between == "step":
        return float(next((p.value for p in points if done < p.until), points[-1].value))
    before = points[0]
    if done <= before.until:
        return float(before.value)
    for after in points[1:]:
        if done <= after.until:
            share = (done - before.until) / (after.until - before.until)
            share = (1 - math.cos(math.pi * share)) / 2 if between == "cosine" else share
            return before.value + share * (after.value - before.value)
        before = after
    return float(points[-1].value)
