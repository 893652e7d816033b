"""What a stranger meets: help, refusals, a new recipe, the catalogue, and the pages that say how to take part."""

import ast
import hashlib
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from recipelin import cli
from recipelin.catalogue import names
from recipelin.cli import main
from recipelin.load import expand, load, load_base
from recipelin.plan import plan
from recipelin.reuse import threads
from recipelin.strict_yaml import RecipeError

ROOT = Path(__file__).parent.parent
PARSER, COMMANDS = cli._parser()
RECIPES = sorted(names())

GOOD = """\
name: mine
model: {teacher: pocket}
method: {name: lolcats, window: 16}
eval: {suites: [pocket]}
"""
FITS = "schedule: {transfer: {length: 256}, tune: {length: 256}}\n"  # the pocket's context


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with right and wrong things to name, and the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "yml").mkdir()
    (tmp_path / "yml" / "a.yml").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "run" / "record.json").mkdir(parents=True)
    (tmp_path / "good.yaml").write_text(GOOD + FITS)
    (tmp_path / "nothing.yaml").touch()
    (tmp_path / "binary.yaml").write_bytes(b"\x7fELF\xd0")
    (tmp_path / "control.yaml").write_text("name: a\nabout: {claim: be\x07ep}\n")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "list.json").write_text("[")
    return tmp_path


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples_that_parse(command, capsys):
    assert len(COMMANDS) >= 8
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "examples:" in text
    examples = re.findall(r"^  recipelin (.+)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0])
        assert words[0] == command and PARSER.parse_args(words).command
    for action in COMMANDS[command]._actions:
        assert action.help, f"{command} {action.dest} has no help"


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    text = capsys.readouterr().err
    assert left.value.code == 2 and all(name in text for name in COMMANDS) and "run pocket/lolcats" in text


# --- refusals ---------------------------------------------------------------------------------------------------------

USAGE = {
    "rnu": "no command 'rnu'; did you mean 'run'? There are run, ",
    "RUN x": "did you mean 'run'?",
    "--verion": "did you mean '--version'?",
    "run": "required: RECIPE",
    "check": "required: PATH",
    "new x": "required: --from",
    "publish": "required: RUN",
    "list extra": "unexpected argument 'extra'",
    "run good.yaml --devise cpu": "unexpected option '--devise'; did you mean '--device'?",
    "run good.yaml --device gpu": "found 'gpu'; expected auto, cpu, cuda or cuda:0",
    "plan good.yaml --dev cpu": "unexpected option '--dev'",
    "table x --format pdf": "invalid choice: 'pdf'",
    "list --runs --format markdown": "not allowed with",
}
INPUTS = {
    "run goood.yaml": "goood.yaml: no such recipe; did you mean good.yaml?",
    "plan pocket/lolcat": "did you mean pocket/lolcats?",
    "plan lolcats": "did you mean pocket/lolcats?",
    "plan empty": "empty: is a folder; expected a recipe",
    "plan .": "is a folder; expected a recipe, such as binary.yaml",
    "plan ''": "'': is a folder",
    "plan /": "/: is a folder",
    f"plan {'x' * 300}": "no such recipe; there are examples/",
    f"check {'x' * 5000}": "no such recipe",
    "plan nothing.yaml": "nothing.yaml:1:1: the file is empty; expected a recipe",
    "plan binary.yaml": "binary.yaml:1:5: not UTF-8: byte 0xd0",
    "plan control.yaml": "control.yaml:2:18: found the control character U+0007; expected text",
    "plan object.json": "object.json: is named .json; expected a .yaml file",
    "plan suites/pocket": "this is a suite, which recipes name in eval.suites; expected a recipe",
    f"plan {ROOT}/results/tables/pocket-first.yaml": "this is a table spec (recipelin table ",
    "check empty": "no YAML files in this folder",
    "check yml": "a.yml: is named .yml; expected .yaml",
    "table nowhere": "nowhere: found no such file; expected a table spec",
    "table bare": "bare: found no table; expected a table spec",
    "table nowhere.yaml": "nowhere.yaml: no such file",
    "table nothing.yaml": "nothing.yaml:1:1: the file is empty; expected a table spec",
    "table good.yaml": "good.yaml: is a recipe; expected a table spec",
    "table object.json": "object.json: not a Record of version 1: name: Field required",
    "table list.json": "list.json: not a Record of version 1: the file: Invalid JSON",
    "table run": "run/record.json: Is a directory",
    "table empty --check": "--check compares specs",
    "publish object.json": "there is no results/",
    "new good --from pocket/lolcats": "good.yaml is there already",
    "new 'My Recipe' --from pocket/lolcats": "'My Recipe' is no name for a recipe; expected small letters",
    "new '' --from pocket/lolcats": "'' is no name for a recipe",
    "new .. --from pocket/lolcats": "'..' is no name for a recipe",
    "new x/ --from pocket/lolcats": "x/ names a folder",
    "new x.yml --from pocket/lolcats": "found .yml; a recipe's file ends in .yaml",
    "new good.yaml/x --from pocket/lolcats": "good.yaml is a file; expected a folder",
    "new x --from pocket/lolcat": "did you mean pocket/lolcats?",
    "new x --from suites/pocket": "this is a suite",
    "new x --from nothing.yaml": "nothing.yaml:1:1: the file is empty",
    "new pocket/lolcats --from pocket/absolute": "pocket/lolcats is the name of a recipe that recipelin ships",
    "list --check nowhere.md": "nowhere.md: No such file or directory",
}
# ruff: noqa: E501 (a case a line reads best)
CONTENT = {
    ("pocket}", "pockett}"): "2:18: model.teacher 'pockett' is not a folder here (did you mean 'pocket'?)",
    ("pocket}", "bare}"): "2:18: the teacher's folder ",
    ("pocket}", "./bar}"): "bar is not there; did you mean 'bare'?",
    ("pocket}", "./good.yaml}"): "good.yaml is a file; expected a folder",
    ("pocket}", "~/my/model}"): "~/my/model is not there",
    ("pocket}", "3}"): "2:18: model.teacher: found 3; expected text: put it in quotes",
    ("pocket}", "x/y, architecture: no.json}"): "2:37: model.architecture: no such file no.json",
    ("pocket}", "x/y, architecture: list.json}"): "2:37: model.architecture: list.json is not JSON",
    ("pocket}", "x/y, architecture: bare}"): "2:37: model.architecture: bare: Is a directory",
    ("name: mine", "name: My Recipe"): "1:7: name: found the text 'My Recipe'; expected small letters, digits and . _ /",
    ("window: 16", "window: 1_"): "3:33: method.window: found the text '1_'; expected a whole number",
    ("method: {name: lolcats, window: 16}", "method: lolcats"): "3:9: method: found the text 'lolcats'; expected a map with a name",
    ("[pocket]", "[good.yaml]"): "good.yaml: is a recipe; expected a suite",
    ("[pocket]", "[pocket], states: [hybrid, hybrid]"): "4:34: eval.states: hybrid given twice",
    ("[pocket]", "[pocket], states: [{name: a, window: fulll}]"): "expected a whole number or 'full'; did you mean 'full'?",
    ("eval", "schedule: {tune: {validation: {watch: [{suite: pokcet}]}, epochs: 1.0}}\neval"): "4:48: no suite 'pokcet'; did you mean 'pocket'?",
    ("eval", "extends: suites/pocket\neval"): "4:10: extends: suites/pocket is a suite; expected a recipe",
    ("eval", "extends: pocket/lolcat\neval"): "4:10: extends: pocket/lolcat: no such recipe; did you mean pocket/lolcats?",
    ("eval", "about: 'x\neval"): "4:8: found quotes that open here and never close",
    ("eval", "about: a: b\neval"): "4:9: found a second `: ` on this line",
    ("eval", " about: 3\neval"): "4:2: this line is not indented as the lines that it belongs to",
    ("eval", "---\neval"): "4:1: found a second document",
    ("eval", "grid: {name: [a]}\neval"): "4:8: 'name' is no axis",
    ("eval", "grid: {seed: [1, 1]}\neval"): "4:14: two points are named 'mine/seed=1'",
    ("eval", "grid: {eval.suites: [[pocket], [pokcet]]}\neval"): "4:33: no suite 'pokcet'",
    ("eval", "grid: {method.form.feature_map.width: [1, wide]}\neval"): "4:43: method.form.feature_map.width: found the text 'wide'",
    ("eval", "grid: {model.teacher: [pocket, pockett]}\neval"): "4:32: model.teacher 'pockett'",
}  # fmt: skip


@pytest.mark.parametrize("line", USAGE)
def test_wrong_usage(line, folder, capsys):
    with pytest.raises(SystemExit) as left:
        main(shlex.split(line))
    text = capsys.readouterr().err
    assert left.value.code == 2 and USAGE[line] in text and "usage: recipelin" in text and "-h` explains" in text


@pytest.mark.parametrize("line", INPUTS, ids=lambda line: line[:40])
def test_wrong_input(line, folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(shlex.split(line)) == 2
    assert INPUTS[line] in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before, "nothing is left half written"


@pytest.mark.parametrize("change", CONTENT, ids=lambda change: change[1][:40])
def test_wrong_content_is_named_with_its_line(change, folder, capsys):
    text = GOOD.replace(*change, 1)
    (folder / "wrong.yaml").write_text(text if "schedule" in text else text + FITS)
    assert main(["check", "wrong.yaml"]) == 2
    found = capsys.readouterr().err
    assert CONTENT[change] in found and len(found.splitlines()) == 1, found


def test_one_wrong_axis_hides_no_other(folder, capsys):
    (folder / "wrong.yaml").write_text(GOOD + "grid: {method.windw: [1], seed: [x], eval.margin: [0.1, -1]}\n")
    assert main(["check", "wrong.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["wrong.yaml:5:8", "wrong.yaml:5:34", "wrong.yaml:5:57"]


def test_the_environment_is_checked_too(folder, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert main(["plan", "good.yaml", "--device", "cpu"]) == 2
    assert "OMP_NUM_THREADS is '4,2'; expected a whole number" in capsys.readouterr().err
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads() == len(os.sched_getaffinity(0))


def test_check_knows_recipes_suites_and_table_specs(capsys):
    assert main(["check", str(ROOT / "recipes"), str(ROOT / "results" / "tables")]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("ok  pocket/lolcats (1 run)", "ok  suite pocket", "ok  table pocket-first"))


def test_dynamic_imports_are_in_lookup_alone():
    """Two exceptions: the forms take the rotary function from the family's own module of transformers, and a process of
    its own runs lm-eval's generators of RULER.
    """
    found = set()
    for path in [*(ROOT / "recipelin").rglob("*.py"), *(ROOT / "kernels" / "recipelin_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                if called in ("import_module", "__import__", "exec_module", "run_module", "run_path"):
                    found.add(path.relative_to(ROOT).as_posix())
    others = {"recipelin/attention/softmax.py", "recipelin/evals/lm_eval/making.py"}
    assert found == {"recipelin/lookup.py", *others}


# --- a new recipe -----------------------------------------------------------------------------------------------------


def last_point(path: str | Path) -> tuple[dict, str]:
    """The grid, and the plan of its last point: the others differ from it by the grid's values alone."""
    loaded = load_base(path)
    one = {axis: values[-1:] for axis, values in loaded.recipe.grid.items()}
    (point,) = expand(replace(loaded, recipe=loaded.recipe.model_copy(update={"grid": one})))
    return loaded.recipe.grid, plan(point).hash


@pytest.mark.parametrize("parent", RECIPES)
def test_a_new_recipe_does_what_its_parent_does(parent, folder, capsys):
    assert len(RECIPES) >= 6
    assert main(["new", "mine/first", "--from", parent]) == 0
    told = capsys.readouterr().out
    assert "mine/first.yaml (" in told and "recipelin run mine/first.yaml" in told
    assert main(["check", "mine/first.yaml"]) == 0
    path = folder / "mine" / "first.yaml"
    text = path.read_text()
    made = load_base(path)
    assert made.recipe.name == "mine/first" and made.recipe.about.claim == "not stated yet"
    assert last_point(path) == last_point(parent)
    # Every commented field holds the parent's present value: taking all the signs away changes nothing.
    fields = re.sub(r"^# (?=(?:[a-z_]+:|[ -]))(?!grid:)", "", text, flags=re.MULTILINE)
    assert fields.count("\nmethod:") == fields.count("\nseed: ") == fields.count("\n  states:") == 1
    path.write_text(fields)
    assert last_point(path) == last_point(parent)


def test_a_new_recipe_of_a_local_one_finds_its_files(folder, capsys):
    """Relative paths of the parent lead to the same files from another folder; the data that is missing is named."""
    (folder / "base").mkdir()
    config = (ROOT / "recipelin" / "pocket" / "config.json").read_text()
    (folder / "base" / "numbers.json").write_text(config)
    (folder / "base" / "mine.jsonl").write_text('{"text": "a"}\n')
    (folder / "base" / "suite.yaml").write_text("name: own\nevals: [{eval: usage}]\n")
    text = GOOD.replace("pocket}", "far/away, architecture: numbers.json}").replace("[pocket]", "[suite.yaml]")
    sources = "[{source: jsonl, path: mine.jsonl}, {source: text, path: not-here.txt}]"
    (folder / "base" / "parent.yaml").write_text(f"{text}{FITS}data: {{mix: {sources}}}\n")
    assert main(["new", "other/place/child", "--from", "base/parent.yaml"]) == 0
    assert "put other/place/not-here.txt there" in capsys.readouterr().out
    child = load("other/place/child.yaml")
    assert "extends: ../../base/parent.yaml" in child.text
    paths = [source.path for source in child.recipe.data.mix]
    assert paths == ["../../base/mine.jsonl", "not-here.txt"]
    assert child.recipe.eval.suites[0].name == "own" and plan(child).parameters == 754_560


def test_extends_takes_names(folder):
    path = folder / "child.yaml"
    path.write_text("name: child\nextends: pocket/lolcats\nmethod: {window: 8}\n")
    assert load(path).recipe.method.window == 8
    path.write_text("name: child\nextends: pocket/lolcats-with-recall\n")
    with pytest.raises(RecipeError, match="itself extends another"):
        load(path)


# --- the catalogue ----------------------------------------------------------------------------------------------------


def test_the_catalogue_is_what_the_recipes_give(capsys):
    page = ROOT / "recipes" / "README.md"
    assert main(["list", "--check", str(page)]) == 0, f"make catalogue\n{capsys.readouterr().out}"
    text = page.read_text(encoding="utf-8")
    for name, path in {**names(), **names(suites=True)}.items():
        assert f"[{name.removeprefix('suites/')}]({path.relative_to(ROOT / 'recipes').as_posix()})" in text


def test_a_stale_catalogue_is_shown_as_a_difference(folder, capsys):
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    (folder / "stale.md").write_text(text.replace("| `window_only` | 5 |", "| `window_only` | 6 |"))
    assert main(["list", "--check", "stale.md"]) == 1
    told = capsys.readouterr()
    assert "\n-| [pocket/windows]" in told.out and "\n+| [pocket/windows]" in told.out
    assert "stale.md is not what the recipes give" in told.err
    (folder / "stale.md").write_bytes(b"\xd0")
    assert main(["list", "--check", "stale.md"]) == 2 and "stale.md: not UTF-8; expected" in capsys.readouterr().err


# --- the pages --------------------------------------------------------------------------------------------------------


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "CHANGELOG.md", "README.md", "results/README.md", "recipes/README.md"]
)
def test_a_page_names_only_what_exists(page):
    """Paths and make targets in backticks; words in capitals are placeholders, and their folder must exist."""
    text = (ROOT / page).read_text(encoding="utf-8")
    checked = 0
    for code in re.findall(r"`([^`\n]+)`", text):
        if match := re.match(r"make ([a-z]+)$", code):
            assert match[1] in targets(), code
            checked += 1
        elif re.fullmatch(r"(recipelin|recipes|kernels|results|tests|\.github|\.ci)/[\w./-]+", code):
            path = Path(code) if not re.search(r"[A-Z]{4}", code) or code.endswith("README.md") else Path(code).parent
            pattern = re.sub(r"[A-Z]{4,}", "*", path.as_posix()) if path.name != "README.md" else path.as_posix()
            assert list(ROOT.glob(pattern)), f"{page} names {code}"
            checked += 1
        elif match := re.match(r"recipelin ([a-z]+)\b", code):
            assert match[1] in COMMANDS, code
            checked += 1
    assert checked >= {"CONTRIBUTING.md": 30, "recipes/README.md": 4}.get(page, 1)


def test_contributing_has_a_list_for_each_kind():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind in ("A recipe", "A method", "An attention form", "A kernel", "An evaluation or a suite", "A table"):
        part = text.split(f"\n## {kind}\n", 1)[1].split("\n## ", 1)[0]
        assert "1. " in part and "Held by " in part and "The pull request shows" in part, kind
    assert "negative results" in text and "## A Record" in text


def test_what_ci_runs_is_a_make_target():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    ran = {step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step}
    assert ran == {"make check", "make plans", "make tables", "make test", "make wheel"}
    assert {line.removeprefix("make ") for line in ran} <= targets()
    versions = flow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]


def test_the_citation_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["authors"] == [{"name": "The recipelin maintainers"}]
    assert citation["version"] == cli.__version__ and citation["license"] == "Apache-2.0"
    papers = {i["value"] for r in citation["references"] for i in r["identifiers"]}
    assert papers == {"arXiv:2510.05901", "arXiv:2410.10254", "arXiv:2606.16429"}
    assert all({"type", "title", "authors"} <= r.keys() for r in citation["references"])


def test_the_licence_is_the_plain_apache_text():
    """The digest of LICENSE-2.0.txt as the Apache foundation and Debian's common-licenses ship it."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
