"""A recipe at tiny size: the same family, method, form and stages, on a random model of thousands of weights (no torch).

A dry run: whether a recipe for a large model runs from end to end is seen on a laptop in seconds. Its numbers mean nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .base import Config
from .branches import RandomWidth
from .families import Architecture
from .load import Loaded
from .lookup import lookup
from .plan import architecture_of, digest
from .recipe import Evaluation, Model, Recipe, Suite
from .records import SHRUNK
from .schedule import Schedule, Validation
from .sources import Data, Recall, Retrieval, Source, Stdlib
from .steps import Choice

STEPS, BATCH, ACCUMULATION, LENGTH, WINDOW, SINKS = 3, 2, 2, 48, 8, 2
LAYERS, HEADS, HEAD_DIM, OWN_WINDOW, VOCABULARY = 2, 4, 8, 16, 1024


class ShrinkError(ValueError):
    """A recipe that has no tiny counterpart; the message says why."""


def tiny_architecture(arch: Architecture) -> Architecture:
    """The same family with its biases, rope scaling, own window and grouping of heads, and few of everything."""
    group = min(HEADS, arch.num_attention_heads // arch.num_key_value_heads)
    scaling = arch.rope_scaling
    if scaling and "original_max_position_embeddings" in scaling:
        scaling = {**scaling, "original_max_position_embeddings": LENGTH // 2}
    types = arch.layer_types
    return arch.model_copy(
        update={
            "hidden_size": HEADS * HEAD_DIM,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS // group,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCABULARY + 1,  # transformers gives a tokenizer of Qwen2's a token of its own
            "max_position_embeddings": 4 * LENGTH,
            "rope_scaling": scaling,
            "initializer_range": 0.1,
            "sliding_window": OWN_WINDOW if arch.sliding_window else None,
            "layer_types": (types[0], types[-1]) if types else None,
        }
    )


def shrink(loaded: Loaded, teacher: str) -> Loaded:
    """The recipe (a point of a grid) on the tiny model in the folder `teacher`, three steps a stage, a few rows of evaluation.

    Raises ShrinkError for what starts from given weights.
    """
    recipe = loaded.recipe
    if recipe.model.converted or recipe.model.student:
        raise ShrinkError(f"{recipe.name}: published weights have no tiny counterpart")
    model: dict[str, Any] = {"dtype": recipe.model.dtype}
    if recipe.model.scratch:
        scratch = recipe.model.scratch
        model["scratch"] = scratch.model_copy(
            update={
                "architecture": tiny_architecture(scratch.architecture),
                "tokenizer": scratch.tokenizer.model_copy(update={"vocab_size": VOCABULARY}),
            }
        )
    else:
        model["teacher"] = teacher
    stages = lookup("methods", recipe.method.name).STAGES if "." not in recipe.method.name else {}  # type: ignore[attr-defined]
    small = Recipe(
        name=f"{SHRUNK}{recipe.name}",
        about=recipe.about,
        seed=0,  # points that differ by their seed alone are one tiny run
        model=Model(**model),
        method=_method(recipe.method),
        data=_data(recipe.data),
        schedule={
            name: _schedule(recipe.schedule.get(name, default)) for name, default in (stages or recipe.schedule).items()
        },
        eval=_evaluation(recipe.eval),
    )
    return replace(loaded, recipe=small)


def tiny_of(loaded: Loaded) -> Architecture:
    """The architecture of the tiny teacher that stands in for a recipe's."""
    return tiny_architecture(architecture_of(loaded))


def _method(method: Config) -> Config:
    """Windows, sinks and calibration made small, wherever the method has them."""
    return method.model_copy(update=_smaller(method))


def _smaller(value: BaseModel) -> dict[str, Any]:
    most = {"window": WINDOW, "sinks": SINKS, "calibration_batches": 1}
    found: dict[str, Any] = {}
    for name in type(value).model_fields:
        own = getattr(value, name)
        if name in most and isinstance(own, int):
            found[name] = min(own, most[name])
        elif isinstance(own, RandomWidth):
            found[name] = own.model_copy(update={"random": tuple(min(w, WINDOW) for w in own.random)})
        elif name == "window" and isinstance(own, tuple):
            found[name] = tuple(w.model_copy(update={"value": min(w.value, WINDOW)}) for w in own)
        elif isinstance(own, Choice):
            found[name] = _choice(own)
        elif name == "layers" and isinstance(own, tuple):
            found[name] = (0,)
        elif name == "branches" and isinstance(own, BaseModel):
            found[name] = own.model_copy(update=_smaller(own))
    return found


def _choice(choice: Choice) -> Choice:
    """One of the tiny model's two layers stays, by the same policy."""
    if choice.policy == "explicit":
        return Choice(policy="explicit", layers=(0,))
    scored = {"rows": 2, "length": LENGTH, "draws": min(choice.draws, 2)} if choice.scored else {}
    found: dict[str, Any] = {**scored, "data": _data(choice.data) if choice.data else None}
    return Choice(policy=choice.policy, keep=1, tune=_schedule(choice.tune), **found)


def _data(data: Data) -> Data:
    """The pocket's text in place of every corpus; generated rows stay, with little in them."""
    text = Stdlib(source="python-stdlib")

    def little(source: Source) -> Source:
        if isinstance(source, Recall):
            return source.model_copy(update={"text": text, "keys": 16, "values": 16, "pairs": 2})
        if isinstance(source, Retrieval):  # a row of LENGTH tokens holds no sentences
            return Retrieval(source="retrieval", format="copy", copied=2, text=text, weight=source.weight)
        return text

    return data.model_copy(update={"mix": tuple(map(little, data.mix))})


def _schedule(schedule: Schedule | None) -> Schedule | None:
    if schedule is None:
        return None
    found: Mapping[str, Any] = schedule.model_dump(exclude={"steps", "tokens", "epochs", "data", "validation", "curve"})
    validation = schedule.validation
    if validation:
        watch = tuple(w.model_copy(update={"suite": None, "metric": "loss"}) for w in validation.watch)
        validation = Validation(
            every=2, watch=watch, batches=1, keep_best=validation.keep_best, patience=validation.patience
        )
    return Schedule(
        **{
            **found,
            "steps": STEPS,
            "batch": min(schedule.batch, BATCH),
            "accumulation": min(schedule.accumulation, ACCUMULATION),
            "length": LENGTH,
            "validation": validation,
            "data": _data(schedule.data) if schedule.data else None,
        }
    )


def _evaluation(evaluation: Evaluation) -> Evaluation:
    """A few rows of log-loss in every state that the recipe asks for."""
    perplexity = lookup("evals", "perplexity").Config(rows=2, length=LENGTH, batch=2)
    suite = Suite(name="shrunk", evals=(perplexity,))
    return evaluation.model_copy(update={"suites": (suite,), "seeds": (0,)})


def tiny_folder(home: Path, arch: Architecture) -> Path:
    """Where the tiny teacher of an architecture lies."""
    return home / "shrunk" / f"{arch.model_type}-{digest(arch.model_dump(mode='json'))[:12]}"
