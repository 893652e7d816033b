"""An exported student as it is: nothing is trained, its states are evaluated (no torch)."""

from collections.abc import Mapping
from typing import Literal

from ..base import Config as Base
from ..recipe import Recipe
from ..schedule import Schedule
from ..steps import Step, StepsError, Swap, Switch


class Config(Base):
    """Takes `model.student`, whose folder says form, layers, window and join. What `recipelin diagnose` writes.

    Sample YAML: `{name: exported}`
    """

    name: Literal["exported"] = "exported"


STAGES: Mapping[str, Schedule | None] = {}


def steps(recipe: Recipe) -> tuple[Step, ...]:
    """The swap and the state that the student was saved in. Raises StepsError without `model.student`."""
    student = recipe.model.student
    if student is None:
        raise StepsError("method: exported evaluates a student: give model.student, the folder of an exported one")
    return (
        Swap(form=student.form, config=student.config, layers=student.layers),
        Switch(state=student.state),
    )
