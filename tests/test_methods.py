"""The laws of methods: each composes known steps, owns its stages, and has a recipe that shows it."""

from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from recipelin import lookup
from recipelin.load import CHECKOUT
from recipelin.plan import plan
from recipelin.schedule import Schedule
from recipelin.sources import Data, Recall
from recipelin.steps import Calibrate, Evaluate, Select, Step, Swap, Switch, Transfer, Tune
from tests.shipped import points_of

METHODS = lookup.names("methods")
SHOWN = tuple(m for m in METHODS if m != "exported")  # whose recipes `diagnose` writes (test_diagnose)
KNOWN = get_args(Step)


@cache
def used() -> dict[str, list]:
    """Method -> the grid points of all recipes that use it."""
    found: dict[str, list] = {}
    for path in sorted(CHECKOUT.rglob("*.yaml")):
        if path.parent.name != "suites":
            for point in points_of(path):
                found.setdefault(point.recipe.method.name, []).append(point)
    return found


def test_every_method_has_a_recipe():
    assert set(used()) == set(SHOWN)
    assert len(METHODS) >= 9


ANSWERS = Data(mix=(Recall(source="recall"),))  # a stage `sft` asks for data of its own, with answers


@pytest.mark.parametrize("name", SHOWN)
def test_a_method_composes_known_steps_and_its_stages(name):
    module = lookup.lookup("methods", name)
    assert module.Config.model_fields["name"].default == name
    assert "Sample YAML" in module.Config.__doc__
    assert all(s is None or isinstance(s, Schedule) for s in module.STAGES.values())
    for point in used()[name]:
        # Every stage on: what the method can do, not only what this recipe asks for.
        full = {stage: default or Schedule(steps=3, data=ANSWERS) for stage, default in module.STAGES.items()}
        recipe = point.recipe.model_copy(update={"schedule": full})
        found = module.steps(recipe)
        assert all(isinstance(step, KNOWN) for step in found) and not any(isinstance(s, Evaluate) for s in found)
        stages = [s for s in module.STAGES if s not in getattr(recipe.method, "without", ())]
        assert [s.stage for s in found if isinstance(s, (Transfer, Tune))] == stages, "in their order"
        assert found == module.steps(recipe), "steps are a pure function of the recipe"
        bare = module.steps(point.recipe.model_copy(update={"schedule": dict.fromkeys(module.STAGES)}))
        assert not any(isinstance(s, (Transfer, Tune)) for s in bare), "a stage left out is left out"
        swaps = [i for i, s in enumerate(found) if isinstance(s, Swap)]
        if swaps:
            assert swaps == [int(isinstance(found[0], Select))]
            hybrid = [s.state for s in found if isinstance(s, Switch)][-1]
            assert plan(point).hybrid == hybrid
        for index, step in enumerate(found):
            if isinstance(step, Calibrate) and step.what == "log_scale":
                before = [s.state for s in found[:index] if isinstance(s, Switch)]
                assert before and before[-1].join == "absolute", "c_h belongs to the absolute join"


def test_the_files_are_the_methods():
    folder = Path(lookup.__file__).parent / "methods"
    assert tuple(sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")) == METHODS
