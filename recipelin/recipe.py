"""The schema of a recipe: every block, with its defaults and their sources (no torch)."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator

from .base import Config
from .families import Architecture
from .schedule import Schedule
from .sources import Data
from .states import Branch, Compat, Join, Shape, State
from .strict_yaml import Where


class About(Config):
    """What the recipe is for. Sample YAML: `{paper: arXiv 2410.10254, claim: the linear branch is bypassed}`"""

    paper: str | None = None
    claim: str | None = None


class Scratch(Config):
    """A new model instead of a teacher: its numbers and its byte-level BPE.

    Sample YAML: `{architecture: {model_type: llama, ...}, tokenizer: {vocab_size: 1024}}`
    """

    class Tokenizer(Config):
        vocab_size: Annotated[int, Field(ge=260)] = 1024

    architecture: Architecture
    tokenizer: Tokenizer = Tokenizer()
    embedding_std: Annotated[float, Field(gt=0)] = Field(
        0.02,
        description="start of the input embeddings; wide ones keep rare tokens apart while the rest is still moving",
    )


class Converted(Config):
    """Weights that somebody else has converted already: read, checked key by key, and laid into the swapped teacher.

    `lolcats`: the two files that LoLCATs saves: `distill` (feature maps and window factors of stage 1) and `finetune`
    (LoRA of stage 2; may hold feature maps and factors too, which then win). Relative paths start at the recipe's folder.
    Sample YAML: `{format: lolcats, distill: lolcats-llama-3.1-8b-distill/model.pt,
    finetune: lolcats-llama-3.1-8b-ft-lora/model.pt, alpha: 16}`
    """

    format: Literal["lolcats"]
    distill: str
    finetune: str | None = Field(None, description="None: the student as stage 1 left it")
    alpha: Annotated[float, Field(gt=0)] = Field(
        16, description="LoRA is scaled by alpha / rank; the rank is in the file, alpha is not (LoLCATs, 8B: 16)"
    )

    def files(self) -> dict[str, str]:
        """Field name -> path as the recipe gives it."""
        found = {"distill": self.distill, "finetune": self.finetune}
        return {name: path for name, path in found.items() if path is not None}


# Where the files of a `format` are to be had; read in LoLCATs' demos/demo_8b.sh and demos/demo_lolcats_hf.py.
SOURCES = {
    "lolcats": "LoLCATs' Llama-3.1-8B is on the hub, a model.pt each: hazyresearch/lolcats-llama-3.1-8b-distill and "
    "hazyresearch/lolcats-llama-3.1-8b-ft-lora"
}


class Student(Config):
    """An exported student, as its config.json describes it. In YAML: the path of its folder.

    Sample YAML: `student: runs/pocket-lolcats--1a2b3c4d/model`
    """

    folder: str = Field(description="as the recipe gives it; relative paths start at the recipe's folder")
    form: str
    config: SerializeAsAny[Config]
    layers: tuple[int, ...]
    state: State


class Model(Config):
    """The model that is converted, or made from nothing.

    Sample YAML: `{teacher: pocket}`, `{teacher: ./my-checkpoint}`,
    `{teacher: meta-llama/Meta-Llama-3-8B, revision: 8cde5ca8, architecture: llama3-8b.json, dtype: bfloat16}`
    """

    teacher: str | None = Field(
        None, description="`pocket` and its kin (shipped), a local folder (relative to the recipe), or a hub id"
    )
    revision: str | None = Field(None, description="commit of a hub id")
    dtype: Literal["float32", "bfloat16"] = "float32"
    architecture: Architecture | None = Field(
        None, description="numbers of a teacher that is not here yet; in YAML also the path of a config.json"
    )
    beyond_context: bool = Field(
        False,
        description="true: rows may be longer than the teacher's context (max_position_embeddings, times the factor of yarn "
        "or linear scaling), at positions that it never saw; its own scores there are then of no use as a measure",
    )
    scratch: Scratch | None = None
    converted: Converted | None = Field(
        None, description="a published conversion of the teacher, for `method: {name: converted}`"
    )

    student: Student | None = Field(
        None, description="in YAML the folder of an exported student, for `method: {name: exported}`; teacher: its own"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if self.student:
            if self.scratch or self.converted:
                raise ValueError("a student is evaluated as it is; scratch and converted have no place beside it")
            return self
        if (self.teacher is None) == (self.scratch is None):
            raise ValueError("give exactly one of teacher and scratch")
        if self.converted and self.scratch:
            raise ValueError("converted weights belong to a teacher; this model is made from scratch")
        return self


class StateOf(Config):
    """A state spelt out as a change of a named one; `compat: null` takes a published window's defects away.

    Sample YAML: `{name: window-16, of: window, window: 16}`
    """

    name: str
    of: str = "hybrid"
    branches: tuple[Branch, ...] | None = None
    window: Annotated[int, Field(ge=1)] | Literal["full"] | None = None
    shape: Shape | None = None
    compat: Compat | None = None
    sinks: Annotated[int, Field(ge=0)] | None = None
    cover: Literal["outside", "all"] | None = None
    join: Join | None = None
    ablate: Literal["mass", "output"] | None = None


class Suite(Config):
    """A named list of evaluations: a file of recipes/suites.

    Sample YAML: `{name: pocket, evals: [{eval: perplexity}, {eval: recall}]}`
    """

    name: str
    about: str | None = None
    evals: Annotated[tuple[SerializeAsAny[Config], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_row_twice(self) -> "Suite":
        for _, text in twins(self.evals):
            raise ValueError(text)
        return self


def twins(evals: Sequence[Config]) -> Iterator[tuple[Where, str]]:
    """(place among the evaluations, what is wrong) of every row of a Record that two of them would make; once a place."""
    known: set[tuple[str, str]] = set()
    told: set[Where] = set()
    for index, evaluation in enumerate(evals):
        for name in evaluation.names() if hasattr(evaluation, "names") else ():
            where: Where = (index, *name.field)
            if (key := (name.task, name.metric)) in known and where not in told:
                text = (
                    f"the suite has task {name.task!r} with metric {name.metric!r} already, and a Record knows rows by suite, "
                    "task and metric; leave one out, or put it into a suite of its own (eval.suites takes several)"
                )
                told.add(where)
                yield where, text
            known.add(key)


class Evaluation(Config):
    """What is measured after the method has run.

    Sample YAML: `{suites: [pocket], states: [teacher, softmax, hybrid, window, linear, none], seeds: [0], margin: 0.01}`
    """

    suites: Annotated[tuple[Suite, ...], Field(min_length=1)] = Field(description="in YAML: names of recipes/suites")
    states: Annotated[tuple[str | StateOf, ...], Field(min_length=1)] = Field(
        ("teacher", "softmax", "hybrid", "window", "linear", "linear_outside", "none"),
        description="DESIGN §6; the subsets that the Shapley values need are added, and of this default those are left out that "
        "the form does not have (gated_delta has no window)",
    )
    shapley: bool = Field(
        True,
        description="whether every subset of the hybrid's branches is evaluated; false: only `states`, and no Shapley values",
    )
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = Field(
        (0,), description="draws of generated items (recall, next line)"
    )
    margin: Annotated[float, Field(gt=0)] = Field(
        0.01, description="smallest difference that counts: 1 point of a score, 0.01 nats of log-loss (DESIGN §6)"
    )


class Recipe(Config):
    """One experiment, whole and frozen. `load` makes it from text; `expand` resolves its grid."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._/=,+-]*$")]
    about: About = About()
    seed: Annotated[int, Field(ge=0)] = 0
    grid: dict[str, tuple[object, ...]] = Field({}, description="axes over dotted fields; one Record for each point")
    model: Model
    method: SerializeAsAny[Config]
    data: Data = Data()
    schedule: dict[str, Schedule | None] = Field(
        {}, description="stages of the method; what is not given comes from the method; null leaves a stage out"
    )
    eval: Evaluation
