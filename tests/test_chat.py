"""Conversations by the tokenizer's own chat template: which tokens are the assistant's, and the stage that trains on them."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recipelin import chat, data, hf
from recipelin.documents import documents
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.records import read_record
from recipelin.run import run
from recipelin.sources import Data, LocalFile, SourceError
from recipelin.spool import stream
from recipelin.steps import Tune
from recipelin.strict_yaml import RecipeError

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
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TURNS = (
    ("user", "What is 2 and 3?"),
    ("assistant", " It is 5, it is said "),
    ("user", "It is 5, it is said"),
    ("assistant", "Be kind."),
)


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
    only = tokenizer(PLAIN)  # without a token that ends a turn, the answer alone
    text, spans = chat.written(TURNS[:2], only)
    encoding = only.backend_tokenizer.encode(text, add_special_tokens=False)
    ((first, last),) = chat.said(encoding, text, spans, chat.special_ids(only))
    assert only.decode(encoding.ids[first:last]).strip() == TURNS[1][1].strip()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "c.jsonl:0: column 'messages' holds no turn; expected turns"),
        ("text", "c.jsonl:0: column 'messages' holds a str; expected turns"),
        ([{"rol": "user", "content": "x"}], "turn 0: no 'role'; did you mean 'rol'"),
        ([{"role": "user", "content": None}], "turn 0: 'content' holds a NoneType; expected text"),
        (
            [{"role": "critic", "content": "x"}],
            "c.jsonl:0: the tokenizer's chat template refuses the turns: who is critic",
        ),
        ([{"role": "assistant", "content": "loud"}], "chat template changes turn 0, so that its tokens cannot be told"),
        ([{"role": "assistant", "content": "x"}, {"role": "tool", "content": "x"}], "leaves answers out or moves them"),
    ],
)
def test_rows_that_are_no_conversation(row, words, tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('who is ' + m.role) }}{% endif %}"
        "{% if messages[-1].role != 'tool' %}{{ m.role + m.content.replace('loud', 'LOUD') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(SourceError, match=words):
        stream(source(tmp_path, [{"messages": row}]), tokenizer(template), part="training", folder=tmp_path, cache=None)


def test_what_does_not_go_with_a_chat(tmp_path):
    made = source(tmp_path)
    for change, words in (
        ({"field": "t"}, "one of field, template and chat"),
        ({"template": "alpaca"}, "one of field, template and chat"),
        ({"source": "text"}, "text has no columns for a chat"),
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
