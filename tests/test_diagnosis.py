"""Known answers of the whole diagnosis: planted students, their real states, real items, and the verdict.

The teacher is written by hand. Its tokens are pairs (key, value) and questions (key); one head of its one layer matches key
codes, which lie in dimensions that RoPE hardly turns, and reads the value code: it answers at any distance. Swapped, with
features relu(x) (W the identity), phi(q).phi(k) is 1 for equal keys and about 0 else: the linear branch alone answers.
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipelin.attention.hybrid.config import Config, FeatureMap
from recipelin.exposure import exposed_share
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.records import Item, Result
from recipelin.states import State, resolve, subsets
from recipelin.steps import Swap
from recipelin.swap import forms, swap, switch
from recipelin.verdict import judge

KEYS, VALUES, HEAD = 8, 6, 128
WIDTH = 128
PAIRS = KEYS * VALUES
VOCABULARY = PAIRS + KEYS + VALUES  # pairs, questions, answers
WINDOW = 6


def teacher() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        embed, layer = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        key_at, value_at, asks_at, answer_at = 0, 16, 32, 48
        for key in range(KEYS):
            for value in range(VALUES):
                embed[key * VALUES + value, key_at + key] = 1
                embed[key * VALUES + value, value_at + value] = 1
            embed[PAIRS + key, key_at + key] = 1
            embed[PAIRS + key, asks_at] = 1
        slow = HEAD // 2 - 16  # dimensions of the slowest rotations
        for key in range(KEYS):
            layer.q_proj.weight[slow + key, key_at + key] = 12.0
            layer.k_proj.weight[slow + key, key_at + key] = 12.0
        for value in range(VALUES):
            layer.v_proj.weight[value, value_at + value] = 1
            layer.o_proj.weight[answer_at + value, value] = 1
            model.lm_head.weight[PAIRS + KEYS + value, answer_at + value] = 1
    return model


def questions(distance: int, count: int = 120, length: int = 40) -> list[tuple[list[int], int]]:
    """Rows that end in a question whose pair stands `distance` tokens before; every other token is a pair of another key."""
    found = []
    for number in range(count):
        draw = np.random.default_rng([distance, number])
        key, value = int(draw.integers(KEYS)), int(draw.integers(VALUES))
        others = [k for k in range(KEYS) if k != key]
        row = [int(draw.choice(others)) * VALUES + int(draw.integers(VALUES)) for _ in range(length - 1)]
        row[length - 1 - distance] = key * VALUES + value
        found.append(([*row, PAIRS + key], value))
    return found


def student(**features) -> LlamaForCausalLM:
    model = teacher()
    swap(
        model,
        Swap(form="hybrid", config=Config(feature_map=FeatureMap(activation="relu", width=2, **features))),
        seed=0,
    )
    return model


def measured(model, plain, *, distance: int, length: int = 40, join: str = "replace"):
    """(state -> Result) of one recall task, as an evaluation gives it."""
    hybrid = State(window=WINDOW, join=join)
    items = questions(distance, length=length)
    ids = torch.tensor([row for row, _ in items])
    results = {}
    states = [resolve(n, hybrid) for n in ("teacher", "hybrid", "window", "linear", "none")]
    states += [s for s in subsets(hybrid).values() if s.name not in [x.name for x in states]]
    for state in states:
        source = plain if state.weights == "teacher" else model
        if state.state is not None:
            switch(model, state.state)
        with torch.no_grad():
            logits = source(input_ids=ids, use_cache=False).logits[:, -1]
        # An untouched stream has no answer at all: all logits 0 are no right answer.
        right = (logits.argmax(-1) == torch.tensor([PAIRS + KEYS + v for _, v in items])) & (logits.amax(-1) > 1e-4)
        exposed = exposed_share([length], WINDOW)
        results[state.name] = Result(
            task=f"recall@{distance}",
            metric="accuracy",
            value=float(right.float().mean()),
            stderr=0.0,
            n=len(items),
            exposed=exposed,
            chance=1 / VALUES,
            distance=distance,
            items=tuple(
                Item(id=str(i), score=float(r), length=length, exposed=exposed) for i, r in enumerate(right.tolist())
            ),
        )
    return results


def word(results) -> str:
    return judged(results).word


def judged(results):
    from recipelin.measures import measures
    from recipelin.records import ItemColumns, ItemsOf, Record

    rows = [result.row(state=state, suite="planted", seed=0) for state, result in results.items()]
    items = {ItemsOf(r.state, r.suite, r.task, r.metric, r.seed): ItemColumns.of(results[r.state].items) for r in rows}
    record = Record(
        name="test/planted", recipe="", plan={}, plan_hash="0" * 64, status="finished", commit=None, dirty=None, versions={},
        digests={}, device="cpu", threads=1, dtype="float32", seed=0, started="2026-01-01T00:00:00+00:00", seconds=0.0,
        layers=1, window=WINDOW, branches=("window", "linear"), margin=0.01, rows=tuple(rows),
    )  # fmt: skip
    return judge(measures([record], [items]), record.margin)


def test_the_teacher_answers_at_any_distance():
    plain = teacher()
    for distance in (1, 5, 20, 35):
        items = questions(distance)
        logits = plain(input_ids=torch.tensor([r for r, _ in items]), use_cache=False).logits[:, -1]
        assert (logits.argmax(-1) - PAIRS - KEYS).tolist() == [v for _, v in items]


@pytest.fixture(scope="module")
def planted():
    return measured(student(), teacher(), distance=20)


def test_a_student_that_answers_only_through_its_linear_branch_carries(planted):
    assert planted["window"].value < 0.4 and planted["hybrid"].value > 0.95
    assert word(planted) == "carries"


def test_permuting_its_features_takes_that_away(planted):
    model = student()
    (form,) = forms(model)
    with torch.no_grad():
        weight = form.feature_map_k.weight
        order = torch.randperm(weight.shape[-1], generator=torch.Generator().manual_seed(1))
        assert not torch.equal(order, torch.arange(len(order)))
        weight.copy_(weight[:, :, order])
    found = measured(model, teacher(), distance=20)
    assert found["hybrid"].value < 0.5 < planted["hybrid"].value
    assert word(found) != "carries"


def test_a_student_with_zeroed_features_is_bypassed():
    model = student()
    (form,) = forms(model)
    with torch.no_grad():
        form.feature_map_q.weight.zero_()
        form.feature_map_k.weight.zero_()
    found = measured(model, teacher(), distance=20, join="shared")
    assert [i.score for i in found["hybrid"].items] == [i.score for i in found["window"].items]
    assert word(found) == "bypassed"


def test_short_items_are_not_testable():
    found = measured(student(), teacher(), distance=3, length=WINDOW)
    assert found["hybrid"].exposed == 0.0
    assert word(found) == "not testable"


def test_harm_inside_the_window_is_said():
    """Features that match the wrong keys drown what the window sees: nothing to win there, but something to lose."""
    model = student()
    (form,) = forms(model)
    with torch.no_grad():
        form.feature_map_k.weight.copy_(form.feature_map_k.weight.roll(1, -1))
    found = judged(measured(model, teacher(), distance=3))
    assert found.word == "not testable" and "It harms recall" in found.sentence


@pytest.mark.parametrize("sinks", [2, 8])
def test_every_subset_is_measured_beside_the_first_eight_positions(tmp_path, sinks):
    """The state `sinks` is the paper's, the first 8; a hybrid with other sinks has a subset of its own for them."""
    path = tmp_path / "r.yaml"
    text = f"name: x\nmodel: {{teacher: pocket, beyond_context: true}}\nmethod: {{name: lolcats, window: 8, sinks: {sinks}}}\n"
    asked = "[teacher, hybrid, window, linear_outside, sinks, none]"
    path.write_text(text + f"eval: {{suites: [pocket], states: {asked}}}\n")
    planned = plan(load(path))
    states = planned.steps[-1].step.states
    found = {s.name: s.state for s in states}
    assert len(found) == len(states) and found["sinks"].sinks == 8
    assert all(s.state in found.values() for s in subsets(planned.hybrid).values())
    assert ("sinks-2" in found) == (sinks == 2)
    path.write_text(text + f"eval: {{suites: [pocket], states: {asked}, shapley: true}}\n")
    assert plan(load(path)).hash == planned.hash
    path.write_text(text + f"eval: {{suites: [pocket], states: {asked}, shapley: false}}\n")
    alone = plan(load(path))
    assert [s.name for s in alone.steps[-1].step.states] == asked.strip("[]").split(", ") and alone.hash != planned.hash
    path.write_text(text + "eval: {suites: [pocket], states: [hybrid, {name: window+linear, of: linear}]}\n")
    with pytest.raises(
        PlanError, match=r"r.yaml:4:\d+: eval.states: window\+linear: the name of a subset of the branches"
    ):
        plan(load(path))
