"""Distillation: block outputs, the loss behind a large vocabulary, rates of groups, and curves over training tokens."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import recipelin.hf as hf
import recipelin.losses as losses
import recipelin.stages as stages
from recipelin import data
from recipelin.attention.block_loss import block_loss
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.data import IGNORED, Batch
from recipelin.head_loss import head_loss, plain_loss
from recipelin.load import load
from recipelin.masks import ATTENTION
from recipelin.mistakes import PlanError
from recipelin.optimizer import make_optimizers
from recipelin.plan import plan
from recipelin.records import read_record
from recipelin.run import run
from recipelin.schedule import Curve, Optimizer, Schedule
from recipelin.show import show
from recipelin.sources import Data, Stdlib
from recipelin.states import State
from recipelin.steps import Lora, Loss, Swap, Transfer, Tune
from recipelin.strict_yaml import RecipeError
from recipelin.swap import forms, recording, restore, swap, switch

EXACT = torch.float64


class Rows:
    """Random rows of 24 tokens, a pure function of the step; the first tokens of each carry no loss."""

    rows = 64

    def batch(self, step: int, micro: int = 0) -> Batch:
        ids = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        labels[0, :5] = IGNORED
        return Batch(ids, labels, torch.arange(24).expand(2, -1))


def hybrid(tiny, **fields):
    model = tiny(**fields)
    swap(model, Swap(form="hybrid", config=Hybrid()), seed=0)
    switch(model, State(window=5))
    return model


def go(function, model, step, folder: Path, batches=None, **extra):
    arguments = {"device": "cpu", "folder": folder / "work", "seed": 3, "log": folder / "logs", "key": "k", **extra}
    return function(model, step, batches or Rows(), **arguments)


# --- block outputs ----------------------------------------------------------------------------------------------------


def test_block_loss_by_hand():
    student, teacher = (
        torch.tensor([[[3.0, 4.0], [1.0, 1.0], [9.0, 9.0]]]),
        torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]),
    )
    mask = torch.tensor([[True, True, False]])
    assert float(block_loss(student, teacher, "mse", mask)) == pytest.approx(25 / 2 / 2)
    assert float(block_loss(student, teacher, "l2norm", mask)) == pytest.approx(5 / math.sqrt(2) / 2)
    assert float(block_loss(student, teacher, "l2norm")) == pytest.approx((5 + math.sqrt(81 + 64)) / math.sqrt(2) / 3)
    own = student.clone().requires_grad_()
    block_loss(own, teacher, "l2norm", mask).backward()
    assert torch.equal(own.grad[0, 1], torch.zeros(2)), "no error: the gradient is 0, not 0 / 0"
    assert bool(own.grad.isfinite().all()) and torch.equal(own.grad[0, 2], torch.zeros(2))
    assert own.grad[0, 0].norm() == pytest.approx(1 / math.sqrt(2) / 2), "it keeps its size"
    with pytest.raises(ValueError, match="'l1'; expected mse or l2norm"):
        block_loss(student, teacher, "l1")


@pytest.mark.parametrize("kind", ["mse", "l2norm"])
def test_block_outputs_are_those_of_the_block(tiny, tmp_path, kind):
    """The loss of a layer is that between its module's outputs and the teacher's, after o_proj; and training lowers it."""
    model = hybrid(tiny, dtype=EXACT)
    inputs: dict[int, tuple] = {}
    for form in forms(model):
        form.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.__setitem__(module.layer_index, (args, kwargs)), with_kwargs=True
        )
    found: dict[int, float] = {}

    def record(index, captured):
        form = forms(model)[index]
        found[index] = float(form.losses(captured, {"block_outputs": 1.0}, kind)["block_outputs"].detach())

    batch = Rows().batch(0)
    with torch.no_grad(), recording(model, record):
        losses.hidden_states(model, batch)
    teacher = tiny(dtype=EXACT)
    teacher.set_attn_implementation(ATTENTION)
    for index, (args, kwargs) in inputs.items():
        with torch.no_grad():
            student = forms(model)[index](*args, **kwargs)[0]
            taught = teacher.model.layers[index].self_attn(*args, **kwargs)[0]
        error = student - taught
        expected = error.square().mean() if kind == "mse" else error.norm(dim=-1).mean() / math.sqrt(48)
        assert found[index] == pytest.approx(float(expected), rel=1e-9), index
    schedule = Schedule(steps=25, batch=2, length=24, optimizer=Optimizer(lr=3e-2))
    trains = ("feature_maps", "mix")
    step = Transfer(
        stage="transfer",
        objective={"block_outputs": 1.0},
        block_loss=kind,
        trains=trains,
        schedule=schedule,
        data=Data(),
    )
    before = forms(model)[0].o_proj.weight.clone()
    report = go(stages.transfer, model, step, tmp_path)
    assert report["loss_mean_of_last_tenth"] < report["loss_first"]
    assert torch.equal(forms(model)[0].o_proj.weight, before)
    restore(model)


# --- the loss behind the head -----------------------------------------------------------------------------------------

LOSSES = {
    "lm": Loss(),
    "forward": Loss(lm=0, kl=1),
    "reverse": Loss(lm=0, kl=0.7, direction="reverse"),
    "warm": Loss(lm=0, kl=1.3, temperature=2.5),
    "both": Loss(lm=0.4, kl=1.1, temperature=0.7),
    "both reverse": Loss(lm=0.4, kl=1.1, direction="reverse", temperature=1.7),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_shares_are_the_plain_formula_and_its_gradient(name, rows):
    """float64; 29 tokens in shares of 1, 7 (4 + 1) and all; hidden and head both learn, and the head alone is frozen."""
    loss, draw = LOSSES[name], torch.Generator().manual_seed(0)
    hidden, weight, stream, other = (
        torch.randn(*shape, generator=draw, dtype=EXACT) for shape in ((29, 12), (53, 12), (29, 9), (53, 9))
    )
    labels = torch.randint(0, 53, (29,), generator=draw)
    taught = (lambda share: stream[share] @ other.T) if loss.kl else None
    found = []
    for made in (
        lambda h, w: plain_loss(h @ w.T, labels, taught(slice(None)) if taught else None, loss),
        lambda h, w: head_loss(h, w, labels, taught, loss, rows),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = made(h, w)
        (value * 0.3).backward()
        found.append([value.detach(), h.grad, w.grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    h = hidden.clone().requires_grad_()
    head_loss(h, weight, labels, taught, loss, rows).backward()
    torch.testing.assert_close(h.grad, found[0][1] / 0.3, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        assert float(head_loss(hidden, weight, labels, taught, loss, rows)) == pytest.approx(float(found[0][0]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_loss_in_shares_has_the_gradients_of_the_whole(tiny, monkeypatch, tied):
    """Through the layers, with tied embeddings (whose gradient comes from both ends) and without; and in bf16 autocast."""
    found, teacher = [], tiny(layers=1, dtype=EXACT)
    for numbers in (2**25, 7 * 131):
        monkeypatch.setattr(losses, "LOGITS", numbers)
        model = tiny(dtype=EXACT, tie_word_embeddings=tied)
        value = losses.token_loss(model, Rows().batch(0), LOSSES["both"], teacher)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    rough, teacher = [], tiny(layers=1)
    for numbers in (2**25, 7 * 131):
        monkeypatch.setattr(losses, "LOGITS", numbers)
        model = tiny()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = losses.token_loss(model, Rows().batch(0), LOSSES["both"], teacher)
        value.backward()
        rough.append((float(value.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert rough[0][0] == pytest.approx(rough[1][0], rel=1e-3)
    assert torch.cosine_similarity(rough[0][1], rough[1][1], dim=0) > 0.999


class Wide(TorchDispatchMode):
    """Most rows of any tensor [rows, vocabulary] that an operation makes; the head itself, [vocabulary, 48], is let by."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, torch.Tensor) and self.vocabulary in each.shape and 48 not in each.shape:
                self.rows = max(self.rows, each.numel() // self.vocabulary)
        return found


@pytest.mark.parametrize("loss", ["lm", "both", "reverse"])
def test_logits_of_all_tokens_are_never_held(tiny, monkeypatch, loss):
    """Forward and backward, of the student and of the teacher, whether the head learns or not."""
    vocabulary, batch = 5000, Rows().batch(0)
    scored = int((batch.labels[:, 1:] != IGNORED).sum())
    teacher = None if loss == "lm" else tiny(layers=1, vocab_size=vocabulary)
    for numbers, rows in ((2**25, scored), (4 * vocabulary, 4)):
        monkeypatch.setattr(losses, "LOGITS", numbers)
        for learns in (True, False):
            model = tiny(layers=1, vocab_size=vocabulary)
            model.model.embed_tokens.weight.requires_grad_(learns)
            with Wide(vocabulary) as seen:
                losses.token_loss(model, batch, LOSSES[loss], teacher).backward()
            assert seen.rows == rows


# --- rates of groups --------------------------------------------------------------------------------------------------


def test_rates_reach_attention_and_its_norms(tiny, tmp_path, monkeypatch):
    """Stage 2 of arXiv 2606.16429: everything with attn in its name at 1e-4 (norms before attention too), the rest 7e-6."""
    seen = {}

    def spied(config, trained, groups):
        found = make_optimizers(config, trained, groups)
        for group in found.parts[0].param_groups:
            seen.update({found.names[id(p)]: group["lr"] for p in group["params"]})
        return found

    monkeypatch.setattr("recipelin.loop.make_optimizers", spied)
    rates = {"attention": 1e-4, "attention_norms": 2e-4, "mix": 3e-4}
    model = tiny()
    swap(model, Swap(form="hybrid", config=Hybrid(), layers=(1,)), seed=0)
    switch(model, State(window=5))
    schedule = Schedule(steps=1, batch=2, length=24, optimizer=Optimizer(lr=7e-6, group_lr=rates))
    step = Tune(stage="tune", lora=None, trains=("feature_maps", "mix"), schedule=schedule, data=Data())
    go(stages.tune, model, step, tmp_path)
    for name, rate in seen.items():
        expected = 7e-6
        if ".self_attn." in name:  # of the layer that stayed softmax too
            expected = 3e-4 if name.endswith("theta") else 1e-4
        elif ".input_layernorm." in name:
            expected = 2e-4
        assert rate == expected, name
    assert len(seen) == len(list(model.parameters())) - 1, "all but c_h, which this join does not use"
    lora = step.model_copy(update={"lora": Lora(rank=2)})
    with pytest.raises(ValueError, match=r"attention, attention_norms, mix do not train in this stage"):
        go(stages.tune, tiny(), lora.model_copy(update={"trains": ()}), tmp_path / "lora")


# --- curves -----------------------------------------------------------------------------------------------------------

POINTS = Curve(tokens=(0, 90, 200), suites=("s",))  # a step reads 48 tokens: after 0, 2 and 5 steps


class Stop(Rows):
    def batch(self, step: int, micro: int = 0) -> Batch:
        if step == 3:
            raise KeyboardInterrupt
        return super().batch(step, micro)


def test_a_curve_measures_the_student_as_it_stands_and_once(tiny, tmp_path):
    schedule = Schedule(steps=6, batch=2, length=24, checkpoint_every=1, curve=POINTS)
    step = Tune(stage="tune", lora=None, schedule=schedule, data=Data())
    asked = []

    def measure_of(model):
        def measure(curve):
            assert curve == POINTS
            asked.append(float(model.model.norm.weight.detach().sum()))
            return [{"value": asked[-1]}]

        return measure

    model = tiny()
    whole = go(stages.tune, model, step, tmp_path / "a", measure=measure_of(model))
    assert [(p["step"], p["tokens"]) for p in whole["measured"]] == [(0, 0), (2, 96), (5, 240)]
    assert [p["rows"][0]["value"] for p in whole["measured"]] == asked and len(set(asked)) == 3
    plain = go(
        stages.tune,
        tiny(),
        step.model_copy(update={"schedule": schedule.model_copy(update={"curve": None})}),
        tmp_path / "b",
    )
    assert plain["loss_last"] == whole["loss_last"] and "measured" not in plain
    asked.clear()
    broken, fresh = tiny(), tiny()
    with pytest.raises(KeyboardInterrupt):
        go(stages.tune, broken, step, tmp_path / "c", Stop(), measure=measure_of(broken))
    again = go(stages.tune, fresh, step, tmp_path / "c", measure=measure_of(fresh))
    assert again["measured"] == whole["measured"] and len(asked) == 3
    with pytest.raises(stages.StageError, match="a curve measures suites, which needs a run"):
        go(stages.tune, tiny(), step, tmp_path / "d")
    epochs = step.model_copy(update={"schedule": Schedule(epochs=0.1, batch=2, length=24, curve=POINTS)})
    with pytest.raises(stages.StageError, match=r"tune: curve\.tokens: 200; the stage reads 192 tokens"):
        go(stages.tune, tiny(), epochs, tmp_path / "e", measure=measure_of(tiny()))


RECIPE = """\
name: test/curve
model: {teacher: teacher}
method: {name: lolcats, window: 8, layers: [1]}
data: {mix: [{source: text, path: corpus.txt, documents: paragraph}]}
schedule:
  transfer: {steps: 3, batch: 2, accumulation: 1, length: 32, curve: {tokens: [192], suites: [suite.yaml]}}
  tune:
    {steps: 4, batch: 2, accumulation: 1, length: 32,
     curve: {tokens: [0, 100], suites: [suite.yaml], states: [hybrid, window]}}
eval: {suites: [suite.yaml], states: [teacher, hybrid, window]}
"""
SUITE = "name: small\nevals: [{eval: perplexity, rows: 4, length: 32, text: {source: text, path: corpus.txt}}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("curve")
    texts = [t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "training", folder))[:8]]
    corpus = "\n\n".join(texts)
    for name, text in (("corpus.txt", corpus), ("suite.yaml", SUITE), ("recipe.yaml", RECIPE)):
        (folder / name).write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more, initializer_range=0.2))
    hf.export(model, data.train_tokenizer([corpus], 300), folder / "teacher", hybrid=None)
    return folder


def test_the_rows_of_a_curve_stand_in_the_record_with_their_tokens(folder, home, tmp_path):
    one = run(load(folder / "recipe.yaml"), out=tmp_path / "one", device="cpu")
    record = read_record(one)
    assert [(r.stage, r.tokens, r.state) for r in record.curves] == [
        ("transfer", 192, "hybrid"),
        *[("tune", t, s) for t in (0, 128) for s in ("hybrid", "window")],
    ]
    value = {(r.stage, r.tokens, r.state): r.value for r in record.curves}
    assert value["tune", 0, "hybrid"] == pytest.approx(value["transfer", 192, "hybrid"], abs=1e-6), (
        "adapters start at 0"
    )
    assert value["tune", 128, "hybrid"] != value["tune", 0, "hybrid"] != value["tune", 0, "window"]
    assert all("measured" not in t.report for t in record.steps) and len(record.rows) == 5
    finished = [json.loads(p.read_text()) for p in (home / "steps").glob("*/report.json")]
    assert sum("measured" in r for r in finished) == 2
    again = read_record(run(load(folder / "recipe.yaml"), out=tmp_path / "two", device="cpu"))
    assert again.curves == record.curves and all(t.reused for t in again.steps if t.step in ("transfer", "tune"))


def test_a_curve_is_in_the_plan_and_its_absence_in_no_hash(folder):
    planned = plan(load(folder / "recipe.yaml"))
    assert "suite.yaml in hybrid, window at 0, 100 tokens" in show(planned)
    before = [s.hash for s in planned.steps]
    (folder / "suite.yaml").write_text(SUITE.replace("rows: 4", "rows: 5"), encoding="utf-8")
    after = [s.hash for s in plan(load(folder / "recipe.yaml")).steps]
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False, False]
    tune = planned.steps[3].step
    assert "curve" in tune.model_dump(mode="json")["schedule"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tokens: [192]", "tokens: [193]", r"curve\.tokens: 193; the stage reads 192"),
        ("tokens: [0, 100]", "tokens: [100, 90]", r"tokens: found 100, 90; expected rising numbers"),
        ("tokens: [0, 100]", "tokens: [1, 60]", r"1 and 60 are both reached by step 1; a step reads 64 tokens"),
        ("states: [hybrid, window]", "states: [hybrid, teacher]", r"cannot measure teacher"),
        ("suites: [suite.yaml], states: [hybrid, window]", "suites: [suit.yaml]", r"suit\.yaml"),
        (
            "window: 8,",
            "window: 8, block_loss: l2norm,",
            r"l2norm is of the objective block_outputs; found hybrid_outputs",
        ),
    ],
)
def test_mistakes_in_a_curve_or_a_block_loss_are_found_before_any_work(folder, old, new, words):
    assert old in RECIPE
    (folder / "wrong.yaml").write_text(RECIPE.replace(old, new), encoding="utf-8")
    with pytest.raises((RecipeError, PlanError), match=words):
        plan(load(folder / "wrong.yaml"))
