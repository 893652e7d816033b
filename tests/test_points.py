"""Several recipes in one command, points of a grid by name, and `make claims`: nothing twice, jobs side by side."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipelin.cli import main
from recipelin.naming import but_seed, default_folder
from recipelin.plan import plan
from recipelin.points import points
from recipelin.records import Record, write_record
from recipelin.strict_yaml import RecipeError

ROOT = Path(__file__).parents[1]
RECIPE = """\
name: mine
model: {teacher: pocket}
method: {name: window_only}
grid: {method.window: [8, 16], seed: [1, 2]}
eval: {suites: [pocket], states: [teacher, hybrid]}
"""


@pytest.fixture(scope="module")
def claims():
    """The module .ci/claims.py."""
    spec = importlib.util.spec_from_file_location("ci_claims", ROOT / ".ci" / "claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_claims"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ci_claims"]


def runs_of(claims, folder, *recipes, **options):
    """What `make claims` finds for a spec that names these recipes, with records/ and runs/ in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "check_claims", lambda spec: SimpleNamespace(recipes=recipes))
        return list(claims.todo([folder / "tables" / "mine.yaml"], folder / "runs", **options))


def test_a_point_of_a_grid_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    names = ["mine/window=8,seed=1", "mine/window=8,seed=2", "mine/window=16,seed=1", "mine/window=16,seed=2"]
    assert [p.recipe.name for p in points("./mine")] == names
    assert [p.recipe.name for p in points("./mine/window=8")] == names[:2]
    assert [p.recipe.name for p in points("./mine/seed=2,window=16")] == names[3:]
    with pytest.raises(RecipeError, match=r"no such point; did you mean '\./mine/window=8,seed=[12]'\?; there are"):
        points("./mine/window=8,seed=3")
    with pytest.raises(RecipeError, match="no such point: pocket/lolcats has no grid"):
        points("pocket/lolcats/window=8")
    assert but_seed(names[0]) == but_seed(names[1]) == ("mine", frozenset({"window=8"})) != but_seed(names[2])
    assert but_seed("pocket/lolcats") == but_seed("pocket/lolcats/seed=3") == ("pocket/lolcats", frozenset())


def test_seeds_of_a_grid_run_the_same_steps(tmp_path):
    """What `published` pools as seeds differs in nothing but the seed."""
    (tmp_path / "mine.yaml").write_text(RECIPE)
    one, two = (plan(p) for p in points(tmp_path / "mine.yaml")[:2])
    assert [s.step for s in one.steps] == [s.step for s in two.steps] and one.seed != two.seed


def test_run_takes_several_recipes_and_refuses_before_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "pocket/lolcats", "pocket/nothing"]) == 2
    assert "no such recipe" in capsys.readouterr().err
    assert main(["run", "pocket/lolcats", "pocket/absolute", "--out", "x"]) == 2
    assert "--out is the folder of one recipe's run; found 2 recipes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_published_or_finished_is_not_run_again(claims, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    planned = [plan(p) for p in points("./mine")]
    folders = [default_folder(p.name, p.hash) for p in planned]

    def record(index, **changes):
        fields = {
            "name": planned[index].name, "recipe": "", "plan": {}, "plan_hash": planned[index].hash, "status": "finished",
            "commit": "0" * 40, "dirty": False, "versions": {}, "digests": {}, "device": "cpu", "threads": 1,
            "dtype": "float32", "seed": 1, "started": "2026-11-24T13:00:00+00:00", "seconds": 1.0, "layers": 3, "margin": 0.01,
        }  # fmt: skip
        return Record(**fields | changes)

    write_record(tmp_path / "records" / f"{folders[0]}--20261124T130000Z-abcd.json", record(0))
    write_record(tmp_path / "runs" / folders[1] / "record.json", record(1))
    write_record(tmp_path / "runs" / folders[2] / "record.json", record(2, dirty=True))
    write_record(tmp_path / "records" / f"{folders[3]}--20261124T130000Z-abcd.json", record(3, plan_hash="f" * 64))
    found = runs_of(claims, tmp_path, "./mine/window=8", "./mine")
    assert [t.name for t in found] == [p.name for p in planned]
    assert [bool(t.published) for t in found] == [True, False, False, False]
    assert [bool(t.finished) for t in found] == [False, True, False, False]
    anew = runs_of(claims, tmp_path, "./mine", again=True)
    assert [t.left for t in anew] == [True, False, True, True]
    lines = list(claims.shown(found))
    assert (
        lines[0].endswith("abcd.json")
        and lines[2].endswith("to run")
        and lines[-1].startswith("2 of 4 runs are left, ")
    )


def test_what_runs_share_is_counted_once(claims, tmp_path, monkeypatch):
    grid = (
        "grid: {schedule.tune.steps: [10, 20]}\nschedule: {transfer: {steps: 10, length: 256}, tune: {length: 256}}\n"
    )
    text = RECIPE.replace("window_only", "lolcats, window: 16").replace(
        "grid: {method.window: [8, 16], seed: [1, 2]}\n", grid
    )
    (tmp_path / "mine.yaml").write_text(text.replace("[pocket]", "[pocket-claims]"))
    monkeypatch.chdir(tmp_path)
    both = runs_of(claims, tmp_path, "./mine")
    costs = [{p.step.step: p.cost.flops for p in each.planned.steps} for each in both]
    alone = [sum(dict(claims.costs_of(each)).values()) for each in both]
    assert alone == pytest.approx([c["transfer"] + c["tune"] + c["evaluate"] for c in costs])
    together = sum({what: f for each in both for what, f in claims.costs_of(each)}.values())
    measured = len(both[0].planned.steps[-1].step.states)
    shared = {"teacher", "none"}  # LoRA changes attention alone, which `none` does not read
    assert shared < {state.name for state in both[0].planned.steps[-1].step.states}
    assert together == pytest.approx(sum(alone) - costs[0]["transfer"] - len(shared) * costs[0]["evaluate"] / measured)
    monkeypatch.setattr(claims, "ATTENTION", {"q_proj"})  # adapters on anything else
    together = sum({what: f for each in both for what, f in claims.costs_of(each)}.values())
    assert together == pytest.approx(sum(alone) - costs[0]["transfer"] - costs[0]["evaluate"] / measured)


def test_jobs_run_side_by_side_and_a_failure_is_told(claims, tmp_path, capfd):
    """Each job gets its share in order; the one that fails keeps no other back, and its last words are shown."""
    program = (
        "import os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    print('threads', os.environ.get('OMP_NUM_THREADS'), flush=True)\n"
        "    if name == 'bad': sys.exit('it broke')\n"
        f"    print('{claims.ENDED}runs/' + name, flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    assert claims.carry_out(command, ["a", "b", "c"], jobs=2, logs=tmp_path) == 0
    out = capfd.readouterr().out
    assert all(f" {name}: " in out for name in "abc") and "[3/3]" in out and "about 0.0 min left" in out
    first, second = ((tmp_path / f"job-{n}.log").read_text() for n in (1, 2))
    assert "runs/a" in first and "runs/c" in first and "runs/b" in second and "threads 1" in first
    assert claims.carry_out(command, ["a", "bad", "c", "d"], jobs=2, logs=tmp_path) == 1
    out, err = capfd.readouterr()
    assert "[2/4]" in out and "exit code 1" in err and "it broke" in err


def test_the_plan_of_claims_costs_nothing(claims, monkeypatch, capsys):
    specs = [str(ROOT / "results" / "tables" / f"{name}.yaml") for name in ("pocket-claims", "pocket-taylor-claims")]
    monkeypatch.setattr(sys, "argv", ["claims.py", "--plan", *specs])
    assert claims.main() == 0
    assert "runs are left, " in capsys.readouterr().out


def test_jobs_side_by_side_are_one_a_core_on_a_cpu(claims, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, jobs in ((1, 1), (2, 2), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert claims.jobs_on("cpu") == jobs and claims.jobs_on("cuda") == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert claims.jobs_on("cpu") == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "few")
    spec = str(ROOT / "results" / "tables" / "pocket-claims.yaml")
    monkeypatch.setattr(sys, "argv", ["claims.py", spec])
    monkeypatch.setattr(claims, "carry_out", lambda *_, **__: pytest.fail("ran"))
    monkeypatch.setattr(claims, "todo", lambda *_, **__: [SimpleNamespace(left=True, published=None)])
    monkeypatch.setattr(claims, "shown", lambda _: [])
    monkeypatch.setattr(claims, "provenance", lambda _: SimpleNamespace(dirty=False))
    assert claims.main() == 2
