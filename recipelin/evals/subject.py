"""What an evaluation is made of: one model in one state, and where its items come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..states import NamedState


@dataclass(frozen=True)
class Subject:
    """The second argument of every `run(config, subject)`; the model is in `state` already."""

    model: Any
    tokenizer: Any
    state: NamedState
    seed: int
    """Draws the items."""
    exposed_from: int | None
    """First position of a row at which the hybrid's linear branch sees a key; None: nowhere."""
    folder: Path
    """Where an evaluation writes what others can read: lm-eval's local tasks."""
    base: Path
    """The recipe's folder, from which relative paths of texts start."""
    device: str
    reference: Any = None
    """What `reference()` of the same module made with the teacher; None: it has none, or there is no teacher."""
