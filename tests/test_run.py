"""The interpreter end to end on a small model: reuse, resuming after SIGKILL, and what a run refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import recipelin.hf as hf
from recipelin import data, reuse
from recipelin.cli import main
from recipelin.load import load
from recipelin.plan import plan
from recipelin.records import RecordError, read_bands, read_items, read_record
from recipelin.run import RunError, run
from recipelin.sources import Stdlib
from recipelin.states import State, resolve
from recipelin.student_digest import digest_student
from recipelin_kernels import resolve_kernel
from tests.forked import start

RECIPE = """\
name: test/small
model: {teacher: teacher}
method:
  name: lolcats
  window: 8
  form: {feature_map: {width: 2}}
  tune_form: [mix]
data: {mix: [{source: text, path: corpus.txt, documents: paragraph}]}
schedule:
  transfer: {steps: 12, batch: 2, accumulation: 2, length: 48, checkpoint_every: 3, optimizer: {lr: 3e-2}}
  tune: {steps: 10, batch: 2, accumulation: 1, length: 48, checkpoint_every: 3, optimizer: {lr: 1e-2}}
eval:
  suites: [suite.yaml]
  states: [teacher, softmax, hybrid, window, linear, none]
"""
SUITE = """\
name: small
evals:
  - {eval: perplexity, rows: 8, length: 48, batch: 4, text: {source: text, path: corpus.txt}}
  - {eval: usage, rows: 4, length: 48, text: {source: text, path: corpus.txt}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe, its suite, its corpus and a random teacher that stand alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("recipe")
    texts = [t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "training", folder))[:12]]
    corpus = "\n\n".join(texts)
    (folder / "corpus.txt").write_text(corpus, encoding="utf-8")
    tokenizer = data.train_tokenizer([corpus], 300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=300,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    hf.export(model, tokenizer, folder / "teacher", hybrid=None)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    return folder


def go(folder: Path, home: Path, out: Path, **arguments) -> Path:
    return run(load(folder / "recipe.yaml"), out=out, device="cpu", **arguments)


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "model" / "model.safetensors")


def test_a_run_is_whole_and_the_second_reuses_it(folder, home, tmp_path, capfd):
    one = go(folder, home, tmp_path / "one")
    record, items = read_record(one), read_items(one)
    assert record.status == "finished"
    assert record.kernels == {"hybrid_attention": resolve_kernel("auto", "cpu")}
    assert [t.step for t in record.steps] == ["swap", "switch", "transfer", "tune", "evaluate"]
    assert {r.state for r in record.rows} == {
        "teacher",
        "softmax",
        "hybrid",
        "window",
        "linear",
        "linear_outside",
        "none",
    }
    assert len(items) == 7 and all(len(found) == 8 for found in items.values())
    exposed = {share for found in items.values() for share in found.exposed}
    assert exposed == {(47 - 8) / 47}
    assert (one / "logs" / "transfer").is_dir() and record.steps[2].report["trained_parameters"] > 0
    capfd.readouterr()
    two = go(folder, home, tmp_path / "two")
    text = capfd.readouterr().err
    assert text.count("reused") >= 3
    again = read_record(two)
    assert [t.reused for t in again.steps][2:4] == [True, True]
    assert again.rows == record.rows and read_items(two) == items
    assert again.kernels == record.kernels  # all was reused: what it takes
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))


def test_the_window_shows_in_the_numbers(folder, home, tmp_path):
    """States differ as they must: softmax is not the hybrid, and `none` is worse than everything."""
    rows = {r.state: r.value for r in read_record(go(folder, home, tmp_path / "run")).rows if r.task == "perplexity"}
    assert len(set(rows.values())) == len(rows)


KILLS = ("transfer", "tune", "evaluate")


def recipelin(*arguments: str) -> None:
    sys.exit(main([*arguments]))


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(folder, tmp_path):
    """Killed in transfer, in tune, in evaluate and between: the run that resumes ends bit-equal."""
    told = tmp_path / "stderr.txt"

    def started(home: str, out: str):
        command = ("run", str(folder / "recipe.yaml"), "--out", str(tmp_path / out), "--device", "cpu")
        return start(recipelin, *command, stderr=told, environment={"RECIPELIN_HOME": str(tmp_path / home)})

    def finished(home: str, out: str) -> str:
        process = started(home, out)
        process.join(120)
        assert process.exitcode == 0, told.read_text()
        return told.read_text()

    finished("whole", "a")
    killed = []
    for sign in KILLS:
        process = started("broken", "b")
        deadline = time.monotonic() + 90
        while process.is_alive() and time.monotonic() < deadline:
            if _reached(tmp_path / "broken", tmp_path / "b", sign):
                process.kill()
                process.join(240)
                killed += [sign] if process.exitcode == -signal.SIGKILL else []
                break
            time.sleep(0.005)
        process.join(240)
    assert len(killed) >= 2, f"too fast to be killed: {killed}"
    last = finished("broken", "b")
    assert "goes on from step" in last or "reused" in last
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert read_record(tmp_path / "a").rows == read_record(tmp_path / "b").rows
    assert read_items(tmp_path / "a") == read_items(tmp_path / "b")


def _reached(home: Path, out: Path, sign: str) -> bool:
    steps = home / "steps"
    if not steps.is_dir():
        return False
    done = [p for p in steps.iterdir() if not p.name.endswith(".working")]
    under_way = any(p.glob("checkpoint.safetensors") for p in steps.glob("*.working"))
    half = any(True for p in steps.glob("*.working/checkpoint.safetensors"))
    if sign == "transfer":
        return len(done) == 0 and under_way and half
    if sign == "tune":
        return len(done) == 1 and half
    return (home / "evaluations").is_dir() and len(list((home / "evaluations").glob("*.json"))) >= 3


def test_another_plan_never_overwrites_a_run(folder, home, tmp_path):
    go(folder, home, tmp_path / "run")
    (folder / "other.yaml").write_text(RECIPE.replace("window: 8", "window: 6"), encoding="utf-8")
    with pytest.raises(RunError, match="holds the run of another plan"):
        run(load(folder / "other.yaml"), out=tmp_path / "run", device="cpu")


def test_what_is_asked_for_and_not_there(folder, home, tmp_path, capsys):
    if not torch.cuda.is_available():
        assert main(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path / "x"), "--device", "cuda"]) == 1
        assert "torch sees no GPU here" in capsys.readouterr().err
    with pytest.raises(RunError, match="expected auto, cpu or cuda"):
        run(load(folder / "recipe.yaml"), out=tmp_path / "y", device="gpu")
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_token_without_a_row_is_refused_before_any_step(folder, home, tmp_path, capsys):
    (folder / "larger").mkdir()
    for path in (folder / "teacher").iterdir():
        (folder / "larger" / path.name).write_bytes(path.read_bytes())
    tokenizer = hf.load_tokenizer(folder / "teacher")
    tokenizer.add_tokens(["<more>", "<most>"])
    tokenizer.save_pretrained(folder / "larger")
    path = folder / "larger.yaml"
    path.write_text(RECIPE.replace("teacher: teacher", "teacher: larger"), encoding="utf-8")
    assert main(["run", str(path), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 1
    text = capsys.readouterr().err
    assert "has 302 tokens, the model's embedding 300 rows; first without a row: '<more>', number 300" in text
    assert "Traceback" not in text and not (home / "steps").exists()


def test_documents_without_an_end_are_said(folder, home, tmp_path, capfd, monkeypatch):
    untrained(folder, tmp_path / "one", "hybrid", only="usage")
    assert "EOS" not in capfd.readouterr().err
    original = hf.load_tokenizer

    def endless(*args, **more):
        tokenizer = original(*args, **more)
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(hf, "load_tokenizer", endless)
    untrained(folder, tmp_path / "two", "hybrid", only="usage")
    assert "the tokenizer names no EOS token: documents follow one another without one" in capfd.readouterr().err


def test_a_diverging_stage_stops_with_its_step(folder, home, tmp_path, capsys):
    text = RECIPE.replace("optimizer: {lr: 1e-2}", "optimizer: {lr: 1e25}")
    (folder / "diverges.yaml").write_text(text, encoding="utf-8")
    assert main(["run", str(folder / "diverges.yaml"), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "tune: the loss is" in error and "at step" in error and "Traceback" not in error
    assert read_record(tmp_path / "x").status == "failed"


def test_a_missing_corpus_is_said_before_any_work(folder, home, tmp_path, capsys):
    (folder / "lost.yaml").write_text(
        RECIPE.replace("path: corpus.txt, doc", "path: corpsu.txt, doc"), encoding="utf-8"
    )
    assert main(["run", str(folder / "lost.yaml"), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "corpsu.txt is not there; did you mean 'corpus.txt'?" in error
    (folder / "lost.yaml").write_text(RECIPE.replace("path: corpus.txt, doc", "path: teacher, doc"), encoding="utf-8")
    assert main(["run", str(folder / "lost.yaml"), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 2
    assert "teacher is a folder; expected a file" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_is_watched_counts_and_is_opened_before_any_work(folder, home, tmp_path, capsys):
    """A suite that only a stage's validation names: its texts are in the data's digest, and missing ones stop the run."""
    watch = "optimizer: {lr: 1e-2}, validation: {every: 5, watch: [{suite: watched.yaml, metric: METRIC}]}}"
    recipe = RECIPE.replace("optimizer: {lr: 1e-2}}", watch)
    perplexity = "{eval: perplexity, rows: 2, length: 48, text: {source: jsonl, path: watched.jsonl}}"
    short = "{eval: retrieval, format: passkey, length: 40, distances: [3]}"
    (folder / "watched.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")

    def write(suite, metric):
        (folder / "watched.yaml").write_text(f"name: watched\nevals: [{suite}]\n", encoding="utf-8")
        (folder / "watching.yaml").write_text(recipe.replace("METRIC", metric), encoding="utf-8")
        loaded = load(folder / "watching.yaml")
        return loaded, plan(loaded)

    loaded, planned = write(perplexity, "log_loss")
    before = reuse.digests(loaded, planned)["data"]
    (folder / "watched.jsonl").write_text('{"text": "two"}\n', encoding="utf-8")
    assert reuse.digests(loaded, planned)["data"] != before
    asked = ["run", str(folder / "watching.yaml"), "--out", str(tmp_path / "x"), "--device", "cpu"]
    (folder / "watched.jsonl").unlink()
    assert main(asked) == 2 and "watched.jsonl is not there" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    write(short, "exact_match")
    assert main(asked) != 0 and "distance 3 does not fit" in capsys.readouterr().err
    assert not (home / "steps").exists() or not list((home / "steps").glob("*.working"))


def test_students_share_what_their_states_read_alike(folder, home, tmp_path):
    """`none` reads no attention, which is all that LoRA changed; whose recipe made a student nobody reads. The Record says it."""

    def made(name: str, *change: str, **arguments):
        text = RECIPE.replace("name: test/small", f"name: test/{name}")
        (folder / "recipe-of.yaml").write_text(text.replace(*change) if change else text, encoding="utf-8")
        out = run(load(folder / "recipe-of.yaml"), out=tmp_path / f"{name}{len(arguments)}", device="cpu", **arguments)
        record = read_record(out)
        return record.rows, read_items(out), record.steps[-1].report

    states = ["teacher", "softmax", "hybrid", "window", "linear", "none", "linear_outside"]
    one = made("one")
    assert one[2] == {"evaluations": dict.fromkeys(states, 2), "reused": {}}
    other = ("steps: 10", "steps: 4")
    two = made("two", *other)
    assert two[2] == {"evaluations": dict.fromkeys(states, 2), "reused": {"teacher": 2, "none": 2}}
    assert {r.value for r in two[0] if r.state == "hybrid"} != {r.value for r in one[0] if r.state == "hybrid"}
    assert made("two", *other, fresh=True)[:2] == two[:2]
    assert made("three")[2]["reused"] == dict.fromkeys(states, 2)


def test_the_digest_of_a_student_knows_what_its_state_reads(folder, home, tmp_path):
    """Each tensor by itself is changed; of `none` those of the attention do not count, nor the form's settings."""
    model = go(folder, home, tmp_path / "run") / "model"
    path, file = model / "config.json", model / "model.safetensors"
    config, tensors = json.loads(path.read_text(encoding="utf-8")), load_file(file)
    assert len(tensors) > 20 and config["recipelin"]["origin"]["recipe"] == "test/small"
    states = [resolve(name, State(window=8)).state for name in ("hybrid", "none")]

    def digests() -> list[str]:
        return [digest_student(model, state) for state in states]

    def told(**layout) -> list[bool]:
        """In which of the states a change of the layout counts."""
        path.write_text(json.dumps({**config, "recipelin": {**config["recipelin"], **layout}}), encoding="utf-8")
        return [a != b for a, b in zip(digests(), before, strict=True)]

    save_file(tensors, file)
    before = digests()
    assert before[0] != before[1] and told(origin=None, state=None) == [False, False]
    assert told(config={}) == [True, False] and told(layers=[0]) == [True, True] and told() == [False, False]
    bias = "model.layers.1.self_attn.o_proj.bias"  # of families that have one
    for name in [*tensors, bias]:
        save_file({**tensors, name: tensors.get(name, torch.zeros(3)) + 1}, file)
        assert told() == [True, ".self_attn." not in name or name == bias], name
    save_file(tensors, file)
    config["rms_norm_eps"] = 0.5
    assert told() == [True, True]


def test_plan_knows_what_is_finished(folder, home, tmp_path, capsys):
    go(folder, home, tmp_path / "run")
    assert main(["plan", str(folder / "recipe.yaml"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("finished, would be reused") == 2
    assert main(["list", "--runs"]) == 0
    assert "2 finished steps" in capsys.readouterr().out


def test_a_shared_prefix_is_shared(folder, home, tmp_path):
    """A weights transfer in the linear state serves every window: its key does not know the window."""
    text = (
        RECIPE.replace("name: lolcats", "name: absolute")
        .replace("  tune_form: [mix]\n", "")
        .replace(
            "  tune: {steps: 10, batch: 2, accumulation: 1, length: 48, checkpoint_every: 3, optimizer: {lr: 1e-2}}\n",
            "",
        )
    )
    hashes = []
    for window in (4, 8):
        (folder / "w.yaml").write_text(text.replace("window: 8", f"window: {window}"), encoding="utf-8")
        hashes.append([p.hash for p in plan(load(folder / "w.yaml")).steps])
    assert hashes[0][:2] == hashes[1][:2] and hashes[0][2] != hashes[1][2]


def test_a_transfer_that_reads_no_state_is_shared(folder, home, tmp_path):
    """The teacher's weights are learnt alike in every state; what is tuned behind it is not. Bit for bit what was not shared."""

    def steps(objective: str, join: str, more: str = ""):
        text = RECIPE.replace("  window: 8\n", f"  window: 8\n  objective: {{{objective}: 1}}\n  join: {join}\n")
        (folder / "reading.yaml").write_text(text.replace("transfer: {", f"transfer: {{{more}"), encoding="utf-8")
        loaded = load(folder / "reading.yaml")
        planned = plan(loaded)
        return loaded, planned, reuse.run_keys(planned.steps, reuse.surroundings(loaded, planned, "cpu"))

    def alike(objective: str, more: str = "") -> list[bool]:
        (_, one, ours), (_, other, theirs) = (steps(objective, join, more) for join in ("shared", "average"))
        assert [p.step.step for p in one.steps] == ["swap", "switch", "transfer", "tune", "evaluate"]
        assert [a.hash == b.hash for a, b in zip(one.steps, other.steps, strict=True)] == [True] + [False] * 4
        same = [reuse.lineage(one.steps, i) == reuse.lineage(other.steps, i) for i in range(5)]
        assert same == [a == b for a, b in zip(ours, theirs, strict=True)]
        return same

    assert alike("weights") == [True, False, True, False, False]
    assert alike("hybrid_outputs") == [True] + [False] * 4
    assert alike("weights", "validation: {every: 6, batches: 1}, ") == [True] + [False] * 4
    run(steps("weights", "shared")[0], out=tmp_path / "one", device="cpu")
    loaded = steps("weights", "average")[0]
    shared = run(loaded, out=tmp_path / "two", device="cpu")
    alone = run(loaded, out=tmp_path / "alone", device="cpu", fresh=True)
    assert [t.reused for t in read_record(shared).steps] == [False, False, True, False, False]
    assert read_record(shared).rows == read_record(alone).rows and read_items(shared) == read_items(alone)
    assert all(torch.equal(a, b) for a, b in zip(weights(shared).values(), weights(alone).values(), strict=True))


def test_without_a_c_compiler_a_run_says_so(folder, home, tmp_path, monkeypatch, capfd):
    with_one = read_record(go(folder, home, tmp_path / "with"))
    assert "kernel chunked" not in capfd.readouterr().err
    for module in ("cpu.why_not", "hybrid.why_no_c"):
        monkeypatch.setattr(f"recipelin_kernels.{module}", lambda: "no C compiler (cc, gcc, clang)")
    without = read_record(go(folder, home, tmp_path / "without", fresh=True))
    assert "kernel chunked: no C compiler (cc, gcc, clang); the C kernels" in capfd.readouterr().err
    assert (with_one.kernels, without.kernels) == ({"hybrid_attention": "cpu"}, {"hybrid_attention": "chunked"})
    for one, other in zip(with_one.rows, without.rows, strict=True):  # of a whole run, trained by each
        assert (one.state, one.metric) == (other.state, other.metric) and abs(one.value - other.value) < 1e-3


def test_source_changes_change_the_key(folder, monkeypatch):
    step = plan(load(folder / "recipe.yaml")).steps[2].step
    before = reuse.source_digest(step)
    real = reuse.digest_file
    for changed in ("stages.py", "chunked.py", "hybrid_forward.c", "tiles.h"):
        monkeypatch.setattr(reuse, "digest_file", lambda p, name=changed: "other" if p.name == name else real(p))
        assert reuse.source_digest(step) == before, "a process runs what it loaded"
        reuse._digest_of.cache_clear()  # another process
        try:
            assert reuse.source_digest(step) != before
        finally:
            monkeypatch.setattr(reuse, "digest_file", real)
            reuse._digest_of.cache_clear()
            assert reuse.source_digest(step) == before


def test_the_exported_student_generates_with_its_own_classes(folder, home, tmp_path):
    out = go(folder, home, tmp_path / "run")
    model, tokenizer = hf.load_student(out / "model", dtype="float32", device="cpu")
    ids = torch.randint(4, 300, (1, 20))
    made = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert made.shape[1] <= 32
    config = json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "recipelin_llama" and config["recipelin"]["state"]["window"] == 8


def test_validation_never_sees_test_items():
    """Every `part` of a suite's settings, however deep, is on the selection part while a stage validates."""
    from recipelin.preflight import on_selection
    from recipelin.suites import load_suite

    for config in load_suite("pocket", Path("x.yaml")).evals:
        text = on_selection(config).model_dump_json()
        assert '"test"' not in text and '"selection"' in text


def test_a_full_disk_is_said_and_nothing_is_half_written(folder, home, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("recipelin.run.save_file", full)
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "somewhere: No space left on device; what was finished is kept" in error and "Traceback" not in error
    assert not list((home / "steps").glob("*/report.json"))
    monkeypatch.undo()
    monkeypatch.setenv("RECIPELIN_HOME", str(home))
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(tmp_path / "x"), "--device", "cpu"]) == 0


def test_a_sidecar_that_cannot_be_written_loses_no_record(folder, home, tmp_path, monkeypatch):
    def refuse(*_):
        raise RecordError("two rows")

    monkeypatch.setattr("recipelin.records.write_items", refuse)
    with pytest.raises(RecordError, match="two rows"):
        go(folder, home, tmp_path / "x")
    record = read_record(tmp_path / "x")
    assert record.status == "finished" and record.rows and record.steps


def test_a_teacher_that_is_not_here_or_not_as_planned_is_refused_before_any_work(folder, home, tmp_path, capsys):
    """A hub id without network: what is missing and how to bring it here; other numbers than planned: which."""
    numbers = json.loads((folder / "teacher" / "config.json").read_text(encoding="utf-8"))
    path = folder / "numbers.json"
    path.write_text(json.dumps(numbers), encoding="utf-8")
    text = RECIPE.replace("{teacher: teacher}", "{teacher: some/model, revision: abc, architecture: numbers.json}")
    recipe = folder / "hub.yaml"
    recipe.write_text(text, encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RECIPELIN_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "recipelin", "run", str(recipe), "--device", "cpu"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for words in (
        "'some/model' at revision 'abc'",
        "hf download some/model --revision abc",
        "model: {teacher: ./teacher}",
    ):
        assert words in done.stderr
    assert not list(tmp_path.glob("test-small*"))

    path.write_text(json.dumps({**numbers, "num_key_value_heads": 2, "rope_theta": 5.0}), encoding="utf-8")
    recipe.write_text(text.replace("some/model, revision: abc", "elsewhere"), encoding="utf-8")
    loaded = load(recipe)
    (folder / "elsewhere").symlink_to(folder / "teacher")
    try:
        assert plan(loaded).architecture.num_key_value_heads == 1  # a teacher that is here speaks for itself
    finally:
        (folder / "elsewhere").unlink()
    from recipelin.run import _refuse_other_teacher

    planned = plan(loaded)
    (folder / "elsewhere").symlink_to(folder / "teacher")
    try:
        with pytest.raises(RunError, match="num_key_value_heads: planned 2, found 1"):
            _refuse_other_teacher(loaded, planned)
    finally:
        (folder / "elsewhere").unlink()
    recipe.write_text(text.replace("some/model, revision: abc", "./elsewhere"), encoding="utf-8")
    with pytest.raises(RunError, match="elsewhere is not there"):
        _refuse_other_teacher(load(recipe), planned)


WITHOUT_TRAINING = """\
name: test/untrained
model: {teacher: teacher}
method: {name: inference_hybrid, window: 8}
schedule: {transfer: null}
eval: {suites: [beside.yaml], states: [STATES]}
"""
BESIDE = """\
name: beside
evals:
  - {eval: usage, rows: 2, length: 32, text: {source: text, path: corpus.txt}}
  - {eval: agreement, rows: 2, length: 12, new_tokens: 4, text: {source: text, path: corpus.txt}}
  - {eval: decode, contexts: [4, 12], new_tokens: 1, repeats: 1}
"""


def untrained(folder: Path, out: Path, states: str, *, only: str = "eval", **arguments) -> Path:
    text = "".join(f"{x}\n" for x in BESIDE.splitlines() if "{eval" not in x or only in x)
    (folder / "beside.yaml").write_text(text, encoding="utf-8")
    (folder / "untrained.yaml").write_text(WITHOUT_TRAINING.replace("STATES", states), encoding="utf-8")
    return run(load(folder / "untrained.yaml"), out=out, device="cpu", **arguments)


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Which models were loaded, in order."""
    found = []
    for name in ("load_teacher", "load_student"):
        original = getattr(hf, name)
        monkeypatch.setattr(hf, name, lambda *a, n=name, f=original, **k: (found.append(n[5:]), f(*a, **k))[1])
    return found


def test_the_teachers_continuations_are_made_once_and_survive(folder, home, tmp_path, loads):
    """With the teacher among the states, without it, and after a kill. The first load is of the swap."""

    def go(out: str, states: str, **arguments):
        loads.clear()
        done = untrained(folder, tmp_path / out, states, only="agreement", **arguments)
        return {r.state: r.value for r in read_record(done).rows if r.task == "agreement@4"}

    references = home / "references"
    one = go("one", "teacher, softmax")
    assert loads == ["teacher", "teacher", "student"] and one == {"teacher": 1.0, "softmax": 1.0}
    (kept,) = references.iterdir()
    continued, stamp = json.loads(kept.read_text()), kept.stat().st_mtime_ns
    assert len(continued) == 2
    for file in (home / "evaluations").iterdir():  # killed before any evaluation was whole
        file.unlink()
    two = go("two", "softmax, window")
    assert loads == ["teacher", "student"] and kept.stat().st_mtime_ns == stamp and two["softmax"] == 1.0
    kept.unlink()
    assert go("two", "softmax, window") == two
    assert loads == ["teacher"] and not list(references.iterdir()), "all is reused: nobody asks for it"
    assert go("two", "softmax, window", fresh=True) == two
    assert loads == ["teacher", "teacher", "student"] and json.loads(kept.read_text()) == continued


def test_a_reference_is_of_its_teacher_and_a_time_is_of_its_machine(folder, home, tmp_path, monkeypatch):
    from recipelin.evals.agreement.config import Config as Agreement
    from recipelin.evals.decode.config import Config as Decode
    from recipelin.evaluate import Evaluator

    (folder / "untrained.yaml").write_text(WITHOUT_TRAINING.replace("STATES", "hybrid"), encoding="utf-8")
    (folder / "beside.yaml").write_text(BESIDE, encoding="utf-8")
    loaded = load(folder / "untrained.yaml")
    planned = plan(loaded)
    around = reuse.surroundings(loaded, planned, "cpu")
    tokenizer = hf.load_tokenizer(folder / "teacher")

    def keys(**digests):
        other = dataclasses.replace(around, digests={**around.digests, **digests})
        held = Evaluator(loaded, planned, tmp_path, "cpu", other, False, teacher=lambda: pytest.fail("not needed"))
        return [
            held._reference_key(Agreement(), tokenizer, 0), held._reference_key(Decode(), tokenizer, 0),
            held._key(Agreement(), tokenizer, "x", seed=0), held._key(Decode(), tokenizer, "x", seed=0),
        ]  # fmt: skip

    before = keys()
    assert before[1] is None and keys() == before
    assert [a == b for a, b in zip(before, keys(teacher="other"), strict=True)] == [False, True, True, True]
    monkeypatch.setattr("platform.node", lambda: "another")
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, True, True, False]


def test_what_lies_beside_the_record_and_what_the_table_says_of_it(folder, home, tmp_path, capsys):
    out = tmp_path / "run"
    untrained(folder, out, "teacher, softmax, hybrid")
    record = read_record(out)
    assert {(b.state, b.task, b.metric) for b in read_bands(out)} == {
        (r.state, r.task, r.metric) for r in record.rows if r.metric.endswith("share")
    }
    assert (out / "usage.png").read_bytes()[:4] == b"\x89PNG" and record.processor == reuse.processor()
    assert main(["table", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out / 'usage.json.gz'}; heat maps: {out / 'usage.png'}" in " ".join(text.split())
    assert "## Cost of decoding by context" in text and "| teacher" in text.split("## Cost of decoding")[1]
    assert "tokens per second" not in text.split("## Cost of decoding")[0]
    assert [m for m in ("decode", "cache_bytes", "outside_share") if m in text.partition("**Verdict")[0]] == []
