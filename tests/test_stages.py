"""The training loops: what moves and what stays, exact accumulation, exact resuming, and clear ends."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import recipelin.losses as losses
import recipelin.stages as stages
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.checkpoint import FILE, OtherCheckpoint, read_checkpoint
from recipelin.data import Batch
from recipelin.optimizer import Optimizers, rate
from recipelin.schedule import Decay, Optimizer, Schedule, Validation
from recipelin.sources import Data
from recipelin.states import State
from recipelin.steps import Calibrate, Lora, Swap, Transfer, Tune
from recipelin.swap import form_parameters, forms, recording, swap, switch
from recipelin.teacher_stream import show_teacher


class Rows:
    """Random rows, a pure function of (step, micro); the last `quiet` tokens of odd rows carry no loss."""

    rows = 64

    def __init__(self, batch: int, length: int = 24, accumulation: int = 1, part: int = 0, quiet: int = 0) -> None:
        self.size, self.length, self.accumulation, self.part, self.quiet = batch, length, accumulation, part, quiet

    def batch(self, step: int, micro: int = 0) -> Batch:
        first = (step * self.accumulation + micro) * self.size
        rows = [np.random.default_rng([self.part, first + i]).integers(0, 7, self.length) for i in range(self.size)]
        ids = torch.from_numpy(np.stack(rows))
        labels = ids.clone()
        for i in range(self.size):
            if self.quiet and (first + i) % 2:
                labels[i, -self.quiet :] = -100
        return Batch(ids, labels, torch.arange(self.length).expand(self.size, -1))


def hybrid(tiny, window: int = 5, dtype=torch.float32, **state):
    model = tiny(dtype=dtype)
    swap(model, Swap(form="hybrid", config=Hybrid()), seed=0)
    switch(model, State(window=window, **state))
    return model


def schedule(**fields) -> Schedule:
    return Schedule(**{"steps": 6, "batch": 2, "length": 24, "checkpoint_every": 2, "log_every": 2, **fields})


def transfer_step(objective=None, trains=("feature_maps", "mix"), **fields) -> Transfer:
    fields.setdefault("optimizer", Optimizer(lr=3e-2))
    objective = objective or {"hybrid_outputs": 1000.0}
    return Transfer(stage="transfer", objective=objective, trains=trains, schedule=schedule(**fields), data=Data())


def tune_step(lora: Lora | None = None, trains=(), **fields) -> Tune:
    return Tune(stage="tune", lora=lora, trains=trains, schedule=schedule(**fields), data=Data())


def go(function, model, step, folder: Path, batches=None, **extra):
    arguments = {"device": "cpu", "folder": folder / "work", "seed": 3, "log": folder / "logs", "key": "k", **extra}
    return function(model, step, batches or Rows(2), **arguments)


def values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("objective", ["weights", "outputs", "hybrid_weights", "hybrid_outputs"])
def test_transfer_learns_and_touches_only_what_it_names(tiny, tmp_path, objective):
    model = hybrid(tiny)
    before = values(model)
    trains = ("feature_maps", "mix") if objective.startswith("hybrid") else ("feature_maps",)
    step = transfer_step({objective: 1.0 if "weights" in objective else 1000.0}, trains, steps=30)
    report = go(stages.transfer, model, step, tmp_path)
    assert report["loss_mean_of_last_tenth"] < report["loss_first"]
    after = values(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    names = {n for n in form_parameters(model) if "feature_map" in n or ("theta" in n and "mix" in trains)}
    assert moved == names
    assert not any(p.requires_grad for p in model.parameters())


def test_layers_learn_alone(tiny, tmp_path):
    """Teacher-forced: another layer's feature maps change nothing of what a layer learns."""
    one, other = hybrid(tiny), hybrid(tiny)
    with torch.no_grad():
        forms(other)[0].feature_map_q.weight.normal_()
    for name, model in (("one", one), ("other", other)):
        go(stages.transfer, model, transfer_step(), tmp_path / name)
    assert torch.equal(forms(one)[1].feature_map_q.weight, forms(other)[1].feature_map_q.weight)
    assert not torch.equal(forms(one)[0].feature_map_q.weight, forms(other)[0].feature_map_q.weight)


@pytest.mark.parametrize("layers", ["all", (0,)])
@pytest.mark.parametrize("kind", ["transfer", "calibrate"])
def test_the_stream_ends_with_the_last_layer_that_learns(tiny, tmp_path, monkeypatch, layers, kind):
    """Bit-equal to whole passes, two micro-batches a step; nothing behind the last form is computed."""

    def whole(model, batch, recorder):
        with recording(model, recorder):
            losses.hidden_states(model, batch)

    def learnt(show, run):
        monkeypatch.setattr(stages, "show_teacher", show)
        model = tiny()
        swap(model, Swap(form="hybrid", config=Hybrid(), layers=layers), seed=0)
        switch(model, State(window=5))
        ran: list[str] = []
        for name, module in model.model.named_modules():
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
        if kind == "transfer":
            step = transfer_step(accumulation=2)
            report = go(stages.transfer, model, step, tmp_path / run, Rows(2, accumulation=2))["curve"]
        else:
            step = Calibrate(what="log_scale", batches=2, batch=2, length=24, data=Data())
            report = stages.calibrate(model, step, Rows(2), device="cpu")
        assert forms(model)[0].recorder is None
        return values(model), report, set(ran)

    weights, report, ran = learnt(whole, "whole")
    early, early_report, early_ran = learnt(show_teacher, "early")
    last = f"layers.{(tiny().config.num_hidden_layers if layers == 'all' else 1) - 1}"
    assert early_report == report and all(torch.equal(early[n], w) for n, w in weights.items())
    assert f"{last}.mlp" in ran - early_ran and "norm" in ran - early_ran
    assert f"{last}.input_layernorm" in early_ran


def test_a_stream_that_nobody_sees_is_refused(tiny):
    with pytest.raises(ValueError, match="no layer of the model is swapped"):
        show_teacher(tiny(), Rows(2).batch(0), lambda *_: None)


def test_lora_is_merged_once_and_leaves_plain_modules(tiny, tmp_path):
    model = hybrid(tiny)
    before = values(model)
    step = tune_step(Lora(rank=2, targets=("q_proj", "down_proj")), ("mix",), steps=8, optimizer=Optimizer(lr=1e-2))
    report = go(stages.tune, model, step, tmp_path)
    after = values(model)
    assert after.keys() == before.keys() and not any("lora" in n for n in after)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if "q_proj" in n or "down_proj" in n or n.endswith("theta")}
    assert report["loss_last"] < report["loss_first"]
    for name in (n for n in moved if "proj" in n):
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_full_tuning_learns(tiny, tmp_path, name):
    model = tiny()
    optimizer = Optimizer(name=name, lr=1e-2)
    report = go(stages.tune, model, tune_step(steps=25, optimizer=optimizer, clip=1.0), tmp_path)
    assert report["loss_mean_of_last_tenth"] < report["loss_first"] - 0.5


def test_accumulation_is_one_large_batch(tiny, tmp_path):
    """4 x 1 and 1 x 4 rows, with rows that carry different numbers of tokens."""
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = tiny(dtype=torch.float64)
        step = tune_step(batch=batch, accumulation=accumulation, clip=1.0, optimizer=Optimizer(lr=1e-2))
        rows = Rows(batch, accumulation=accumulation, quiet=9)
        go(stages.tune, model, step, tmp_path / str(batch), rows)
        found.append(values(model))
    assert max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) < 1e-10


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    found = []
    for on in (False, True):
        model = hybrid(tiny, dtype=torch.float64)
        step = tune_step(Lora(rank=2, dropout=0.3), gradient_checkpointing=on, optimizer=Optimizer(lr=1e-2))
        go(stages.tune, model, step, tmp_path / str(on))
        found.append(values(model))
    assert max(float((found[0][n] - found[1][n]).abs().max()) for n in found[0]) < 1e-9


class Stop(Rows):
    """Ctrl-C while the batch of one step is read."""

    def __init__(self, at: int, **fields) -> None:
        super().__init__(2, **fields)
        self.at = at

    def batch(self, step: int, micro: int = 0) -> Batch:
        if step == self.at:
            raise KeyboardInterrupt
        return super().batch(step, micro)


@pytest.mark.parametrize("kind", ["transfer", "lora", "adamw", "muon", "validated"])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_resuming_is_bit_equal(tiny, tmp_path, kind, at):
    def make():
        model = tiny() if kind in ("adamw", "muon") else hybrid(tiny)
        optimizer = Optimizer(name="muon" if kind == "muon" else "adamw", lr=1e-2)
        common = {"steps": 9, "optimizer": optimizer, "decay": Decay(name="cosine", warmup=2), "checkpoint_every": 3}
        if kind in ("transfer", "validated"):
            if kind == "validated":
                watch = (Validation.Watch(state="transfer"),)
                common["validation"] = Validation(every=2, watch=watch, batches=2)
                common["decay"] = Decay(name="plateau", patience=0)
            return model, stages.transfer, transfer_step(**common)
        lora = Lora(rank=2, dropout=0.5) if kind == "lora" else None
        return model, stages.tune, tune_step(lora, ("mix",) if kind == "lora" else (), **common)

    extra = {"validation_batches": Rows(2, part=1)}
    model, function, step = make()
    whole = go(function, model, step, tmp_path / "whole", **extra)
    expected = values(model)
    broken, function, step = make()
    with pytest.raises(KeyboardInterrupt):
        go(function, broken, step, tmp_path / "b", Stop(at), **extra)
    assert read_checkpoint(tmp_path / "b" / "work", "k").step == at
    (tmp_path / "b" / "work" / f".{FILE}.dead").write_bytes(b"half a checkpoint")
    fresh, function, step = make()
    report = go(function, fresh, step, tmp_path / "b", **extra)
    assert report["resumed_from"] == at and report["loss_last"] == whole["loss_last"]
    assert report["validation"] == whole["validation"]
    found = values(fresh)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize("where", ["update", "validation"])
def test_ctrl_c_within_an_update_or_a_validation_is_bit_equal(tiny, tmp_path, monkeypatch, where):
    """An update that is half done is not kept as done; a validation that was cut off is made after all."""
    watch = (Validation.Watch(suite="s", metric="m"),)
    fields = {"validation": Validation(every=2, watch=watch), "optimizer": Optimizer(name="muon", lr=1e-2)}
    step = tune_step(checkpoint_every=3, **fields)
    measured = {2: 5.0, 4: 1.0, 6: 3.0}  # the best lies where the validation is cut off

    def watched(*left, stop=None):
        remaining = list(left)

        def evaluate(*_):
            number = remaining.pop(0)
            if number == stop:
                raise KeyboardInterrupt
            return measured[number]

        return evaluate

    model = tiny()
    whole = go(stages.tune, model, step, tmp_path / "whole", evaluate=watched(2, 4, 6))
    broken = {"evaluate": watched(2, 4, 6, stop=4 if where == "validation" else None)}
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        if where == "update":
            steps = Optimizers.step

            def half(self):
                if self.parts[0].state and int(next(iter(self.parts[0].state.values()))["step"]) == 4:
                    self.parts[0].step()
                    raise KeyboardInterrupt
                steps(self)

            patch.setattr(Optimizers, "step", half)
        go(stages.tune, tiny(), step, tmp_path / "b", **broken)
    other = tiny()
    report = go(stages.tune, other, step, tmp_path / "b", evaluate=watched(4, 6))
    assert report["resumed_from"] == (3 if where == "update" else 4)
    assert report["validation"] == whole["validation"] and report["best_step"] == 4
    expected, found = values(model), values(other)
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_a_checkpoint_of_another_plan_is_refused(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(stages.transfer, hybrid(tiny), transfer_step(), tmp_path, Stop(3))
    with pytest.raises(OtherCheckpoint, match="--fresh"):
        go(stages.transfer, hybrid(tiny), transfer_step(), tmp_path, key="another")


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        go(stages.transfer, hybrid(tiny), transfer_step(), tmp_path, Stop(3))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recipelin.checkpoint.save_file", full)
    with pytest.raises(
        stages.StageError, match=r"No space left on device; the checkpoint of step 3 is whole\. Make room"
    ):
        go(stages.transfer, hybrid(tiny), transfer_step(), tmp_path)
    assert read_checkpoint(tmp_path / "work", "k").step == 3
    assert [p.name for p in (tmp_path / "work").iterdir()] == [FILE]


def test_a_nan_names_step_and_layer(tiny, tmp_path):
    model = hybrid(tiny)
    with torch.no_grad():
        forms(model)[1].feature_map_q.weight.fill_(math.nan)
    with pytest.raises(
        stages.StageError, match=r"transfer: the loss is nan at step 1 in layer1; there is no checkpoint yet"
    ):
        go(stages.transfer, model, transfer_step(), tmp_path)


def test_a_gradient_that_is_not_finite_reaches_no_weights(tiny, tmp_path):
    """The loss of the step is finite still: the checkpoint before it stays the last, and nothing is handed back."""
    model, seen = tiny(), []

    def spoil(gradient):
        seen.append(1)
        return gradient * math.nan if len(seen) == 4 else gradient

    model.model.norm.weight.register_hook(spoil)
    text = r"the gradient of model\.norm\.weight is not finite at step 4; the last good checkpoint is step 2"
    with pytest.raises(stages.StageError, match=text):
        go(stages.tune, model, tune_step(steps=4), tmp_path)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_autocast_of_a_transfer_is_never_ignored(tiny, tmp_path):
    step = transfer_step({"weights": 1.0}, ("feature_maps",), steps=10, autocast="bfloat16")
    with pytest.raises(stages.StageError, match="needs a teacher in bfloat16, found float32"):
        go(stages.transfer, hybrid(tiny), step, tmp_path)
    report = go(stages.transfer, hybrid(tiny, dtype=torch.bfloat16), step, tmp_path)
    assert report["loss_last"] < report["loss_first"]


def test_without_tensorboard_the_words_say_what_to_install(tiny, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(stages.StageError, match=r"TensorBoard is not installed: pip install"):
        go(stages.transfer, hybrid(tiny), transfer_step(), tmp_path)


def test_plateau_lowers_the_rate_and_never_raises_it(tiny, tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(Optimizers, "set_rates", lambda self, factor: rates.append(factor))
    validation = Validation(every=1, watch=(Validation.Watch(suite="s", metric="m"),))
    for floor, expected in ((1e-4, [1, 1, 0.5, 0.25, 0.125, 0.1]), (1e-2, [1] * 6)):
        rates.clear()
        decay = Decay(name="plateau", factor=0.5, patience=0, floor=floor)
        step = tune_step(validation=validation, decay=decay, optimizer=Optimizer(lr=1e-3))
        go(stages.tune, tiny(), step, tmp_path / str(floor), evaluate=lambda *_: 1.0)
        assert rates == expected


def test_rates_by_hand():
    cosine = Decay(name="cosine", warmup=2, final=0.1)
    assert [rate(cosine, s, 10) for s in (0, 1)] == [0.5, 1.0]
    assert (
        rate(cosine, 2, 10) == 1.0
        and abs(rate(cosine, 6, 10) - 0.55) < 1e-12
        and abs(rate(cosine, 10, 10) - 0.1) < 1e-12
    )
    linear = Decay(name="linear", final=0.2)
    assert abs(rate(linear, 5, 10) - 0.6) < 1e-12
    assert rate(Decay(), 7, 10) == 1.0


def test_keep_best_and_early_stopping(tiny, tmp_path):
    """A watched value that gets worse from the second check on: the stage stops, and the best weights come back."""
    seen = iter([3.0, 1.0, 2.0, 2.5, 9.0])
    model = hybrid(tiny)
    validation = Validation(every=2, patience=2, watch=(Validation.Watch(state="hybrid", suite="s", metric="m"),))
    saved = {}

    def evaluate(state, suite, metric):
        assert (state, suite, metric) == ("hybrid", "s", "m")
        value = next(seen)
        saved[value] = forms(model)[0].feature_map_q.weight.detach().clone()
        return value

    report = go(stages.transfer, model, transfer_step(steps=50, validation=validation), tmp_path, evaluate=evaluate)
    assert report["stopped_early"] and report["steps"] == 8 and report["best_step"] == 4
    assert torch.equal(forms(model)[0].feature_map_q.weight, saved[1.0])


def test_validation_sees_the_state_it_names(tiny, tmp_path):
    model = hybrid(tiny)
    watch = (Validation.Watch(state="none", metric="loss"),)
    step = tune_step(Lora(rank=2), steps=2, validation=Validation(every=1, watch=watch, batches=1))
    report = go(stages.tune, model, step, tmp_path, validation_batches=Rows(2, part=1))
    assert len(report["validation"]) == 2 and forms(model)[0].state.branches == ("window", "linear")


def test_the_closed_form_of_c_restores_the_mass_outside(tiny, tmp_path):
    model = hybrid(tiny, join="absolute")
    report = stages.calibrate(
        model, Calibrate(what="log_scale", data=Data(), batches=3, batch=2, length=24), Rows(2), device="cpu"
    )
    assert set(report["layers"]) == {"0", "1"}
    assert all(float(f.log_scale.c.detach().abs().sum()) > 0 for f in forms(model))
    with pytest.raises(ValueError, match="log_scale"):
        stages.calibrate(model, Calibrate(what="scale", data=Data()), Rows(2), device="cpu")


def test_group_rates_must_name_what_trains(tiny, tmp_path):
    step = transfer_step(optimizer=Optimizer(lr=1e-2, group_lr={"lora": 1.0}))
    with pytest.raises(ValueError, match="lora do not train in this stage; groups that do: feature_maps, mix"):
        go(stages.transfer, hybrid(tiny), step, tmp_path)
    model = hybrid(tiny)
    before = values(model)
    go(stages.transfer, model, transfer_step(optimizer=Optimizer(lr=1e-2, group_lr={"mix": 1e-30}), steps=1), tmp_path)
    after = values(model)
    theta = next(n for n in before if n.endswith("theta"))
    assert torch.equal(before[theta], after[theta])


def test_loss_is_shifted_once(tiny):
    model = tiny()
    batch = Rows(2).batch(0)
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        assert abs(float(losses.token_loss(model, batch)) - float(expected)) < 1e-5


def test_logits_in_shares_give_the_same_loss_and_gradients(tiny, monkeypatch):
    found = []
    for rows in (4096, 7):
        monkeypatch.setattr(losses, "LOGITS", rows * 131)
        model = tiny(dtype=torch.float64)
        loss = losses.token_loss(model, Rows(2, quiet=5).batch(0))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
