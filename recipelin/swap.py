"""Finds the attention modules of one model instance, replaces, switches and restores them; classes stay as they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import families, lookup
from .attention.captured import Captured
from .families import Architecture
from .states import State
from .steps import FromSelect, Swap

_KEPT = "_recipelin_kept"  # on a swapped layer: the softmax module it held, out of sight of parameters()
_MERGED = "_recipelin_merged"


def architecture_of(model: Any) -> Architecture:
    """The numbers of a loaded model. Raises ValueError for an unsupported family, naming the supported ones."""
    config = model.config.to_dict()
    return families.architecture({**config, "model_type": families.base_type(config["model_type"])})


def swap(model: Any, step: Swap, *, seed: int) -> None:
    """Put the form of `step` into its layers; it shares the teacher's projections, or copies them (the form's choice).

    Raises ValueError for an unsupported family, a layer that is not there, or one that is swapped already.
    """
    from .masks import ATTENTION

    if isinstance(step.layers, FromSelect):
        raise ValueError("swap: layers {from: select} are known only to a run, after its Select")
    architecture = architecture_of(model)
    form = lookup.implementation("attention", step.form).FORM
    layers = range(architecture.num_hidden_layers) if step.layers == "all" else step.layers
    if wrong := [i for i in layers if not 0 <= i < architecture.num_hidden_layers]:
        raise ValueError(f"layers {wrong}: the model has layers 0 to {architecture.num_hidden_layers - 1}")
    if twice := [i for i in layers if _is_form(model.model.layers[i].self_attn)]:
        raise ValueError(f"layers {twice} are swapped already")
    for index in layers:
        layer = model.model.layers[index]
        made = form(layer.self_attn, config=step.config, architecture=architecture, layer_index=index, seed=seed)
        # Past nn.Module's own bookkeeping: the kept module may share its projections and must not be saved twice.
        object.__setattr__(layer, _KEPT, layer.self_attn)
        made.train(layer.self_attn.training)
        layer.self_attn = made
    model.set_attn_implementation(ATTENTION)


def restore(model: Any) -> None:
    """Give the softmax modules back: the teacher, bit for bit. Raises RuntimeError once its weights were changed."""
    if getattr(model, _MERGED, False):
        raise RuntimeError("restore: the student's projections were trained and merged; load the teacher anew")
    for layer in model.model.layers:
        kept = getattr(layer, _KEPT, None)
        if kept is not None:
            layer.self_attn = kept
            object.__delattr__(layer, _KEPT)
    model.set_attn_implementation("sdpa")


@contextmanager
def softmax_in(model: Any, layer: int) -> Iterator[None]:
    """Within: a swapped layer has the softmax module back that it held. Raises ValueError for one that is not swapped."""
    at = model.model.layers[layer]
    kept, form = getattr(at, _KEPT, None), at.self_attn
    if kept is None:
        raise ValueError(f"layer {layer} is not swapped")
    at.self_attn = kept
    try:
        yield
    finally:
        at.self_attn = form


def forget_teacher(model: Any) -> None:
    """Let go of the softmax modules that swapped layers took the place of: those of a loaded student were never loaded."""
    for layer in model.model.layers:
        if hasattr(layer, _KEPT):
            object.__delattr__(layer, _KEPT)
        if hasattr(layer.self_attn, "teacher"):
            object.__setattr__(layer.self_attn, "teacher", None)
    mark_merged(model)


def mark_merged(model: Any) -> None:
    """Say that the projections are no longer the teacher's."""
    object.__setattr__(model, _MERGED, True)


def _is_form(module: nn.Module) -> bool:
    return hasattr(module, "groups") and hasattr(module, "recorder")


def forms(model: Any) -> list[Any]:
    """The swapped attention modules in layer order."""
    return [m for m in model.modules() if _is_form(m)]


def switch(model: Any, state: State) -> None:
    """Set what the swapped layers do from here on. Raises ValueError if none is swapped."""
    found = forms(model)
    if not found:
        raise ValueError("switch: no layer of the model is swapped")
    for form in found:
        form.state = state


def state_of(model: Any) -> State | None:
    """The state that the swapped layers are in; None if there are none."""
    found = forms(model)
    return found[0].state if found else None


def form_parameters(model: Any, *, projections: bool = True) -> dict[str, nn.Parameter]:
    """The forms' own parameters by their names in the model; without `projections`, those that only `trains` names."""
    own = {
        id(p)
        for form in forms(model)
        for name, group in form.groups().items()
        if projections or name not in form.config.PROJECTIONS
        for p in group
    }
    return {name: p for name, p in model.named_parameters() if id(p) in own}


@contextmanager
def recording(model: Any, recorder: Callable[[int, Captured], None]) -> Iterator[None]:
    """Within: every swapped layer passes on the teacher's softmax output and shows `recorder` what it saw."""
    with _attached(model, "recorder", recorder):
        yield


@contextmanager
def observing(model: Any, observer: Callable[[int, Captured], None]) -> Iterator[None]:
    """Within: every swapped layer shows `observer` its q, k, v, and goes on as its state says."""
    with _attached(model, "observer", observer):
        yield


@contextmanager
def _attached(model: Any, name: str, function: Callable[[int, Captured], None]) -> Iterator[None]:
    found = forms(model)
    for form in found:
        setattr(form, name, function)
    try:
        yield
    finally:
        for form in found:
            setattr(form, name, None)
