"""Plans: pure hashes, counts that built modules have, and the torch-free half."""

import itertools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from recipelin import lookup
from recipelin.cost import lora_parameters
from recipelin.exposure import exposed_from
from recipelin.finding import RECIPES
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.schedule import Schedule, optimiser_steps
from recipelin.schema import recipe_schema
from recipelin.show import show
from recipelin.steps import Evaluate, Lora, Step, Transfer, Tune
from tests.shipped import points_of

ROOT = Path(__file__).parent.parent
ALL = sorted(p for p in (ROOT / RECIPES).rglob("*.yaml") if "suites" not in p.parts)
FRONT = (
    "base", "states", "sources", "schedule", "steps", "families", "recipe", "load", "lookup", "plan", "reuse", "records",
    "statistics", "verdict", "measures", "render", "runtable", "tables", "tablespec", "publish", "commands", "schema",
    "exposure", "files", "strict_yaml", "mistakes", "finding", "show", "catalogue", "new",
    "templates", "hub", "documents", "reads", "cli",
    "claims", "claimspec", "claimcheck", "published", "points", "naming", "bench", "bench.record",
)  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_every_recipe_plans(path):
    for point in points_of(path):
        planned = plan(point)
        assert isinstance(planned.steps[-1].step, Evaluate)
        assert planned == plan(point), "a plan is pure"
        assert len({p.hash for p in planned.steps}) == len(planned.steps)
        text = show(planned)
        for number, step in enumerate(planned.steps, 1):
            assert f"{number}. {step.step.step}" in text
    assert len(ALL) >= 6


def test_every_method_has_a_recipe_and_composes_known_steps():
    kinds = set(Step.__args__)
    used = {point.recipe.method.name for path in ALL for point in points_of(path)}
    assert used == set(lookup.names("methods")) - {"exported"}  # whose recipes `diagnose` writes
    for path in ALL:
        for point in points_of(path):
            module = lookup.lookup("methods", point.recipe.method.name)
            assert {type(s) for s in module.steps(point.recipe)} <= kinds


def test_an_8b_teacher_without_torch_or_download():
    """Counts of Llama-3-8B: 8.03 B parameters, LoRA rank 8 on q, k, v, o 6.8 M, feature maps 16.8 M (peers.md A.2)."""
    planned = plan(load(ROOT / "recipes/untangling/llama3-8b-lolcats.yaml"))
    assert planned.parameters == 8_030_261_248
    swap, _, transfer, tune, _ = planned.steps
    assert "16,779,264 new parameters" in swap.what
    assert transfer.trains == 2 * 32 * 32 * 128 * 64 + 32 * 32
    assert tune.trains == 6_815_744
    assert isinstance(transfer.step, Transfer) and transfer.step.schedule.accumulation == 8
    assert tune.cost.memory["cuda"] > 16e9
    assert transfer.optimiser_steps == 2 * (9_800_000 // 1024) // 8 + 1, (
        "alpaca is not here: the recipe says about how long"
    )
    assert transfer.reads == (
        "100% hub yahma/alpaca-cleaned@12567cab (template alpaca, loss on the response, "
        "selection rows 0 to 99, test rows 100 to 199)"
    )
    assert "2 epochs, 2393 optimiser steps" in show(planned) and "in all" in show(planned)


def test_a_stream_is_described_and_trains_no_tokenizer(tmp_path):
    """What is kept of a stream, and how, is in the plan; a model made from nothing cannot wait for its tokenizer."""
    stream = "data: {mix: [{source: hub, dataset: ./set, streaming: true, tokens: 20000000, shuffle: {seed: 1}}]}\n"
    hashes = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.yaml"
        text = (ROOT / "recipes/pocket/lolcats.yaml").read_text()
        path.write_text(_without(text, "data") + stream.replace("seed: 1", f"seed: {seed}"))
        planned = plan(load(path))
        hashes.append(planned.hash)
        assert "reads     100% hub ./set (the first 20 M tokens shuffled)" in show(planned)
    assert hashes[0] != hashes[1]
    for change, words in (
        (", parts: {selection: [0, 9], test: [9, 20]}", "different parts"),
        ("", "different shuffle"),
    ):
        twice = stream.replace("]}\n", f", {{source: hub, dataset: ./set{change}}}]}}\n")
        path.write_text(_without(text, "data") + twice)
        with pytest.raises(PlanError, match=f"./set: read twice with {words}: "):
            plan(load(path))
    path.write_text(_without((ROOT / "recipes/pocket/teacher.yaml").read_text(), "data") + stream)
    with pytest.raises(PlanError, match="a new model's tokenizer is trained on whole sources"):
        plan(load(path))


def _without(text: str, key: str) -> str:
    """A recipe without one of its blocks."""
    return re.sub(rf"^{key}:.*\n(?:[ \t]+.*\n|\n)*", "", text, flags=re.M)


# ruff: noqa: E501 (a case a line reads best)
LEAKS = {
    "one file": ("{source: jsonl, path: ds/a.jsonl}", "{source: jsonl, path: ds/a.jsonl}", None),
    "one file, two paths": ("{source: jsonl, path: ds/a.jsonl, PARTS}", "{source: jsonl, path: ./ds/../ds/a.jsonl}", "ds/a.jsonl and ./ds/../ds/a.jsonl: read twice with different parts"),
    "a link": ("{source: jsonl, path: ds/a.jsonl, PARTS}", "{source: jsonl, path: link.jsonl}", "different parts"),
    "a file of the folder": ("{source: hub, dataset: ./ds}", "{source: jsonl, path: ds/a.jsonl}", "./ds and ds/a.jsonl: one reads rows of the other"),
    "the folder around": ("{source: jsonl, path: ds/a.jsonl}", "{source: hub, dataset: ./ds}", "one reads rows of the other"),
    "a folder in it": ("{source: hub, dataset: ./ds}", "{source: hub, dataset: ./ds/in}", "one reads rows of the other"),
    "two kinds": ("{source: jsonl, path: ds/a.jsonl}", "{source: text, path: ds/a.jsonl}", "one reads rows of the other"),
    "one folder, two paths": ("{source: hub, dataset: ./ds}", "{source: hub, dataset: ./ds/}", "./ds and ./ds/: one folder, written in two ways"),
    "numbered rows": ("{source: hub, dataset: ./ds, PARTS}", "{source: hub, dataset: ./ds/, PARTS}", None),
    "its own name": ("{source: hub, dataset: ./ds, PARTS}", "{source: hub, dataset: ./ds, name: default}", "./ds: read twice with different parts"),
    "two splits": ("{source: hub, dataset: ./ds, PARTS}", "{source: hub, dataset: ./ds, split: test}", None),
    "two files": ("{source: jsonl, path: ds/a.jsonl, PARTS}", "{source: jsonl, path: ds/b.jsonl}", None),
}  # fmt: skip
PARTS = "parts: {selection: [0, 1], test: [1, 2]}"


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("case", LEAKS)
def test_rows_are_held_out_in_one_way_wherever_they_are_read(tmp_path, case, watched):
    train, test, words = (x and x.replace("PARTS", PARTS) for x in LEAKS[case])
    (tmp_path / "ds").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "ds" / "a.jsonl")
    (tmp_path / "s.yaml").write_text(f"name: s\nevals: [{{eval: perplexity, text: {test}}}]\n")
    validation = ", validation: {watch: [{suite: ./s.yaml, metric: log_loss}]}" if watched else ""
    text = (
        f"name: x\nmodel: {{teacher: pocket}}\nmethod: {{name: lolcats}}\ndata: {{mix: [{train}]}}\n"
        f"schedule: {{transfer: {{length: 256}}, tune: {{steps: 1, length: 256{validation}}}}}\neval: {{suites: [{'pocket' if watched else './s.yaml'}]}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    if words is None:
        assert plan(load(tmp_path / "r.yaml"))
    else:
        with pytest.raises(PlanError) as found:
            plan(load(tmp_path / "r.yaml"))
        assert words in str(found.value)


def test_lora_counts_are_pefts(tiny):
    from peft import LoraConfig, inject_adapter_in_model

    from recipelin.swap import architecture_of

    model = tiny(6, 2)
    lora = Lora(rank=3, targets=("q_proj", "v_proj", "down_proj"))
    counted = lora_parameters(lora, architecture_of(model))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=list(lora.targets)), model)
    assert counted == sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)


def test_durations():
    shared = {"batch": 4, "accumulation": 2, "length": 100}
    assert optimiser_steps(Schedule(steps=7, **shared), None) == 7
    assert optimiser_steps(Schedule(tokens=1601, **shared), None) == 3
    assert optimiser_steps(Schedule(epochs=1.5, **shared), 33) == 7
    assert optimiser_steps(Schedule(epochs=1.5, **shared), None) is None


def test_what_cannot_change_a_result_is_not_in_the_hash(tmp_path):
    text = (ROOT / "recipes/pocket/lolcats.yaml").read_text()
    hashes = []
    for name, change in (("a", ""), ("b", ", log_every: 3, checkpoint_every: 7"), ("c", ", clip: 0.5")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("decay: {name: cosine}", "decay: {name: cosine}" + change, 1))
        hashes.append(plan(load(path)).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_states_that_need_a_swap_are_refused(tmp_path):
    text = (ROOT / "recipes/pocket/teacher.yaml").read_text()
    for state, words in (("hybrid", "this method swaps none"), ("teacher", "needs model.teacher")):
        path = tmp_path / f"{state}.yaml"
        path.write_text(text.replace("states: [softmax]", f"states: [{state}]"))
        with pytest.raises(PlanError, match=words):
            plan(load(path))


def test_a_published_checkpoint_is_planned_without_its_files():
    planned = plan(load("untangling/llama3.1-8b-lolcats"))
    swap, switch, _ = planned.steps
    assert swap.what.endswith("16,779,264 new parameters, published weights (lolcats)")
    assert "finetune lolcats-llama-3.1-8b-ft-lora/model.pt (not here)" in swap.reads
    assert switch.what.startswith("terraced window 64 (lolcats_tk_v1) + linear over keys outside")
    assert planned.hybrid.most_keys == 128 == exposed_from(planned.hybrid) and planned.parameters == 8_030_261_248
    corrected = plan(load("untangling/llama3.1-8b-lolcats-corrected"))
    assert corrected.hybrid.compat is None and corrected.steps[0].hash == swap.hash


SUITE = "name: one\nevals: [{eval: lm_eval, tasks: [{task: piqa}], batch: 1}]\n"


def of(tmp_path, old="", new="", *, suite=SUITE):
    """The plan of the pocket's LoLCATs with the published terraced window, a piece of its text replaced."""
    (tmp_path / "one.yaml").write_text(suite)
    text = (ROOT / "recipes/pocket/lolcats.yaml").read_text().replace("[pocket]", "[one.yaml]")
    text = text.replace("name: lolcats\n", "name: lolcats\n  shape: terraced\n  compat: lolcats_tk_v1\n", 1)
    path = tmp_path / "r.yaml"
    path.write_text(text.replace(old, new, 1) if old else text)
    return plan(load(path))


def test_a_published_window_is_planned_as_it_is(tmp_path):
    planned = of(tmp_path)
    assert "terraced window 32 (lolcats_tk_v1) + linear over keys outside" in show(planned)
    states = {s.name: s.state for s in planned.steps[-1].step.states}
    assert states["hybrid"].compat and not states["linear"].compat
    plain = of(tmp_path, "  compat: lolcats_tk_v1\n")
    assert "terraced window 32 + linear" in show(plain)
    changed = of(
        tmp_path,
        "suites: [one.yaml]",
        "suites: [one.yaml]\n  states: [hybrid, {name: clean, of: hybrid, compat: null}]",
    )
    clean = next(s.state for s in changed.steps[-1].step.states if s.name == "clean")
    assert (clean.shape, clean.compat) == ("terraced", None)


@pytest.mark.parametrize(
    ("old", "new", "suite", "words"),
    [
        ("data:\n", "data:\n  separate: true\n", SUITE, "knows no separate documents"),
        ("data:\n", "data:\n  positions: restart\n", SUITE, "knows no separate documents"),
        ("", "", SUITE.replace("batch: 1", "batch: 8"), "lm_eval of suite 'one' has batch 8, write batch: 1"),
        (
            "suites: [one.yaml]",
            "suites: [one.yaml]\n  states: [{name: odd, of: hybrid, cover: all}]",
            SUITE,
            r"eval.states: 'odd': compat: lolcats_tk_v1 needs .* found cover: all",
        ),
    ],
    ids=["separate", "restart", "batch", "state"],
)
def test_what_a_published_window_does_not_have_is_refused(tmp_path, old, new, suite, words):
    with pytest.raises(PlanError, match=words):
        of(tmp_path, old, new, suite=suite)


def test_how_far_a_linear_branch_may_look(tmp_path):
    """The widest own window of the swapped layers; None where one has none, or the form ignores it."""
    planned = plan(load("pocket/lolcats"))
    assert planned.reach is None
    windows = {"model_type": "qwen2", "sliding_window": 64, "layer_types": ("sliding_attention",) * 3}
    cut = planned.model_copy(update={"architecture": planned.architecture.model_copy(update=windows)})
    assert cut.reach == 64
    mixed = {**windows, "layer_types": ("full_attention", *windows["layer_types"][1:])}
    assert cut.model_copy(update={"architecture": planned.architecture.model_copy(update=mixed)}).reach is None
    swap = planned.steps[0].step
    ignores = swap.model_copy(update={"config": swap.config.model_copy(update={"teacher_window": "ignore"})})
    steps = (planned.steps[0].model_copy(update={"step": ignores}), *planned.steps[1:])
    assert cut.model_copy(update={"steps": steps}).reach is None


def test_a_tune_is_described_with_its_share():
    planned = plan(load("pocket/lolcats"))
    tune = next(p for p in planned.steps if isinstance(p.step, Tune))
    swapped = 3 * sum(planned.steps[0].step.config.parameters(planned.architecture).values())
    assert tune.trains > 0 and abs(tune.share - tune.trains / (planned.parameters + swapped)) < 1e-12
    assert "% of the model" in show(planned)


def run_front(code: str) -> tuple[str, float]:
    """(stdout, CPU seconds) of a fresh process in which torch cannot be imported."""
    guard = "import sys\nfor name in ('torch', 'transformers', 'peft', 'lm_eval'):\n    sys.modules[name] = None\n"
    return run_fresh(guard + code)


def run_fresh(code: str) -> tuple[str, float]:
    """(stdout, CPU seconds) of a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_front_half_never_imports_torch():
    names = ", ".join(f"recipelin.{n}" for n in FRONT)
    out, _ = run_front(
        f"import {names}\n"
        "from recipelin.points import points\nfrom recipelin.plan import plan\nfrom pathlib import Path\n"
        "paths = [p for p in sorted(Path('recipes').rglob('*.yaml')) if 'suites' not in p.parts]\n"
        "print(sum(len([plan(x) for x in points(p)]) for p in paths), len(paths))"
    )
    plans, recipes = map(int, out.split())
    assert recipes == len(ALL) and plans >= recipes


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "recipes/pocket/lolcats.yaml"],
        ["plan", "pocket/lolcats"],
        ["list"],
        ["schema"],
        ["table", "results/tables/pocket-first.yaml"],
    ],
    ids=lambda a: a[0],
)
def test_a_front_command_is_quick(arguments):
    """Far under what torch alone takes to import beside it; one of three tries, since these machines are shared."""
    code = f"import sys\nfrom recipelin.cli import main\nsys.exit(main({arguments!r}))"
    shares = (run_front(code)[1] / run_fresh("import torch")[1] for _ in range(3))
    assert any(share < 0.6 for share in shares)


def test_imports_go_one_way():
    """base <- states, sources <- schedule <- steps <- recipe <- load <- plan <- reuse; nothing of it reads what comes later."""
    order = [
        "base",
        "states",
        "templates",
        "sources",
        "families",
        "schedule",
        "steps",
        "recipe",
        "lookup",
        "finding",
        "load",
        "plan",
        "reuse",
    ]
    for index, name in enumerate(order):
        text = (ROOT / "recipelin" / f"{name}.py").read_text()
        for later in order[index + 1 :]:
            assert f"from .{later} import" not in text, f"{name} imports {later}"
    for path in (ROOT / "kernels" / "recipelin_kernels").rglob("*.py"):
        assert "import recipelin\n" not in path.read_text() and "from recipelin." not in path.read_text(), path
    for folder in ("kernels", "recipes", "results", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_schema_knows_every_method_and_is_json():
    schema = json.loads(json.dumps(recipe_schema()))
    names = {m["$ref"].rpartition("method_")[2] for m in schema["properties"]["method"]["oneOf"]}
    assert names == set(lookup.names("methods"))
    references = {r for r in _references(schema)}
    assert {r.rpartition("/")[2] for r in references} <= set(schema["$defs"])


def _references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_validation_cannot_watch_what_is_reported(tmp_path):
    """A stock task has no selection part; our own suites have one."""
    text = (
        (ROOT / "recipes/pocket/lolcats.yaml")
        .read_text()
        .replace("    steps: 50\n", "    steps: 50\n    validation: {every: 5, watch: [{suite: SUITE, metric: acc}]}\n")
    )
    for suite, fits in (("pocket", True), ("pocket-recall", True), ("untangling", False), ("mmlu-5shot", False)):
        path = tmp_path / f"{suite}.yaml"
        path.write_text(text.replace("SUITE", suite))
        if fits:
            plan(load(path))
            continue
        with pytest.raises(
            PlanError, match=rf"{suite}.yaml:\d+:\d+: suite '{suite}' cannot be watched: its lm_eval has no"
        ):
            plan(load(path))


def test_a_hub_teacher_is_planned_from_the_cache_and_known_by_its_commit(tmp_path, monkeypatch):
    """No network, no torch: the cache's config.json; `main` is the commit that it stood at."""
    commit = "c1899de289a04d12100db370d81485cdf75e47ca"
    repository = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text((ROOT / "recipes/examples/qwen3-0.6b.json").read_text())
    (tmp_path / "r.yaml").write_text(
        "name: mine/hub\nmodel: {teacher: Qwen/Qwen3-0.6B}\nmethod: {name: lolcats}\neval: {suites: [recall-1k]}\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = (
        "from recipelin.load import load\nfrom recipelin.plan import plan\nfrom recipelin.reuse import digests\n"
        f"loaded = load({str(tmp_path / 'r.yaml')!r})\nplanned = plan(loaded)\n"
        "print(planned.parameters, digests(loaded, planned)['teacher_commit'])"
    )
    out, _ = run_front(code)
    assert out.split() == ["596049920", commit]


def text_of(tmp_path, *changes: tuple[str, str]):
    """The plan of the pocket's LoLCATs, pieces of its text replaced."""
    text = (ROOT / "recipes/pocket/lolcats.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return plan(load(path))


FIXED = "{name: fixed, activation: elu, width: 2}"
WIDTH = "form: {feature_map: {width: 8}}"


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (
            f"form: {{feature_map: {FIXED}}}\n  objective: {{weights: 1}}",
            r"r.yaml:10:30: stage 'transfer': nothing trains",
        ),
        (f"form: {{feature_map: {FIXED}}}\n  join: replace", r"r.yaml:10:30: stage 'transfer': nothing trains"),
        (
            "form: {feature_map: {activation: none}}\n  join: absolute",
            r"r.yaml:10:36: join: absolute needs features of",
        ),
        (
            "window: 256\n  join: absolute",
            r"r.yaml:9:11: calibration of log_scale: rows of 256 tokens have no key outside",
        ),
        ("window: 250\n  sinks: 6\n  join: absolute", "outside the sliding window 250 and 6 sinks"),
        ("window: 128\n  shape: terraced\n  join: absolute", "outside the terraced window 128"),
    ],
    ids=["nothing", "nothing joint", "signed", "window", "sinks", "terraced"],
)
def test_what_could_only_fail_after_work_is_refused(tmp_path, new, words):
    old = WIDTH if "form" in new else "window: 32 "
    with pytest.raises(PlanError, match=words):
        text_of(tmp_path, (old, new + " "))


def test_what_is_just_enough_is_planned(tmp_path):
    for old, new in (
        (WIDTH, f"form: {{feature_map: {FIXED}}}"),  # the mix still trains
        (WIDTH, "form: {feature_map: {activation: none}}"),
        ("window: 32 ", "window: 255\n  join: absolute "),
        ("window: 32 ", "window: 250\n  sinks: 5\n  join: absolute "),
        ("window: 32 ", "window: 127\n  shape: terraced\n  join: absolute "),
    ):
        text_of(tmp_path, (old, new))
    states = "suites: [pocket]\n  states: [hybrid, {name: loud, of: hybrid, join: absolute}]"
    signed = {WIDTH: "form: {feature_map: {activation: none}}", "suites: [pocket]": states}
    with pytest.raises(PlanError, match=r"r.yaml:\d+:\d+: eval.states: 'loud': join: absolute needs features"):
        text_of(tmp_path, *signed.items())


@pytest.mark.parametrize("shape", ["sliding", "terraced"])
@pytest.mark.parametrize("own", [None, 5, 9])
def test_keys_outside_are_counted_as_the_operator_does(shape, own):
    import torch

    from recipelin.states import State
    from recipelin_kernels import log_scale_closed_form, teacher_attention

    found = set()
    for length, window, sinks in itertools.product((1, 4, 8, 9, 10, 12, 17), (1, 4, 8), (0, 3)):
        x = torch.rand(1, 1, length, 2)
        _, lse = teacher_attention(x, x, x, window=own)
        how = {"window": window, "shape": shape, "sinks": sinks, "reach": own, "teacher_window": own}
        rows = log_scale_closed_form(x, x, x, x, lse, **how)[1]
        state = State(branches=("window", "linear", "sinks"), window=window, shape=shape, sinks=sinks)
        assert state.leaves_keys(length, own) == (rows > 0), (length, window, sinks)
        found.add(rows > 0)
    assert found == {True, False}


ROWS = "transfer: {steps: 150, batch: 4, accumulation: 1, length: 256"
TEACHER = "model: {teacher: pocket}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([(ROWS, ROWS.replace("256", "257"))], r"r.yaml:15:\d+: schedule.transfer.length: 257; the teacher's context is 256 tok"),
        ([(", length: 256", "")], r"r.yaml:15:\d+: schedule.transfer.length: 1024, the default; .* expected at most 256"),
        ([("suites: [pocket]", "suites: [pocket, recall-1k]")], r"r.yaml:\d+:20: suite 'recall-1k' has rows of 1024 tokens"),
        (
            [("decay: {name: cosine}", "validation: {watch: [{suite: recall-1k, metric: x}]}")],
            r"r.yaml:15:\d+: suite 'recall-1k' has rows of 1024 tokens",
        ),
    ],
    ids=["stage", "default", "suite", "watched"],
)  # fmt: skip
def test_rows_beyond_the_teachers_context_are_refused_unless_wanted(tmp_path, changes, words):
    with pytest.raises(PlanError, match=words):
        text_of(tmp_path, *changes)
    text_of(tmp_path, *changes, (TEACHER, "model: {teacher: pocket, beyond_context: true}"))


def test_to_allow_longer_rows_changes_no_hash(tmp_path):
    wanted = text_of(tmp_path, (TEACHER, "model: {teacher: pocket, beyond_context: true}"))
    assert wanted.hash == text_of(tmp_path).hash


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 256),
        ({"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64}, 256),  # Llama-3.2
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),  # Qwen2.5
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
    ],
    ids=str,
)
def test_the_context_of_a_scaled_teacher(scaling, context):
    from recipelin.plan import _context

    arch = plan(load("pocket/lolcats")).architecture
    assert _context(arch.model_copy(update={"rope_scaling": scaling})) == context
