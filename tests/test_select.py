"""Select: which layers stay softmax, by every policy; what it refuses, what it costs, and how it goes on."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import recipelin.hf as hf
import recipelin.losses as losses
import recipelin.selection as selection
from recipelin import data, layers, swap
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.records import read_record
from recipelin.run import run
from recipelin.schedule import Schedule
from recipelin.show import show
from recipelin.shrink import shrink
from recipelin.sources import Data, Stdlib
from recipelin.states import State
from recipelin.steps import Choice, Evaluate, FromSelect, Loss, Select, Swap, Switch, Transfer, Tune
from recipelin.strict_yaml import RecipeError

RECIPE = """\
name: test/select
model: {teacher: teacher}
method: {name: lolcats, window: 8, layers: LAYERS}
data: {mix: [{source: text, path: corpus.txt, documents: paragraph}]}
schedule:
  transfer: {steps: 4, batch: 2, accumulation: 1, length: 32, optimizer: {lr: 3e-2}}
  tune: null
eval: {suites: [suite.yaml], states: [teacher, hybrid, softmax]}
"""
SUITE = "name: small\nevals: [{eval: perplexity, rows: 4, length: 32, text: {source: text, path: corpus.txt}}]\n"
SCORED = "rows: 3, length: 32"
POLICIES = {
    "uniform": "{keep: 1, offset: 1}",
    "explicit": "{policy: explicit, layers: [2]}",
    "lm_ppl": "{policy: lm_ppl, keep: 1, draws: 2, SCORED}",
    "single_keep_ppl": "{policy: single_keep_ppl, keep: 1, draws: 2, SCORED}",
    "kl_stage2": "{policy: kl_stage2, keep: 1, SCORED, candidates: [0, 2], tune: {steps: 2, batch: 1, length: 32}}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("select")
    texts = [t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "training", folder))[:8]]
    corpus = "\n\n".join(texts)
    (folder / "corpus.txt").write_text(corpus, encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more, initializer_range=0.2))
    hf.export(model, data.train_tokenizer([corpus], 300), folder / "teacher", hybrid=None)
    return folder


def written(folder: Path, choice: str, name: str = "recipe") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("LAYERS", choice.replace("SCORED", SCORED)), encoding="utf-8")
    return path


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_uniform_by_hand():
    """The authors' lists at a quarter (papers/taylor-calibrate.md §5), and the same rule at other budgets and offsets."""

    def of(keep, n, offset=0):
        return layers.ahead(Choice(keep=keep, offset=offset), n)

    assert of(0.25, 28) == of(7, 28) == (0, 4, 8, 12, 16, 20, 24)
    assert of(0.25, 36) == tuple(range(0, 36, 4))
    assert of(0.5, 28) == tuple(range(0, 28, 2))
    assert of(0.75, 8) == (0, 1, 2, 4, 5, 6)
    assert of(2, 6, offset=2) == (2, 5)
    for n in range(2, 40):
        for keep in range(1, n):
            found = of(keep, n)
            assert len(set(found)) == keep and found[0] == 0 and found[-1] < n
            steps = {b - a for a, b in pairwise((*found, n))}
            assert max(steps) - min(steps) <= 1, "as even as whole layers allow"


@pytest.mark.parametrize(
    ("fields", "n", "words"),
    [
        ({"keep": 0.25}, 6, r"keep: 0\.25 of 6 layers is 1\.5; give a whole number"),
        ({"keep": 6}, 6, r"6 of 6 layers would stay softmax; expected 1 to 5"),
        ({"keep": 3, "offset": 2}, 6, r"offset: 2 leaves the 6 layers; expected at most 1"),
        ({"policy": "explicit", "layers": (1, 6)}, 6, r"layers: 6: the model has layers 0 to 5"),
        ({"policy": "explicit", "layers": (1, 1)}, 6, r"layers: 1 given twice"),
        ({"policy": "lm_ppl", "keep": 2, "candidates": (0, 9, 3)}, 6, r"candidates: 9: the model has layers 0 to 5"),
        (
            {"policy": "lm_ppl", "keep": 2, "candidates": (0, 3)},
            6,
            r"candidates: 2 for 2 layers that stay leave no choice",
        ),
    ],
)
def test_choices_that_do_not_fit_the_model(fields, n, words):
    choice = Choice(**fields)
    with pytest.raises(ValueError, match=words):
        layers.tried(choice, n)
        layers.ahead(choice, n)


def test_the_best_are_the_largest_or_the_smallest_and_ties_go_low():
    scores = {0: 1.0, 1: 3.0, 2: 1.0, 3: 2.0}
    assert layers.best(scores, 2, "lm_ppl") == (1, 3)
    assert layers.best(scores, 1, "single_keep_ppl") == (0,)
    assert layers.best(scores, 2, "kl_stage2") == (0, 2)
    assert layers.overlap([(0, 1), (1, 2), (1, 0)]) == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert layers.overlap([(0,)]) is None


def test_decide_pools_rows_by_tokens_and_says_how_stable_it_is():
    sure = {0: [(1.0, 1.0), (30.0, 10.0)], 1: [(8.0, 1.0), (80.0, 10.0)], 2: [(9.0, 1.0), (90.0, 10.0)]}
    found = layers.decide([sure, sure], keep=1, policy="single_keep_ppl")
    assert found["layers"] == [0] and found["scores"]["0"] == pytest.approx(31 / 11)
    assert found["overlap_of_draws"] == found["overlap_of_rows"] == 1.0 and found["overlap_by_chance"] == 1 / 3
    # Two layers that differ on one row of two only: a resample without that row is a tie, which the lower layer wins.
    close = {0: [(1.0, 1.0), (1.0, 1.0)], 1: [(1.0, 1.0), (2.0, 1.0)]}
    found = layers.decide([close], keep=1, policy="lm_ppl", teacher=[[(0.5, 1.0), (0.5, 1.0)]])
    assert found["layers"] == [1] and found["scores"] == {"0": 0.5, "1": 1.0} and found["overlap_of_draws"] is None
    assert found["overlap_of_rows"] == pytest.approx(0.75, abs=0.04)
    found = layers.decide([close, {0: close[1], 1: close[0]}], keep=1, policy="lm_ppl")
    assert found["layers_by_draw"] == [[1], [0]] and found["overlap_of_draws"] == 0.0


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_policy_shows_what_it_costs_before_anything_runs(folder):
    what = {}
    for policy, choice in POLICIES.items():
        planned = plan(load(written(folder, choice)))
        select, move = planned.steps[0], planned.steps[1].step
        assert isinstance(select.step, Select) and isinstance(move, Swap) and move.layers == FromSelect()
        assert planned.steps[1].step.model_dump(mode="json")["layers"] == {"from": "select"}
        assert "hybrid into 2 layers" in planned.steps[1].what
        assert [type(s) for s in select.step.probe] == {
            "single_keep_ppl": [Swap, Switch, Transfer],
            "kl_stage2": [Swap, Switch, Transfer, Tune],
        }.get(policy, [])
        what[policy] = select.what
        assert f"1. select    {select.what}" in show(planned)
        assert bool(select.cost.tokens) == (policy not in ("uniform", "explicit"))
        if policy == "lm_ppl":
            assert select.cost.tokens == 2 * 3 * 3 * 32
        if policy == "single_keep_ppl":
            assert select.cost.tokens == 2 * 4 * 64 + 2 * 3 * 3 * 32
        if policy == "kl_stage2":
            assert select.cost.tokens == 4 * 64 + 2 * (2 * 32 + 3 * 32)
            assert select.step.probe[-1].loss == Loss(lm=0, kl=1) and select.step.probe[-1].lora is None
    assert what == {
        "uniform": "uniform, 1 of 3 layers stay softmax: 1",
        "explicit": "explicit, 1 of 3 layers stay softmax: 2",
        "lm_ppl": "lm_ppl, 1 of 3 layers stay softmax: 3 candidates x 2 draws x 96 tokens scored",
        "single_keep_ppl": "single_keep_ppl, 1 of 3 layers stay softmax: 3 candidates x 2 draws x 96 tokens scored",
        "kl_stage2": "kl_stage2, 1 of 3 layers stay softmax: 2 candidates x 1 draw x 96 tokens scored and 64 tuned",
    }


def test_all_layers_is_the_plan_of_before_and_a_list_needs_no_select(folder):
    text = RECIPE.replace(", layers: LAYERS", "")
    (folder / "plain.yaml").write_text(text, encoding="utf-8")
    assert plan(load(folder / "plain.yaml")).hash == plan(load(written(folder, "all"))).hash
    some = plan(load(written(folder, "[0, 2]")))
    assert [s.step.step for s in some.steps][:2] == ["swap", "switch"] and "into 2 layers" in some.steps[0].what


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("{keep: 3}", r"recipe.yaml:3:44: method\.layers: 3 of 3 layers would stay softmax"),
        ("[0, 3]", r"recipe.yaml:3:44: method\.layers: 3 not there; the model has layers 0 to 2"),
        ("{keep: 0.5}", r"keep: 0\.5 of 3 layers is 1\.5"),
        ("{keep: 1, policy: lm_ppl}", r"recipe.yaml:3.*rows of 1024 tokens; the teacher's context is 64 tokens"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_at_its_line(folder, choice, words):
    with pytest.raises(PlanError, match=words):
        plan(load(written(folder, choice)))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("{keep: 1, policy: lm_pl}", r"recipe.yaml:3:62: method\.layers\.policy: .*did you mean 'lm_ppl'"),
        ("{policy: explicit}", r"policy explicit needs layers"),
        ("{keep: 1, draws: 2}", r"policy uniform does not use draws; it has keep, offset"),
        ("{keep: 1, policy: kl_stage2}", r"policy kl_stage2 needs tune"),
        ("some", r"method\.layers: found the text 'some'; expected 'all'"),
    ],
)
def test_a_choice_with_idle_or_missing_fields_is_refused(folder, choice, words):
    with pytest.raises(RecipeError, match=words):
        load(written(folder, choice))


def test_every_policy_shrinks(folder):
    for choice in POLICIES.values():
        small = shrink(load(written(folder, choice)), "teacher").recipe.method.layers
        assert isinstance(small, Choice) and layers.count(small, 2) == 1


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_keeps_what_it_chose(folder, home, tmp_path, policy, capfd):
    path = written(folder, POLICIES[policy])
    one = run(load(path), out=tmp_path / "one", device="cpu")
    record = read_record(one)
    report = record.steps[0].report
    kept = report["layers"]
    assert record.steps[0].step == "select" and len(kept) == 1
    student, _ = hf.load_student(one / "model", dtype="float32", device="cpu")
    assert [f.layer_index for f in swap.forms(student)] == [i for i in range(3) if i not in kept]
    value = {r.state: r.value for r in record.rows}
    assert value["softmax"] == pytest.approx(value["teacher"], abs=1e-5), "nothing of the teacher was moved"
    assert value["hybrid"] != value["teacher"]
    if policy in ("uniform", "explicit"):
        assert kept == [1 if policy == "uniform" else 2]
        return
    scores = {int(layer): x for layer, x in report["scores"].items()}
    assert sorted(scores) == ([0, 2] if policy == "kl_stage2" else [0, 1, 2])
    assert tuple(kept) == layers.best(scores, 1, policy)
    assert 0 <= report["overlap_of_rows"] <= 1 and len(report["layers_by_draw"]) == (1 if policy == "kl_stage2" else 2)
    capfd.readouterr()
    again = read_record(run(load(path), out=tmp_path / "two", device="cpu"))
    assert again.steps[0].reused and again.steps[0].report == report and again.rows == record.rows
    assert f"layers {kept[0]} stay softmax" in capfd.readouterr().err
    assert not list((home / "steps").glob("*/draw*")), "no checkpoints of candidates are left"


# --- the scores, against the plain way --------------------------------------------------------------------------------


class Rows:
    rows = 64

    def __init__(self, draw: int = 0) -> None:
        self.draw = draw

    def batch(self, step: int, micro: int = 0) -> data.Batch:
        ids = torch.randint(0, 131, (1, 24), generator=torch.Generator().manual_seed(step + 100 * self.draw))
        labels = ids.clone()
        labels[:, : 2 + 3 * step] = data.IGNORED  # rows with different numbers of tokens
        return data.Batch(ids, labels, torch.arange(24)[None])


def selector(tiny, folder: Path, step: Select, train=None) -> selection.Selector:
    return selection.Selector(
        step=step,
        fresh=lambda: tiny(layers=3, dtype=torch.float64),
        teacher=lambda: tiny(layers=3, dtype=torch.float64),
        rows=Rows,
        train=train or (lambda *_: None),
        seed=lambda draw: draw,
        folder=folder,
        device="cpu",
    )


SWAPPED = (Swap(form="hybrid", config=Hybrid()), Switch(state=State(window=4)))
FIELDS = {"keep": 1, "rows": 3, "length": 24, "data": Data()}


def plain(model, teacher=None) -> float:
    """Nats a token over the three rows, by whole logits."""
    total, count = 0.0, 0
    for number in range(3):
        batch = Rows().batch(number)
        scored = batch.labels[0, 1:] != data.IGNORED
        with torch.no_grad():
            own = model(input_ids=batch.input_ids, use_cache=False).logits[0, :-1][scored].log_softmax(-1)
            if teacher is None:
                found = -own.gather(1, batch.labels[0, 1:][scored][:, None])
            else:
                other = teacher(input_ids=batch.input_ids, use_cache=False).logits[0, :-1][scored].log_softmax(-1)
                found = (other.exp() * (other - own)).sum(-1)
        total, count = total + float(found.sum()), count + int(scored.sum())
    return total / count


def test_lm_ppl_is_the_rise_of_the_teachers_loss_without_a_layers_attention(tiny, tmp_path):
    report = selector(tiny, tmp_path, Select(policy="lm_ppl", **FIELDS)).go()
    base = plain(tiny(layers=3, dtype=torch.float64))
    for layer in range(3):
        without = tiny(layers=3, dtype=torch.float64)
        torch.nn.init.zeros_(without.model.layers[layer].self_attn.o_proj.weight)
        assert report["scores"][str(layer)] == pytest.approx(plain(without) - base, abs=1e-10)
    assert report["layers"] == [max(range(3), key=lambda i: report["scores"][str(i)])]


@pytest.mark.parametrize("policy", ["single_keep_ppl", "kl_stage2"])
def test_a_candidates_student_has_it_alone_as_softmax(tiny, tmp_path, policy):
    """Against students swapped one by one; a `tune` that spoils all weights leaves no trace in the next candidate."""
    teacher = tiny(layers=3, dtype=torch.float64)
    tune = Schedule(steps=1, length=24)
    probe = (
        SWAPPED
        if policy == "single_keep_ppl"
        else (*SWAPPED, Tune(stage="tune", lora=None, schedule=tune, data=Data()))
    )

    def train(model, step, folder, given):
        assert isinstance(step, Tune) and given is not None and step.stage == "select-tune-0"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)

    extra = {} if policy == "single_keep_ppl" else {"tune": tune}
    report = selector(tiny, tmp_path, Select(policy=policy, probe=probe, **FIELDS, **extra), train).go()
    for layer in range(3):
        student = tiny(layers=3, dtype=torch.float64)
        others = tuple(i for i in range(3) if i != layer)
        swap.swap(student, SWAPPED[0].model_copy(update={"layers": others}), seed=0)
        swap.switch(student, SWAPPED[1].state)
        if policy == "kl_stage2":
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(1.1)
        expected = plain(student, teacher if policy == "kl_stage2" else None)
        assert report["scores"][str(layer)] == pytest.approx(expected, abs=1e-9)


def test_a_selection_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    step = Select(policy="single_keep_ppl", probe=SWAPPED, **{**FIELDS, "draws": 2})
    whole = selector(tiny, tmp_path / "whole", step).go()
    scored = []
    own = losses.token_loss

    def counting(*arguments):
        scored.append(1)
        if len(scored) == 3 * 4 + 2:
            raise KeyboardInterrupt
        return own(*arguments)

    monkeypatch.setattr(selection, "token_loss", counting)
    with pytest.raises(KeyboardInterrupt):
        selector(tiny, tmp_path / "broken", step).go()
    assert selector(tiny, tmp_path / "broken", step).go() == whole
    assert len(scored) == 3 * 4 + 2 + 3 * 2, "what was scored is not scored again"
    assert whole["scores_by_draw"][0] != whole["scores_by_draw"][1], "another draw, other rows"


def test_a_score_that_is_not_finite_names_its_layer(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "token_loss", lambda *_: torch.tensor(math.nan))
    with pytest.raises(
        selection.StageError, match="select: single_keep_ppl: layer 0 of draw 0 has a score that is not finite"
    ):
        selector(tiny, tmp_path, Select(policy="single_keep_ppl", probe=SWAPPED, **FIELDS)).go()


def test_a_layer_that_is_not_swapped_lends_nothing(tiny):
    model = tiny()
    with pytest.raises(ValueError, match="layer 0 is not swapped"), swap.softmax_in(model, 0):
        pass
    with pytest.raises(ValueError, match="known only to a run"):
        swap.swap(model, Swap(form="hybrid", config=Hybrid(), layers=FromSelect()), seed=0)


def test_the_steps_of_a_choice_are_in_the_plan_alone(folder):
    planned = plan(load(written(folder, POLICIES["kl_stage2"])))
    assert [s.step.step for s in planned.steps] == ["select", "swap", "switch", "transfer", "evaluate"]
    assert isinstance(planned.steps[-1].step, Evaluate)
