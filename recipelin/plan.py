"""Recipe -> Plan: the steps in order, their hashes, what each reads, trains and costs (no torch, no network)."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError

from . import families, lookup, reads
from .attention.hybrid.config import Config as Hybrid
from .base import Config
from .families import Architecture
from .load import Loaded, load_suite
from .mistakes import listed, nearest, placed
from .recipe import Converted, StateOf, Suite
from .schedule import optimiser_steps
from .sources import Data, Hub, LocalFile, Recall, Rows, SourceError, Stdlib
from .states import NAMES, NamedState, State, resolve, subsets
from .steps import Calibrate, Evaluate, Lora, Step, StepsError, Swap, Switch, Transfer, Tune
from .strict_yaml import Mistake, Where
from .templates import name_of

BYTES_PER_TOKEN = 4  # of English text under a vocabulary of tens of thousands; only sizes `epochs` before tokenising
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
POCKET = Path(__file__).parent / "pocket"


class PlanError(ValueError):
    """A recipe that is well formed but cannot be carried out; the message says what to change, and at `place` where."""

    def __init__(self, text: str, place: Mistake | None = None) -> None:
        self.located = place is not None
        super().__init__(str(replace(place, text=text)) if place else text)


class Cost(Config):
    """Estimates. `memory`: bytes at the peak by place; `cpu` for a CPU run, `cuda` and `host` for a run on one GPU."""

    tokens: int | None = None
    flops: float | None = None
    memory: dict[str, int] = Field({}, description="bytes at the peak by place")


class Planned(Config):
    """One step of a plan. `hash` is pure: the step's fields, the seed, and everything before it."""

    step: SerializeAsAny[Step]
    hash: str
    what: str
    reads: str = ""
    trains: int = 0
    share: float = 0.0
    optimiser_steps: int | None = None
    cost: Cost = Cost()


class Plan(Config):
    """What `run` will do, whole: nothing is decided later."""

    name: str
    seed: int
    architecture: Architecture
    parameters: int
    layers: int
    hybrid: State | None
    steps: tuple[Planned, ...]
    hash: str

    @property
    def reach(self) -> int | None:
        """The farthest that a linear branch may look, the query included: the teacher's own window; None: no limit."""
        swap = next((p.step for p in self.steps if isinstance(p.step, Swap)), None)
        if swap is None or not isinstance(swap.config, Hybrid):
            return None
        layers = range(self.layers) if swap.layers == "all" else swap.layers
        found = [swap.config.reach(self.architecture, i) for i in layers]
        return None if None in found else max(w for w in found if w is not None)


# What cannot change a result stays out of the hash.
_UNHASHED = {"checkpoint_every", "log_every"}


def digest(value: object) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hashed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _hashed(v) for k, v in value.items() if k not in _UNHASHED}
    if isinstance(value, (list, tuple)):
        return [_hashed(v) for v in value]
    return value


def teacher_folder(loaded: Loaded) -> Path | None:
    """The folder of a teacher that is on this machine (the pocket, or a local path); None for a hub id or scratch."""
    name = loaded.recipe.model.teacher
    if name is None:
        return None
    if name == "pocket":
        return POCKET
    folder = (loaded.path.parent / name).resolve()
    return folder if folder.is_dir() else None


def refusal(loaded: Loaded, where: Where, text: str) -> PlanError:
    """A PlanError at a field of the recipe's file."""
    return PlanError(text, placed(loaded.places, where, "") if loaded.places else None)


def architecture_of(loaded: Loaded) -> Architecture:
    """The teacher's numbers: from the recipe, or from the config.json of a local teacher."""
    model = loaded.recipe.model
    if model.scratch:
        return model.scratch.architecture
    folder = teacher_folder(loaded)
    if folder is not None and (folder / "config.json").is_file():
        try:
            return families.architecture(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            reason = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
            raise refusal(loaded, ("model", "teacher"), f"{folder / 'config.json'}: {reason}{error}") from error
    if folder is not None and model.teacher:
        text = f"the teacher's folder {folder} has no config.json; expected a model's folder"
        raise refusal(loaded, ("model", "teacher"), text)
    if model.architecture:
        return model.architecture
    near = difflib.get_close_matches(
        str(model.teacher), ["pocket", *(p.name for p in loaded.path.parent.iterdir() if p.is_dir())], 1
    )
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise refusal(
        loaded,
        ("model", "teacher"),
        f"model.teacher {model.teacher!r} is not a folder here{hint}; to plan without it, "
        "give its numbers: model.architecture (a map, or the path of its config.json)",
    )


def plan(loaded: Loaded, *, allow_code: Sequence[str] = ()) -> Plan:
    """The plan of one recipe (a point of its grid). Raises PlanError."""
    recipe = loaded.recipe
    arch = architecture_of(loaded)
    name = recipe.method.name  # type: ignore[attr-defined]
    method = lookup.lookup("methods", name, allow_code=tuple(allow_code))
    try:
        found: list[Step] = list(method.steps(recipe))
    except StepsError as error:
        raise refusal(loaded, ("method",), str(error)) from error
    if recipe.model.converted and not any(isinstance(s, Swap) and s.published for s in found):
        text = (
            f"model.converted: method {name!r} starts from the teacher and would not read it; "
            "use method: {name: converted}, or leave model.converted out"
        )
        raise refusal(loaded, ("model", "converted"), text)
    if recipe.model.student and name != "exported":
        text = f"model.student: method {name!r} starts from a teacher and would not read it; use method: {{name: exported}}"
        raise refusal(loaded, ("model", "student"), text)
    _refuse_idle_rates(loaded, found)
    hybrid = next((s.state for s in reversed(found) if isinstance(s, Switch)), None)
    found.append(
        Evaluate(
            suites=recipe.eval.suites,
            states=_states(loaded, hybrid),
            hybrid=hybrid,
            seeds=recipe.eval.seeds,
            margin=recipe.eval.margin,
        )
    )
    if recipe.model.scratch and any(isinstance(s, Hub) and s.streaming for s in recipe.data.mix):
        text = "data: a new model's tokenizer is trained on whole sources; give one that does not stream"
        raise refusal(loaded, ("data", "mix"), text)
    try:
        reads.refuse_leaks(found)
    except SourceError as error:
        raise refusal(loaded, ("data",), f"data: {error}") from error
    _refuse_padding(loaded, tuple(found))
    counting = _Counting(loaded, arch, tuple(found))
    model = recipe.model.model_dump(mode="json", exclude={"architecture", "converted"})  # the Swap has the latter
    chain = digest({"model": model, "seed": recipe.seed})
    planned = []
    for step in found:
        fields = _hashed(step.model_dump(mode="json"))
        watched = {name: load_suite(name, loaded.path).model_dump(mode="json") for name in _watched(step)}
        chain = digest({"before": chain, "step": fields, "seed": recipe.seed, "suites": watched})
        planned.append(Planned(step=step, hash=chain, **counting.describe(step)))
    return Plan(
        name=recipe.name,
        seed=recipe.seed,
        architecture=arch,
        parameters=families.parameters(arch)["total"],
        layers=arch.num_hidden_layers,
        hybrid=hybrid,
        steps=tuple(planned),
        hash=chain,
    )


def _refuse_idle_rates(loaded: Loaded, steps: Sequence[Step]) -> None:
    """A learning rate of its own for a group that does not train in a stage would do nothing. Raises PlanError."""
    for step in steps:
        if isinstance(step, (Transfer, Tune)):
            groups = [*step.trains, *(["lora"] if isinstance(step, Tune) and step.lora else [])]
            for name in step.schedule.optimizer.group_lr:
                if name not in groups:
                    text = (
                        f"schedule.{step.stage}.optimizer.group_lr: {name!r} does not train in this stage"
                        f"{nearest(name, groups)}; groups that do: {listed(groups) or 'none'}"
                    )
                    raise refusal(loaded, ("schedule", step.stage, "optimizer", "group_lr", name, "key"), text)


def _watched(step: Step) -> list[str]:
    """Suites that a stage's validation watches: their content belongs to the step's hash."""
    if isinstance(step, (Transfer, Tune)) and step.schedule.validation:
        return sorted({w.suite for w in step.schedule.validation.watch if w.suite})
    return []


def _refuse_padding(loaded: Loaded, steps: Sequence[Step]) -> None:
    """LoLCATs' published window has neither padding nor separate documents: PlanError where a step would bring them."""
    switched = [s.state for s in steps if isinstance(s, Switch)]
    evaluated = [s.state for e in steps if isinstance(e, Evaluate) for s in e.states if s.state is not None]
    compat = next((s.compat for s in (*switched, *evaluated) if s.compat), None)
    if compat is None:
        return
    for step in steps:
        if isinstance(step, (Calibrate, Transfer, Tune)) and (step.data.separate or step.data.positions == "restart"):
            text = f"compat: {compat} knows no separate documents; write data: {{separate: false, positions: run_on}}"
            raise refusal(loaded, ("data",), text)
        watched = [load_suite(name, loaded.path) for name in _watched(step)]
        for suite in suites_of(step) if isinstance(step, Evaluate) else watched:
            for evaluation in suite.evals:
                batch = getattr(evaluation, "batch", 1)
                if getattr(evaluation, "eval", "") == "lm_eval" and batch != 1:
                    text = (
                        f"compat: {compat} counts its blocks from the end of the padded row; lm_eval of suite "
                        f"{suite.name!r} has batch {batch}, write batch: 1 (LoLCATs' own)"
                    )
                    raise refusal(loaded, ("eval", "suites"), text)


def _states(loaded: Loaded, hybrid: State | None) -> tuple[NamedState, ...]:
    """The states to evaluate, resolved; the subsets that Shapley values need are added at the end."""
    found: list[NamedState] = []
    for index, entry in enumerate(loaded.recipe.eval.states):
        where: Where = ("eval", "states", index)
        name = entry if isinstance(entry, str) else entry.of
        if name == "teacher" and loaded.recipe.model.teacher is None:
            text = "eval.states: `teacher` needs model.teacher; without one leave it out, e.g. [softmax]"
            raise refusal(loaded, where, text)
        if hybrid is None:
            if name not in ("teacher", "softmax") or not isinstance(entry, str):
                text = f"eval.states: {name!r} needs a swapped layer, and this method swaps none; use [softmax]"
                raise refusal(loaded, where, text)
            found.append(NamedState(name=name, weights="teacher" if name == "teacher" else "student", state=None))
            continue
        if name not in NAMES:
            text = f"eval.states: {name!r} is not a state; states are {', '.join(NAMES)}"
            raise refusal(loaded, where, text)
        state = resolve(name, hybrid)
        if isinstance(entry, StateOf):
            if state.state is None:
                raise refusal(loaded, where, "eval.states: the teacher has no branches to change")
            changes = {k: v for k, v in entry.model_dump(exclude={"name", "of"}).items() if v is not None}
            if "compat" in entry.model_fields_set:  # null says: without
                changes["compat"] = entry.compat
            try:
                changed = State(**{**state.state.model_dump(), **changes})
            except ValidationError as error:
                wrong = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                raise refusal(loaded, where, f"eval.states: {entry.name!r}: {wrong}") from error
            state = NamedState(name=entry.name, weights="student", state=changed)
        found.append(state)
    names = [s.name for s in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise refusal(loaded, ("eval", "states"), f"eval.states: {', '.join(twice)} given twice")
    if hybrid is not None and "hybrid" in names:
        found += [s for s in subsets(hybrid).values() if s.name not in names]
    return tuple(found)


@dataclass(frozen=True)
class _Counting:
    """Counts and cost estimates of the steps of one recipe.

    FLOPs a token, forward: 2 a weight of the matrices, plus attention. Softmax over T keys: 2 T d a head (causal half);
    hybrid: 4 (C + w) d + 2 C F + 4 F d a head with chunk C = w (facts/performance.md §2). Backward: twice the forward
    where weights train, once where only activations carry gradient.
    """

    loaded: Loaded
    arch: Architecture
    steps: tuple[Step, ...]

    def describe(self, step: Step) -> dict[str, Any]:
        if isinstance(step, Swap):
            new = self._new(step)
            what = f"{step.form} into {self._layers(step)} layers, {sum(new.values()):,} new parameters"
            if isinstance(step.published, Converted):
                what += f", published weights ({step.published.format})"
                return {"what": what, "reads": ", ".join(self._published(step.published))}
            return {"what": what}
        if isinstance(step, Switch):
            return {"what": describe_state(step.state)}
        if isinstance(step, Calibrate):
            tokens = step.batches * step.batch * step.length
            return {
                "what": f"{step.what} in closed form",
                "reads": describe_data(step.data),
                "cost": Cost(tokens=tokens, flops=tokens * self._forward(step.length), memory=self._memory(step, 0)),
            }
        if isinstance(step, Transfer):
            return self._training(step, self._groups(step.trains), factor=1.0, what=_objective(step))
        if isinstance(step, Tune):
            trained = self._groups(step.trains)
            total = families.parameters(self.arch)["total"]
            if step.lora:
                what = f"next-token loss, LoRA rank {step.lora.rank} on {', '.join(step.lora.targets)}"
                return self._training(step, trained + lora_parameters(step.lora, self.arch), factor=2.0, what=what)
            return self._training(step, trained + total, factor=3.0, what="next-token loss, all weights")
        return self._evaluation(step)

    def _published(self, converted: Converted) -> list[str]:
        """The files in words, with what is not here."""
        return [
            f"{name} {path}" + ("" if (self.loaded.path.parent / path).is_file() else " (not here)")
            for name, path in converted.files().items()
        ]

    def _swap(self) -> Swap | None:
        return next((s for s in self.steps if isinstance(s, Swap)), None)

    def _layers(self, step: Swap) -> int:
        return self.arch.num_hidden_layers if step.layers == "all" else len(step.layers)

    def _new(self, step: Swap) -> dict[str, int]:
        counts: dict[str, int] = step.config.parameters(self.arch)  # type: ignore[attr-defined]
        return {group: n * self._layers(step) for group, n in counts.items()}

    def _groups(self, names: Sequence[str]) -> int:
        swap = self._swap()
        return sum(self._new(swap)[n] for n in names) if swap else 0

    def _forward(self, length: int) -> float:
        counts = families.parameters(self.arch)
        weights = self.arch.num_hidden_layers * (counts["attention"] + counts["mlp"])
        weights += self.arch.vocab_size * self.arch.hidden_size
        attention = 2 * length * self.arch.head_dim * self.arch.num_attention_heads * self.arch.num_hidden_layers
        return 2.0 * weights + attention

    def _operator(self, window: int) -> float:
        swap = self._swap()
        if swap is None:
            return 0.0
        features = swap.config.features(self.arch)  # type: ignore[attr-defined]
        head = 8 * window * self.arch.head_dim + 2 * window * features + 6 * features * self.arch.head_dim
        return float(head * self.arch.num_attention_heads * self._layers(swap))

    def _rows(self, data: Data, length: int) -> int | None:
        """Rows of one epoch by the size of the files; None where they are not here."""
        size = 0
        for source in data.mix:
            text = source.text if isinstance(source, Recall) else source
            if not isinstance(text, LocalFile):
                return None
            path = self.loaded.path.parent / text.path
            if not path.is_file():
                return None
            size += path.stat().st_size
        return max(1, size // BYTES_PER_TOKEN // length)

    def _training(self, step: Transfer | Tune, trained: int, *, factor: float, what: str) -> dict[str, Any]:
        schedule = step.schedule
        count = optimiser_steps(schedule, self._rows(step.data, schedule.length))
        tokens = None if count is None else count * schedule.batch * schedule.accumulation * schedule.length
        before = self.steps[: self.steps.index(step)]
        keys = next((s.state.most_keys for s in reversed(before) if isinstance(s, Switch)), None)
        operator = self._operator(schedule.length if keys is None else min(keys, schedule.length))
        per_token = factor * self._forward(schedule.length) + 3.0 * operator
        if isinstance(step, Tune) and schedule.gradient_checkpointing:
            per_token += self._forward(schedule.length)
        total = families.parameters(self.arch)["total"]
        return {
            "what": what,
            "reads": describe_data(step.data),
            "trains": trained,
            "share": trained / total,
            "optimiser_steps": count,
            "cost": Cost(
                tokens=tokens,
                flops=None if tokens is None else tokens * per_token,
                memory=self._memory(step, trained),
            ),
        }

    def _memory(self, step: Calibrate | Transfer | Tune | Evaluate, trained: int) -> dict[str, int]:
        """Weights + (value, gradient, two moments in fp32 of what trains) + activations of one micro-batch."""
        arch = self.arch
        size = DTYPE_BYTES[self.loaded.recipe.model.dtype]
        weights = families.parameters(arch)["total"] * size
        if isinstance(step, (Transfer, Tune)):
            tokens = step.schedule.batch * step.schedule.length
        elif isinstance(step, Calibrate):
            tokens = step.batch * step.length
        else:
            tokens = max((e.batch * getattr(e, "length", 512) for s in suites_of(step) for e in s.evals), default=0)  # type: ignore[attr-defined]
        swap = self._swap()
        features = swap.config.features(arch) if swap else 0  # type: ignore[attr-defined]
        heads = arch.num_attention_heads
        # Saved for backward in one layer: inputs of the projections, q k v, features of queries and keys, three of the MLP.
        layer = tokens * (
            4 * arch.hidden_size + 4 * heads * arch.head_dim + 2 * heads * features + 3 * arch.intermediate_size
        )
        if isinstance(step, Tune):
            checkpointed = step.schedule.gradient_checkpointing
            kept = (
                tokens * arch.hidden_size * arch.num_hidden_layers + layer
                if checkpointed
                else layer * arch.num_hidden_layers
            )
            activations = kept * (2 if step.schedule.autocast else 4) + 2 * tokens * arch.vocab_size * 4
        else:
            activations = layer * 4 + tokens * arch.vocab_size * 4
        peak = weights + 16 * trained + activations
        return {"cpu": peak, "cuda": peak, "host": weights}

    def _evaluation(self, step: Evaluate) -> dict[str, Any]:
        suites = suites_of(step)
        counts = [e.tokens() for s in suites for e in s.evals]  # type: ignore[attr-defined]
        tokens = None if any(c is None for c in counts) else sum(counts) * len(step.states) * len(step.seeds)
        names = ", ".join(s.name for s in suites)
        length = max((getattr(e, "length", 512) for s in suites for e in s.evals), default=512)
        return {
            "what": f"{names} in {len(step.states)} states: {', '.join(s.name for s in step.states)}",
            "reads": "the exported folder, reloaded",
            "cost": Cost(
                tokens=tokens,
                flops=None if tokens is None else tokens * self._forward(length),
                memory=self._memory(step, 0),
            ),
        }


def suites_of(step: Evaluate) -> tuple[Suite, ...]:
    """The step's suites; steps know them as plain Configs, since the recipe's schema comes after the steps'."""
    return tuple(s for s in step.suites if isinstance(s, Suite))


def lora_parameters(lora: Lora, arch: Architecture) -> int:
    """Adapter weights: rank x (in + out) for each named projection of each layer."""
    shapes = families.shapes(arch)
    return arch.num_hidden_layers * sum(lora.rank * sum(shapes[t]) for t in lora.targets)


def _objective(step: Transfer) -> str:
    return " + ".join(f"{weight:g} x {name}" for name, weight in step.objective.items())


def describe_state(state: State) -> str:
    """A state in words, for the plan and the table's legend."""
    if not state.branches:
        return "no attention"
    parts = []
    if "window" in state.branches:
        shape = "" if state.shape == "sliding" else f"{state.shape} "
        parts.append(f"{shape}window {state.window}{f' ({state.compat})' if state.compat else ''}")
    if "sinks" in state.branches:
        parts.append(f"{state.sinks} sinks")
    if "linear" in state.branches:
        parts.append(f"linear over {'all keys' if state.cover == 'all' else 'keys outside the window'}")
    joined = f", join {state.join}" if len(parts) > 1 else ""
    return " + ".join(parts) + joined


def describe_data(data: Data) -> str:
    """The mixture in words."""
    total = sum(s.weight for s in data.mix)
    return " + ".join(f"{s.weight / total:.0%} {_source(s)}" for s in data.mix)


def _source(source: Stdlib | LocalFile | Hub | Recall) -> str:
    """A source in words: what is read, by which template, and which tokens carry loss."""
    if not isinstance(source, Rows):
        return source.source
    facts = []
    if isinstance(source, LocalFile):
        name = source.path
    else:
        name = source.label
        facts = [x for x in (source.name, source.split if source.split != "train" else None) if x]
        if source.tokens:
            facts.append(f"the first {count(source.tokens)} tokens" + (" shuffled" if source.shuffle else ""))
    if source.template:
        facts.append(f"template {name_of(source.template)}")
    if source.loss == "response":
        facts.append("loss on the response")
    if source.parts:
        held = {part: getattr(source.parts, part) for part in ("selection", "test")}
        facts.append(", ".join(f"{part} rows {first} to {end - 1}" for part, (first, end) in held.items()))
    return f"{source.source} {name}" + (f" ({', '.join(facts)})" if facts else "")


def count(value: float | None, unit: str = "") -> str:
    """1234567 -> '1.23 M'."""
    if value is None:
        return "not known"
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:g} {unit}".strip()
