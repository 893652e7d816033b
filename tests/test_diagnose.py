"""`recipelin diagnose`: an exported student in all its states gives what its own run gave; refusals."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import recipelin.hf as hf
from recipelin import data
from recipelin.cli import main
from recipelin.diagnose import DiagnoseError, diagnose_command, diagnosis
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.records import read_items, read_record
from recipelin.run import run
from recipelin.sources import Stdlib

RECIPE = """\
name: test/diagnosed
model: {teacher: teacher}
method: {name: lolcats, window: 8, form: {feature_map: {width: 2}}}
data: {mix: [{source: text, path: corpus.txt, documents: paragraph}]}
schedule:
  transfer: {steps: 4, batch: 2, accumulation: 1, length: 32, optimizer: {lr: 3e-2}}
  tune: {steps: 4, batch: 2, accumulation: 1, length: 32, optimizer: {lr: 1e-2}}
eval:
  suites: [suite.yaml]
"""
SUITE = """\
name: small
evals:
  - {eval: perplexity, rows: 6, length: 32, batch: 3, text: {source: text, path: CORPUS}}
"""


@pytest.fixture
def made(tiny, tmp_path, home) -> Path:
    """A folder with a teacher, a corpus, a suite and a finished run."""
    texts = [t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "training", tmp_path))[:6]]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(SUITE.replace("CORPUS", str(tmp_path / "corpus.txt")), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    tokenizer = data.train_tokenizer(["\n\n".join(texts)], 300)
    hf.export(tiny(vocab_size=300, family="qwen3"), tokenizer, tmp_path / "teacher", hybrid=None)
    run(load(tmp_path / "recipe.yaml"), out=tmp_path / "run", device="cpu")
    return tmp_path


def command(path: Path, **options) -> int:
    given = {"teacher": None, "suite": [], "finetune": None, "dtype": None, "device": "cpu", "fresh": True, "out": None}
    given |= {"beyond_context": False, "window": []}
    return diagnose_command(argparse.Namespace(path=str(path), **{**given, **options}))


def test_a_student_says_its_teacher_and_gives_the_numbers_of_its_run(made, capsys):
    assert command(made / "run" / "model", suite=[str(made / "suite.yaml")], out=str(made / "found")) == 0
    found, known = read_record(made / "found"), read_record(made / "run")
    values = {r.state: r.value for r in known.rows}
    assert {r.state: r.value for r in found.rows if r.state in values} == values
    assert {r.state for r in found.rows} >= {"teacher", "softmax", "hybrid", "window", "linear", "none"}
    one, other = read_items(made / "found"), read_items(made / "run")
    assert all(one[key] == other[key] for key in other)
    assert found.digests["student"] and found.digests["teacher"] == known.digests["teacher"]
    assert found.branches == known.branches and found.window == 8
    assert found.kernels.items() <= known.kernels.items() and found.kernels
    assert not (made / "found" / "model").exists(), "the student is evaluated where it lies"
    text = capsys.readouterr()
    assert "Verdict" in text.out and "diagnoses" in text.err


def test_a_kernel_that_is_not_for_this_device_is_refused_at_the_student(made, monkeypatch):
    """Of a student that was made on a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = made / "run" / "model" / "config.json"
    config.write_text(config.read_text().replace('"kernel": "auto"', '"kernel": "gpu"'))
    with pytest.raises(PlanError, match=r"\.yaml:\d+:\d+: model.student: kernel='gpu': .*found cpu.*json names it"):
        command(made / "run" / "model", suite=[str(made / "suite.yaml")], out=str(made / "found"))
    assert not (made / "found").exists()


def test_a_suite_by_path_starts_at_the_current_folder(made, monkeypatch):
    monkeypatch.chdir(made)
    found = diagnosis(Path("run/model"), teacher=None, suites=["./suite.yaml"], finetune=None, dtype=None)
    assert found["eval"]["suites"] == [str(made / "suite.yaml")]
    assert found["name"] == "diagnose/run" and "of run does" in found["about"]["claim"]


def test_texts_of_a_suite_start_at_its_folder(made, home):
    """The recipe that is written lies elsewhere."""
    (made / "near.yaml").write_text(SUITE.replace("CORPUS", "corpus.txt"), encoding="utf-8")
    assert command(made / "run" / "model", suite=[str(made / "near.yaml")], out=str(made / "found")) == 0
    assert {r.state for r in read_record(made / "found").rows} >= {"teacher", "hybrid"}
    (made / "corpus.txt").rename(made / "corpse.txt")
    with pytest.raises(
        DiagnoseError, match=f"near.yaml: .*file {made}/corpus.txt is not there; did you mean 'corpse.txt'"
    ):
        ask = {"teacher": None, "finetune": None, "dtype": None}
        diagnosis(made / "run" / "model", suites=[str(made / "near.yaml")], **ask)


def test_without_its_teacher_it_is_diagnosed_all_the_same(made, capsys):
    shutil.move(made / "teacher", made / "gone")
    assert command(made / "run" / "model", suite=[str(made / "suite.yaml")], out=str(made / "found")) == 0
    assert "give --teacher" in capsys.readouterr().err
    assert "teacher" not in {r.state for r in read_record(made / "found").rows}
    shutil.move(made / "gone", made / "teacher")
    (made / "teacher" / "config.json").write_text(
        (made / "teacher" / "config.json").read_text().replace('"rms_norm_eps"', '"rms_norm_eps" ')
    )
    diagnosis(made / "run" / "model", teacher=None, suites=[str(made / "suite.yaml")], finetune=None, dtype=None)
    assert "no longer the one of" in capsys.readouterr().err


def test_the_recipe_that_it_writes_is_a_recipe(made, home):
    command(made / "run" / "model", suite=[str(made / "suite.yaml")], out=str(made / "found"))
    (path,) = (home / "diagnoses").glob("*.yaml")
    loaded = load(path)
    assert loaded.recipe.method.name == "exported" and loaded.recipe.name == "diagnose/run"
    assert loaded.recipe.model.student.state.window == 8
    for wrong, words in (
        (("name: exported", "name: lolcats"), "starts from a teacher and would not read it"),
        ((f"student: {made / 'run' / 'model'}", "student: nowhere"), "no exported student at"),
        ((f"student: {made / 'run' / 'model'}", f"student: {made / 'teacher'}"), "is no student of recipelin"),
    ):
        (home / "wrong.yaml").write_text(path.read_text().replace(*wrong))
        with pytest.raises(ValueError, match=words):
            from recipelin.plan import plan

            plan(load(home / "wrong.yaml"))


def test_what_cannot_be_diagnosed_is_refused(tmp_path, made):
    ask = {"teacher": None, "suites": [], "finetune": None, "dtype": None}
    (tmp_path / "x.pt").write_bytes(b"")
    for path, options, words in (
        (tmp_path / "nowhere", {}, "expected the folder of an exported student"),
        (tmp_path / "run" / "modle", {}, "did you mean 'model'"),
        (tmp_path / "teacher", {}, "is no student of recipelin"),
        (tmp_path / "run" / "model", {}, "give --suite NAME"),
        (tmp_path / "run" / "model", {"finetune": "y.pt"}, "--finetune belongs to"),
        (tmp_path / "nix.pt", {}, "expected the folder of an exported student"),
        (tmp_path / "x.pt", {}, "give --teacher"),
        (tmp_path / "x.pt", {"teacher": str(tmp_path / "teacher")}, "give --suite"),
        (tmp_path / "x.pt", {"teacher": str(tmp_path / "teacher"), "finetune": "y.pt"}, "no such file"),
    ):
        with pytest.raises(DiagnoseError, match=words):
            diagnosis(path, **{**ask, **options})
    layout = tmp_path / "run" / "model" / "config.json"
    config = json.loads(layout.read_text())
    config["recipelin"]["version"] = 99
    layout.write_text(json.dumps(config))
    with pytest.raises(DiagnoseError, match="layout version 99"):
        diagnosis(tmp_path / "run" / "model", **ask)


def test_windows_are_swept_at_inference(tmp_path, made):
    asked = diagnosis(
        made / "run" / "model", teacher=None, suites=["pocket"], finetune=None, dtype=None, windows=(2, 4)
    )
    swept = asked["eval"]["states"][-4:]
    assert swept == [
        {"name": f"{state}-{width}", "of": state, "window": width} for width in (2, 4) for state in ("hybrid", "window")
    ]
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(asked))
    (evaluation,) = [p.step for p in plan(load(path)).steps if p.step.step == "evaluate"]
    widths = {s.name: s.state.window for s in evaluation.states if s.state is not None}
    own = widths["hybrid"]
    assert widths["hybrid-2"] == widths["window-2"] == 2 and widths["window-4"] == 4 and widths["window"] == own
    with pytest.raises(SystemExit):
        main(["diagnose", "x", "--window", "0"])


def test_a_published_checkpoint_becomes_a_recipe(tmp_path, made):
    (tmp_path / "lolcats-8b").mkdir()
    torch.save({}, tmp_path / "lolcats-8b" / "model.pt")
    found = diagnosis(
        tmp_path / "lolcats-8b",
        teacher=str(made / "teacher"),
        suites=["pocket"],
        finetune=str(tmp_path / "lolcats-8b"),
        dtype=None,
    )
    assert found["name"] == "diagnose/lolcats-8b" and found["method"] == {"name": "converted"}
    assert found["model"]["converted"]["finetune"] == str(tmp_path / "lolcats-8b" / "model.pt")
