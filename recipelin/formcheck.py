"""What a plan asks of its attention form that the form does not have (no torch)."""

from collections.abc import Iterator, Sequence

from . import layers
from .attention.form import Form
from .families import Architecture
from .mistakes import among
from .states import NAMES, State, resolve
from .steps import Calibrate, Select, Step, Swap, Switch, Transfer, Tune, first
from .strict_yaml import Where


def form_of(steps: Sequence[Step]) -> Form | None:
    """The Config of the form that a plan swaps in; None where it swaps none."""
    return next((s.config for s in steps if isinstance(s, Swap) and isinstance(s.config, Form)), None)


def unfit(arch: Architecture, steps: Sequence[Step]) -> Iterator[tuple[Where, str]]:
    """(place in the recipe, what is wrong): a teacher, state, group of parameters or objective that the form does not have."""
    form = form_of(steps)
    if form is None:
        return
    state: State | None = None
    select = first(steps, Select)
    for step in steps:
        if isinstance(step, Swap):
            count = arch.num_hidden_layers
            if why := form.refuses_teacher(arch, count - layers.how_many(step.layers, select, count)):
                yield ("method",), f"method: {why}"
        elif isinstance(step, Switch):
            state = step.state
            if why := form.refuses("", state, arch):
                yield ("method",), f"method: {why}"
        elif isinstance(step, Calibrate):
            if why := form.refuses_calibration(step.what, step.rule):
                yield ("method",), f"method: {why}"
        elif isinstance(step, (Transfer, Tune)):
            yield from _unfit_stage(form, arch, step, state)


def _unfit_stage(
    form: Form, arch: Architecture, step: Transfer | Tune, state: State | None
) -> Iterator[tuple[Where, str]]:
    groups = tuple(form.parameters(arch))
    objective: tuple[str, ...] = tuple(step.objective) if isinstance(step, Transfer) else ()
    for what, given, have in (("parameters", step.trains, groups), ("objective", objective, form.OBJECTIVES)):
        for each in given:
            if each not in have:
                text = f"stage {step.stage!r}: the form has no {what} {each!r}"
                yield ("method",), f"{text}{among(each, have, 'it has')}"
    asked: list[tuple[Where, str]] = []
    if step.schedule.validation:
        watched = enumerate(step.schedule.validation.watch)
        asked += [(("schedule", step.stage, "validation", "watch", i, "state"), w.state) for i, w in watched]
    if step.schedule.curve:
        shown = enumerate(step.schedule.curve.states)
        asked += [(("schedule", step.stage, "curve", "states", i), name) for i, name in shown]
    for where, name in asked:
        named = resolve(name, state).state if state is not None and name in NAMES else None
        if named is not None and (why := form.refuses(name, named, arch)):
            yield where, f"schedule.{step.stage}: {name!r}: {why}"
