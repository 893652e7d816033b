"""The schedule of one training stage: how long, with which optimiser, on which batches (no torch)."""

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Config
from .sources import Data
from .states import NAMES


class Decay(Config):
    """The learning rate over a stage, after `warmup` optimiser steps of linear warm-up.

    Sample YAML: `{name: cosine, warmup: 20, final: 0.1}`. `plateau` multiplies the rate by `factor` when the validation
    value has not improved for `patience` checks, down to `floor` (LoLCATs: 0.1, 10, 1e-5).
    """

    name: Literal["constant", "cosine", "linear", "plateau"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of lr left at the end (cosine, linear)")
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    patience: Annotated[int, Field(ge=0)] = 10
    floor: Annotated[float, Field(ge=0)] = 1e-5


class Optimizer(Config):
    """AdamW, or Muon for the matrices of the layers with AdamW for embeddings and norms.

    Sample YAML: `{name: adamw, lr: 1e-2, weight_decay: 0.0}`
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    adamw_lr: Annotated[float, Field(gt=0)] = Field(3e-3, description="rate of what Muon leaves to AdamW")
    group_lr: dict[str, float] = Field(
        {},
        description="own rate for a group of parameters: feature_maps, mix, log_scale, lora; where all weights train also "
        "attention (all of every attention module, swapped or not) and attention_norms (the norms before them). "
        "arXiv 2606.16429, stage 2: {attention: 1e-4, attention_norms: 1e-4}, the rest 7e-6 (its rule is `attn` in the name)",
    )


class Validation(Config):
    """What is watched while a stage trains, on the selection part; the mean over the entries, each times its weight,
    is minimised.

    Sample YAML: `{every: 100, watch: [{state: hybrid, metric: loss}], keep_best: true, patience: 10}`; the linear branch's
    contribution is watched by `watch: [{state: hybrid}, {state: window, weight: -1}]`.
    """

    class Watch(Config):
        state: str = Field("hybrid", description="a named state, or `transfer` for a transfer stage's own objective")
        suite: str | None = Field(None, description="a suite; None: held-out rows of the stage's own data")
        metric: str = Field("loss", description="a metric of the suite; `loss` on held-out rows")
        weight: float = Field(1.0, description="negative: the larger the better")

    every: Annotated[int, Field(ge=1)] = 100
    watch: Annotated[tuple[Watch, ...], Field(min_length=1)] = (Watch(),)
    batches: Annotated[int, Field(ge=1)] = 8
    keep_best: bool = True
    patience: Annotated[int, Field(ge=1)] | None = Field(None, description="checks without improvement before stopping")


class Curve(Config):
    """What is measured of the student while a stage trains: suites in states, once it has read so many training tokens.

    Each after the first optimiser step that reaches the number (0: before the first); the rows stand in the Record with the
    tokens read by then. The student is measured as it stands, adapters unmerged; nothing is selected by it, so what is
    measured may be test items. Sample YAML: `{tokens: [0, 100000, 400000], suites: [pocket-claims], states: [hybrid]}`
    """

    tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    suites: Annotated[tuple[str, ...], Field(min_length=1)]
    states: Annotated[tuple[str, ...], Field(min_length=1)] = ("hybrid",)

    @model_validator(mode="after")
    def _rising(self) -> "Curve":
        if any(b <= a for a, b in itertools.pairwise(self.tokens)):
            raise ValueError(f"tokens: found {', '.join(map(str, self.tokens))}; expected rising numbers")
        if wrong := [name for name in self.states if name not in NAMES[1:]]:
            raise ValueError(f"states: cannot measure {', '.join(wrong)}; there are {', '.join(NAMES[1:])}")
        for name in ("suites", "states"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: one is given twice")
        return self


class Schedule(Config):
    """One training stage. Exactly one of `steps`, `tokens`, `epochs` says how long.

    Sample YAML::

        transfer: {steps: 150, batch: 4, length: 256, optimizer: {lr: 3e-2}, decay: {name: cosine}}
    """

    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimiser steps")
    tokens: Annotated[int, Field(ge=1)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    optimizer: Optimizer = Optimizer()
    decay: Decay = Decay()
    batch: Annotated[int, Field(ge=1)] = Field(1, description="rows of a micro-batch")
    accumulation: Annotated[int, Field(ge=1)] = Field(1, description="micro-batches of an optimiser step")
    length: Annotated[int, Field(ge=2)] = Field(1024, description="tokens of a row (LoLCATs: 1024)")
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="largest gradient norm; None: no clipping")
    autocast: Literal["bfloat16"] | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] = Field(50, description="optimiser steps between checkpoints")
    log_every: Annotated[int, Field(ge=1)] = 10
    data: Data | None = Field(None, description="this stage's own data; None: the recipe's")
    validation: Validation | None = None
    curve: Curve | None = Field(None, description="evaluations at numbers of training tokens, for token curves")

    @property
    def tokens_a_step(self) -> int:
        """Training tokens that an optimiser step reads."""
        return self.batch * self.accumulation * self.length

    @property
    def measured_at(self) -> dict[int, int]:
        """Optimiser step -> tokens asked for, of `curve`. Raises ValueError where two fall on one step."""
        found: dict[int, int] = {}
        for tokens in self.curve.tokens if self.curve else ():
            step = -(-tokens // self.tokens_a_step)
            if step in found:
                raise ValueError(
                    f"curve.tokens: {found[step]} and {tokens} are both reached by step {step}; a step reads "
                    f"{self.tokens_a_step} tokens"
                )
            found[step] = tokens
        return found

    @model_validator(mode="after")
    def _one_duration(self) -> "Schedule":
        given = [n for n in ("steps", "tokens", "epochs") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens, epochs; found {', '.join(given) or 'none'}")
        if self.decay.name == "plateau" and self.validation is None:
            raise ValueError("decay: plateau needs validation: it follows the validation value")
        if self.measured_at and (total := optimiser_steps(self, None)) is not None and max(self.measured_at) > total:
            raise ValueError(f"curve.tokens: {max(self.curve.tokens)}; the stage reads {total * self.tokens_a_step}")  # type: ignore[union-attr]
        return self


def optimiser_steps(schedule: Schedule, rows: int | None) -> int | None:
    """Optimiser steps of a stage whose data has `rows` rows an epoch; None where the duration needs rows that are not known."""
    if schedule.steps is not None:
        return schedule.steps
    rows_a_step = schedule.batch * schedule.accumulation
    if schedule.tokens is not None:
        return math.ceil(schedule.tokens / schedule.tokens_a_step)
    if rows is None or schedule.epochs is None:
        return None
    return math.ceil(schedule.epochs * rows / rows_a_step)
