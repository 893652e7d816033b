"""A model from nothing, on the next-token loss: how the pocket teacher is made (no torch)."""

from typing import Literal

from ..base import Config as Base
from ..recipe import Recipe
from ..schedule import Optimizer, Schedule
from ..steps import Step, Tune


class Config(Base):
    """Stage `short`, then stage `long`: the same training at two row lengths.

    Recall emerges after a warm-up in length (facts/pocket.md §A; a guess that fits, not a result).
    Sample YAML: `{name: pretrain}`
    """

    name: Literal["pretrain"] = "pretrain"


STAGES = {
    "short": Schedule(steps=1000, batch=32, length=64, optimizer=Optimizer(name="muon", lr=2e-2)),
    "long": Schedule(steps=700, batch=8, length=256, optimizer=Optimizer(name="muon", lr=2e-2)),
}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """One Tune of all weights for each stage that the schedule keeps."""
    return tuple(
        Tune(stage=stage, lora=None, schedule=schedule, data=schedule.data or recipe.data)
        for stage in STAGES
        if (schedule := recipe.schedule[stage])
    )
