"""Tokens a second of the stages of the pocket's LoLCATs recipe and of a layer of Llama-3.1-8B's shape, and what takes the time.

Each in a process of its own, with the allocator that a run has.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from .. import data, hf, lookup, memory, swap
from ..attention.hybrid.config import Config
from ..bench.measure import Bar, Fact, apart
from ..bench.profile import DATA, Stretch, marked, part
from ..cost import suites_of
from ..evals.subject import Subject
from ..exposure import exposed_from
from ..families import Architecture
from ..files import home
from ..load import Loaded, load
from ..loop import BatchSource
from ..plan import Plan, plan, teacher_folder
from ..schedule import Optimizer, Schedule
from ..sources import Data
from ..states import State
from ..steps import Evaluate, Swap, Switch, Transfer, Tune
from .methods import quietly, train

SETTLE = 2  # steps that are not counted


class _Enough(Exception):
    """Ends a stage whose steps were seen."""


@dataclass(frozen=True)
class Watched:
    """A stage's batches; those of optimiser step `first` (from 0) begin the stretch, and step `last` ends stretch and stage."""

    source: BatchSource
    stretch: Stretch
    first: int
    last: int

    @property
    def rows(self) -> int:
        return self.source.rows

    def batch(self, step: int, micro: int = 0) -> data.Batch:
        if micro == 0 and step == self.first:
            self.stretch.begin()
        if micro == 0 and step == self.last:
            self.stretch.end()
            raise _Enough
        with part(DATA):
            return self.source.batch(step, micro)


def watch(
    model: Any, step: Transfer | Tune, source: BatchSource, steps: int, *, settle: int, profiled: bool
) -> Stretch:
    """`steps` optimiser steps of a stage, after `settle` that are not counted."""
    stretch, last = Stretch(profiled), settle + steps
    schedule = step.schedule.model_copy(update={"steps": last + 1, "tokens": None, "epochs": None, "validation": None})
    short = step.model_copy(update={"schedule": schedule})

    def call() -> None:
        with tempfile.TemporaryDirectory() as made, marked(model), suppress(_Enough):
            train(model, short, Watched(source, stretch, settle, last), Path(made))

    quietly(call)
    return stretch


def values(profiled: Stretch, cpu: float, tokens: int, **more: float) -> dict[str, float]:
    """Tokens a second, `more`, the share of each part in percent, and how many times as long it took with the profiler.

    cpu: seconds without the profiler.
    """
    shares = {f"{name} %": 100 * share for name, share in profiled.shares.items()}
    return {"tokens/s": tokens / cpu, **more, **shares, "times with the profiler": profiled.cpu / cpu}


# --- the recipe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """The stages of a recipe, each with a model of its own: how fast they are does not hang on what was learnt before."""

    recipe: str = "pocket/lolcats"

    @cached_property
    def loaded(self) -> Loaded:
        return load(self.recipe)

    @cached_property
    def plan(self) -> Plan:
        return plan(self.loaded)

    @cached_property
    def teacher(self) -> Path:
        folder = teacher_folder(self.loaded)
        assert folder is not None
        return folder

    @cached_property
    def tokenizer(self) -> Any:
        return hf.load_tokenizer(self.teacher)

    def model(self, weights: str = "student") -> Any:
        """The teacher, as a student with the recipe's form in its layers."""
        model, _ = hf.load_teacher(self.teacher, dtype="float32", device="cpu")
        for step in (p.step for p in self.plan.steps if weights == "student"):
            if isinstance(step, Swap):
                swap.swap(model, step, seed=0)
            elif isinstance(step, Switch):
                swap.switch(model, step.state)
        return model

    def training(self, name: str, steps: int) -> dict[str, float]:
        """A stage by its name: `steps` optimiser steps without the profiler, and as many with it."""
        step = next(p.step for p in self.plan.steps if isinstance(p.step, Transfer | Tune) and p.step.stage == name)
        schedule = step.schedule
        source = data.Batches(
            step.data,
            self.tokenizer,
            part="training",
            length=schedule.length,
            batch=schedule.batch,
            accumulation=schedule.accumulation,
            seed=0,
            folder=self.loaded.path.parent,
            cache=home() / "tokens",
        )
        plain, profiled = (
            watch(self.model(), step, source, steps, settle=SETTLE, profiled=profiled) for profiled in (False, True)
        )
        return values(profiled, plain.cpu, steps * schedule.tokens_a_step, **{"ms a step": 1e3 * plain.cpu / steps})

    def evaluation(self, state: str) -> dict[str, float]:
        """The recipe's suites in a state, and seconds of each kind of evaluation. Tokens: all that the model reads."""
        step = next(p.step for p in self.plan.steps if isinstance(p.step, Evaluate))
        named = next(s for s in step.states if s.name == state)
        model, tokens, seconds = self.model(named.weights), 0, dict[str, float]()
        if named.state is not None:
            swap.switch(model, named.state)
        asked: list[Any] = [config for suite in suites_of(step) for config in suite.evals]

        def count(_: Any, __: Any, given: Mapping[str, Any]) -> None:
            nonlocal tokens
            tokens += given["input_ids"].numel()

        with tempfile.TemporaryDirectory() as made, marked(model):
            subject = Subject(
                model=model,
                tokenizer=self.tokenizer,
                state=named,
                seed=0,
                exposed_from=exposed_from(self.plan.hybrid, self.plan.reach),
                folder=Path(made),
                base=self.loaded.path.parent,
                device="cpu",
            )

            def call() -> None:
                for config in asked:
                    start = time.process_time()
                    lookup.implementation("evals", config.eval).run(config, subject)
                    seconds[f"{config.eval} s"] = time.process_time() - start

            quietly(call)  # writes the items of local tasks, which a run keeps for all states
            hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
            quietly(call)
            hook.remove()
            found = dict(seconds)
            profiled = Stretch(True)
            profiled.begin()
            quietly(call)
            profiled.end()
        return values(profiled, sum(found.values()), tokens, **found)


# --- a layer of a large model -----------------------------------------------------------------------------------------

# meta-llama/Llama-3.1-8B's config.json but for the number of layers; the vocabulary is the pocket's, whose tokenizer it has.
LLAMA_LAYER = Architecture(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=1024,
    max_position_embeddings=131072,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
)


@dataclass(frozen=True)
class Random:
    """One row of random tokens a step."""

    length: int
    vocabulary: int
    rows: int = 1

    def batch(self, step: int, micro: int = 0) -> data.Batch:
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(self.vocabulary, (1, self.length), generator=draw)
        return data.Batch(input_ids=ids, labels=ids, position_ids=torch.arange(self.length)[None])


def layer(architecture: Mapping[str, Any], length: int, features: int, window: int) -> dict[str, float]:
    """One step of transfer of one row: hybrid_outputs, learned feature maps of `features` and the mix; memory at the peak.

    architecture: an Architecture as JSON has it.
    """
    shape = Architecture.model_validate(architecture)
    model = hf.new_model(shape, Stages().tokenizer, embedding_std=1.0, seed=0)
    form = Config.model_validate({"feature_map": {"width": features // shape.head_dim}})
    swap.swap(model, Swap(form="hybrid", config=form, layers="all"), seed=0)
    swap.switch(model, State(window=window))
    schedule = Schedule(steps=1, batch=1, length=length, optimizer=Optimizer(lr=1e-2))
    step = Transfer(
        stage="transfer",
        objective={"hybrid_outputs": 1.0},
        trains=("feature_maps", "mix"),
        schedule=schedule,
        data=Data(),
    )
    rows = partial(Random, vocabulary=shape.vocab_size)
    watch(model, step, rows(2 * window), 1, settle=0, profiled=False)  # libraries
    memory.reset_peak("cpu")
    # Operations are so long that the profiler's cost is nothing: one step is timed and seen.
    stretch = watch(model, step, rows(length), 1, settle=0, profiled=True)
    highest = memory.peak("cpu")
    more = {} if highest is None else {"GiB at the peak": highest / 2**30}
    return values(stretch, stretch.cpu, length, **{"s a step": stretch.cpu}, **more)


# --- the facts --------------------------------------------------------------------------------------------------------


def training(name: str, steps: int) -> dict[str, float]:
    return Stages().training(name, steps)


def evaluation(state: str) -> dict[str, float]:
    return Stages().evaluation(state)


def _apart(function: Callable[..., Any], full: Mapping[str, Any], quick: Mapping[str, Any]) -> Callable[[bool], Any]:
    return lambda short: apart("stages", function.__name__, {**full, **quick} if short else full)


_LAYER = {"architecture": LLAMA_LAYER.model_dump(mode="json"), "features": 128, "window": 64}
_HOW = "process CPU time of one thread, shares by torch.profiler (bench/profile.py)"

BARS: list[Bar | Fact] = [
    Fact("stages/transfer", f"pocket/lolcats, transfer, 4 rows of 256 tokens: {_HOW}",
         _apart(training, {"name": "transfer", "steps": 16}, {"steps": 3})),
    Fact("stages/tune", "the same, tune, 8 rows of 256 tokens",
         _apart(training, {"name": "tune", "steps": 12}, {"steps": 3})),
    Fact("stages/evaluation", "the same, suite pocket in state hybrid; tokens that the model reads, padding too",
         _apart(evaluation, {"state": "hybrid"}, {})),
    Fact("stages/evaluation-teacher", "the same in state teacher",
         _apart(evaluation, {"state": "teacher"}, {})),
    Fact("stages/layer-1k", "one layer of Llama-3.1-8B's shape (random, F 128, window 64): a step of transfer on one row of "
         "1,024, MLP and teacher's attention included (quick: 128)",
         _apart(layer, {**_LAYER, "length": 1024}, {"length": 128})),
    Fact("stages/layer-8k", "the same on a row of 8,192 (quick: 1,024)",
         _apart(layer, {**_LAYER, "length": 8192}, {"length": 1024})),
]  # fmt: skip
