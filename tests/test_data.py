"""Text to batches: disjoint parts, purity, packing, labels, and clear words for files that are not as named."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from recipelin import data
from recipelin.data import IGNORED, Batches
from recipelin.documents import documents
from recipelin.sources import Data, LocalFile, Recall, SourceError, Stdlib, part_of
from recipelin.spool import Stream, stream
from recipelin.templates import TEMPLATES, Template

STDLIB = Stdlib(source="python-stdlib")
PARTS = ("training", "selection", "test")
CACHE = tempfile.TemporaryDirectory()  # tokenising takes a second: once for the file
pytestmark = pytest.mark.usefixtures("little_library")


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([t for _, t in list(documents(STDLIB, "training", Path()))[:40]], 900)


def batches(tokenizer, mix, **extra):
    arguments = {
        "part": "training",
        "length": 64,
        "batch": 4,
        "seed": 5,
        "folder": Path(),
        "cache": Path(CACHE.name),
        **extra,
    }
    settings = {n: arguments.pop(n) for n in ("separate", "positions") if n in arguments}
    return Batches(Data(mix=mix, **settings), tokenizer, **arguments)


def test_a_batch_is_a_pure_function(tokenizer, tmp_path):
    mix = (STDLIB, Recall(source="recall"))
    one, other = batches(tokenizer, mix, cache=None), batches(tokenizer, mix, cache=tmp_path)
    for step in range(5):
        other.batch(step)
    again = batches(tokenizer, mix, cache=tmp_path)  # from the cache
    for found in (other, again):
        assert torch.equal(one.batch(17, 0).input_ids, found.batch(17, 0).input_ids)
        assert torch.equal(one.batch(17, 0).labels, found.batch(17, 0).labels)
    assert not torch.equal(one.batch(17).input_ids, one.batch(18).input_ids)
    assert not torch.equal(one.batch(17).input_ids, batches(tokenizer, mix, seed=6).batch(17).input_ids)


def test_accumulated_micro_batches_are_the_large_batch(tokenizer):
    large = batches(tokenizer, (STDLIB,), batch=4).batch(3)
    small = batches(tokenizer, (STDLIB,), batch=1, accumulation=4)
    assert torch.equal(torch.cat([small.batch(3, m).input_ids for m in range(4)]), large.input_ids)


def test_an_epoch_reads_every_row_once(tokenizer, tmp_path):
    text = "\n\n".join(f"paragraph {i} says the number {i * 7} in words and no more" for i in range(300))
    (tmp_path / "t.txt").write_text(text)
    source = LocalFile(source="text", path="t.txt")
    made = batches(tokenizer, (source,), length=16, batch=1, folder=tmp_path)
    rows = [tuple(made.batch(i).input_ids[0].tolist()) for i in range(made.rows)]
    tokens = stream(source, tokenizer, part="training", folder=tmp_path, cache=None).tokens
    expected = [tuple(tokens[i * 16 : (i + 1) * 16].tolist()) for i in range(len(tokens) // 16)]
    assert sorted(rows) == sorted(expected) and rows != expected
    second = [tuple(made.batch(i).input_ids[0].tolist()) for i in range(made.rows, 2 * made.rows)]
    assert sorted(second) == sorted(expected) and second != rows


def test_packing_with_and_without_separation(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(f"text {i}" for i in range(400)))
    source = LocalFile(source="text", path="t.txt")
    run_on = batches(tokenizer, (source,), folder=tmp_path).batch(0)
    assert run_on.segment_ids is None and torch.equal(run_on.position_ids[0], torch.arange(64))
    assert torch.equal(run_on.labels, run_on.input_ids)
    apart = batches(tokenizer, (source,), folder=tmp_path, separate=True, positions="restart").batch(0)
    assert torch.equal(apart.input_ids, run_on.input_ids)
    segments, positions = apart.segment_ids[0], apart.position_ids[0]
    begins = [0] + [i for i in range(1, 64) if segments[i] != segments[i - 1]]
    assert len(begins) > 3 and all(positions[i] == 0 for i in begins)
    assert all(apart.input_ids[0, i] == tokenizer.bos_token_id for i in begins[1:])
    assert (
        all(apart.labels[0, i] == IGNORED for i in begins[1:])
        and int((apart.labels[0] == IGNORED).sum()) == len(begins) - 1
    )


def test_weights_are_respected(tokenizer):
    made = batches(
        tokenizer, (Stdlib(source="python-stdlib", weight=3.0), Recall(source="recall", weight=1.0)), batch=50
    )
    recall = np.mean([float((made.batch(i).labels == IGNORED).any(1).float().mean()) for i in range(20)])
    assert 0.2 < recall < 0.3


def test_recall_rows_score_only_what_was_seen(tokenizer):
    made = batches(tokenizer, (Recall(source="recall", spacing=4, pairs=6),), length=128, batch=6)
    batch, marker = made.batch(2), data.marker_id(tokenizer)
    late = 0
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        known: dict[int, int] = {}
        for place in (i for i, t in enumerate(ids[:-2]) if t == marker):
            key, value = ids[place + 1], ids[place + 2]
            assert labels[place + 2] == (value if key in known else IGNORED)
            assert known.setdefault(key, value) == value
            late += key not in known or place > 64
        scored = [i for i, y in enumerate(labels) if y != IGNORED]
        assert scored and all(ids[i] == labels[i] and ids[i - 2] == marker for i in scored)
    assert late, "keys must be born throughout the row"


def test_recall_written_as_lines_scores_values_of_known_keys(tokenizer):
    made = batches(tokenizer, (Recall(source="recall", spacing=5, pairs=6, slot="line"),), length=128, batch=6)
    written = data.writing(tokenizer, "line")
    batch = made.batch(0)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        scored = [i for i, y in enumerate(labels) if y != IGNORED]
        assert scored
        for place in scored:
            slot = ids[place - 2 : place + 1]
            assert slot[0] == written.sign and slot[1] in written.keys and slot[2] == labels[place]
            assert any(ids[i : i + 3] == slot for i in range(place - 4)), "what is asked has been said"


def test_parts_of_generated_rows_differ(tokenizer):
    mix = (Recall(source="recall"),)
    rows = [batches(tokenizer, mix, part=p).batch(0).input_ids for p in PARTS]
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])


def test_what_is_too_short_is_said(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo\n\nthree\n\nfour\n\nfive")
    with pytest.raises(SourceError, match=r"fewer than one row of 64|holds no document"):
        batches(tokenizer, (LocalFile(source="text", path="t.txt"),), folder=tmp_path)
    with pytest.raises(SourceError, match="lower keys and values"):
        data.recall_words(tokenizer, 5000, 5000)
    plain = data.train_tokenizer(["a b c"] * 3, 262)
    assert data.marker_id(plain) == 3


# --- templates and masked prompts -------------------------------------------------------------------------------------

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
)
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)


def alpaca(folder: Path, rows: int) -> LocalFile:
    """A file of the format: every third row has an input; responses of very different lengths, one of them empty."""
    with (folder / "alpaca.jsonl").open("w") as file:
        for i in range(rows):
            output = "" if i == 5 else f"answer {i} " * (1 if i % 4 else 40)
            row = {"instruction": f"Say {i}.", "input": "" if i % 3 else f"number {i}", "output": output}
            file.write(json.dumps(row) + "\n")
    return LocalFile(
        source="jsonl",
        path="alpaca.jsonl",
        template="alpaca",
        loss="response",
        parts={"selection": (0, 10), "test": (10, 20)},
    )


def pocket():
    return PreTrainedTokenizerFast.from_pretrained(Path(data.__file__).parent / "pocket")


def without_bos():
    made = data.train_tokenizer([WITH_INPUT, WITHOUT, "answer number say 0123456789"] * 3, 300)
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="</s>")


def written_out(folder: Path, tokenizer, rows) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each training document, as LoLCATs' template_and_tokenize has them (facts/peers.md §A.5)."""
    found = []
    for number, line in enumerate((folder / "alpaca.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if number not in rows:
            continue
        prompt = (WITH_INPUT.replace("2 and 3", row["input"]) if row["input"] else WITHOUT).replace(
            "Add.", row["instruction"]
        )
        ids = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        if tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id, *ids]
        answer = tokenizer.backend_tokenizer.encode(row["output"], add_special_tokens=False).ids
        answer = [*answer, tokenizer.eos_token_id]
        found.append((ids + answer, [IGNORED] * len(ids) + answer))
    return found


def test_the_alpaca_template_is_exact():
    template = TEMPLATES["alpaca"]
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    assert template.render(row) == (WITH_INPUT, "5")
    assert template.render({**row, "input": ""}) == template.render({**row, "input": None}) == (WITHOUT, "5")
    empty = template.render({**row, "instruction": ""})
    assert "### Input:\n2 and 3" in empty[0], "an empty instruction does not drop the input"
    own = Template(prompt="{{{a b}}} {n}:", response=" {out.put}")
    assert own.columns == ("a b", "n", "out.put")
    assert own.render({"a b": "{x}", "n": 3, "out.put": "y"}) == ("{{x}} 3:", " y")
    with pytest.raises(ValueError, match="column 'n' holds a list; expected text"):
        own.render({"a b": "", "n": [1], "out.put": ""})


@pytest.mark.parametrize("make", [pocket, without_bos])
@pytest.mark.parametrize("separate", [False, True])
def test_masking_and_packing_equal_the_written_out_loop(make, separate, tmp_path):
    """Token by token: concatenate, cut, drop the remainder and the rows without a label that is predicted."""
    tokenizer, length = make(), 48
    assert (tokenizer.bos_token_id is None) == (make is without_bos)
    source = alpaca(tmp_path, 90)
    ids, labels, document, place = [], [], [], []
    for number, (tokens, own) in enumerate(written_out(tmp_path, tokenizer, range(20, 90))):
        ids, labels = ids + tokens, labels + ([IGNORED, *own[1:]] if separate else own)
        document, place = document + [number] * len(tokens), place + list(range(len(tokens)))
    expected, dropped = [], 0
    for start in range(0, len(ids) // length * length, length):
        cut = slice(start, start + length)
        if all(y == IGNORED for y in labels[cut][1:]):
            dropped += 1
            continue
        first = document[start]
        segments = tuple(d - first for d in document[cut]) if separate else None
        begun = place[start]
        positions = [p - begun if d == first else p for p, d in zip(place[cut], document[cut], strict=True)]
        expected.append(
            (tuple(ids[cut]), tuple(labels[cut]), segments, tuple(positions if separate else range(length)))
        )
    assert dropped > 5 and len(expected) > 20
    how = {"separate": separate, "positions": "restart" if separate else "run_on"}
    made = batches(tokenizer, (source,), folder=tmp_path, length=length, batch=1, cache=tmp_path, **how)
    assert made.rows == len(expected)
    found = []
    for step in range(made.rows):
        batch = made.batch(step)
        row = [batch.input_ids, batch.labels, batch.segment_ids, batch.position_ids]
        found.append(tuple(None if x is None else tuple(x[0].tolist()) for x in row))
    assert found != expected and sorted(found, key=str) == sorted(expected, key=str)


def test_where_rows_are_scored_equals_counting(tmp_path):
    """Stream.row and scored_rows beside loops, on random documents and silent tokens: none, all, rows within one document."""
    draw = np.random.default_rng(0)
    for trial in range(200):
        sizes = draw.integers(1, 14, draw.integers(1, 12))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        silent = draw.random(sizes.sum()) < (0, 0.3, 0.5, 0.9, 1)[trial % 5]
        edges = np.flatnonzero(np.diff(silent, prepend=False, append=False))
        if trial % 2:  # ranges that touch, as of two documents
            edges = np.repeat(np.flatnonzero(silent), 2) + np.tile([0, 1], silent.sum())
        found = Stream(np.arange(sizes.sum(), dtype=np.int32), starts, edges)
        document = np.repeat(np.arange(len(sizes)), sizes)
        place = np.arange(sizes.sum()) - starts[document]
        for length in (2, 3, 7):
            for separate in (False, True):
                carries = ~silent & ((place > 0) | (not separate))
                rows = [r for r in range(len(place) // length) if carries[r * length + 1 : (r + 1) * length].any()]
                assert found.scored_rows(length, separate=separate).tolist() == rows
            for start in range(len(place) - length + 1):
                tokens, segments, scored = found.row(start, length)
                cut = slice(start, start + length)
                assert tokens.tolist() == list(range(start, start + length))
                assert segments.tolist() == (document[cut] - document[start]).tolist()
                assert scored.tolist() == (~silent[cut]).tolist()


def test_a_part_without_any_response_is_said(tmp_path):
    source = alpaca(tmp_path, 90)
    long = source.model_copy(update={"template": Template(prompt="{instruction}" * 9, response="{input}")})
    (tmp_path / "alpaca.jsonl").write_text(
        json.dumps({"instruction": "x y z " * 999, "input": "", "output": ""}) + "\n"
    )
    long = long.model_copy(update={"parts": None})
    part = part_of("alpaca.jsonl:0")
    with pytest.raises(SourceError, match=r"no row of 64 tokens of the .* part has a token with loss"):
        batches(pocket(), (long,), folder=tmp_path, cache=None, part=part)
