"""Every suite's tasks are lm-eval's, with metrics that they declare and the right chance; what is not here is said first."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

import recipelin
from recipelin.evals import EvalError
from recipelin.evals.lm_eval import ruler, stock
from recipelin.evals.lm_eval.config import Config, Task
from recipelin.evals.lm_eval.run import _manager, _result, _rolling_positions, preflight
from recipelin.evals.retrieval.config import FILLER
from recipelin.evals.retrieval.items import rows
from recipelin.facts import filler
from recipelin.load import load
from recipelin.records import Item
from recipelin.run import run
from recipelin.sources import SourceError
from recipelin.suites import load_suite

FOLDER = Path(recipelin.__file__).parents[1] / "recipes" / "suites"
SUITES = {path.stem: load_suite(path.stem, path) for path in sorted(FOLDER.glob("*.yaml"))}
POCKET = Path(recipelin.__file__).parent / "pocket"
# Options of a question, where the task's YAML has a template; read from the datasets' cards.
OPTIONS = {"piqa": 2, "arc_easy": 4, "arc_challenge": 4, "hellaswag": 4, "winogrande": 2, "openbookqa": 4, "race": 4,
           "sciq": 4, "copa": 2}  # fmt: skip


def lm_evals(suite):
    return [e for e in suite.evals if e.eval == "lm_eval"]


def test_the_suites_are_covered():
    tasks = {n: len(lm_evals(s)[0].tasks) if lm_evals(s) else 0 for n, s in SUITES.items()}
    assert tasks == {
        "commonsense": 5, "mmlu-0shot": 1, "mmlu-5shot": 1, "pocket-claims": 0, "pocket-cost": 0, "pocket-recall": 0, "pocket": 2,
        "pocket-copy": 0, "pocket-curve": 0, "pocket-strings": 0, "copy-4k": 0, "pocket-formats": 0, "wikitext-2": 0,
        "ruler-4k": 13, "recall-1k": 0, "recall-32k": 0, "recall-4k": 0, "taylor-calibrate": 12, "untangling": 6,
        "untangling-unpadded": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n, s in SUITES.items() if any(t.next_line is None for e in lm_evals(s) for t in e.tasks)]
)
def test_stock_tasks_exist_with_their_metric_and_chance(name):
    for config in lm_evals(SUITES[name]):
        manager = _manager(config, [])
        for task in config.tasks:
            leaves = stock.leaves(manager, task.task)
            assert len(leaves) == (57 if task.task == "mmlu" else 1)
            for leaf in leaves:
                assert str(task.max_seq_length or task.metric) in stock.metrics(leaf), leaf["task"]
                assert isinstance(leaf["dataset_path"], str)
                choices = leaf.get("doc_to_choice")
                options = len(choices) if isinstance(choices, list) else OPTIONS.get(task.task)
                if leaf["output_type"] == "multiple_choice":
                    assert task.chance == 1 / options
                elif leaf["output_type"] in ("loglikelihood", "generate_until"):
                    assert task.chance == 0 and ruler.is_ruler(leaf) == (task.max_seq_length is not None)
                else:
                    assert task.chance is None and task.metric == "word_perplexity"


def test_a_name_is_found_where_lm_evals_own_index_has_it():
    """Names that several files speak of, a group in a group, and a name that nothing has."""
    assert [p.name for p in stock.folders(["mmlu", "boolq", "piqa"])] == ["default", "boolq", "piqa"]
    assert stock._files()["arc_challenge"].name == "arc_challenge.yaml"
    with pytest.raises(EvalError, match="no task 'piqua'; did you mean 'piqa'"):
        stock.folders(["piqua"])


def test_what_the_papers_average_over():
    tasks = {n: [t for e in lm_evals(s) for t in e.tasks] for n, s in SUITES.items()}
    assert [*tasks["commonsense"], *tasks["mmlu-0shot"]] == tasks["untangling"] == tasks["untangling-unpadded"]
    (five,) = tasks["mmlu-5shot"]
    assert (five.shots, five.mean, five.metric) == (5, "subtasks", "acc")
    assert all(t.shots == 0 for n, each in tasks.items() if n != "mmlu-5shot" for t in each)


def test_the_ruler_suite_is_lm_evals_group_and_its_items_are_made_from_what_is_there():
    (evaluation,) = lm_evals(SUITES["ruler-4k"])
    leaves = ruler.leaves(Task(task="ruler", metric="string_match", max_seq_length=4096))
    assert [leaf["task"] for leaf in leaves] == [t.task for t in evaluation.tasks]
    assert {t.max_seq_length for t in evaluation.tasks} == {evaluation.length} == {4096}
    for leaf in leaves:  # what ruler.write takes over is all that there is
        assert set(leaf) <= {*ruler._KEPT, "task", "tag", "dataset_path", "dataset_name", "custom_dataset", "process_results",
                             "metric_list", "metadata"}  # fmt: skip
        for function in ("custom_dataset", "process_results"):
            file, _, name = leaf[function].rpartition(".")
            assert f"def {name}(" in Path(f"{file}.py").read_text(encoding="utf-8")


def test_retrieval_suites_fit_their_rows_on_both_sides_of_the_reach():
    tokenizer = AutoTokenizer.from_pretrained(POCKET)  # of all tokenizers the one with the longest spelling
    haystack = filler(tokenizer, FILLER, 40000)
    found = {n: [e for e in s.evals if e.eval == "retrieval"] for n, s in SUITES.items()}
    formats = {n: [f"{c.format}{c.copied or ''}" for c in each] for n, each in found.items() if each}
    words = ["associative", "passkey", "needle"]
    assert formats == {
        "copy-4k": ["copy8", "copy32", "copy128"], "pocket-copy": ["copy8", "copy32"], "pocket-recall": words,
        "pocket-strings": ["copy8", "copy32", "passkey"],
        "recall-1k": [*words, "copy32"], "recall-32k": [*words, "copy32"], "recall-4k": [*words, "copy32"],
    }  # fmt: skip
    every = np.resize(np.arange(len(tokenizer)), 40000)
    for name in formats:
        limit = 93 if name.startswith("pocket") else 32 * 63
        for config in found[name]:
            text = every if config.format == "copy" else haystack
            made = rows(config.model_copy(update={"items": 2}), tokenizer, text, seed=0)
            assert len(made) == 2 * len(config.distances) // config.queries
            near = config.items * sum(d <= limit for d in config.distances)
            far = config.items * len(config.distances) - near
            if name != "pocket-strings":  # for claims that compare recipes over seeds: fewer questions, more runs
                assert near >= 100 and (far >= 100 or name == "recall-1k"), "or the verdict is `not testable`"


def samples(count, right, start=0):
    return [
        {"acc": float(i < right), "target": 0, "doc": {"q": i}, "arguments": [("a b", " c")]}
        for i in range(start, count)
    ]


WRAPPED = SimpleNamespace(tok_encode=str.split, max_length=4)


def test_the_mean_of_subtasks_and_of_items():
    outcome = {"samples": {"x": samples(160, 150), "y": samples(40, 10)}, "group_subtasks": {"both": ["x", "y"]}}
    of_items = _result(Task(task="both", chance=0.25), "both", outcome, WRAPPED, 8)
    assert of_items.value == 160 / 200 and of_items.n == 200
    assert of_items.stderr == pytest.approx(math.sqrt(160 * 150 / 160 * 10 / 160 + 40 * 0.25 * 0.75) / 200, rel=0.01)
    plain = _result(Task(task="both", chance=0.25, mean="subtasks"), "both", outcome, WRAPPED, 8)
    assert plain.value == pytest.approx((150 / 160 + 10 / 40) / 2)
    assert plain.stderr == pytest.approx(0.5 * math.sqrt(150 / 160 * 10 / 160 / 159 + 0.25 * 0.75 / 39))
    assert {(i.id, i.subtask) for i in plain.items} >= {("x/0", "x"), ("y/39", "y")}
    assert len({i.id for i in plain.items}) == 200
    one = _result(Task(task="x"), "x", outcome, WRAPPED, 8)
    assert one.items[0] == Item(id="0", score=1.0, length=3, exposed=0.0)
    with pytest.raises(ValueError, match="no subtasks"):
        Task.model_validate({"task": "x", "mean": "subtasks", "next_line": {"context": (1, 2)}})


def test_word_perplexity_is_of_the_corpus():
    documents = [("a b c d e f", -12.0, 4), ("a b", -1.0, 2)]
    found = [{"word_perplexity": (ll, w), "target": t, "doc": {}, "arguments": [(t,)]} for t, ll, w in documents]
    outcome = {"samples": {"wikitext": found}, "group_subtasks": {}}
    result = _result(Task(task="wikitext", metric="word_perplexity"), "wikitext", outcome, WRAPPED, 2)
    assert math.exp(result.value) == pytest.approx(math.exp(13 / 6)) and not result.higher_is_better
    assert result.metric == "word_log_loss" and [i.weight for i in result.items] == [4, 2]
    assert result.items[0].exposed == 4 / 6  # positions 1 2 3 4, then 3 4 in a row that reaches back
    with pytest.raises(ValueError, match="no chance"):
        Task(task="wikitext", metric="word_perplexity", chance=0.1)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 8, 9, 11])
def test_rolling_positions_are_those_of_lm_eval(tokens):
    from lm_eval.utils import get_rolling_token_windows

    expected = []
    for given, scored in get_rolling_token_windows(list(range(tokens)), -1, 4, 1):
        expected += [len(given) - len(scored) + i + 1 for i in range(len(scored))]
    assert _rolling_positions(tokens, 4) == expected


def config(*tasks):
    return Config.model_validate_json(json.dumps({"eval": "lm_eval", "tasks": tasks}))


@pytest.fixture
def offline(monkeypatch):
    """As where there is no network: huggingface_hub's own switch, set after its import."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


WORDS = SimpleNamespace(bos_token_id=None, eos_token_id=0)
ASKED = {"tokenizer": WORDS, "seeds": (0,), "base": Path()}


def test_a_dataset_that_cannot_be_had_is_said_in_one_sentence(offline, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(EvalError) as caught:
        preflight(config({"task": "winogrande", "chance": 0.5}), **ASKED)
    said = str(caught.value)
    assert "task 'winogrande' needs the dataset 'allenai/winogrande', name 'winogrande_xl'" in said
    for word in (
        "cannot be had here",
        "HF_HOME",
        "HF_DATASETS_CACHE",
        "HF_HUB_OFFLINE=1",
        "load_dataset('allenai/winogrande', 'winogrande_xl')",
    ):
        assert word in said
    assert "\n" not in said and capfd.readouterr().err == ""


def test_names_and_metrics_are_checked_before_any_dataset(monkeypatch):
    monkeypatch.setattr(stock, "fetch", lambda _: pytest.fail("nothing is fetched"))
    with pytest.raises(EvalError, match=r"no task 'piqua'; did you mean 'piqa'\?"):
        preflight(config({"task": "hellaswag"}, {"task": "piqua"}), **ASKED)
    with pytest.raises(EvalError, match="task 'winogrande' has no metric 'acc_norm'; it has acc"):
        preflight(config({"task": "winogrande", "metric": "acc_norm"}), **ASKED)


@pytest.mark.parametrize(
    ("bos", "task", "words"),
    [
        (
            None,
            "piqa",
            "neither a BOS nor an EOS token, and lm-eval needs one of them: name one in its tokenizer_config",
        ),
        (None, "ruler_vt", "no EOS token, which ends what task 'ruler_vt' generates"),
        (0, "ruler_vt", "no EOS token, which ends what task 'ruler_vt' generates"),
        (0, "piqa", None),
    ],
)
def test_a_tokenizer_without_the_token_that_lm_eval_needs_is_refused(monkeypatch, bos, task, words):
    fetched = []
    monkeypatch.setattr(stock, "fetch", fetched.append)
    asked = {**ASKED, "tokenizer": SimpleNamespace(bos_token_id=bos, eos_token_id=None)}
    made = {"metric": "string_match", "max_seq_length": 4096} if task == "ruler_vt" else {}
    if words:
        with pytest.raises(EvalError, match=words):
            preflight(config({"task": task, **made}), **asked)
    else:
        preflight(config({"task": task}), **asked)
    assert len(fetched) == (not words)


def test_every_subtasks_dataset_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(stock, "fetch", lambda leaf: asked.append((leaf["dataset_path"], leaf["dataset_name"])))
    preflight(SUITES["mmlu-5shot"].evals[0], **ASKED)
    assert len(set(asked)) == 57 and {path for path, _ in asked} == {"cais/mmlu"}


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("{eval: lm_eval, tasks: [{task: piqa, chance: 0.5}]}", "needs the dataset 'baber/piqa'"),
        ("{eval: retrieval, format: passkey, length: 128, distances: [3]}", "distance 3 does not fit"),
    ],
)
def test_a_run_says_so_before_its_first_step(offline, home, tmp_path, suite, words):
    (tmp_path / "suite.yaml").write_text(f"name: x\nevals:\n  - {suite}\n")
    recipe = "name: x/x\nmodel: {teacher: pocket, beyond_context: true}\nmethod: {name: lolcats, window: 32}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "eval: {suites: [suite.yaml]}\n")
    with pytest.raises((EvalError, SourceError), match=words):
        run(load(tmp_path / "recipe.yaml"), out=tmp_path / "out", device="cpu")
    assert not (home / "steps").exists() and not (tmp_path / "out" / "model").exists()
