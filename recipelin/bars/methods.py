"""What HedgeCATs and SSD cost beside LoLCATs: the training of the pocket's recipes, side by side."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from .. import data, hf, stages, swap
from ..bench.measure import Bar, Fact
from ..load import load
from ..loop import BatchSource
from ..plan import plan, teacher_folder
from ..steps import Swap, Switch, Transfer, Tune

SHARE = 25  # of each stage's optimiser steps, one in so many is made: 6 of 150, 2 of 50


@dataclass(frozen=True)
class Training:
    """The training stages of a recipe without calibrations, a part of the steps of each; every call begins with the teacher."""

    recipe: str
    length: int = 256
    steps: int = 1

    def make(self) -> Callable[[], object]:
        loaded = load(self.recipe)
        folder = teacher_folder(loaded)
        assert folder is not None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        planned = [p.step for p in plan(loaded).steps]
        rows = {
            step.stage: data.Batches(
                step.data,
                tokenizer,
                part="training",
                length=self.length,
                batch=step.schedule.batch,
                seed=0,
                folder=folder,
            )
            for step in planned
            if isinstance(step, Transfer | Tune)
        }

        def call() -> None:
            model, _ = hf.load_teacher(str(folder), revision=None, dtype="float32", device="cpu")
            with tempfile.TemporaryDirectory() as made:
                for step in planned:
                    if isinstance(step, Swap):
                        swap.swap(model, step, seed=0)
                    elif isinstance(step, Switch):
                        swap.switch(model, step.state)
                    elif isinstance(step, Transfer | Tune):
                        schedule = step.schedule.model_copy(
                            update={
                                "steps": max(1, (step.schedule.steps or SHARE) // SHARE),
                                "length": self.length,
                                "validation": None,
                            }
                        )
                        short = step.model_copy(update={"schedule": schedule})
                        train(model, short, rows[step.stage], Path(made))

        return lambda: quietly(call)


def train(model: Any, step: Transfer | Tune, rows: BatchSource, folder: Path) -> None:
    """The stage of a step on the CPU, from seed 0."""
    if isinstance(step, Transfer):
        stages.transfer(model, step, rows, device="cpu", folder=folder / step.stage, seed=0, log=folder / "log")
    else:
        stages.tune(model, step, rows, device="cpu", folder=folder / step.stage, seed=0, log=folder / "log")


def quietly(call: Callable[[], object]) -> object:
    """Without the progress bars of loading and training."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        return call()


def _beside(other: str) -> dict[str, Training]:
    return {name: Training(f"pocket/{name}") for name in (other, "lolcats")}


BARS: list[Bar | Fact] = [
    bar
    for method, name in (("hedgecats", "HedgeCATs"), ("ssd", "SSD"))
    for time in [
        Bar(f"methods/{method}", f"training of pocket/{method} over that of pocket/lolcats, both stages: {name}'s cost",
            _beside(method), (method, "lolcats"), None, slow=True)
    ]
    for bar in (time, replace(time, name=f"methods/{method}-memory", about=f"the same, peak memory: {name}", peak=True))
]  # fmt: skip
