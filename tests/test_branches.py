"""Branch schedules: values over a stage, draws, and what they do to a hybrid that trains."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import recipelin.stages as stages
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.branches import RATES, BranchSchedule, RandomWidth, Rate, Width, dropout_at, kept, window_at
from recipelin.data import Batch
from recipelin.losses import token_loss
from recipelin.schedule import Optimizer, Schedule, Validation
from recipelin.sources import Data
from recipelin.states import State, resolve
from recipelin.steps import Loss, Swap, Tune
from recipelin.swap import forms, swap, switch

GRANULARITIES = ("step", "layer", "head", "sequence")


def rates(*pairs: tuple[float, float]) -> tuple[Rate, ...]:
    return tuple(Rate(until=u, value=v) for u, v in pairs)


# --- values -----------------------------------------------------------------------------------------------------------


def test_the_papers_schedule_counts_optimiser_steps():
    found = [dropout_at(BranchSchedule(dropout=RATES), step, 100) for step in range(100)]
    assert found == [0.9] * 33 + [0.75] * 33 + [0.5] * 34


@pytest.mark.parametrize("between", ["step", "linear", "cosine"])
def test_values_between_knots(between):
    schedule = BranchSchedule(dropout=rates((0.5, 0.8), (1.0, 0.2)), between=between)
    at = {step: dropout_at(schedule, step, 8) for step in range(8)}
    assert [at[s] for s in range(4)] == [0.8] * 4
    expected = {
        "step": [0.2, 0.2, 0.2, 0.2],
        "linear": [0.8, 0.65, 0.5, 0.35],
        "cosine": [0.8 - 0.3 * (1 - math.cos(math.pi * s / 4)) for s in range(4)],
    }[between]
    assert [at[s] for s in range(4, 8)] == pytest.approx(expected)


def test_windows_by_schedule_and_at_random():
    steps = BranchSchedule(window=(Width(until=0.5, value=8), Width(until=1.0, value=32)))
    assert [window_at(steps, 64, seed=0, step=s, total=4) for s in range(4)] == [8, 8, 32, 32]
    linear = steps.model_copy(update={"between": "linear"})
    assert [window_at(linear, 64, seed=0, step=s, total=8) for s in range(8)] == [8, 8, 8, 8, 8, 14, 20, 26]
    assert window_at(BranchSchedule(), 64, seed=0, step=1, total=4) == 64
    drawn = BranchSchedule(window=RandomWidth(random=(4, 16), until=0.75))
    found = [window_at(drawn, 64, seed=1, step=s, total=400) for s in range(400)]
    assert set(found[:300]) == {4, 16} and found[300:] == [64] * 100
    assert 100 < found.count(4) < 200
    assert found == [window_at(drawn, 64, seed=1, step=s, total=400) for s in range(400)]
    assert found != [window_at(drawn, 64, seed=2, step=s, total=400) for s in range(400)]


@pytest.mark.parametrize(
    ("points", "words"),
    [([(0.5, 0.1)], "must rise to 1, found 0.5"), ([(0.6, 0.1), (0.4, 0.2), (1, 0)], "must rise to 1")],
)
def test_a_schedule_that_does_not_reach_the_end_is_refused(points, words):
    with pytest.raises(ValidationError, match=words):
        BranchSchedule(dropout=rates(*points))


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_one_draw_decides_for(granularity):
    schedule = BranchSchedule(dropout=rates((1.0, 0.5)), granularity=granularity)
    axes = {"step": range(24), "micro": range(4), "layer": range(4)}
    drawn = np.array(
        [
            kept(schedule, seed=3, total=24, rows=5, heads=6, **dict(zip(axes, at, strict=True)))
            for at in product(*axes.values())
        ]
    ).reshape(24, 4, 4, 5, 6)
    names = ("step", "micro", "layer", "row", "head")
    varying = {name for axis, name in enumerate(names) if (np.diff(drawn.astype(int), axis=axis) != 0).any()}
    assert (
        varying
        == {
            "step": {"step"},
            "layer": {"step", "micro", "layer"},
            "head": {"step", "micro", "layer", "head"},
            "sequence": {"step", "micro", "row"},
        }[granularity]
    )
    again = kept(schedule, seed=3, total=24, rows=5, heads=6, step=7, micro=1, layer=2)
    assert (again == drawn[7, 1, 2]).all(), "pure in its arguments"
    other = [kept(schedule, seed=4, total=24, rows=5, heads=6, step=s, micro=0, layer=0) for s in range(24)]
    assert (np.array(other) != drawn[:, 0, 0]).any(), "the seed decides"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_rate_is_the_schedules(granularity):
    schedule = BranchSchedule(dropout=rates((0.5, 0.9), (1.0, 0.25)), granularity=granularity)
    found = [kept(schedule, seed=0, total=4000, step=s, micro=0, layer=0, rows=1, heads=1).mean() for s in range(4000)]
    for part, expected in ((found[:2000], 0.1), (found[2000:], 0.75)):
        assert abs(np.mean(part) - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)


# --- training ---------------------------------------------------------------------------------------------------------


class Rows:
    """Random rows, a pure function of (step, micro)."""

    rows = 64

    def __init__(self, batch: int, accumulation: int = 1, stop: int | None = None) -> None:
        self.size, self.accumulation, self.stop = batch, accumulation, stop

    def batch(self, step: int, micro: int = 0) -> Batch:
        if step == self.stop:
            raise KeyboardInterrupt
        first = (step * self.accumulation + micro) * self.size
        ids = np.stack([np.random.default_rng([first + i]).integers(0, 7, 24) for i in range(self.size)])
        return Batch(torch.from_numpy(ids), torch.from_numpy(ids.copy()), torch.arange(24).expand(self.size, -1))


def hybrid(tiny, **state):
    model = tiny(dtype=torch.float64)
    swap(model, Swap(form="hybrid", config=Hybrid()), seed=0)
    switch(model, State(**{"window": 5, **state}))
    return model


def tune(model, folder: Path, branches: BranchSchedule | None, batches=None, *, loss=None, extra=None, **fields):
    schedule = Schedule(
        **{"steps": 6, "batch": 2, "length": 24, "checkpoint_every": 2, "optimizer": Optimizer(lr=1e-2), **fields}
    )
    step = Tune(
        stage="tune", lora=None, trains=("feature_maps",), branches=branches, schedule=schedule, data=Data(),
        loss=loss or Loss(),
    )  # fmt: skip
    arguments = {"device": "cpu", "folder": folder / "work", "seed": 3, "log": folder / "logs", "key": "k"}
    return stages.tune(model, step, batches or Rows(2), **arguments, **(extra or {}))


def values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_checkpointing_and_resuming_draw_the_same(tiny, tmp_path, granularity):
    branches = BranchSchedule(dropout=RATES, granularity=granularity, window=(Width(until=1.0, value=3),))
    whole = hybrid(tiny)
    report = tune(whole, tmp_path / "whole", branches)
    assert all(form.drop is None and form.state == State(window=5) for form in forms(whole))
    checkpointed = hybrid(tiny)
    again = tune(checkpointed, tmp_path / "checkpointed", branches, gradient_checkpointing=True)
    assert all(
        (a - b).abs().max() < 1e-12 for a, b in zip(values(whole).values(), values(checkpointed).values(), strict=True)
    )
    broken, resumed = hybrid(tiny), hybrid(tiny)
    with pytest.raises(KeyboardInterrupt):
        tune(broken, tmp_path / "broken", branches, Rows(2, stop=3))
    assert all(form.drop is None and form.state == State(window=5) for form in forms(broken))
    third = tune(resumed, tmp_path / "broken", branches)
    assert all(torch.equal(a, b) for a, b in zip(values(whole).values(), values(resumed).values(), strict=True))
    assert third["resumed_from"] == 3
    assert report["window_on"] == again["window_on"] == third["window_on"]


def test_accumulation_changes_nothing_where_a_draw_holds_for_the_step(tiny, tmp_path):
    branches = BranchSchedule(dropout=rates((1.0, 0.5)), granularity="step")
    one, two = hybrid(tiny), hybrid(tiny)
    tune(one, tmp_path / "one", branches, Rows(4), batch=4)
    tune(two, tmp_path / "two", branches, Rows(2, accumulation=2), batch=2, accumulation=2)
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(values(one).values(), values(two).values(), strict=True))


@pytest.mark.parametrize("on_drop", ["linear_covers_all", "linear_outside"])
def test_a_window_that_is_always_dropped_is_the_linear_branch(tiny, tmp_path, on_drop):
    branches = BranchSchedule(dropout=rates((1.0, 1.0)), on_drop=on_drop)
    dropped, linear = hybrid(tiny), hybrid(tiny)
    switch(linear, resolve("linear" if on_drop == "linear_covers_all" else "linear_outside", State(window=5)).state)
    first = tune(dropped, tmp_path / "dropped", branches)
    second = tune(linear, tmp_path / "linear", None)
    assert first["window_on"] == 0.0 and "window_on" not in second
    assert abs(first["loss_last"] - second["loss_last"]) < 1e-8
    assert abs(first["loss_last"] - tune(hybrid(tiny), tmp_path / "none", None)["loss_last"]) > 1e-3


def test_nothing_is_dropped_in_validation(tiny, tmp_path):
    """Neither in held-out losses nor in a suite: the model is seen as it will be evaluated."""
    seen = []
    model = hybrid(tiny)

    def evaluate(*_):
        seen.append([(form.drop, form.state.window) for form in forms(model)])
        return 1.0

    branches = BranchSchedule(dropout=rates((1.0, 1.0)), window=(Width(until=1.0, value=2),))
    watch = (Validation.Watch(state="hybrid"), Validation.Watch(suite="s", metric="m"))
    extra = {"evaluate": evaluate, "validation_batches": Rows(2)}
    report = tune(
        model,
        tmp_path,
        branches,
        steps=1,
        validation=Validation(every=1, watch=watch, batches=1, keep_best=False),
        extra=extra,
    )
    assert seen == [[(None, 5), (None, 5)]]
    with torch.no_grad():
        expected = float(token_loss(model, Rows(2).batch(0)))
    assert report["validation"][0][1] == pytest.approx((expected + 1.0) / 2, abs=1e-10)


def test_what_is_watched_with_a_negative_weight_is_maximised(tiny, tmp_path):
    """hybrid - window: the best weights are those where the linear branch brings most."""
    model = hybrid(tiny)
    watch = (Validation.Watch(state="hybrid"), Validation.Watch(state="window", weight=-1.0))
    extra = {"validation_batches": Rows(2)}
    report = tune(model, tmp_path, None, validation=Validation(every=2, watch=watch, batches=2), extra=extra)
    held_out = []
    for name in ("hybrid", "window"):
        switch(model, resolve(name, State(window=5)).state)
        with torch.no_grad():
            held_out.append(sum(float(token_loss(model, Rows(2).batch(n))) for n in range(2)) / 2)
    best = min(value for _, value in report["validation"])
    assert best == pytest.approx((held_out[0] - held_out[1]) / 2, abs=1e-10)


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_against_a_dense_formula(tiny, direction, temperature):
    model, teacher = hybrid(tiny), tiny(dtype=torch.float64)
    batch = Rows(2).batch(0)
    batch.labels[0, 5:9] = -100
    loss = Loss(lm=0.3, kl=0.7, direction=direction, temperature=temperature)
    scored = batch.labels[:, 1:] != -100
    own, target = (
        m(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][scored].detach() for m in (model, teacher)
    )
    p, q = ((x / temperature).softmax(-1) for x in (target, own))
    one, other = (p, q) if direction == "forward" else (q, p)
    divergence = (one * (one.log() - other.log())).sum(-1).mean() * temperature**2
    entropy = torch.nn.functional.cross_entropy(own, batch.labels[:, 1:][scored])
    found = token_loss(model, batch, loss, teacher)
    assert float(found.detach()) == pytest.approx(float(0.3 * entropy + 0.7 * divergence), abs=1e-10)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert float(token_loss(teacher, batch, Loss(lm=0, kl=1), teacher).detach()) == pytest.approx(0, abs=1e-12)


def test_a_divergence_without_a_teacher_is_refused(tiny, tmp_path):
    with pytest.raises(stages.StageError, match="needs the teacher"):
        tune(hybrid(tiny), tmp_path, None, loss=Loss(lm=0, kl=1))
    with pytest.raises(ValidationError, match="nothing to minimise"):
        Loss(lm=0, kl=0)


def test_a_partly_given_schedule_of_ssd_keeps_the_papers_rates():
    from recipelin.methods.ssd import Config

    assert Config(branches={"granularity": "head"}).branches.dropout == RATES
    assert Config(branches={"dropout": (), "window": {"random": (4, 8)}}).branches.dropout == ()
    with pytest.raises(ValueError, match="nothing would be scheduled"):
        Config(branches={"dropout": ()})
