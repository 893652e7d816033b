"""The teacher's stream as layer-local stages need it: it ends with the last layer that learns."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from .attention.captured import Captured
from .data import Batch
from .losses import hidden_states
from .swap import forms, recording


class _Shown(Exception):
    """Ends a forward pass whose last swapped layer has been shown."""


def show_teacher(model: nn.Module, batch: Batch, recorder: Callable[[int, Captured], Any]) -> None:
    """Show `recorder` what every swapped layer sees, in order, while each passes on the teacher's output.

    What stands behind the last of them, its MLP and further layers, is not computed: nobody reads it. transformers' models
    cannot be stopped between two modules, so an exception ends the pass. Raises ValueError if no layer is swapped.
    """
    found = [form.layer_index for form in forms(model)]
    if not found:
        raise ValueError("show_teacher: no layer of the model is swapped")

    def show(index: int, captured: Captured) -> None:
        recorder(index, captured)
        if index == found[-1]:
            raise _Shown

    with suppress(_Shown), recording(model, show):
        hidden_states(model, batch)
