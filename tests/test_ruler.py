"""Tasks whose answers are generated, against lm-eval's model and greedy decoding by hand; RULER's items, made once or refused."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recipelin import data
from recipelin.evals import EvalError
from recipelin.evals.greedy import greedy
from recipelin.evals.lm_eval import ruler, stock
from recipelin.evals.lm_eval.config import Config, Task
from recipelin.evals.lm_eval.run import preflight, run
from recipelin.evals.subject import Subject
from recipelin.states import NamedState

RULER = {"metric": "string_match", "chance": 0}


@pytest.fixture(scope="module")
def tokenizer():
    text = "The grass is green. What are the 5 values of VAR ABC = 12345? Answer: they are"
    made = data.train_tokenizer([text] * 3, 300)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, **special)


def config(*tasks, batch=3):
    return Config.model_validate_json(json.dumps({"eval": "lm_eval", "tasks": tasks, "batch": batch}))


def subject(model, tokenizer, folder, seed=0):
    state = NamedState(name="teacher", weights="teacher", state=None)
    where = {"folder": folder / "tasks", "base": folder, "device": "cpu"}
    return Subject(model=model, tokenizer=tokenizer, state=state, seed=seed, exposed_from=40, **where)


def small(tiny):
    torch.manual_seed(0)
    model = tiny(4, 2, vocab_size=300, max_position_embeddings=256, initializer_range=0.4).eval()
    model.generation_config.eos_token_id = None
    model.lm_head.weight.data[1] = 0  # the end of text is never the likeliest token: lm-eval would stop there
    return model


def answered(model, tokenizer, prompt, count):
    ids = torch.tensor([tokenizer.encode(prompt)])
    return len(ids[0]), greedy(model, tokenizer, ids, count)[0].tolist()


def test_rulers_answers_are_greedy_decodings_with_lm_evals_scores(tiny, tokenizer, tmp_path, home):
    """lm-eval's own ruler_vt, prompts of unlike length in one batch: each item's text, score, length and exposure by hand."""
    model = small(tiny)
    task = Task(task="ruler_vt", max_seq_length=4096, **RULER)
    (leaf,) = ruler.leaves(task)
    items, expected = [], []
    for number, noise in enumerate((1, 4, 2, 9)):
        prefix = "Answer: they are"
        text = "The grass is green. " * noise + "What are the values?"
        length, made = answered(model, tokenizer, f"{text} {prefix}", leaf["generation_kwargs"]["max_gen_toks"])
        assert tokenizer.eos_token_id == 1 and 1 not in made
        said = tokenizer.decode(made, skip_special_tokens=True)
        read = re.sub(r"[\x00-\x1f]", "\n", said.strip()).strip()  # as RULER does
        outputs = [read[3:9], "never said", read[-4:].upper(), f"{read}."][number:]
        items.append({"index": number, "input": text, "outputs": outputs, "gen_prefix": prefix, "max_length": 4096})
        score = sum(o.lower() in read.lower() for o in outputs) / len(outputs)
        again = len(tokenizer.encode(said, add_special_tokens=False))
        exposed = sum(p - 1 >= 40 for p in range(length, length + again)) / again
        expected.append((score, length + again, exposed))
    assert [score for score, *_ in expected] == [1 / 2, 1 / 3, 1 / 2, 0]
    path = ruler.place(leaf, 4096, tokenizer, seed=0)
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(i) + "\n" for i in items))
    asked = config({"task": "ruler_vt", "max_seq_length": 4096, **RULER})
    (result,) = run(asked, subject(model, tokenizer, tmp_path))
    assert (result.task, result.metric, result.chance) == ("ruler_vt@4096", "string_match", 0)
    assert [(i.score, i.length, i.exposed) for i in result.items] == [pytest.approx(e) for e in expected]
    assert 0 < result.exposed < 1 and result.value == pytest.approx(sum(e[0] for e in expected) / 4)
    spread = sum((e[0] - result.value) ** 2 for e in expected) / 4
    assert result.stderr == pytest.approx((spread / 3) ** 0.5)


def test_a_state_without_cache_leaves_generation_out(tiny, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipelin.evals.lm_eval.run.cannot_generate", lambda _: "it keeps no cache")
    asked = config({"task": "ruler_vt", "max_seq_length": 4096, **RULER})
    assert run(asked, subject(None, tokenizer, tmp_path)) == ()
    assert "ruler_vt@4096: state teacher: it keeps no cache: left out" in capsys.readouterr().err


MAKER = """
import random
import numpy
STATE = random.Random(1)
def make(max_seq_lengths, tokenizer, **_):
    (length,) = max_seq_lengths
    print("this is not for stdout")
    BODY
    rows = [{"input": f"say {random.random()} {STATE.random()} {numpy.random.rand()}", "outputs": ["a"], "max_length": length}
            for _ in range(5)]
    return {"test": rows}
def process_results(doc, results):
    return {str(doc["max_length"]): float("a" in results[0]), "128": -1.0}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Two tasks that lm-eval would find as RULER's, and their group; `fake(body)` says what the generator does first."""
    metrics = "".join(f"  - {{metric: '{n}', aggregation: mean, higher_is_better: true}}\n" for n in (64, 128))
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: ''\noutput_type: generate_until\ntest_split: test\n"
            "custom_dataset: !function maker.make\nprocess_results: !function maker.process_results\n"
            "doc_to_text: '{{input}}'\ndoc_to_target: '{{outputs}}'\n"
            f"generation_kwargs: {{do_sample: false, max_gen_toks: 4, until: []}}\nmetric_list:\n{metrics}"
        )
    (tmp_path / "pair.yaml").write_text("group: pair\ntask: [one, two]\n")
    monkeypatch.setattr(stock, "_files", lambda: {n: tmp_path / f"{n}.yaml" for n in ("one", "two", "pair")})

    def write(body="pass"):
        (tmp_path / "maker.py").write_text(MAKER.replace("BODY", body))

    write()
    return write


def test_items_are_made_once_for_all_states_and_follow_from_the_seed_alone(
    fake, tiny, tokenizer, tmp_path, home, capfd
):
    asked = config({"task": "pair", "max_seq_length": 64, "mean": "subtasks", **RULER}, {"task": "pair", "limit": 2,
                   "max_seq_length": 64, **RULER})  # fmt: skip
    state = random.getstate()
    preflight(asked, tokenizer=tokenizer, seeds=(0, 3), base=tmp_path)
    assert random.getstate() == state and "stdout" not in capfd.readouterr().out
    (one, _), *_ = leaves = [(leaf, leaf["task"]) for leaf in ruler.leaves(asked.tasks[0])]
    assert [name for _, name in leaves] == ["one", "two"]
    first = ruler.items(one, 64, tokenizer, seed=0)
    text = first.read_text()
    assert text != ruler.items(one, 64, tokenizer, seed=3).read_text() and len(text.splitlines()) == 5
    first.unlink()
    fake("random.seed(numpy.random.randint(9) and None) if 0 else None")
    assert ruler.items(one, 64, tokenizer, seed=0).read_text() == text, "whatever was drawn before"
    fake("raise RuntimeError('asked again')")
    whole, two = run(asked, subject(small(tiny), tokenizer, tmp_path, seed=3))
    assert (whole.task, whole.n, two.n) == ("pair@64", 10, 4)
    assert {i.subtask for i in whole.items} == {"one@64_seed3", "two@64_seed3"}


@pytest.mark.parametrize(
    ("body", "task", "words"),
    [
        ("import nosuchpackage", {"task": "one"}, r"'one' at 64 tokens needs nosuchpackage: pip install 'recipelin\[ruler\]'"),
        ("raise ConnectionError('no route')", {"task": "two"}, r"cannot be had here \(ConnectionError: no route\); .*items"),
        ("raise ValueError('too short')", {"task": "pair"}, r"lm-eval cannot make its items \(ValueError: too short\)"),
        ("import os; os._exit(7)", {"task": "one"}, "the process ended with 7"),
        ("while True: pass", {"task": "one"}, "made no item in 1 s; it tries without end where a prompt does not fit"),
        ("pass", {"task": "one", "max_seq_length": 65}, "task 'one' has no length 65; it has 64, 128"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_said_before_any_work(body, task, words, fake, tokenizer, tmp_path, home, monkeypatch):
    monkeypatch.setattr(ruler, "PATIENCE", 1.0)
    fake(body)
    with pytest.raises(EvalError, match=words):
        preflight(config({"max_seq_length": 64, **task, **RULER}), tokenizer=tokenizer, seeds=(0,), base=tmp_path)
    assert not list(home.rglob("*.jsonl")), "nothing is half written"


def test_settings_that_do_not_fit_are_refused(fake, tokenizer, tmp_path):
    for task in ({"task": "one", "metric": "string_match"}, {"task": "one", "max_seq_length": 64}):
        with pytest.raises(ValueError, match="give both"):
            Task.model_validate(task)
    with pytest.raises(ValueError, match="leave next_line and shots out"):
        Task(task="one", max_seq_length=64, shots=1, **RULER)
    asked = {"tokenizer": tokenizer, "seeds": (0,), "base": tmp_path}
    with pytest.raises(EvalError, match="task 'one' makes its items for a length; give metric: string_match"):
        preflight(config({"task": "one"}), **asked)
    twice = [{"task": t, "max_seq_length": 64, **RULER} for t in ("pair", "two")]
    with pytest.raises(EvalError, match="task 'two' is asked for twice, by 'pair' and by 'two'"):
        preflight(config(*twice), **asked)


def test_one_of_several_filters_counts(tiny, tokenizer, tmp_path, monkeypatch):
    """As of gsm8k: lm-eval gives every document once for each filter."""
    model, questions = small(tiny), ["What are the values", "The grass is"]
    said = [tokenizer.decode(answered(model, tokenizer, q, 6)[1], skip_special_tokens=True) for q in questions]
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"q": q, "a": s[0]}) + "\n" for q, s in zip(questions, said, strict=True))
    )
    settings = {
        "task": "read", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": n, "filter": [{"function": "regex", "regex_pattern": p}, {"function": "take_first"}]}
                        for n, p in (("first", r"(?s)^(.)"), ("never", "(QQQ)"))],
    }  # fmt: skip
    (tmp_path / "read.yaml").write_text(json.dumps(settings))
    monkeypatch.setattr(stock, "_files", lambda: {"read": tmp_path / "read.yaml"})
    task = {"task": "read", "metric": "exact_match"}
    for given, words in ((None, "filter: none is given; it has first, never"), ("frist", "found 'frist'")):
        with pytest.raises(EvalError, match=words):
            preflight(config({**task, "filter": given}), tokenizer=tokenizer, seeds=(0,), base=Path())
    for name, value in (("first", 1.0), ("never", 0.0)):
        asked = config({**task, "filter": name})
        preflight(asked, tokenizer=tokenizer, seeds=(0,), base=Path())
        (result,) = run(asked, subject(model, tokenizer, tmp_path))
        assert (result.value, result.n) == (value, 2)
        assert [i.length for i in result.items] == [
            len(tokenizer.encode(q)) + len(tokenizer.encode(s, add_special_tokens=False))
            for q, s in zip(questions, said, strict=True)
        ]
