"""Every recipe of the project, run from end to end at tiny size, each value of its grid; what plans the same runs once."""

import time

import pytest

from recipelin import hf, lookup
from recipelin.families import Architecture, architecture, parameters
from recipelin.load import CHECKOUT, Loaded, load_base
from recipelin.plan import plan
from recipelin.records import read_record
from recipelin.run import run
from recipelin.shrink import LENGTH, ShrinkError, shrink, tiny_architecture, tiny_folder, tiny_of
from recipelin.steps import Swap, Transfer, Tune
from tests.shipped import points_of

POCKET = hf.__file__.replace("hf.py", "pocket")


def points() -> list[Loaded]:
    """Of every recipe; of a grid as many points as its longest axis has values: each value of each axis is among them."""
    found: list[Loaded] = []
    for path in sorted(p for p in CHECKOUT.rglob("*.yaml") if p.parent.name != "suites"):
        grid = load_base(path).recipe.grid
        longest = max((len(values) for values in grid.values()), default=1)
        wanted = [{axis: values[i % len(values)] for axis, values in grid.items()} for i in range(longest)]
        found += [point for point in points_of(path) if not grid or dict(point.point) in wanted]
    return found


def small(point: Loaded, home) -> Loaded | None:
    """The point at tiny size, its teacher made; None for one that starts from given weights."""
    numbers = tiny_of(point)
    folder = tiny_folder(home, numbers)
    try:
        made = shrink(point, str(folder))
    except ShrinkError:
        return None
    if made.recipe.model.teacher:
        hf.tiny_teacher(numbers, folder, POCKET)
    return made


@pytest.mark.slow
def test_every_recipe_runs_at_tiny_size(home, little_library, record_property):
    found = [(point, small(point, home)) for point in points()]
    runs = {plan(made).hash: made for _, made in found if made is not None}
    left_out = [point.recipe.name for point, made in found if made is None]
    methods, families, started = set(), set(), time.monotonic()
    for made in runs.values():
        record = read_record(run(made, device="cpu"))
        assert record.status == "finished" and record.rows, made.recipe.name
        planned = plan(made)
        assert {s.step for s in record.steps} >= {getattr(p.step, "stage", p.step.step) for p in planned.steps}
        methods.add(made.recipe.method.name)
        families.add(planned.architecture.model_type)
    record_property(
        "tiny runs",
        f"{len(runs)} unique of {len(found) - len(left_out)} recipe points, {time.monotonic() - started:.0f} s; "
        f"{len(left_out)} start from given weights",
    )
    assert methods >= set(lookup.names("methods")) - {"converted", "exported"}
    assert families >= {"llama", "mistral"}
    assert all(name.startswith("untangling/llama3.1-8b") for name in left_out)


def test_a_small_recipe_keeps_what_matters(home):
    for point in points():
        made = small(point, home)
        if made is None:
            continue
        large, tiny = plan(point), plan(made)
        assert [p.step.step for p in tiny.steps] == [p.step.step for p in large.steps], point.recipe.name
        assert tiny.parameters < 100_000
        for one, other in zip(large.steps, tiny.steps, strict=True):
            if isinstance(one.step, Swap):
                assert one.step == other.step, "form and feature map as they are"
            if isinstance(one.step, (Transfer, Tune)):
                assert other.optimiser_steps == 3 and other.step.schedule.length == LENGTH
                assert (
                    one.step.trains == other.step.trains
                    and one.step.schedule.optimizer == other.step.schedule.optimizer
                )
            if isinstance(one.step, Transfer):
                assert one.step.objective == other.step.objective


def test_a_tiny_architecture_keeps_its_family():
    base = {
        "hidden_size": 4096,
        "intermediate_size": 9,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 9,
    }
    for config, group in (
        ({"model_type": "llama", "num_key_value_heads": 8, "attention_bias": True}, 4),
        ({"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096}, 4),
        ({"model_type": "qwen2", "num_key_value_heads": 16, "use_sliding_window": True, "sliding_window": 9}, 2),
        ({"model_type": "qwen3", "num_key_value_heads": 32}, 1),
    ):
        large = architecture({**base, **config})
        tiny = tiny_architecture(large)
        assert isinstance(tiny, Architecture) and tiny.num_attention_heads // tiny.num_key_value_heads == group
        assert tiny.attention_bias == large.attention_bias and (tiny.sliding_window is None) == (
            large.sliding_window is None
        )
        assert tiny.layer_types == (("full_attention", "sliding_attention") if large.layer_types else None)
        assert parameters(tiny)["total"] < 100_000
