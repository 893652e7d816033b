"""Products in the dtype of their factors: autocast would take them in half precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast. Where there is none it costs nothing; to leave autocast takes 4 us on a CPU."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def ignores_autocast(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """The function, called without autocast on its first argument's device."""

    @wraps(function)
    def called(x: Tensor, *others: P.args, **named: P.kwargs) -> R:
        with without_autocast(x.device):
            return function(x, *others, **named)

    return called
