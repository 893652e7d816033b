"""The `retrieval` evaluation: every item says what it is, a model that attends scores 1, one that cannot the guess."""

import re
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import recipelin
from recipelin import data, lookup
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.evals.greedy import greedy
from recipelin.evals.retrieval.config import Config
from recipelin.evals.retrieval.items import rows
from recipelin.evals.retrieval.run import _generate, _haystack, _likelihood, chance, score
from recipelin.evals.subject import Subject
from recipelin.facts import WORDINGS, filler
from recipelin.files import home
from recipelin.load import load
from recipelin.plan import plan
from recipelin.preflight import preflight
from recipelin.sources import Data, Facts, Retrieval, SourceError, Stdlib
from recipelin.states import State, resolve
from recipelin.steps import Swap
from recipelin.swap import swap, switch
from tests.rows import without_layers

HYBRID = State(window=8)
STDLIB = {"source": "python-stdlib"}
POCKET = Path(recipelin.__file__).parent / "pocket"
FORMATS = {
    "associative": {"pairs": 8, "queries": 3},
    "passkey": {},
    "needle": {"text": STDLIB},
    "needles": {"text": STDLIB, "pairs": 4, "queries": 2},
    "copy": {"text": STDLIB, "copied": 24},
}


def config(kind="associative", length=512, distances=(80, 200, 420), **extra):
    format = "needle" if kind == "needles" else kind
    given = {"format": format, "length": length, "distances": distances, "items": 4}
    return Config.model_validate({**given, **FORMATS[kind], **extra})


def trained(kind):
    """Tokenizers of the kinds in use: Llama 3 (regex, digits in threes), Llama 2 (Metaspace, bytes, BOS), BERT."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = [t for _, t in list(data.documents(Stdlib(**STDLIB), "training", Path()))[:30]]
    texts += [
        f"{w.fact} {w.question} " + " ".join(map(str, (*w.keys, *w.values(np.random.default_rng(0), 500))))
        for w in WORDINGS.values()
    ]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama3":
        made = Tokenizer(models.BPE())
        split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    elif kind == "llama2":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation(),
             pre_tokenizers.Split("\n", "isolated")]
        )  # fmt: skip
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
                                      show_progress=False)  # fmt: skip
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special, show_progress=False)
    made.train_from_iterator(texts, trainer)
    if kind == "llama2":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def tokenizers():
    return {"pocket": AutoTokenizer.from_pretrained(POCKET)} | {k: trained(k) for k in ("llama3", "llama2", "bert")}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["pocket"]


@pytest.fixture(autouse=True, scope="module")
def _read_once(tmp_path_factory):
    """A home of this file's own: the library is tokenised once for each tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPELIN_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def words(tokenizer, ids):
    """The text without white space at its ends or doubled, in small letters (BERT's)."""
    return " ".join(tokenizer.decode(ids).lower().replace(" .", ".").replace(" ?", "?").split())


STEMS = {
    "associative": r"the code of (\w+) is",
    "passkey": r"the pass key is()",
    "needle": r"the one thing to see in (\w+) is the",
}


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "copy"])
@pytest.mark.parametrize("which", ["pocket", "llama3", "llama2", "bert"])
def test_every_item_is_what_it_says(tokenizers, kind, which):
    tokenizer, asked = tokenizers[which], config(kind)
    made = rows(asked, tokenizer, _haystack(asked, tokenizer, Path()), seed=3)
    cells = [(q.distance, q.id) for row in made for q in row.questions]
    assert sorted(cells) == sorted((d, f"{d}-{n}") for d in asked.distances for n in range(asked.items))
    assert len({(q.size, q.answer) for row in made for q in row.questions}) == asked.queries, "length tells nothing"
    for row in made:
        ids, known = row.ids.tolist(), []
        assert len(ids) == asked.length and min(ids) >= 0
        assert (ids[0] == tokenizer.bos_token_id) == (which == "llama2")
        assert row.questions[-1].answer + row.questions[-1].size == len(ids), "a row ends in its last answer"
        whole = words(tokenizer, ids)
        for number, q in enumerate(row.questions):
            assert q.distance == q.answer - 1 - q.fact and q.before == number
            assert ids[q.fact : q.fact + q.size] == ids[q.answer : q.answer + q.size]
            value = words(tokenizer, ids[q.answer : q.answer + q.size])
            stem = re.search(STEMS[asked.format] + "$", words(tokenizer, ids[: q.answer]))
            assert stem, "the question ends where the answer begins"
            assert words(tokenizer, ids[: q.fact + q.size]).endswith(f"{stem[0]} {value}"), (
                "the fact is where it is said"
            )
            assert whole.count(f"{stem[0]} {value}") == whole.count(stem[0]) == 2, (
                "one fact, one question, nothing else"
            )
            known.append((stem[1], value))
        facts = re.findall(STEMS[asked.format] + r" ((?:\w+ )?\w+)\.", words(tokenizer, ids[: row.questions[0].answer]))
        assert len(facts) == asked.pairs and set(known) <= set(facts)
        assert len({k for k, _ in facts}) == len({v for _, v in facts}) == asked.pairs
        if asked.format == "passkey":
            assert re.fullmatch(r"[1-9]\d{4}", known[0][1])


@pytest.mark.parametrize("which", ["pocket", "llama3", "llama2", "bert"])
def test_every_string_is_said_twice(tokenizers, which):
    tokenizer, asked = tokenizers[which], config("copy")
    haystack = _haystack(asked, tokenizer, Path())
    made = rows(asked, tokenizer, haystack, seed=3)
    cells = [(q.distance, q.id) for row in made for q in row.questions]
    assert sorted(cells) == sorted((d, f"{d}-{n}") for d in asked.distances for n in range(asked.items))
    strings, text = [], set(np.flatnonzero(np.bincount(haystack)).tolist())
    for row in made:
        ids, (q,) = row.ids.tolist(), row.questions
        assert len(ids) == 512 == q.answer + q.size and min(ids) >= 0 and q.size == 24
        assert (ids[0] == tokenizer.bos_token_id) == (which == "llama2")
        assert q.distance == q.answer - 1 - q.fact
        strings.append(ids[q.answer :])
        assert ids[q.fact : q.fact + q.size] == strings[-1] and len(set(strings[-1])) == 24
        assert set(strings[-1]) <= text - set(tokenizer.all_special_ids)
        assert all(tokenizer.decode([t]).strip().isalnum() for t in strings[-1])
        assert words(tokenizer, ids[: q.fact]).endswith("the list to remember is")
        assert words(tokenizer, ids[: q.answer]).endswith("what is the list? the list to remember is")
        assert words(tokenizer, ids).count("the list to remember is") == 2, "one string, one copy, nothing else"
    assert len(set(map(tuple, strings))) == len(made)


def test_rows_are_pure_and_follow_seed_and_part(tokenizer):
    for kind in FORMATS:
        asked = config(kind)
        haystack = _haystack(asked, tokenizer, Path())
        made, again, other = (rows(asked, tokenizer, haystack, seed=s) for s in (3, 3, 4))
        assert all(
            np.array_equal(a.ids, b.ids) and a.questions == b.questions for a, b in zip(made, again, strict=True)
        )
        selection = rows(asked.model_copy(update={"part": "selection"}), tokenizer, haystack, seed=3)
        texts = {kept.ids.tobytes() for kept in made}
        assert len(texts) == asked.rows and not texts & {r.ids.tobytes() for r in (*other, *selection)}


def test_lengths_to_32k_are_exact(tokenizers):
    for length in (128, 1024, 4096, 32768):
        asked = config("associative", length=length, distances=(40, length - 60), items=1, pairs=4, queries=2)
        for which in ("pocket", "llama3"):
            (row,) = rows(asked, tokenizers[which], _haystack(asked, tokenizers[which], Path()), seed=0)
            assert len(row.ids) == length and {q.distance for q in row.questions} == {40, length - 60}


class Induction:
    """Attends perfectly, over the last `window` tokens: copies what followed the longest match of what it has just read."""

    generation_config = SimpleNamespace(eos_token_id=None)
    model = without_layers()

    def __init__(self, window=10**9):
        self.window = window

    def modules(self):
        return []

    def next(self, ids, position):
        here, best, found = ids[: position + 1], 0, 0
        for place in range(max(0, position - self.window), position):
            size = 0
            while size <= place and size < 60 and here[place - size] == here[position - size]:
                size += 1
            if size > best:
                best, found = size, here[place + 1]
        return found

    def __call__(self, input_ids, logits_to_keep, **_):
        logits = torch.zeros(len(input_ids), len(logits_to_keep), 3000)
        for row, ids in enumerate(input_ids.tolist()):
            for i, position in enumerate(logits_to_keep.tolist()):
                logits[row, i, self.next(ids, position)] = 1
        return SimpleNamespace(logits=logits)

    def generate(self, prompt, generation_config, **_):
        made = prompt.tolist()
        for ids in made:
            for _ in range(generation_config.max_new_tokens):
                ids.append(self.next(ids, len(ids) - 1))
        return torch.tensor(made)


def run(config, model, tokenizer, *, seed=0, name="hybrid", hybrid=HYBRID, exposed_from=8):
    subject = Subject(
        model=model, tokenizer=tokenizer, state=resolve(name, hybrid), seed=seed, exposed_from=exposed_from,
        folder=Path(), base=Path(), device="cpu",
    )  # fmt: skip
    return lookup.implementation("evals", "retrieval").run(config, subject)


@pytest.mark.parametrize("kind", FORMATS)
def test_perfect_attention_scores_one_and_a_window_only_what_it_sees(tokenizer, kind):
    asked = config(kind, scoring=("likelihood", "generate"))
    results = run(asked, Induction(), tokenizer)
    assert [(r.task, r.metric) for r in results] == [(n.task, n.metric) for n in asked.names()]
    label, metrics = asked.format, [["exact_match"], ["generated"]]
    if kind == "copy":
        places = ["1", "2", "3_4", "5_8", "9_16", "17_24"]
        label = "copy24"
        metrics = [["token_accuracy", *(f"position_{p}" for p in places)], ["prefix_match", "generated"]]
    assert [(r.task, r.metric) for r in results] == [
        (f"{label}@512:{d}", m) for each in metrics for d in asked.distances for m in each
    ]
    assert all(r.value == 1 and r.n == 4 and r.stderr == 0 and r.exposed == 1 for r in results)
    near, *far = (r for r in run(config(kind), Induction(window=100), tokenizer) if not r.metric.startswith("position"))
    assert near.value == 1
    # of a copy, a window sees what follows a token where the text says it again
    assert all(r.value <= (0.2 if kind == "copy" else 0) for r in far)


def test_chance_is_the_guess_among_what_was_not_yet_asked(tokenizer):
    asked = config("associative", items=60)
    made = rows(asked, tokenizer, _haystack(asked, tokenizer, Path()), seed=0)
    draw = np.random.default_rng(0)
    hits, said = [], []
    for row in made:
        ids = row.ids.tolist()
        text = tokenizer.decode(ids[: row.questions[0].answer])
        left = [v for _, v in re.findall(r"The code of (\w+) is (\w+)\.", text)]
        for q in row.questions:
            answer = tokenizer.decode(ids[q.answer : q.answer + q.size]).strip()
            hits.append(left[int(draw.integers(len(left)))] == answer)
            said.append(chance(asked, "exact_match", q))
            left.remove(answer)
    assert abs(np.mean(hits) - np.mean(said)) < 3 * np.sqrt(np.mean(said) / len(said))
    assert {round(c, 9) for c in said} == {round(1 / n, 9) for n in (8, 7, 6)}
    assert run(config("passkey"), Induction(), tokenizer)[0].chance == 1 / 90000
    assert run(config("needle"), Induction(), tokenizer)[0].chance == 0


def test_chance_of_a_copy_is_a_guess_in_any_order(tokenizer):
    """Over all orders of a string of five tokens: by place, in the whole, before the first wrong one, all."""
    asked = config("copy", copied=5)
    draws = [[a == b for a, b in enumerate(order)] for order in permutations(range(5))]
    # At place i one of the 5 - i that did not come yet: the right ones before were given.
    places = [1 / (5 - i) for i in range(5)]
    (row, *_) = rows(asked, tokenizer, _haystack(asked, tokenizer, Path()), seed=0)
    (question,) = row.questions
    assert asked.positions == {
        "position_1": slice(0, 1),
        "position_2": slice(1, 2),
        "position_3_4": slice(2, 4),
        "position_5": slice(4, 5),
    }
    expected = {
        "token_accuracy": np.mean(places), "position_1": 1 / 5, "position_3_4": (1 / 3 + 1 / 2) / 2, "position_5": 1.0,
        **{m: np.mean([score(asked, m, d) for d in draws]) for m in ("prefix_match", "generated")},
    }  # fmt: skip
    assert {m: chance(asked, m, question) for m in expected} == pytest.approx(expected)


def test_scores_of_a_string_by_hand():
    asked, hits = config("copy", copied=5), [True, True, False, True, False]
    by_hand = {"token_accuracy": 3 / 5, "prefix_match": 2 / 5, "generated": 0.0, "position_1": 1.0, "position_3_4": 0.5,
               "position_5": 0.0}  # fmt: skip
    assert {m: score(asked, m, hits) for m in by_hand} == by_hand
    assert {score(asked, m, [True] * 5) for m in by_hand} == {1.0}


def test_exposure_of_a_string_is_of_its_tokens(tokenizer):
    """Of 24 tokens at 488 .. 511, those predicted from position 500 on see a key outside the window."""
    found = {r.metric: r for r in run(config("copy"), Induction(), tokenizer, exposed_from=500)[:7]}
    assert found["token_accuracy"].exposed == pytest.approx(11 / 24)
    assert found["position_1"].exposed == 0 and found["position_17_24"].exposed == 1


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
                    head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2,
                    eos_token_id=None, bos_token_id=None, pad_token_id=None)
    ).eval()  # fmt: skip
    swap(made, Swap(form="hybrid", config=Hybrid()), seed=0)
    return made


def test_random_weights_score_about_the_guess(model, tokenizer):
    switch(model, HYBRID)
    for result in run(config("associative", length=256, distances=(60, 90, 180)), model, tokenizer):
        assert result.value <= 0.25 and result.exposed == 1


@pytest.mark.parametrize("name", ["softmax", "hybrid", "window", "linear", "linear_outside", "sinks", "none"])
def test_generation_and_likelihood_agree_in_every_state(model, tokenizer, name):
    """Rows whose answers are what the model itself would say: both scores are 1; with a wrong token, 0."""
    switch(model, resolve(name, HYBRID).state)
    asked = config("associative", length=160, distances=(40, 60, 110), items=1, pairs=4)
    (row,) = rows(asked, tokenizer, _haystack(asked, tokenizer, Path()), seed=0)
    ids = torch.from_numpy(row.ids)[None]
    for q in row.questions:
        for place in range(q.answer, q.answer + q.size):
            with torch.no_grad():
                ids[0, place] = model(input_ids=ids[:, :place], use_cache=False).logits[0, -1].argmax()
    both = (_likelihood, _generate)
    assert all(hits(model, tokenizer, ids, row.questions).all() for hits in both)
    wrong, q = ids.clone(), row.questions[1]
    wrong[0, q.answer + q.size - 1] = (wrong[0, q.answer + q.size - 1] + 1) % len(tokenizer)
    for hits in both:
        assert hits(model, tokenizer, wrong, row.questions)[0, 1].tolist() == [True] * (q.size - 1) + [False]
    batch = torch.cat([ids, wrong, ids])
    assert _generate(model, tokenizer, batch, row.questions)[::2].all()


def test_generation_ends_where_every_row_has_said_something_else(model, tokenizer):
    """And not before: what is made until then is what is made without an end."""
    switch(model, HYBRID)
    prompts = torch.from_numpy(np.random.default_rng(0).integers(3, 900, (3, 40)))
    whole = greedy(model, tokenizer, prompts, 8)
    made = []
    handle = model.lm_head.register_forward_hook(lambda *_: made.append(1))
    for wrong, steps in (((0, 0, 0), 1), ((0, 3, 1), 4), ((0, 7, 2), 8), ((0, 8, 2), 8)):
        expected = whole.clone()
        for row, place in enumerate(wrong):
            expected[row, place:] = 1  # another token from there on
        assert not (expected == whole)[0, 0]
        made.clear()
        found = greedy(model, tokenizer, prompts, 8, expected=expected)
        assert len(made) == steps and torch.equal(found[:, :steps], whole[:, :steps])
        assert bool((found[:, steps:] == -1).all())
    handle.remove()


def test_a_state_without_a_cache_gives_likelihood_only_and_says_so(model, tokenizer, capsys):
    hybrid = State(window="full")
    asked = config("passkey", length=128, distances=(40,), scoring=("likelihood", "generate"))
    switch(model, hybrid)
    (only,) = run(asked, model, tokenizer, hybrid=hybrid)
    assert only.metric == "exact_match"
    assert (
        "state hybrid: window `full` beside a linear branch keeps no cache: likelihood only" in capsys.readouterr().err
    )
    switch(model, resolve("softmax", hybrid).state)
    assert len(run(asked, model, tokenizer, hybrid=hybrid, name="softmax")) == 2


def test_only_the_answers_logits_are_made(model, tokenizer, monkeypatch):
    switch(model, HYBRID)
    seen = []
    original = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape[1]) or original(x))
    run(config("associative", length=256, distances=(60, 90, 180), items=2, batch=1), model, tokenizer)
    assert set(seen) == {3 * 3} and len(seen) == 2  # three questions of three tokens in each row


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": 3}, "give more pairs than queries"),
        ({"queries": 5, "pairs": 9}, "no multiple of 5 queries"),
        ({"distances": (80, 80, 90)}, "distances: one is given twice"),
        ({"distances": (80, 200, 512)}, "distance 512 does not fit"),
        ({"format": "passkey"}, "one number and one question"),
        ({"format": "needle", "queries": 2, "pairs": 1, "items": 2, "text": STDLIB}, "2 queries of 1 pairs"),
        ({"format": "needle", "queries": 1}, "needs a haystack"),
        ({"text": STDLIB, "filler": "Rain."}, "not both"),
        ({"filler": " "}, "filler"),
        ({"copied": 8}, "copied: the tokens of the string; give it with format: copy"),
        ({"format": "copy", "pairs": 1, "queries": 1, "text": STDLIB}, "copied: the tokens of the string"),
        ({"format": "copy", "pairs": 1, "queries": 1, "copied": 8}, "copy: needs a haystack"),
        ({"format": "copy", "copied": 8, "text": STDLIB}, "one string and one question"),
    ],
)
def test_settings_that_cannot_be(change, words):
    with pytest.raises(ValidationError, match=words):
        config("associative", **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"distances": (5, 200, 420)},
            r"distance 5 does not fit a row of 512 tokens with this tokenizer; \d+ to \d+ do",
        ),
        ({"distances": (80, 200, 508)}, "distance 508 does not fit"),
        ({"distances": (14, 15, 400)}, "do not fit together"),
        ({"pairs": 60}, "no room for 60 facts|lower pairs"),
        (
            {"text": {"source": "text", "path": "short.txt"}},
            "the test part has 1?[0-9]+ tokens of text, a row of 512 needs",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(tokenizer, tmp_path, change, words):
    (tmp_path / "short.txt").write_text("\n\n".join(f"word {i}" for i in range(300)))
    preflight = lookup.implementation("evals", "retrieval").preflight
    with pytest.raises(SourceError, match=words):
        preflight(config("associative", **change), tokenizer=tokenizer, seeds=(0,), base=tmp_path)


def test_a_string_that_does_not_fit_or_that_the_text_cannot_make_is_refused(tokenizer):
    preflight = lookup.implementation("evals", "retrieval").preflight
    asked = {"tokenizer": tokenizer, "seeds": (0,), "base": Path()}
    for change, said in (
        ({"copied": 100}, "distance 80 does not fit a row of 512 tokens with this tokenizer; 1"),
        (
            {"text": None, "filler": "Rain and wind. "},
            r"the text has \d+ different tokens of letters or digits, a string of 24",
        ),
    ):
        with pytest.raises(SourceError, match=said):
            preflight(config("copy", **change), **asked)


def test_a_tokenizer_of_few_words_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<unk>": 0, "The": 1, "code": 2, "of": 3, "is": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    few = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    with pytest.raises(SourceError, match="this tokenizer spells 0 of"):
        rows(config(), few, np.zeros(512, dtype=np.int64), seed=0)
    with pytest.raises(SourceError, match="this tokenizer has no tokens for"):
        rows(config("copy"), few, np.zeros(512, dtype=np.int64), seed=0)


def test_a_text_that_says_the_fact_itself_is_refused(tokenizer):
    asked = config("passkey", text=STDLIB)
    poisoned = filler(tokenizer, "It is so quiet.\nThe PASS key is 11111. Remember it.", 900)
    with pytest.raises(SourceError, match="the text says"):
        rows(asked, tokenizer, poisoned, seed=0)


def test_the_plan_counts_what_is_read():
    assert config("associative").tokens() == 4 * 512
    assert config("associative", scoring=("likelihood", "generate")).tokens() == 4 * 512 * (1 + 3)
    assert config("passkey", scoring=("generate",)).tokens() == 12 * 512


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "needles"])
def test_training_rows_ask_what_they_hold_at_every_distance(tokenizer, kind):
    given = {k: v for k, v in FORMATS[kind].items() if k in Facts.model_fields}
    source = Retrieval.model_validate({"source": "retrieval", "format": kind, "text": STDLIB, **given})
    rows = data.Batches(
        Data(mix=(source,)),
        tokenizer,
        part="training",
        length=512,
        batch=40,
        seed=3,
        folder=Path(),
        cache=home() / "tokens",
    )
    batch, again = rows.batch(1), rows.batch(1)
    assert torch.equal(batch.input_ids, again.input_ids) and not torch.equal(batch.input_ids, rows.batch(2).input_ids)
    distances = []
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        scored = [i for i, label in enumerate(labels) if label != data.IGNORED]
        assert all(labels[i] == ids[i] for i in scored) and scored[-1] == 511
        answers = [[]]
        for i in scored:
            if answers[-1] and i != answers[-1][-1] + 1:
                answers.append([])
            answers[-1].append(i)
        assert len(answers) == source.queries
        for answer in answers:
            said = [ids[i] for i in answer]
            found = [i for i in range(answer[0]) if ids[i : i + len(said)] == said]
            assert found, "an answer that its row does not hold"
            distances.append(answer[0] - 1 - found[0])
    assert len(set(distances)) > 20 and min(distances) < 150 and max(distances) > 350


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{source: retrieval, format: copy, copied: 200}", "a row of 256 tokens has no room for 1 facts of"),
        ("{source: retrieval, format: associative, pairs: 30}", "no room for 30 facts|lower pairs"),
        ("{source: recall, keys: 5000}", "word tokens, 10000 are needed"),
    ],
)
def test_generated_rows_that_do_not_fit_are_refused_before_the_first_step(tmp_path, source, words):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nextends: pocket/lolcats\ndata: {{mix: [{source}]}}\n")
    pocket = AutoTokenizer.from_pretrained(POCKET)
    with pytest.raises(SourceError, match=words):
        preflight(plan(load(str(recipe))), tokenizer=pocket, recipe=recipe)
