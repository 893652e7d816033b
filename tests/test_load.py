"""Reading recipes: every kind of mistake is one clean line with file:line:column, and nothing but RecipeError comes out."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipelin import lookup
from recipelin.cli import main
from recipelin.commands import checked
from recipelin.finding import RECIPES, rebased
from recipelin.load import expand, load
from recipelin.plan import plan
from recipelin.recipe import Suite
from recipelin.sources import Hub
from recipelin.strict_yaml import RecipeError
from recipelin.suites import _suite, read_suite
from recipelin.templates import TEMPLATES

ROOT = Path(__file__).parent.parent
ALL = sorted((ROOT / RECIPES).rglob("*.yaml"))

GOOD = """\
name: mine
model: {teacher: pocket}
method:
  name: lolcats
  window: 16
schedule:
  transfer: {steps: 3, batch: 2, accumulation: 1, length: 64, optimizer: {lr: 1e-2}}
  tune: null
eval:
  suites: [pocket]
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as found:
        expand(load(path))
    return [f"{m.line}:{m.column}: {m.text}" for m in found.value.mistakes]


def test_every_recipe_and_suite_of_the_repository_is_right():
    assert len(ALL) >= 8
    for path in ALL:
        assert checked(path)


def test_a_good_recipe_is_complete(tmp_path):
    recipe = load(write(tmp_path, GOOD)).recipe
    assert recipe.schedule["tune"] is None
    transfer = recipe.schedule["transfer"]
    assert (transfer.steps, transfer.epochs, transfer.optimizer.lr) == (3, None, 0.01)
    assert transfer.decay.name == "constant"  # the method's default stays where the recipe is silent
    assert recipe.eval.states[0] == "teacher"


COMMIT = "12567cabf869d7c92e573c7c783905fc160e9639"
HUB = f"""data:
  mix:
    - source: hub
      dataset: yahma/alpaca-cleaned
      revision: {COMMIT}
      template: alpaca
      loss: response
      parts: {{selection: [0, 100], test: [100, 200]}}
eval:"""

# ruff: noqa: E501 (a case a line reads best)
CASES = {
    "unknown key": ("window: 16", "windw: 16", "5:3: method.windw: unknown key; did you mean 'window'?"),
    "key of a map below": ("window: 16", "window: 16\n  feature_map: {width: 8}", "6:3: method.feature_map: unknown key; form: has a field of that name. Fields here: block_loss,"),
    "unknown top key": ("eval:", "evall: {}\neval:", "9:1: evall: unknown key; did you mean 'eval'?"),
    "duplicate key": ("  window: 16", "  window: 16\n  window: 8", "6:3: the key 'window' is given twice, first in line 5"),
    "text for a number": ("window: 16", "window: sixteen", "5:11: method.window: found the text 'sixteen'; expected a whole number"),
    "float for an integer": ("window: 16", "window: 16.5", "5:11: method.window: found 16.5; expected a whole number"),
    "yes is no boolean": ("eval:", "data: {separate: yes}\neval:", "9:18: data.separate: found the text 'yes'; expected true or false"),
    "unknown method": ("name: lolcats", "name: lolcat", "4:9: no method 'lolcat'; did you mean 'lolcats'?"),
    "unknown stage": ("  tune: null", "  tun: null", "8:3: unknown stage 'tun'; did you mean 'tune'? The method has transfer, tune"),
    "unknown suite": ("[pocket]", "[pockets]", "10:12: no suite 'pockets'; did you mean 'pocket'? There are"),
    "unknown state": ("[pocket]", "[pocket]\n  states: [teacher, hybird]", "11:21: unknown state 'hybird'; did you mean 'hybrid'?"),
    "a list for a map": ("model: {teacher: pocket}", "model: [pocket]", "2:8: model: found a list; expected a map of fields"),
    "two durations": ("steps: 3,", "steps: 3, epochs: 1.0,", "give exactly one of steps, tokens, epochs; found steps, epochs"),
    "unknown choice": ("window: 16", "window: 16\n  cover: outsid", "6:10: method.cover: found the text 'outsid'; expected 'outside' or 'all'; did you mean 'outside'?"),
    "a window LoLCATs has not": ("window: 16", "window: 16\n  compat: lolcats_tk_v1", "compat: lolcats_tk_v1 needs shape: terraced, a window in tokens, cover: outside, join: shared and no sinks; found shape: sliding"),
    "unknown shape": ("window: 16", "window: 16\n  shape: terrace", "6:10: method.shape: found the text 'terrace'; expected 'sliding' or 'terraced'; did you mean 'terraced'?"),
    "unknown source": ("eval:", "data: {mix: [{source: python-stdlibs}]}\neval:", "found 'python-stdlibs'; expected one of python-stdlib, jsonl"),
    "floating revision": ("eval:", HUB.replace(COMMIT, "main"), "13:17: data.mix.0.revision: found 'main'; expected the 40 hexadecimal digits of a commit: a branch such as main moves on"),
    "tag": ("eval:", HUB.replace(COMMIT, "v1.0"), "13:17: data.mix.0.revision: found 'v1.0'; expected the 40"),
    "no revision": ("eval:", HUB.replace(f"      revision: {COMMIT}\n", ""), "11:7: data.mix.0.revision: found none; expected the 40"),
    "revision of a folder": ("eval:", HUB.replace("yahma/alpaca-cleaned", "./alpaca"), "13:17: data.mix.0.revision: a folder has none"),
    "no dataset's name": ("eval:", HUB.replace("yahma/alpaca-cleaned", "a/b/c"), "12:16: data.mix.0.dataset: found 'a/b/c'; expected owner/name"),
    "unknown template": ("eval:", HUB.replace("template: alpaca", "template: alpacca"), "14:17: data.mix.0.template: no template 'alpacca'; did you mean 'alpaca'? Expected alpaca, or a map with prompt and response"),
    "another template": ("eval:", HUB.replace("template: alpaca", "template: chat"), "14:17: data.mix.0.template: no template 'chat'; expected alpaca, or a map with prompt and response"),
    "half a template": ("eval:", HUB.replace("template: alpaca", "template: {prompt: '{q}'}"), "14:17: data.mix.0.template.response: is missing"),
    "brace in a template": ("eval:", HUB.replace("template: alpaca", "template: {prompt: '{q', response: '{a}'}"), "14:26: data.mix.0.template.prompt: '{q': expected '}' before end of string; a brace itself is written twice"),
    "format in a template": ("eval:", HUB.replace("template: alpaca", "template: {prompt: '{q:>3}', response: '{a}'}"), "14:26: data.mix.0.template.prompt: '{q:>3}': braces hold the name of a column and nothing else"),
    "response without a column": ("eval:", HUB.replace("template: alpaca", "template: {prompt: '{q}', response: yes}"), "14:17: data.mix.0.template: the response 'yes' names no column"),
    "loss without a prompt": ("eval:", HUB.replace("      template: alpaca\n", ""), "14:13: data.mix.0.loss: response needs a template"),
    "field and template": ("eval:", HUB.replace("loss: response", "field: txt"), "14:17: data.mix.0.template: give one of field and template; found field 'txt'"),
    "parts overlap": ("eval:", HUB.replace("[100, 200]", "[50, 200]"), "16:14: data.mix.0.parts: selection and test share rows 50 to 99"),
    "empty part": ("eval:", HUB.replace("[0, 100]", "[100, 100]"), "16:14: data.mix.0.parts: selection [100, 100] holds no row"),
    "half of parts": ("eval:", HUB.replace(", test: [100, 200]", ""), "16:14: data.mix.0.parts.test: is missing"),
    "a stream without an end": ("eval:", HUB.replace("loss: response", "streaming: true"), "11:7: data.mix.0.tokens: streaming: true needs tokens"),
    "tokens of no stream": ("eval:", HUB.replace("loss: response", "tokens: 500"), "15:15: data.mix.0.tokens: belongs to streaming: true"),
    "shuffle of no stream": ("eval:", HUB.replace("loss: response", "shuffle: {seed: 1}"), "15:16: data.mix.0.shuffle: belongs to streaming: true"),
    "unknown key of a dataset": ("eval:", HUB.replace("loss: response", "stream: true"), "15:7: data.mix.0.stream: unknown key; did you mean 'streaming'? Fields here: chat, dataset, expected_tokens, field, loss, name, parts, revision,"),
    "text file with a template": ("eval:", "data: {mix: [{source: text, path: a.txt, template: alpaca}]}\neval:", "9:23: data.mix.0.source: text has no columns for a template"),
    "one document a file": ("eval:", "data: {mix: [{source: text, path: a.txt, documents: file}]}\neval:", "9:53: data.mix.0.documents: a file that is one document leaves two of the three parts (training, selection, test) empty; write paragraph"),
    "another kind of document": ("eval:", "data: {mix: [{source: text, path: a.txt, documents: lines}]}\neval:", "9:53: data.mix.0.documents: found the text 'lines'; expected 'paragraph'"),
    "a slice of a split": ("eval:", HUB.replace("loss: response", "split: 'train[:50%]'"), "15:14: data.mix.0.split: found 'train[:50%]'; expected the name of one split: a slice or a sum of splits hides which rows are held out, `parts` says it"),
    "a sum of splits": ("eval:", HUB.replace("loss: response", "split: train+test"), "15:14: data.mix.0.split: found 'train+test'; expected the name of one split"),
    "all splits": ("eval:", HUB.replace("loss: response", "split: all"), "15:14: data.mix.0.split: found 'all'; expected the name of one split"),
    "masked text of recall": ("eval:", "data: {mix: [{source: recall, text: {source: jsonl, path: a, template: alpaca, loss: response}}]}\neval:", "loss: response is for training data; here the whole text is read"),
    "no such file": ("eval:", "extends: nothing.yaml\neval:", "9:10: extends: nothing.yaml: no such recipe"),
    "itself": ("eval:", "extends: r.yaml\neval:", "9:10: extends: the recipe extends itself"),
    "negative": ("window: 16", "window: 0", "5:11: method.window: found 0; expected greater than or equal to 1"),
    "not finite": ("1e-2", ".inf", "found .inf; expected a finite number"),
    "tab": ("  window: 16", "\twindow: 16", "found a tab; indent with spaces"),
    "YAML tag": ("window: 16", "window: !!python/object/apply:os.system [ls]", "5:11: found the tag tag:yaml.org,2002:python/object/apply:os.system"),
    "foreign code": ("name: lolcats", "name: mylab.methods.foo", "4:9: 'mylab.methods.foo' is code outside recipelin and was not imported; it needs --allow-code mylab"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_named_with_its_place(tmp_path, case):
    old, new, expected = CASES[case]
    assert GOOD.count(old) == 1 or old == "eval:"
    found = mistakes(write(tmp_path, GOOD.replace(old, new, 1)))
    assert any(expected in text for text in found), found
    assert len(found) == 1, found


def test_a_dataset_by_name_is_complete(tmp_path):
    source = load(write(tmp_path, GOOD.replace("eval:", HUB))).recipe.data.mix[0]
    assert source.label == "yahma/alpaca-cleaned@12567cab" and source.split == "train" and not source.streaming
    assert source.columns == ("instruction", "input", "output"), "the template stands in the recipe, whole"
    assert Hub.model_validate(source.model_dump()) == source
    suite = "name: s\nevals:\n  - {eval: lm_eval, tasks: [{task: t, next_line: {context: [8, 20], text: {source: hub, dataset: ./a, streaming: true, tokens: 9}}}]}\n"
    with pytest.raises(RecipeError, match=r"s\.yaml:3:\d+: .*next_line\.text: a stream's end is known in tokens only"):
        read_suite(write(tmp_path, suite, "s.yaml"))
    for name in lookup.names("evals"):
        fields = lookup.lookup("evals", name).Config.model_fields
        if "text" in fields:
            text = {"source": "hub", "dataset": "./a", "template": TEMPLATES["alpaca"]}
            needed = {"format": "needle", "length": 512, "distances": (99,)} if name == "retrieval" else {}
            assert lookup.lookup("evals", name).Config(text=text, **needed).text.local
            with pytest.raises(ValueError, match="here the whole text is read"):
                lookup.lookup("evals", name).Config(text={**text, "loss": "response"}, **needed)


def test_all_mistakes_of_a_file_at_once(tmp_path):
    text = GOOD.replace("window: 16", "windw: 16").replace("tune: null", "tun: null").replace("[pocket]", "[pockets]")
    assert [t.split(":")[0] for t in mistakes(write(tmp_path, text))] == ["5", "8", "10"]


def test_numbers_are_numbers(tmp_path):
    text = GOOD.replace("lr: 1e-2", "lr: 1E-2")
    assert load(write(tmp_path, text)).recipe.schedule["transfer"].optimizer.lr == 0.01
    quoted = GOOD.replace("lr: 1e-2", "lr: '1e-2'")
    assert "found the text '1e-2'; expected a number" in mistakes(write(tmp_path, quoted))[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "1:1: the file is empty"),
        (b"# only a comment\n", "1:1: the file is empty"),
        (b"- a\n- b\n", "1:1: found a list; expected a map"),
        (b"just text\n", "1:1: found the text 'just text'; expected a map"),
        (b"name: a\nabout: {claim: \xff}\n", "2:16: not UTF-8: byte 0xff"),
        (b"a: [1, 2\n", "expected ',' or ']'"),
        (b"a: &x [*x]\n", "contains itself"),
        (b"a: " + b"[" * 60 + b"]" * 60, "levels deep"),
    ],
)
def test_what_is_no_recipe(tmp_path, content, expected):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert expected in mistakes(path)[0]


def test_large_files_and_bombs_are_refused_at_once(tmp_path):
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(50 << 20)
    started = time.process_time()
    assert "has 52,428,800 bytes" in mistakes(large)[0]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 10)}]\n" for c in "bcdefghi"
    )
    assert "aliases expand to more than" in mistakes(write(tmp_path, bomb))[0]
    assert time.process_time() - started < 2.0


def test_extends_one_level(tmp_path):
    write(tmp_path, GOOD, "base.yaml")
    child = write(tmp_path, "name: child\nextends: base.yaml\nmethod: {window: 8}\nschedule: {transfer: {steps: 9}}\n")
    recipe = load(child).recipe
    assert (recipe.name, recipe.method.window, recipe.schedule["transfer"].steps) == ("child", 8, 9)
    assert recipe.schedule["transfer"].batch == 2
    grandchild = write(tmp_path, "name: g\nextends: r.yaml\n", "g.yaml")
    assert "itself extends another (" in mistakes(grandchild)[0]
    broken = write(tmp_path, GOOD.replace("window: 16", "windw: 16"), "broken.yaml")
    heir = write(tmp_path, "name: heir\nextends: broken.yaml\n", "heir.yaml")
    with pytest.raises(RecipeError) as found:
        load(heir)
    assert found.value.mistakes[0].file == str(broken) and found.value.mistakes[0].line == 5


@pytest.mark.parametrize(
    ("evals", "place"),
    [
        ("[{eval: perplexity}, {eval: recall}, {eval: perplexity, length: 64}]", "2:45: the suite has task 'perplexity' with metric 'log_loss' already"),
        ("[{eval: usage}, {eval: usage, rows: 2}]", "2:24: the suite has task 'layers'"),
        ("[{eval: recall, distances: [6, 24]}, {eval: recall, distances: [60, 24]}]", "2:76: the suite has task 'recall@24'"),
        ("[{eval: lm_eval, tasks: [{task: piqa}]}, {eval: lm_eval, tasks: [{task: piqa, shots: 5}]}]", "2:73: the suite has task 'piqa' with metric 'acc' already"),
        ("[{eval: lm_eval, tasks: [{task: piqa}, {task: piqa, metric: acc_norm}]}]", None),
        ("[{eval: retrieval, format: passkey, length: 64, distances: [20]}, {eval: retrieval, format: passkey, length: 96, distances: [20]}]", None),
        ("[{eval: retrieval, format: passkey, length: 64, distances: [20]}, {eval: retrieval, format: passkey, length: 64, distances: [9, 20]}]", "2:136: the suite has task 'passkey@64:20' with metric 'exact_match' already"),
    ],
)  # fmt: skip
def test_two_rows_of_one_name_are_refused_before_any_work(tmp_path, evals, place):
    path = write(tmp_path, f"name: s\nevals: {evals}\n", "s.yaml")
    write(tmp_path, GOOD.replace("[pocket]", "[s.yaml]"))
    if place is None:
        assert read_suite(path)
        return
    with pytest.raises(RecipeError) as found:
        load(tmp_path / "r.yaml")
    (mistake,) = found.value.mistakes
    assert mistake.file.endswith("s.yaml")
    assert f"{mistake.line}:{mistake.column}: {mistake.text}".startswith(place), mistake
    assert "put it into a suite of its own" in mistake.text


def test_two_suites_of_one_name_are_refused(tmp_path):
    write(tmp_path, "name: pocket\nevals: [{eval: perplexity}]\n", "s.yaml")
    (found,) = mistakes(write(tmp_path, GOOD.replace("[pocket]", "[pocket, s.yaml]")))
    assert found.startswith("10:20: a suite named 'pocket' is there already")
    perplexity = lookup.lookup("evals", "perplexity").Config
    with pytest.raises(ValueError, match="task 'perplexity' with metric 'log_loss' already"):
        Suite(name="inline", evals=(perplexity(), perplexity(length=64)))


def test_paths_of_a_suite_start_at_its_own_folder_where_they_lead_to_something(tmp_path):
    text = "{source: jsonl, path: text.jsonl}"
    data = "{source: hub, dataset: ./rows, revision: null, streaming: true, tokens: 9}"
    (tmp_path / "apart" / "rows").mkdir(parents=True)
    write(tmp_path / "apart", f"name: s\nevals: [{{eval: perplexity, text: {text}}}]\n", "s.yaml")
    write(tmp_path / "apart", f"name: h\nevals: [{{eval: perplexity, text: {data}}}]\n", "h.yaml")
    recipe = write(tmp_path, GOOD.replace("[pocket]", "[apart/s.yaml, apart/h.yaml]"))

    def named() -> list[str]:
        texts = [suite.evals[0].text for suite in load(recipe).recipe.eval.suites]
        return [texts[0].path, texts[1].dataset]

    assert named() == ["text.jsonl", "./apart/rows"], "what is not there is looked for beside the recipe"
    (tmp_path / "apart" / "text.jsonl").touch()
    _suite.cache_clear()  # files do not come and go within a process
    assert named() == ["apart/text.jsonl", "./apart/rows"]
    (tmp_path / "apart" / "org" / "name").mkdir(parents=True)
    assert rebased("org/name", tmp_path / "apart", tmp_path, "dataset") == "org/name", "a hub id, whatever lies here"


def test_a_grid_is_many_recipes(tmp_path):
    text = GOOD + "grid:\n  method.window: [8, 16]\n  seed: [0, 1]\n"
    points = expand(load(write(tmp_path, text)))
    assert [p.recipe.name for p in points] == [f"mine/window={w},seed={s}" for w in (8, 16) for s in (0, 1)]
    assert [(p.recipe.method.window, p.recipe.seed) for p in points] == [(8, 0), (8, 1), (16, 0), (16, 1)]
    assert len({plan(p).hash for p in points}) == 4
    bad = write(tmp_path, GOOD + "grid:\n  method.windw: [8]\n")
    assert "12:3: 'method.windw' is no field: method has no 'windw'; did you mean 'window'?" in mistakes(bad)[0]
    worse = write(tmp_path, GOOD + "grid:\n  method.window: [8, 0]\n")
    assert "12:22: method.window: found 0" in mistakes(worse)[0]


def test_an_axis_takes_maps_and_is_named_by_their_keys(tmp_path):
    axis = "grid:\n  method.objective:\n    - {weights: 1.0}\n    - {outputs: 1000.0, weights: 1}\n"
    points = expand(load(write(tmp_path, GOOD + axis)))
    assert [p.recipe.name for p in points] == ["mine/objective=weights", "mine/objective=outputs+weights"]
    assert [p.recipe.method.objective for p in points] == [{"weights": 1.0}, {"outputs": 1000.0, "weights": 1.0}]
    assert [plan(p).steps[2].what for p in points] == ["1 x weights", "1000 x outputs + 1 x weights"]
    same = axis.replace("{outputs: 1000.0, weights: 1}", "{weights: 2.0}")
    assert [p.recipe.name for p in expand(load(write(tmp_path, GOOD + same)))] == [
        "mine/objective=weights-1.0",
        "mine/objective=weights-2.0",
    ]
    bad = write(tmp_path, GOOD + axis.replace("outputs: 1000.0", "outputs: -1"))
    assert "14:17: method.objective.outputs: found -1" in mistakes(bad)[0]


def test_names_are_found(tmp_path, monkeypatch):
    assert load("pocket/lolcats").recipe.name == "pocket/lolcats"
    monkeypatch.chdir(tmp_path)
    assert load("pocket/lolcats").origin in ("checkout", "installed")
    with pytest.raises(RecipeError, match="did you mean pocket/lolcats"):
        load("pocket/lolcat")


def test_the_command_line_says_it_and_exits_2(tmp_path, capsys):
    path = write(tmp_path, GOOD.replace("window: 16", "windw: 16"))
    for command in (["check", str(path)], ["plan", str(path)], ["run", str(path)]):
        assert main(command) == 2
        text = capsys.readouterr().err
        assert "r.yaml:5:3: method.windw: unknown key; did you mean 'window'?" in text and "Traceback" not in text
    assert main(["check", str(ROOT / "recipes")]) == 0
    assert main(["check", str(tmp_path / "nothing.yaml")]) == 2


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abe:{}[]-&*!'\"\n\t #|>%@,x01.~", max_size=60))
def test_arbitrary_text_never_breaks_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.sampled_from(":{}[]-&*!'\"\n\t x0"))
def test_a_damaged_recipe_never_breaks_the_reader(tmp_path_factory, place, letter):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(GOOD[:place] + letter + GOOD[place + 1 :], encoding="utf-8")
    try:
        expand(load(path))
    except RecipeError as error:
        assert all(m.line >= 1 and m.column >= 1 and m.text for m in error.mistakes)


def test_what_python_itself_would_choke_on(tmp_path):
    """A number of thousands of digits, a NUL in a path, and a grid of millions of runs: refused at once, in a line."""
    assert "found a number of 5,000 characters" in mistakes(write(tmp_path, GOOD.replace("16", "9" * 5000)))[0]
    assert "found the character \\u0000" in mistakes(write(tmp_path, GOOD + 'extends: "\\0"\n'))[0]
    axis = ", ".join(map(str, range(3000)))
    grid = write(tmp_path, GOOD + f"grid:\n  seed: [{axis}]\n  method.window: [{axis}]\n")
    assert "found 9,000,000 points; expected at most 1,000" in mistakes(grid)[0]


def test_a_mistake_of_a_whole_map_is_placed_in_the_file_that_was_laid_over(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nextends: pocket/lolcats\ndata:\n  mix: [{source: python-stdlib}, {source: recall}]\n  order: first\n"
    )
    with pytest.raises(RecipeError, match=r"mine\.yaml:4:3: data: order: first is of one source that is read"):
        load(str(path))
