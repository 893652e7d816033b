"""Conversations by the tokenizer's own chat template: which tokens are the assistant's, and the stage that trains on them."""

import json
import math
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recipelin import chat, data, hf, spool
from recipelin.documents import Document, documents
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.preflight import preflight
from recipelin.records import read_record
from recipelin.run import run
from recipelin.sources import Data, LocalFile, SourceError
from recipelin.spool import stream
from recipelin.steps import Tune
from recipelin.strict_yaml import RecipeError
from recipelin.templates import Chat

# The shapes of published templates, written anew: Qwen2.5's ChatML, Llama 3's (which trims), and Qwen3's, which puts an empty
# thought before the last answer only.
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
TRIMS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
)
SPACED = (  # Mistral's and Llama 2's: the space before an answer is the template's, and the tokenizer's too
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
)
TURNS = (
    ("user", "What is 2 and 3?"),
    ("assistant", " It is 5, it is said "),
    ("user", "It is 5, it is said"),
    ("assistant", "Be kind."),
)
TURNS_OF = tuple(chat.Turn(*turn) for turn in TURNS)


def tokenizer(template):
    text = "What is 2 and 3? It is 5, it is said. Be kind. user assistant system"
    made = data.train_tokenizer([text] * 3, 300)
    words = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = template
    return words


def pieces(template):
    """[(text, whether the assistant says it)] of TURNS, written out by hand."""
    if template is CHATML:
        head = [("<|im_start|>system\nBe kind.<|im_end|>\n", False)]
        between, before, end = "\n", "\n", lambda i: ""
    elif template is TRIMS:
        head, between, before, end = [("<s>", False)], "", "\n\n", lambda i: ""
    else:
        head, between, before = [], "\n", "\n"
        end = lambda i: "<think>\n\n</think>\n\n" if i == 3 else ""  # noqa: E731
    found = head
    for number, (role, content) in enumerate(TURNS):
        content = content.strip() if template is TRIMS else content
        found = [*found, (f"<|im_start|>{role}{before}{end(number)}", False)]
        found = [*found, (f"{content}<|im_end|>", role == "assistant"), (between, False)]
    return found


def source(folder, rows=None, **change):
    rows = rows or [{"messages": [{"role": r, "content": c} for r, c in TURNS]}]
    (folder / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parts = {"selection": (len(rows), len(rows) + 1), "test": (len(rows) + 1, len(rows) + 2)}
    with (folder / "c.jsonl").open("a") as file:  # held-out rows behind them
        for _ in range(2):
            file.write(json.dumps(rows[0]) + "\n")
    return LocalFile(**{"source": "jsonl", "path": "c.jsonl", "chat": {}, "loss": "response", "parts": parts, **change})


@pytest.mark.parametrize("template", [CHATML, TRIMS, THINKS])
def test_the_mask_covers_the_assistants_tokens_and_the_end_of_its_turn(template, tmp_path):
    words = tokenizer(template)
    expected, scored = [], []
    for text, said in pieces(template):
        ids = words.encode(text, add_special_tokens=False)
        expected, scored = expected + ids, scored + [said] * len(ids)
    assert words.decode(expected) == words.apply_chat_template(
        [{"role": r, "content": c} for r, c in TURNS], tokenize=False
    )
    found = stream(source(tmp_path), words, part="training", folder=tmp_path, cache=None)
    tokens, _, carries = found.row(0, len(found.tokens))
    assert tokens.tolist() == expected and carries.tolist() == scored
    end = words.convert_tokens_to_ids("<|im_end|>")
    assert sum(t == end and s for t, s in zip(expected, scored, strict=True)) == 2
    whole = stream(source(tmp_path, loss="all"), words, part="training", folder=tmp_path, cache=None)
    assert whole.row(0, len(expected))[2].all() and whole.tokens.tolist() == expected


def test_conversations_in_batches(tmp_path):
    """Packed and cut: of a row just the assistant's tokens have labels; other names of columns, keys and roles."""
    words = tokenizer(CHATML)
    turns = [{"from": "human" if r == "user" else "gpt", "value": c} for r, c in TURNS]
    keys = {"column": "turns", "role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    made = source(tmp_path, [{"turns": turns[: 2 * (1 + i % 2)]} for i in range(6)], chat=keys)
    found = stream(made, words, part="training", folder=tmp_path, cache=tmp_path)
    carries = found.row(0, len(found.tokens))[2]
    batches = data.Batches(
        Data(mix=(made,), order="first"),
        words,
        part="training",
        length=16,
        batch=2,
        seed=0,
        folder=tmp_path,
        cache=tmp_path,
    )
    rows = [r for r in range(len(found.tokens) // 16) if carries[r * 16 + 1 : r * 16 + 16].any()]
    assert len(rows) > 4
    for number, row in enumerate(rows):
        batch, cut = batches.batch(number // 2), slice(row * 16, row * 16 + 16)
        ids, labels = batch.input_ids[number % 2], batch.labels[number % 2]
        assert torch.equal(ids, torch.from_numpy(found.tokens[cut].astype("int64")))
        assert torch.equal(labels != data.IGNORED, torch.from_numpy(carries[cut]))


def scored(words, *turns):
    """What carries loss of a conversation, a string for each run of tokens."""
    document = Document("name", "here:1", "training", "", "", True, tuple(chat.Turn(*turn) for turn in turns))
    (ids,), (masked,) = spool._encode([document], words)
    silent = {i for first, end in masked for i in range(first, end)}
    return [
        words.decode([ids[i] for i in run])
        for carries, found in groupby(range(len(ids)), lambda i: i not in silent)
        if carries and (run := list(found))
    ]


def test_a_first_word_that_begins_at_the_templates_space_is_said():
    words = tokenizer(SPACED)
    assert "\u0120It" in words.get_vocab(), "a token that begins at the space"
    turns = [("user", "What?"), ("assistant", "It is 5"), ("user", "Be?"), ("assistant", "It")]
    assert scored(words, *turns) == [" It is 5</s>", " It</s>"]
    words.chat_template = SPACED.replace("m.content | trim", "m.content")
    assert scored(words, turns[0], ("assistant", "  It is")) == ["  It is</s>"]
    words.chat_template = SPACED.replace("' ' +", "'\n' +")  # no space: a token of the template's own
    assert scored(words, *turns) == ["It is 5</s>", "It</s>"]


def test_what_may_end_a_turn():
    """EOS, or any added token but white space; where nothing does, a model would never learn to stop: refused."""
    turns = (("user", "What?"), ("assistant", "It is 5"), ("user", "Be?"), ("assistant", "It"))
    words = tokenizer(CHATML.replace("im_", "my_"))
    reason = r"here:1: no token ends the answer 'It is 5' \(behind it is '<\|my_end\|>.*never learn to stop"
    with pytest.raises(SourceError, match=reason):
        scored(words, *turns)
    words.add_tokens(["<|my_start|>", "<|my_end|>"])
    assert not words.added_tokens_decoder[words.convert_tokens_to_ids("<|my_end|>")].special
    assert scored(words, *turns) == ["It is 5<|my_end|>", "It<|my_end|>"]
    words.add_tokens(["   "])
    words.chat_template = CHATML.replace("<|im_end|>", "   <|im_end|>")
    assert scored(words, *turns) == ["It is 5   <|im_end|>", "It   <|im_end|>"]
    words.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    with pytest.raises(SourceError, match=r"the answer 'It' \(behind it is nothing\)"):
        scored(words, *turns[2:])


@pytest.mark.parametrize("ends", [(), ("\n",)])
@pytest.mark.parametrize("way", ["strip", "lstrip", "rstrip"])
def test_white_space_at_the_ends_of_an_answer(way, ends):
    words = tokenizer(TRIMS.replace("m.content | trim", f"m.content.{way}{ends}".replace(",)", ")")))
    for content in ("\n It ", " \nIt \n\n", "It", "\n\nIt\n", " \n"):
        expected = getattr(content, way)(*ends)
        assert scored(words, ("user", "x"), ("assistant", content)) == [f"{expected}<|im_end|>"]


REASONS = """\
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if loop.last and m.role == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '').strip('\n') + '\n</think>\n\n' }}
{%- endif %}{{ m.content.lstrip('\n') }}{% for call in m.tool_calls or () %}{{ '<call>' + call.name }}{% endfor %}
{{- '<|im_end|>' + '\n' }}{% endfor %}"""


def test_other_keys_of_a_turn_are_the_templates():
    """A thought is said, with what closes it, where the template writes it: of the last answer."""
    words = tokenizer(REASONS)
    turns = [("user", "What?"), ("assistant", "It is 5", {"reasoning_content": "2 and\n", "id": "x", "n": [1]})]
    assert scored(words, *turns) == ["2 and\n</think>\n\nIt is 5<|im_end|>"]
    assert scored(words, *turns, ("user", "Be"), ("assistant", "It")) == ["It is 5<|im_end|>", "It<|im_end|>"]
    assert scored(words, ("user", "What?"), ("assistant", "\nIt ")) == ["It <|im_end|>"], "an empty thought is not"
    assert scored(words, ("user", "What?"), ("assistant", "It", {"reasoning_content": "\n"})) == ["It<|im_end|>"]
    words.add_tokens(["<call>"])
    with pytest.raises(SourceError, match=r"writes more of an answer than text \(tool_calls\): loss is on text alone"):
        scored(words, ("user", "What?"), ("assistant", "It", {"tool_calls": [{"name": "f"}]}))
    given = [{"role": "user", "content": "x", "name": None, "weight": 0}]
    assert chat.turns_of(given, Chat()) == (("user", "x", {"weight": 0}),), "null is not given"


def test_turns_that_are_left_out():
    drops = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.content | replace('a', 'b') + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    )
    words = tokenizer(drops)
    assert scored(words, ("system", " "), ("user", "a?"), ("assistant", "It")) == ["It<|im_end|>"], (
        "written in another way"
    )
    with pytest.raises(SourceError, match="here:1: the tokenizer's chat template leaves out turn 0, of role 'system'"):
        scored(words, ("system", "Be kind"), ("user", "a?"), ("assistant", "It"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            {},
            "unknown roles 'human', 'gpt', expected system, user, assistant, tool: .* as in user: human, assistant: gpt",
        ),
        ({"assistant": "gpt"}, r"c.jsonl:2: column 'turns': unknown roles 'human', .* as in user: human$"),
        ({"user": "human"}, r"unknown roles 'gpt', .* as in assistant: gpt$"),
    ],
)
def test_roles_that_no_template_knows(names, words, tmp_path):
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    known = [{"from": "user", "value": "x"}, {"from": "assistant", "value": "y"}]
    keys = {"column": "turns", "role": "from", "content": "value", **names}
    made = source(tmp_path, [{"turns": known}, {"turns": turns}], chat=keys)
    with pytest.raises(SourceError, match=words):
        stream(made, tokenizer(CHATML), part="training", folder=tmp_path, cache=None)


def test_the_day_is_known_to_the_cache(tmp_path, monkeypatch):
    """Llama 3.2's template writes its own date, as on no day; another's day is part of the key."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    words = tokenizer(dated + CHATML)
    assert chat.written(TURNS_OF[:2], words).startswith("26 Jul 2024<|im_start|>system")
    words.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    keys = [spool._key(source(tmp_path), words, ("training",), tmp_path) for _ in range(2)]
    render = words.apply_chat_template
    monkeypatch.setattr(
        words, "apply_chat_template", lambda *a, **b: render(*a, **b).replace("20", "21"), raising=False
    )
    assert keys[0] == keys[1] != spool._key(source(tmp_path), words, ("training",), tmp_path)
    words.chat_template = "{{ raise_exception('no') }}"
    assert "refuses the turns: no" in chat.probe(words)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "c.jsonl:1: column 'messages' holds no turn; expected turns"),
        ("text", "c.jsonl:1: column 'messages' holds a str; expected turns"),
        (["text"], "turn 0: a str; expected a map with 'role' and 'content'"),
        ([{"rol": "user", "content": "x"}], "turn 0: no 'role', found 'rol', 'content'; did you mean 'rol'"),
        ([{"role": "user", "content": None}], "turn 0: 'content' holds a NoneType; expected text"),
        (
            [{"role": "user", "content": "critic"}],
            "c.jsonl:1: the tokenizer's chat template refuses the turns: who is critic",
        ),
        ([{"role": "assistant", "content": "loud"}], "chat template changes turn 0, so that its tokens cannot be told"),
        (
            [{"role": "assistant", "content": "x"}, {"role": "system", "content": ""}],
            "leaves answers out or moves them",
        ),
    ],
)
def test_rows_that_are_no_conversation(row, words, tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'critic' %}{{ raise_exception('who is ' + m.content) }}{% endif %}"
        "{% if messages[-1].role != 'system' %}{{ m.role + m.content.replace('loud', 'LOUD') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(SourceError, match=words):
        stream(source(tmp_path, [{"messages": row}]), tokenizer(template), part="training", folder=tmp_path, cache=None)


def test_what_does_not_go_with_a_chat(tmp_path):
    made = source(tmp_path)
    for change, words in (
        ({"field": "t"}, "one of field, template and chat"),
        ({"template": "alpaca"}, "one of field, template and chat"),
        ({"source": "text"}, "text has no columns for a chat"),
        (
            {"chat": {"user": "gpt", "assistant": "gpt"}},
            "found system: system, user: gpt, assistant: gpt; expected a name",
        ),
        ({"chat": {"content": "role"}}, "found role: role, content: role; expected a name of its own for each"),
    ):
        with pytest.raises(ValueError, match=words):
            LocalFile(**{**made.model_dump(exclude={"template", "field"}), **change})
    with pytest.raises(SourceError, match="a chat has no text before a tokenizer's template writes it"):
        list(documents(made, "training", tmp_path))
    with pytest.raises(SourceError, match="needs the tokenizer's chat template, and this one has none"):
        chat.refuse_without_template([made], tokenizer(None))
    one, other = (tokenizer(t) for t in (CHATML, TRIMS))
    assert (
        len({stream(made, t, part="training", folder=tmp_path, cache=tmp_path).tokens.size for t in (one, other)}) == 2
    )


# --- stage sft --------------------------------------------------------------------------------------------------------

RECIPE = """\
name: test/sft
model: {teacher: teacher}
method: {name: taylor_calibrate, arm: baseline, layers: {policy: explicit, layers: [0]}}
data: {mix: [{source: python-stdlib}]}
schedule: {sft: {steps: 3, batch: 2, length: 24, optimizer: {lr: 1e-3}SFT}}
eval: {suites: [small.yaml], states: [hybrid]}
"""
CHAT = ", data: {mix: [{source: jsonl, path: c.jsonl, chat: {}, loss: response, parts: {selection: [9, 10], test: [10, 11]}}]}"


def recipe(folder, sft):
    (folder / "r.yaml").write_text(RECIPE.replace("SFT", sft))
    (folder / "small.yaml").write_text("name: small\nevals: [{eval: perplexity, rows: 2, length: 32}]\n")
    return load(folder / "r.yaml")


def test_the_stage_trains_on_answers(tiny, tmp_path, home):
    """A whole run: refused without a chat template before anything is made, and finished with one."""
    words = tokenizer(None)
    model = tiny(4, 2, vocab_size=len(words), max_position_embeddings=64)
    hf.export(model, words, tmp_path / "teacher", hybrid=None)
    source(tmp_path, [{"messages": [{"role": r, "content": c} for r, c in TURNS]}] * 9)
    loaded = recipe(tmp_path, CHAT)
    step = next(p.step for p in plan(loaded).steps if isinstance(p.step, Tune))
    assert (step.stage, step.loss.lm, step.loss.kl, step.lora) == ("sft", 1.0, 0.0, None)
    with pytest.raises(SourceError, match="this one has none"):
        run(loaded, device="cpu")
    assert not (home / "steps").exists()
    (tmp_path / "teacher" / "chat_template.jinja").write_text(CHATML)
    record = read_record(run(loaded, device="cpu"))
    assert [s.step for s in record.steps] == ["select", "swap", "switch", "sft", "evaluate"]
    assert all(math.isfinite(r.value) for r in record.rows) and record.status == "finished"


@pytest.mark.usefixtures("little_library")
@pytest.mark.parametrize("held_out", [False, True])
def test_every_row_that_a_stage_reads_is_read_before_the_first_one(held_out, tiny, tmp_path, home):
    """The eighth row, or the second held-out one, where a stage is validated on them."""
    words = tokenizer(CHATML)
    hf.export(tiny(4, 2, vocab_size=len(words), max_position_embeddings=64), words, tmp_path / "teacher", hybrid=None)
    turns = [{"role": r, "content": c} for r, c in TURNS]
    bad = [{"role": "user", "content": "x"}, {"role": "gpt", "content": "y"}]
    rows = [turns] * 9 + [turns, bad] if held_out else [turns] * 7 + [bad, turns]
    source(tmp_path, [{"messages": row} for row in rows])
    stage = CHAT.replace("[9, 10], test: [10, 11]", "[9, 11], test: [11, 12]")
    loaded = recipe(tmp_path, stage + (", validation: {every: 1}" if held_out else ""))
    with pytest.raises(SourceError, match=f"c.jsonl:{11 if held_out else 8}: column 'messages': unknown roles 'gpt'"):
        preflight(plan(loaded), tokenizer=words, recipe=loaded.path)
    with pytest.raises(SourceError, match="unknown roles 'gpt'"):
        run(loaded, device="cpu")
    assert not (home / "steps").exists()
    loaded = recipe(tmp_path, stage)
    (tmp_path / "small.yaml").write_text(
        "name: small\nevals: [{eval: perplexity, rows: 2, length: 32, text: {source: jsonl, path: t.jsonl}}]\n"
    )
    (tmp_path / "t.jsonl").write_text('{"text": "x"}\n' * 40 + '{"txt": "x"}\n')
    source(tmp_path, [{"messages": turns}] * 12)
    with pytest.raises(SourceError, match=r"t.jsonl:41: no column 'text', found 'txt'"):
        preflight(plan(load(loaded.path)), tokenizer=words, recipe=loaded.path)


@pytest.mark.parametrize(
    ("sft", "words"),
    [
        ("", r"r.yaml:3.*schedule.sft: no data of its own; expected .*loss: response"),
        (CHAT.replace("loss: response, ", ""), "schedule.sft: rows with loss: all"),
        (CHAT.replace("chat: {}, ", ""), "response needs a template or a chat"),
    ],
)
def test_a_stage_without_answers_is_refused(sft, words, tiny, tmp_path):
    hf.export(tiny(4, 2, max_position_embeddings=64), tokenizer(None), tmp_path / "teacher", hybrid=None)
    with pytest.raises((PlanError, RecipeError), match=words):
        plan(recipe(tmp_path, sft))


def test_the_file_is_known_to_what_is_reused():
    from recipelin import reuse

    assert "chat.py" in reuse._DATA and Path(chat.__file__).name == "chat.py"
