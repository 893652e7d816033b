"""Products in the dtype of their factors: autocast would take them in half precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
NOTHING: AbstractContextManager[object] = nullcontext()
_available = cache(torch.amp.is_autocast_available)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast. Where there is none it costs nothing; to leave autocast takes 4 us on a CPU."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if _available(kind) and torch.is_autocast_enabled(kind) else NOTHING


def ignores_autocast(function: F) -> F:
    """The function of q and more, called without autocast on q's device; whatever it calls has none either."""

    @wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        q = given[0] if given else named.get("q")
        with without_autocast(q.device) if isinstance(q, torch.Tensor) else NOTHING:
            return function(*given, **named)

    return called  # type: ignore[return-value]
