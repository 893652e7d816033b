"""Recipe -> Plan: the steps in order, their hashes, what each reads, trains and costs (no torch, no network)."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SerializeAsAny, ValidationError

from . import families, layers, lookup, reads
from .attention.form import Form
from .attention.hybrid.config import Config as Hybrid
from .base import Config
from .cost import Cost, Counting, suites_of
from .families import Architecture
from .formcheck import form_of, unfit
from .load import Loaded
from .mistakes import PlanError, among, listed, placed
from .recipe import StateOf, Suite
from .shipped import SHIPPED
from .sources import Hub, SourceError, is_path, lacking
from .states import NAMES, NamedState, State, resolve, subsets
from .steps import Calibrate, Evaluate, FromSelect, Select, Step, StepsError, Swap, Switch, Transfer, Tune, first
from .strict_yaml import Where
from .suites import load_suite


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
        steps = [p.step for p in self.steps]
        swap, select = first(steps, Swap), first(steps, Select)
        if swap is None or not isinstance(swap.config, Form):
            return None
        found = [swap.config.reach(self.architecture, i) for i in layers.converted(swap.layers, select, self.layers)]
        return None if None in found else max(w for w in found if w is not None)


# What cannot change a result stays out of the hash.
_UNHASHED = {"checkpoint_every", "log_every", "expected_tokens"}
# A field that came later: at this value it says what was always done, so hashes of published Records hold.
_UNHASHED_AT_DEFAULT: Mapping[str, object] = {
    **{"slot": "marked", "block_loss": "mse", "held_out": 0, "order": "drawn"},
    **dict.fromkeys(("curve", "rule", "only_part", "first_rows", "copied", "chat", "filter", "max_seq_length")),
}
_UNHASHED_OF_MODEL = {"architecture", "beyond_context", "converted"}  # the Swap has the last


def digest(value: object) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hashed(value: Any) -> Any:
    """A dumped step, or part of one, as it enters the hash: two that differ in nothing else do the same."""
    if isinstance(value, Mapping):
        return {
            k: hashed(v)
            for k, v in value.items()
            if k not in _UNHASHED and not (k in _UNHASHED_AT_DEFAULT and v == _UNHASHED_AT_DEFAULT[k])
        }
    if isinstance(value, (list, tuple)):
        return [hashed(v) for v in value]
    return value


def teacher_folder(loaded: Loaded) -> Path | None:
    """The folder of a teacher that is on this machine (a shipped one, or a local path); None for a hub id or scratch."""
    name = loaded.recipe.model.teacher
    if name is None:
        return None
    if name in SHIPPED:
        return SHIPPED[name]
    folder = (loaded.path.parent / name).resolve()
    return folder if folder.is_dir() else None


def hub_teacher(loaded: Loaded) -> str | None:
    """The hub id of a teacher that is no folder here; None for a folder, a path to none, the pocket, or a model from scratch."""
    name = loaded.recipe.model.teacher
    return name if name and teacher_folder(loaded) is None and not is_path(name) else None


def no_teacher(loaded: Loaded) -> str:
    """What is to be said of a teacher that is not here."""
    name, folder = str(loaded.recipe.model.teacher), loaded.path.parent
    if is_path(name):
        return f"model.teacher: {lacking((folder / name).resolve(), 'folder')}"
    near = difflib.get_close_matches(name, [*SHIPPED, *(p.name for p in folder.iterdir() if p.is_dir())], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"model.teacher {name!r} is not a folder here{hint}, and not in the Hugging Face cache. To plan without it, give its "
        "numbers: model.architecture (a map, or the path of its config.json); `recipelin run` asks the hub"
    )


def cached_config(loaded: Loaded) -> Path | None:
    """The config.json of a hub teacher in the Hugging Face cache, at its revision; None where it is not there."""
    model, name = loaded.recipe.model, hub_teacher(loaded)
    if name is None or "/" not in name:
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def hub_commit(loaded: Loaded) -> str | None:
    """The commit that a hub teacher stands at, as the cache has it: what `main` means today; None where it is not there."""
    cached = cached_config(loaded)
    return cached.parent.name if cached else None  # .../snapshots/<commit>/config.json


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
    if cached := cached_config(loaded):
        try:
            return families.architecture(json.loads(cached.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            raise refusal(loaded, ("model", "teacher"), f"{cached}: {error}") from error
    raise refusal(loaded, ("model", "teacher"), no_teacher(loaded))


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
    _refuse_layers(loaded, arch, found)
    _refuse_idle_rates(loaded, found)
    _refuse_watching_the_test(loaded, found)
    hybrid = next((s.state for s in reversed(found) if isinstance(s, Switch)), None)
    _refuse_branches_of_a_plain_model(loaded, hybrid, found)
    for where, text in unfit(arch, found):
        raise refusal(loaded, where, text)
    found.append(
        Evaluate(
            suites=recipe.eval.suites,
            states=_states(loaded, arch, hybrid, form_of(found)),
            hybrid=hybrid,
            seeds=recipe.eval.seeds,
            margin=recipe.eval.margin,
        )
    )
    if recipe.model.scratch and any(isinstance(s, Hub) and s.streaming for s in recipe.data.mix):
        text = "data: a new model's tokenizer is trained on whole sources; give one that does not stream"
        raise refusal(loaded, ("data", "mix"), text)
    try:
        reads.refuse_leaks(found, loaded.path)
    except SourceError as error:
        raise refusal(loaded, ("data",), f"data: {error}") from error
    _refuse_padding(loaded, tuple(found))
    _refuse_long_rows(loaded, arch, found)
    _refuse_signed_scale(loaded, found)
    _refuse_empty_calibration(loaded, arch, found)
    counting = Counting(loaded, arch, tuple(found))
    model = recipe.model.model_dump(mode="json", exclude=_UNHASHED_OF_MODEL)
    chain = digest({"model": model, "seed": recipe.seed})
    planned = []
    for step in found:
        fields = hashed(step.model_dump(mode="json"))
        asked = dict.fromkeys((*reads.watched(step), *reads.measured(step)))
        watched = {name: load_suite(name, loaded.path).model_dump(mode="json") for name in asked}
        chain = digest({"before": chain, "step": fields, "seed": recipe.seed, "suites": watched})
        planned.append(Planned(step=step, hash=chain, **counting.describe(step)))
    _refuse_idle_stages(loaded, planned)
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


def _refuse_layers(loaded: Loaded, arch: Architecture, steps: Sequence[Step]) -> None:
    """Layers that are not there, a choice that leaves none, and one that comes too late. Raises PlanError."""
    count = arch.num_hidden_layers
    swap = next((i for i, s in enumerate(steps) if isinstance(s, Swap)), len(steps))
    chosen = [i for i, s in enumerate(steps) if isinstance(s, Select)]
    asks = [s for s in steps if isinstance(s, Swap) and isinstance(s.layers, FromSelect)]
    if len(chosen) != bool(asks) or any(i > swap for i in chosen):
        text = "a Select stands once, before the Swap whose layers it gives, and layers: {from: select} needs one"
        raise refusal(loaded, ("method",), text)
    for step in steps:
        if isinstance(step, Swap) and isinstance(step.layers, tuple):
            wrong = [i for i in step.layers if i >= count]
            twice = sorted({i for i in step.layers if step.layers.count(i) > 1})
            if wrong or twice:
                what = f"{listed(map(str, wrong or twice))} {'given twice' if twice and not wrong else 'not there'}"
                text = f"method.layers: {what}; the model has layers 0 to {count - 1}"
                raise refusal(loaded, ("method", "layers"), text)
        elif isinstance(step, Select):
            try:
                layers.tried(step, count)
                layers.ahead(step, count)
            except ValueError as error:
                raise refusal(loaded, ("method", "layers"), f"method.layers: {error}") from error


def _refuse_idle_rates(loaded: Loaded, steps: Sequence[Step]) -> None:
    """A learning rate of its own for a group that does not train in a stage would do nothing. Raises PlanError."""
    for step in (*steps, *_tried(steps)):
        if isinstance(step, (Transfer, Tune)):
            groups: list[str] = [*step.trains]
            if isinstance(step, Tune):
                groups += ["lora"] if step.lora else ["attention", "attention_norms"]
            for name in step.schedule.optimizer.group_lr:
                if name not in groups:
                    text = (
                        f"schedule.{step.stage}.optimizer.group_lr: {name!r} does not train in this stage"
                        f"{among(name, groups, 'groups that do:')}"
                    )
                    raise refusal(loaded, ("schedule", step.stage, "optimizer", "group_lr", name, "key"), text)


def _refuse_branches_of_a_plain_model(loaded: Loaded, hybrid: State | None, steps: Sequence[Step]) -> None:
    """A curve of a method that swaps no layer has one state. Raises PlanError."""
    for step in steps:
        if (
            hybrid is None
            and isinstance(step, Tune)
            and step.schedule.curve
            and step.schedule.curve.states != ("softmax",)
        ):
            text = f"schedule.{step.stage}.curve.states: this method swaps no layer; expected [softmax]"
            raise refusal(loaded, ("schedule", step.stage, "curve", "states"), text)


def _tried(steps: Sequence[Step]) -> tuple[Tune, ...]:
    """What a Select trains for each candidate alone; the rest of its probe are steps of the method."""
    return tuple(t for s in steps if isinstance(s, Select) for t in s.probe if isinstance(t, Tune) and s.tune)


def _refuse_watching_the_test(loaded: Loaded, steps: Sequence[Step]) -> None:
    """A watched suite is asked on the selection part; one that has no parts would select on what is reported."""
    for step in steps:
        for name in reads.watched(step):
            for evaluation in load_suite(name, loaded.path).evals:
                if not _has_parts(evaluation.model_dump()):
                    text = (
                        f"suite {name!r} cannot be watched: its {evaluation.eval} has no selection part, so training would "  # type: ignore[attr-defined]
                        "stop on the items that are reported; watch held-out rows (no suite), or a suite of local texts"
                    )
                    raise refusal(loaded, ("schedule", step.stage, "validation", "watch"), text)  # type: ignore[union-attr]


def _has_parts(value: object) -> bool:
    """Whether every item of an evaluation's settings comes from a part: of a list, each entry must say its own."""
    if isinstance(value, Mapping):
        return "part" in value or any(_has_parts(v) for v in value.values())
    return isinstance(value, tuple) and bool(value) and all(_has_parts(v) for v in value)


def _refuse_idle_stages(loaded: Loaded, planned: Sequence[Planned]) -> None:
    """A stage in which nothing trains would only fail once the data is read. Raises PlanError."""
    for each in planned:
        step = each.step
        if isinstance(step, (Transfer, Tune)) and not each.trains:
            text = (
                f"stage {step.stage!r}: nothing trains in it, as {listed(step.trains) or 'nothing'} of this method have no "
                f"parameters; expected a feature map that learns, or schedule: {{{step.stage}: null}}"
            )
            raise refusal(loaded, ("method", "form", "feature_map", "name"), text)


def _context(arch: Architecture) -> int:
    """Positions that a model was made for. `factor` of linear and yarn counts from the original ones; llama3's does not."""
    scaling = arch.rope_scaling or {}
    if scaling.get("rope_type") not in ("linear", "yarn"):
        return arch.max_position_embeddings
    original = float(scaling.get("original_max_position_embeddings", arch.max_position_embeddings))
    return max(arch.max_position_embeddings, int(original * float(scaling.get("factor", 1.0))))


def _refuse_long_rows(loaded: Loaded, arch: Architecture, steps: Sequence[Step]) -> None:
    """Rows beyond the teacher's context, unless the recipe wants them: PlanError at the length or at the suite's name."""
    if loaded.recipe.model.beyond_context:
        return
    context = _context(arch)
    what = "the model's context" if loaded.recipe.model.scratch else "the teacher's context"
    advice = (
        f"{what} is {context} tokens (max_position_embeddings), and no position beyond was ever seen; expected at most "
        f"{context}, or model: {{beyond_context: true}}"
    )
    for step in steps:
        if isinstance(step, Select):
            longest = max([step.length] * step.scored + [t.schedule.length for t in _tried([step])], default=0)
            if longest > context:
                at = ("method", "layers", "length")
                raise refusal(loaded, at, f"method.layers: rows of {longest} tokens; {advice}")
        if isinstance(step, (Calibrate, Transfer, Tune)):
            length = step.length if isinstance(step, Calibrate) else step.schedule.length
            # whose rows a calibration has: those of the stage that goes on from it
            stage = ("align" if step.rule else "transfer") if isinstance(step, Calibrate) else step.stage
            where: Where = ("schedule", stage, "length")
            if length > context:
                default = "" if where in loaded.places else ", the default"
                raise refusal(loaded, where, f"schedule.{stage}.length: {length}{default}; {advice}")
        found: list[tuple[Where, Suite]] = [
            (("schedule", getattr(step, "stage", ""), block), load_suite(name, loaded.path))
            for block, names in (("validation", reads.watched(step)), ("curve", reads.measured(step)))
            for name in names
        ]
        if isinstance(step, Evaluate):
            found += [(("eval", "suites", index), suite) for index, suite in enumerate(suites_of(step))]
        for where, suite in found:
            asked = [e for e in suite.evals if not getattr(e, "beyond_context", False)]
            longest = max((getattr(e, "length", None) or 0 for e in asked), default=0)
            if longest > context:
                raise refusal(loaded, where, f"suite {suite.name!r} has rows of {longest} tokens; {advice}")


def _refuse_signed_scale(loaded: Loaded, steps: Sequence[Step]) -> None:
    """The join `absolute` compares logarithms of masses, which signed features do not have. Raises PlanError."""
    forms = [s.config for s in steps if isinstance(s, Swap)]
    if not any(isinstance(form, Hybrid) and form.feature_map.activation == "none" for form in forms):
        return
    text = (
        "join: absolute needs features of at least 0, and activation: none has both signs, whose sum has no logarithm"
    )
    expected = "expected another join, or one of the activations softmax, exp, relu, elu"
    if any(isinstance(s, Switch) and s.state.join == "absolute" for s in steps):
        raise refusal(loaded, ("method", "form", "feature_map", "activation"), f"{text}; {expected}")
    for step in steps:
        if isinstance(step, Evaluate):
            for index, named in enumerate(step.states):
                if named.state and named.state.join == "absolute":
                    where: Where = ("eval", "states", index)
                    raise refusal(loaded, where, f"eval.states: {named.name!r}: {text}; {expected}")


def _refuse_empty_calibration(loaded: Loaded, arch: Architecture, steps: Sequence[Step]) -> None:
    """c_h is calibrated on the keys outside the window: PlanError where the rows of a swapped layer have none."""
    if not isinstance(form_of(steps), Hybrid):
        return
    state, swapped = State(), tuple(range(arch.num_hidden_layers))
    select = first(steps, Select)
    for step in steps:
        if isinstance(step, Swap):
            swapped = layers.converted(step.layers, select, arch.num_hidden_layers)
        elif isinstance(step, Switch):
            state = step.state
        elif isinstance(step, Calibrate):
            for own in {arch.own_window(i) for i in swapped}:
                if not state.leaves_keys(step.length, own):
                    seen = f"{state.shape} window {state.window}" + (f" and {state.sinks} sinks" if state.sinks else "")
                    limit = f" of a teacher with an own window of {own}" if own else ""
                    text = (
                        f"calibration of {step.what}: rows of {step.length} tokens{limit} have no key outside the {seen}; "
                        "expected longer rows (length of the stage) or a smaller window"
                    )
                    raise refusal(loaded, ("method", "window"), text)


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
        watched = [load_suite(name, loaded.path) for name in (*reads.watched(step), *reads.measured(step))]
        for suite in suites_of(step) if isinstance(step, Evaluate) else watched:
            for evaluation in suite.evals:
                batch = getattr(evaluation, "batch", 1)
                if getattr(evaluation, "eval", "") == "lm_eval" and batch != 1:
                    text = (
                        f"compat: {compat} counts its blocks from the end of the padded row; lm_eval of suite "
                        f"{suite.name!r} has batch {batch}, write batch: 1 (LoLCATs' own)"
                    )
                    raise refusal(loaded, ("eval", "suites"), text)


def _states(loaded: Loaded, arch: Architecture, hybrid: State | None, form: Form | None) -> tuple[NamedState, ...]:
    """The states to evaluate, resolved; with `shapley` the subsets that its values need are added at the end.

    Of the states that nobody asked for, those that the form does not have are left out.
    """
    asked = "states" in loaded.recipe.eval.model_fields_set
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
        if form and state.state and (why := form.refuses(state.name, state.state, arch)):
            if not asked:
                continue
            raise refusal(loaded, where, f"eval.states: {state.name!r}: {why}")
        found.append(state)
    names = [s.name for s in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise refusal(loaded, ("eval", "states"), f"eval.states: {', '.join(twice)} given twice")
    if hybrid is not None and "hybrid" in names and loaded.recipe.eval.shapley:
        measured = [s.state for s in found]
        missing = [s for s in subsets(hybrid).values() if s.state not in measured]
        if taken := [s.name for s in missing if s.name in names]:
            text = f"eval.states: {', '.join(taken)}: the name of a subset of the branches, which is another state; take another"
            raise refusal(loaded, ("eval", "states"), text)
        found += missing
    return tuple(found)
