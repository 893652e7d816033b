"""Where the CPU time of a stretch of work goes, by part, by the events of torch.profiler; every moment counts once.

An event is an operation, the forward pass of an autograd function, a range (`part`, `marked`) or a node of the backward pass. Its
own time, without the events within it, goes to a part: by its name (NAMES) or its range; a node of the backward pass goes where
the operation that made it went (they share a sequence number); what has none goes with the event around it. An operation within
nothing is the rest of the model; time within no event at all is Python and other. So the parts add up to the whole.

Shares are of the wall clock that the profiler reads, on the thread that begins a stretch. An event costs the profiler a
microsecond or more, so that what is many small operations (operator, Python) looks larger than it is, by at most what a stretch
takes longer with the profiler than without.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..attention.hybrid.feature_map import HeadFeatureMap
from ..swap import forms

OPERATOR, MAPS, SOFTMAX, MODEL = "operator", "feature maps", "softmax attention", "rest of the model"
OPTIMISER, DATA, PYTHON = "optimiser", "data", "Python and other"
PARTS = (OPERATOR, MAPS, SOFTMAX, MODEL, OPTIMISER, DATA, PYTHON)

NAMES = {
    # The operators' autograd functions: hybrid, weight_transfer, gated_delta.
    "_Hybrid": OPERATOR,
    "_Beside": OPERATOR,
    "_Loss": OPERATOR,
    "_Chunked": OPERATOR,
    # The teacher's attention, with its copies of grouped keys.
    "aten::scaled_dot_product_attention": SOFTMAX,
    "aten::_scaled_dot_product_flash_attention_for_cpu": SOFTMAX,
    "aten::repeat_interleave": SOFTMAX,
    # The norm of all gradients, and what clips them.
    "aten::_foreach_norm": OPTIMISER,
    "aten::_foreach_mul_": OPTIMISER,
}
OPERATORS = ("attend", "components", "outside_mass")  # methods of a form that call an operator
_NODE = "autograd::engine::evaluate_function: "
_WHOLE = "recipelin stretch"
_RANGE = "recipelin part: "


@dataclass
class Stretch:
    """A stretch of work from `begin` to `end`: seconds of the process's CPU time and, `profiled`, what took them."""

    profiled: bool
    cpu: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of each part of PARTS; together 1."""
    _open: list[AbstractContextManager[Any]] = field(default_factory=list)

    def begin(self) -> None:
        if self.profiled:
            self._open = [profile(activities=[ProfilerActivity.CPU]), record_function(_WHOLE)]
            for each in self._open:
                each.__enter__()
        self.cpu = time.process_time()

    def end(self) -> None:
        self.cpu = time.process_time() - self.cpu
        for each in reversed(self._open):
            each.__exit__(None, None, None)
        if self.profiled:
            seen: Any = self._open[0]
            self.shares = by_part(seen.events())
            self._open = []


def part(name: str) -> AbstractContextManager[Any]:
    """Within: time belongs to a part of PARTS."""
    return record_function(_RANGE + name)


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Within: a model's feature maps are ranges, and so is what its forms do by an operator. Classes stay as they are."""
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, HeadFeatureMap):
                for handle in _hooks(module, MAPS):
                    undo.callback(handle.remove)
        for form in forms(model):
            for name in OPERATORS:
                if hasattr(form, name):
                    setattr(form, name, _within(OPERATOR, getattr(form, name)))
                    undo.callback(delattr, form, name)
        yield


def _hooks(module: nn.Module, name: str) -> Iterator[Any]:
    opened: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        opened.append(part(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, always_call=True)


def _within(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*given: Any, **named: Any) -> Any:
        with part(name):
            return call(*given, **named)

    return inside


# --- from events to parts ---------------------------------------------------------------------------------------------


def by_part(events: Sequence[Any]) -> dict[str, float]:
    """The share of each part of PARTS in a stretch, from the profiler's events."""
    whole = next(e for e in events if e.name == _WHOLE)
    made = dict[int, str]()
    _forward(whole, MODEL, made)
    spent = dict.fromkeys(PARTS, 0.0)
    _add(whole, PYTHON, made, spent)
    total = sum(spent.values())
    return {name: own / total for name, own in spent.items()}


def _own(event: Any) -> str | None:
    if event.name.startswith(_RANGE):
        return str(event.name.removeprefix(_RANGE))
    return OPTIMISER if event.name.startswith("Optimizer.") else NAMES.get(event.name)


def _forward(event: Any, around: str, made: dict[int, str]) -> None:
    """Fill `made`: sequence number of a node of the backward pass -> part of the operation that made it.

    An operation that makes none has the number of the next one that does: the last to begin counts.
    """
    for child in event.cpu_children:
        if not child.name.startswith(_NODE):
            own = _own(child) or around
            if child.sequence_nr >= 0:
                made[child.sequence_nr] = own
            _forward(child, own, made)


def _add(event: Any, own: str, made: Mapping[int, str], spent: dict[str, float]) -> None:
    spent[own] += event.self_cpu_time_total
    for child in event.cpu_children:
        if child.name.startswith(_NODE):
            inner = made.get(child.sequence_nr, MODEL)
        else:
            inner = _own(child) or (MODEL if own == PYTHON else own)
        _add(child, inner, made, spent)
