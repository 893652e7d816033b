"""What every form's `calibration(what)` gives: set parameters of a layer from the teacher's activations."""

from abc import ABC, abstractmethod
from typing import Any

from .captured import Captured


class Calibration(ABC):
    """One calibration of one layer: feed it batches with `add`, then `finish` sets the parameters and says what it set."""

    def add(self, captured: Captured) -> None:  # noqa: B027 (a calibration may need no data)
        """Take in one batch; nothing to learn from it where a calibration does not say otherwise."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Set the parameters; returns what was set."""
