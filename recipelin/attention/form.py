"""What a plan asks of the Config of every attention form (no torch)."""

from abc import abstractmethod
from typing import ClassVar

from .. import families
from ..base import Config as Base
from ..families import Architecture
from ..states import State


class Form(Base):
    """Structure of a form, and what it counts and costs: base of every `attention/<name>/config.py`."""

    PROJECTIONS: ClassVar[tuple[str, ...]] = ()
    """Groups of `parameters` that are the layer's plain projections: they train wherever all weights do."""

    OBJECTIVES: ClassVar[tuple[str, ...]] = ()
    """Objectives of a layer-local stage that the module's `losses` computes."""

    STATELESS: ClassVar[tuple[str, ...]] = ()
    """Those of them that read nothing of the state: runs whose students learn in other states share what they make."""

    STOCK: ClassVar[str] = ""
    """model_type of transformers as which a run exports the student too, loadable without recipelin; empty: none."""

    def refuses_calibration(self, what: str, rule: Base | None) -> str:
        """Why the form has no such calibration, with these settings; empty where it has it."""
        return f"the form has no calibration {what!r}"

    @abstractmethod
    def parameters(self, architecture: Architecture) -> dict[str, int]:
        """Parameters of one layer by the groups that `trains` can name: held against the built module by a test."""

    def added(self, architecture: Architecture) -> int:
        """By how many parameters a layer grows: what the form brings less what it drops."""
        return sum(self.parameters(architecture).values())

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, int]]:
        """(in, out) of the projections of one layer that adapters can name."""
        return families.shapes(architecture)

    @abstractmethod
    def flops(self, architecture: Architecture, keys: int) -> float:
        """Of the operator, forward, a token in one layer; `keys`: most keys of its softmax window."""

    @abstractmethod
    def saved(self, architecture: Architecture) -> int:
        """Numbers that a token leaves in one layer for the backward pass, beside those of projections and MLP."""

    def reach(self, architecture: Architecture, layer: int) -> int | None:
        """How far a layer may look, the query included; None: no limit."""
        return None

    def refuses_teacher(self, architecture: Architecture, kept: int) -> str:
        """Why the form cannot convert this teacher with `kept` layers left as softmax; empty where it can."""
        return ""

    def refuses(self, name: str, state: State, architecture: Architecture) -> str:
        """Why the form has no such state, without the end of a sentence; empty where it has it. `name`: as it is asked for."""
        return ""
