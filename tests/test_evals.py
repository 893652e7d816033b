"""Every kind of evaluation against numbers made by hand, and the stock lm_eval command against ours."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import recipelin.hf as hf
from recipelin import data, families, lookup
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.evals.lm_eval.config import Config as LmEval
from recipelin.evals.logits_at import FEWEST, logits_at, unseen
from recipelin.evals.perplexity.config import Config as Perplexity
from recipelin.evals.recall.config import Config as Recall
from recipelin.evals.subject import Subject
from recipelin.exposure import exposed_from, exposed_share
from recipelin.sources import Stdlib, part_of
from recipelin.states import NAMES, State, resolve
from recipelin.steps import Swap
from recipelin.swap import state_of, swap, switch
from recipelin_kernels import hybrid_attention
from tests.rows import without_layers

HYBRID = State(window=8)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "training", Path()))[:40]]
    return data.train_tokenizer(texts, 900)


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
                    head_dim=8, vocab_size=900, max_position_embeddings=256, initializer_range=0.2)
    ).eval()  # fmt: skip
    swap(made, Swap(form="hybrid", config=Hybrid()), seed=0)
    switch(made, HYBRID)
    return made


def run(config, model, tokenizer, folder, *, name="hybrid", seed=0, exposed_from=8, hybrid=HYBRID):
    module = lookup.implementation("evals", config.eval)
    made = None
    if hasattr(module, "reference"):  # of the teacher: a student that was only swapped, under full softmax
        before = state_of(model)
        switch(model, resolve("softmax", hybrid).state)
        made = module.reference(config, model=model, tokenizer=tokenizer, seed=seed, base=folder, device="cpu")
        switch(model, before)
    subject = Subject(
        model=model,
        tokenizer=tokenizer,
        state=resolve(name, hybrid),
        seed=seed,
        exposed_from=exposed_from,
        folder=folder,
        base=folder,
        device="cpu",
        reference=made,
    )
    return module.run(config, subject)


TASK = {"task": "next_line_test", "metric": "acc_norm", "chance": 0.25, "next_line": {"items": 12, "context": (30, 60)}}
SMALL = {
    "agreement": {"rows": 2, "length": 20, "new_tokens": 3},
    "decode": {"contexts": [5, 20], "new_tokens": 2, "repeats": 1},
    "lm_eval": {"tasks": [{**TASK, "next_line": {"items": 2, "context": (30, 60)}}]},
    "perplexity": {"rows": 2, "length": 40},
    "recall": {"distances": [6, 60], "items": 2, "length": 96},
    "retrieval": {"format": "passkey", "distances": [40], "items": 2, "length": 128},
    "usage": {"rows": 2, "length": 40},
}
ROWS = {"agreement": 2, "decode": 4, "lm_eval": 1, "perplexity": 1, "recall": 2, "retrieval": 1, "usage": 6}
ONLY = {"decode": {"teacher", "softmax", "hybrid"}, "usage": {"hybrid"}}  # all others: every state
ASKED = {"lm_eval": ("teacher", "hybrid", "none")}  # its own overhead is half a second a state


def small(name, **changes):
    return lookup.lookup("evals", name).Config.model_validate_json(json.dumps({"eval": name, **SMALL[name], **changes}))


@pytest.mark.parametrize("name", lookup.names("evals"))
def test_every_evaluation_runs_in_every_state(name, model, tokenizer, tmp_path):
    """And says nothing where there is nothing to say."""
    try:
        for state in ASKED.get(name, NAMES):
            named = resolve(state, HYBRID)
            switch(model, named.state or resolve("softmax", HYBRID).state)
            found = run(small(name), model, tokenizer, tmp_path, name=state)
            assert len(found) == (ROWS[name] if state in ONLY.get(name, NAMES) else 0), state
            assert all(np.isfinite(r.value) for r in found)
            rows = [r.row(state=state, suite="x", seed=0) for r in found]
            assert len({(r.task, r.metric) for r in rows}) == len(rows)
    finally:
        switch(model, HYBRID)


def test_the_folder_is_covered():
    assert lookup.names("evals") == tuple(SMALL) == tuple(ROWS), "a new evaluation: test it here"


def test_exposure_by_hand():
    assert exposed_share(range(1, 9), 8) == 0.0  # queries 0 .. 7 see at most 8 keys
    assert exposed_share(range(1, 10), 8) == 1 / 9  # query 8 has left one key behind
    assert exposed_share([5], None) == 0.0


@pytest.mark.parametrize("reach", [None, 5, 6, 11])
@pytest.mark.parametrize("sinks", [0, 3, 5, 12])
@pytest.mark.parametrize(("shape", "cover"), [("sliding", "outside"), ("terraced", "outside"), ("terraced", "all")])
def test_the_first_exposed_query_is_the_operators(shape, cover, sinks, reach):
    """The first row in which the linear branch holds any mass, with windows of 5 tokens."""
    state = State(branches=("window", "linear", "sinks"), window=5, shape=shape, cover=cover, sinks=sinks)
    q, phi = torch.randn(1, 1, 33, 4), torch.rand(1, 1, 33, 4) + 0.1
    _, parts = hybrid_attention(
        q, q, q, phi, phi, torch.ones(1), window=5, shape=shape, cover=cover, sinks=sinks, reach=reach, components=True
    )
    found = parts.linear_share[0, 0].nonzero().flatten().tolist()
    assert exposed_from(state, reach) == (found[0] if found else None)
    alone = State(branches=("window", "linear"), window=5, shape=shape, cover=cover, sinks=sinks)
    assert exposed_from(alone) == (0 if cover == "all" else 5 if shape == "sliding" else 10)
    assert exposed_from(None) is exposed_from(State(branches=("window",))) is exposed_from(State(window="full")) is None


def test_perplexity_is_the_mean_log_loss(model, tokenizer, tmp_path):
    config = Perplexity(rows=5, length=40, batch=2)
    (result,) = run(config, model, tokenizer, tmp_path)
    (other,) = run(Perplexity(rows=5, length=40, batch=5), model, tokenizer, tmp_path)
    assert abs(result.value - other.value) < 1e-5, "the batch must not matter"
    from recipelin.evals.held_out import held_out_rows

    rows = torch.from_numpy(held_out_rows(config, tokenizer, base=tmp_path, seed=0))
    with torch.no_grad():
        logs = model(input_ids=rows, use_cache=False).logits.double().log_softmax(-1)
    expected = -np.mean([[float(logs[r, t, rows[r, t + 1]]) for t in range(39)] for r in range(5)])
    assert abs(result.value - expected) < 1e-5
    assert result.items[0].exposed == 31 / 39 and not result.higher_is_better


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_at_some_positions_are_the_same_bits(tiny, family):
    """In the teacher and in every kind of state; the last layer's MLP meets these positions alone, where it pays."""
    model = tiny(family=family).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (8, 40)))
    rows = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[1]))
    for name in ("teacher", "softmax", "hybrid", "linear", "none"):
        if name == "softmax":
            swap(model, Swap(form="hybrid", config=Hybrid()), seed=0)
        if name != "teacher":
            switch(model, resolve(name, State(window=6)).state)
        for given, at in ((ids, [38, 39]), (ids, [0, 7, 8]), (ids[:3], [39])):
            positions = torch.tensor(at)
            rows.clear()
            with torch.no_grad():
                found = logits_at(model, given, positions)
                expected = model(input_ids=given, use_cache=False, logits_to_keep=positions).logits
            assert torch.equal(found, expected) and found.shape[:2] == (len(given), len(at)), (name, at)
            assert rows == [len(at) if len(given) * len(at) >= FEWEST else 40, 40]
    assert not model.model.layers[-1].self_attn.o_proj._forward_hooks


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_no_position_can_know_of_is_left_out(tiny, family):
    """The window alone and neither branch read the end of a row, and find what the whole row gives; other states read it all."""
    model = tiny(family=family, layers=3).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (8, 300)))
    swap(model, Swap(form="hybrid", config=Hybrid()), seed=0)
    read: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *given: read.append(given[2].shape[1]))
    asked: list[int] = []  # queries of the last layer whose features are computed
    last = model.model.layers[-1].self_attn.feature_map_q
    last.register_forward_hook(lambda _, __, phi: asked.append(phi.shape[2]))
    window = State(branches=("window",), window=6)
    for state, reach in (
        (window, 16),
        (window.model_copy(update={"window": 50}), 148),
        (window.model_copy(update={"join": "replace"}), 16),
        (State(branches=()), 1),
        (window.model_copy(update={"sinks": 2}), None),
        (window.model_copy(update={"shape": "terraced"}), None),
        (window.model_copy(update={"ablate": "output"}), None),
        (State(window=6), None),
        (State(branches=("linear",), window=6), None),
        (State(branches=("linear",), cover="all"), None),
        (State(window=6, shape="terraced", sinks=2, join="absolute"), None),
    ):
        switch(model, state)
        for at in ([299], [250, 251, 290]):
            read.clear()
            asked.clear()
            positions = torch.tensor(at)
            with torch.no_grad():
                found = logits_at(model, ids, positions)
                expected = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
            assert torch.equal(found, expected), (state, at)
            if "linear" in state.branches:
                assert asked == [300 - at[0] // 64 * 64, 300]
            least = 0 if reach is None else (at[0] + 1 - reach) // 64 * 64
            assert read == [300 - least, 300], (state, at)
            if least:  # as nothing before them counts
                changed = ids.clone()
                changed[:, : at[0] + 1 - reach] = 1
                same = model(input_ids=changed, use_cache=False, logits_to_keep=positions[:1]).logits
                assert torch.allclose(same, expected[:, :1], atol=1e-5)
    kept = model.model.layers[1]
    kept.self_attn = tiny(family=family, layers=3).model.layers[1].self_attn  # a layer of softmax sees all
    switch(model, window)
    assert unseen(model, 299) == 0


class Oracle:
    """Knows the answer of every question, or guesses among the values in context."""

    model = without_layers()

    def __init__(self, tokenizer, right: bool) -> None:
        self.tokenizer, self.right = tokenizer, right

    def __call__(self, input_ids, **_):
        marker = data.marker_id(self.tokenizer)
        logits = torch.zeros(*input_ids.shape[:1], 1, 900)
        for row, ids in enumerate(input_ids.tolist()):
            places = [i for i, t in enumerate(ids) if t == marker and i + 2 < len(ids)]
            match = [ids[i + 2] for i in places if ids[i + 1] == ids[-1]]
            other = [ids[i + 2] for i in places if ids[i + 1] != ids[-1]]
            logits[row, 0, (match if self.right else other)[0]] = 9.0
        return SimpleNamespace(logits=logits)


def test_recall_of_an_oracle_and_of_its_opposite(tokenizer, tmp_path):
    config = Recall(distances=(6, 24, 61), items=9, pairs=4, length=96)
    for right in (True, False):
        results = run(config, Oracle(tokenizer, right), tokenizer, tmp_path)
        assert [r.distance for r in results] == [6, 24, 61]
        assert all(r.value == float(right) and r.n == 9 and r.chance == 0.25 for r in results)


def test_recall_questions_are_what_they_say(tokenizer):
    tokens = data.stream(Stdlib(source="python-stdlib"), tokenizer, part="test", folder=Path(), cache=None).tokens
    asked = {"distances": [6, 50, 90], "items": 5, "seed": 3, "length": 96, "pairs": 4}
    items = data.recall_items(tokenizer, tokens, **asked)
    marker = data.marker_id(tokenizer)
    for item in items:
        ids = item.ids.tolist()
        here = [i for i in range(len(ids) - 2) if ids[i] == marker and ids[i + 1] == ids[-1]]
        assert len(here) == 1 and ids[-2] == marker
        assert len(ids) - 1 - (here[0] + 1) == item.distance and ids[here[0] + 2] == item.answer
        assert len({ids[i + 2] for i in range(len(ids) - 2) if ids[i] == marker}) == 4, "four values, all different"
    again = data.recall_items(tokenizer, tokens, **asked)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(items, again, strict=True))
    with pytest.raises(data.SourceError, match="does not fit"):
        data.recall_items(tokenizer, tokens, **{**asked, "distances": [96]})


def test_lines_of_pairs_share_no_role_with_marked_slots(tokenizer):
    tokens = data.stream(Stdlib(source="python-stdlib"), tokenizer, part="test", folder=Path(), cache=None).tokens
    marked, lines = data.writing(tokenizer, "marked"), data.writing(tokenizer, "line")
    assert set(marked.keys) == set(lines.values) and not set(marked.keys) & set(lines.keys)
    asked = {"distances": [6, 50, 90], "items": 5, "seed": 3, "length": 96, "pairs": 4}
    for item in data.recall_items(tokenizer, tokens, **asked, slot="line"):
        question = tokenizer.decode(item.ids[-2:])
        assert question[0] == "\n" and item.ids[-1] in lines.keys
        at = len(item.ids) - 2 - item.distance
        assert tokenizer.decode(item.ids[at : at + 3]) == question + tokenizer.decode([item.answer])
        assert item.answer in lines.values and data.marker_id(tokenizer) not in item.ids
    config = Recall(distances=(6, 24), items=2, pairs=4, length=96, slot="line")
    assert [n.task for n in config.names()] == ["line@6", "line@24"]


def test_lm_eval_scores_are_the_log_likelihoods_of_the_lines(model, tokenizer, tmp_path):
    (result,) = run(
        LmEval.model_validate({"eval": "lm_eval", "tasks": (TASK,), "batch": 5}), model, tokenizer, tmp_path
    )
    documents = [json.loads(x) for x in (tmp_path / "next_line_test.jsonl").read_text().splitlines()]
    assert len(documents) == result.n == 12
    for document, item in zip(documents, result.items, strict=True):
        scores = []
        for choice in document["choices"]:
            context = document["context"].rstrip()
            moved = document["context"][len(context) :] + choice
            whole, start = tokenizer.encode(context + moved), len(tokenizer.encode(context))
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[t - 1, whole[t]]) for t in range(start, len(whole))) / len(choice))
        assert item.score == float(int(np.argmax(scores)) == document["answer"])
    assert all(i.exposed > 0.9 for i in result.items)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    (again,) = run(LmEval.model_validate({"eval": "lm_eval", "tasks": (TASK,), "batch": 1}), model, bare, tmp_path)
    assert bare.pad_token is None, "the padding token that lm-eval needs is none of the student's"
    assert [i.score for i in again.items] == [i.score for i in result.items]


@pytest.mark.parametrize(
    "config",
    [{"eval": "perplexity", "rows": 5, "length": 40}, {"eval": "recall", "distances": [6, 60], "items": 5, "length": 96},
     {"eval": "retrieval", "format": "passkey", "distances": [40, 60], "items": 5, "length": 128,
      "scoring": ["likelihood", "generate"]},
     {"eval": "usage", "rows": 5, "length": 40}, {"eval": "agreement", "rows": 5, "length": 20, "new_tokens": 6}],
    ids=lambda c: c["eval"],
)  # fmt: skip
def test_neither_the_batch_nor_the_call_matters(config, model, tokenizer, tmp_path):
    kind = lookup.lookup("evals", config["eval"]).Config
    one, five = (
        run(kind.model_validate_json(json.dumps({**config, "batch": n})), model, tokenizer, tmp_path) for n in (1, 5)
    )
    assert [(r.task, r.n, [i.id for i in r.items]) for r in one] == [
        (r.task, r.n, [i.id for i in r.items]) for r in five
    ]
    assert all(abs(a.value - b.value) < 1e-5 for a, b in zip(one, five, strict=True))
    named = [(n.task, n.metric) for n in kind.model_validate_json(json.dumps(config)).names()]
    if config["eval"] == "usage":  # a row for each layer and head
        assert all((r.task.partition("_")[0] + "s", r.metric) in named for r in one)
    else:
        assert [(r.task, r.metric) for r in one] == named
    assert one == run(kind.model_validate_json(json.dumps({**config, "batch": 1})), model, tokenizer, tmp_path)


def test_short_lines_are_not_exposed(model, tokenizer, tmp_path):
    """At most 20 tokens of context and 11 of answer: no query looks back further than 30 keys."""
    task = {"task": "short", "metric": "acc", "next_line": {"items": 6, "context": (8, 20)}}
    config = LmEval.model_validate({"eval": "lm_eval", "tasks": (task,)})
    (hidden,) = run(config, model, tokenizer, tmp_path, exposed_from=32)
    assert hidden.exposed == 0.0
    line = json.loads((tmp_path / "short.jsonl").read_text().splitlines()[0])
    context, right = line["context"], line["choices"][line["answer"]]
    # lm-eval scores the newline that ends the context too.
    start, stop = len(tokenizer.encode(context.rstrip())), len(tokenizer.encode(context + right))
    (seen,) = run(config, model, tokenizer, tmp_path, exposed_from=start)
    assert seen.items[0].exposed == (stop - start - 1) / (stop - start) and seen.items[0].length == stop


def test_local_items_follow_their_text(tokenizer, tmp_path):
    settings = {**TASK["next_line"], "text": {"source": "text", "path": "a.txt"}, "items": 1}
    lines = [f"self.name_{i * 37 % 60} = name" for i in range(60)]
    names = (f"{n}.txt" for n in range(1000))
    name = next(n for n in names if part_of(f"{n}:0") == "test")
    settings["text"]["path"] = name
    task = LmEval.model_validate({"eval": "lm_eval", "tasks": ({**TASK, "next_line": settings},)}).tasks[0]
    asked = {"folder": tmp_path, "base": tmp_path, "seed": 0}
    write_task = lookup.implementation("evals", "lm_eval").write_task
    (tmp_path / name).write_text("\n".join(lines))
    path = write_task(task, tokenizer, **asked).with_suffix(".jsonl")
    stamp, text = path.stat().st_mtime_ns, path.read_text()
    write_task(task, tokenizer, **asked)
    assert path.stat().st_mtime_ns == stamp, "what is there already is kept"
    (tmp_path / name).write_text("\n".join(reversed(lines)))
    write_task(task, tokenizer, **asked)
    assert path.read_text() != text, "the file has changed, and so have the items"


def test_a_group_is_its_own_subtasks_only():
    leaves = lookup.implementation("evals", "lm_eval")._leaves
    outcome = {"samples": {"piqa": [], "a": [], "b": [], "c": []},
               "group_subtasks": {"mmlu": ["stem", "c"], "stem": ["b", "a"]}}  # fmt: skip
    assert leaves(outcome, "mmlu") == ["c", "a", "b"] and leaves(outcome, "piqa") == ["piqa"]
    assert leaves(outcome, "absent") == []


def test_an_unknown_task_and_a_missing_extra_are_said(model, tokenizer, tmp_path, monkeypatch):
    evaluation = lookup.implementation("evals", "lm_eval")
    config = LmEval.model_validate({"eval": "lm_eval", "tasks": ({"task": "piqua"},)})
    manager = SimpleNamespace(all_tasks=["piqa", "arc_easy"])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)  # the index of all stock tasks takes seconds
    with pytest.raises(evaluation.EvalError, match=r"no task 'piqua'; did you mean 'piqa'\?"):
        run(config, model, tokenizer, tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(evaluation.EvalError, match=r"pip install 'recipelin\[eval\]'"):
        run(config, model, tokenizer, tmp_path)


def test_distractors_come_from_the_same_file(tokenizer):
    texts = dict(data.documents(Stdlib(source="python-stdlib"), "test", Path()))
    items = data.next_line_items(
        texts.items(), tokenizer, items=20, seed=1, context=(30, 60), answer=(4, 11), options=4
    )
    for item in items:
        name, _, line = item["id"].rpartition(":")
        lines = texts[name].splitlines()
        assert lines[int(line) - 1] == item["choices"][item["answer"]]
        assert len(set(item["choices"])) == 4 and set(item["choices"]) <= set(lines)
        assert 30 <= item["tokens"] <= 60


@pytest.mark.slow
def test_the_stock_command_gives_the_same_number(model, tokenizer, tmp_path):
    """`lm_eval` on the exported folder and the local task: exactly the Record's value."""
    config = LmEval.model_validate({"eval": "lm_eval", "tasks": (TASK,), "batch": 4})
    (result,) = run(config, model, tokenizer, tmp_path / "tasks")
    hf.export(model, tokenizer, tmp_path / "model", hybrid=HYBRID)
    done = subprocess.run(
        [Path(sys.executable).parent / "lm_eval", "--model", "hf", "--tasks", "next_line_test", "--batch_size", "4",
         "--model_args", f"pretrained={tmp_path / 'model'},trust_remote_code=True,dtype=float32", "--device", "cpu",
         "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                                                          "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(file.read_text())["results"]["next_line_test"]
    assert scores["acc_norm,none"] == result.value
    assert re.search(r"acc_norm", done.stdout)


@pytest.fixture
def stock_tasks(tmp_path, monkeypatch):
    """Three tasks in lm-eval's own terms, found as its stock tasks are: documents, and a group of two multiple choices."""
    from recipelin.evals.lm_eval import stock

    def write(name, lines, **settings):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        data_files = {"test": str(tmp_path / f"{name}.jsonl")}
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": data_files},
            "test_split": "test",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**common, **settings}))

    texts = [t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "test", Path()))[:3]]
    write(
        "documents",
        [{"text": t[: 300 + 700 * i]} for i, t in enumerate(texts)],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    for name, count in (("left", 9), ("right", 4)):
        questions = [{"q": f"{name} {i} is", "c": ["a", "b c"], "a": i % 2} for i in range(count)]
        write(name, questions, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{c}}", doc_to_target="a",
              metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}])  # fmt: skip
    group = {
        "group": "both",
        "task": ["left", "right"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    files = {n: tmp_path / f"{n}.yaml" for n in ("documents", "left", "right", "both")}
    monkeypatch.setattr(stock, "_files", lambda: files)


def test_stock_tasks_through_lm_eval_itself(stock_tasks, model, tokenizer, tmp_path, monkeypatch):
    """A corpus's word perplexity, a group over its items and over its subtasks: lm-eval's own numbers where it has them."""
    import lm_eval

    theirs = {}
    original = lm_eval.simple_evaluate

    def simple_evaluate(**arguments):
        found = original(**arguments)
        theirs.update(found["results"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    tasks = (
        {"task": "documents", "metric": "word_perplexity"}, {"task": "both", "chance": 0.25},
        {"task": "both", "chance": 0.25, "mean": "subtasks"},
    )  # fmt: skip
    by_task = []
    for task in tasks:
        config = LmEval.model_validate({"eval": "lm_eval", "tasks": (task,)})
        lookup.implementation("evals", "lm_eval").preflight(config, tokenizer=tokenizer, seeds=(0,), base=tmp_path)
        by_task += run(config, model, tokenizer, tmp_path / "tasks")
    documents, items, subtasks = by_task
    assert np.exp(documents.value) == pytest.approx(theirs["documents"]["word_perplexity,none"], rel=1e-9)
    assert len({i.weight for i in documents.items}) == 3 and documents.items[-1].length > 256
    assert all(0.9 < i.exposed < 1 for i in documents.items)
    assert items.value == pytest.approx(theirs["both"]["acc,none"])
    assert subtasks.value == pytest.approx((theirs["left"]["acc,none"] + theirs["right"]["acc,none"]) / 2)
    assert subtasks.n == 13 and subtasks.items[0].id == "left/0"


def test_one_task_with_two_limits_keeps_two_results(stock_tasks, model, tokenizer, tmp_path):
    asked = (
        {"task": "left", "limit": 4},
        {"task": "left"},
        {"task": "right"},
        {"task": "left", "limit": 4},
        {"task": "left", "limit": 2},
    )
    config = LmEval.model_validate({"eval": "lm_eval", "tasks": asked})
    found = run(config, model, tokenizer, tmp_path / "tasks")
    assert [(n.task, n.metric) for n in config.names()] == [(r.task, r.metric) for r in found]
    assert [(r.task, r.n) for r in found] == [("left", 4), ("left", 9), ("right", 4), ("left", 4), ("left", 2)]
