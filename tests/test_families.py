"""Every family of families.py: parity with its teacher, students as Hugging Face models, counts, and refusals."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

import recipelin.hf as hf
from recipelin import families
from recipelin.attention.hybrid.config import Config, FeatureMap
from recipelin.cache import StateLayer, state_bytes
from recipelin.data import Batch
from recipelin.families import architecture, config_json
from recipelin.losses import hidden_states, token_loss
from recipelin.states import State, resolve
from recipelin.steps import Loss, Swap
from recipelin.swap import architecture_of, forms, recording, restore, swap, switch
from recipelin_kernels import resolve_kernel
from tests.rows import left_padded, logits, poison_memory, tokens

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYERS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
# Each row of families.py by the models that people have of it.
CASES = {
    "llama-2": ("llama", {"key_heads": 4, "tie_word_embeddings": False}),
    "llama-3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama-3.2": ("llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-0.1": ("mistral", {"sliding_window": 7}),
    "mistral-0.3": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-windowed": ("qwen2", LAYERS),
    "qwen3": ("qwen3", {}),
    "qwen3-windowed": ("qwen3", {**LAYERS, "attention_bias": True}),
}
HYBRID = State(window=5)
SINKS = State(branches=("window", "linear", "sinks"), window=5, sinks=3)


def test_every_family_has_a_case():
    assert {family for family, _ in CASES.values()} == set(families.FAMILIES)
    assert len(families.FAMILIES) == 4, "a new family: a row in CASES"


@pytest.fixture(params=CASES, ids=list(CASES))
def teacher(request, tiny):
    """A random model of one case, in the dtype asked for."""
    family, extra = CASES[request.param]
    return lambda dtype=torch.float32, layers=2: tiny(family=family, dtype=dtype, layers=layers, **extra)


@pytest.fixture(scope="module")
def tokenizer():
    from recipelin.data import train_tokenizer

    return train_tokenizer(["a small text"] * 3, 264)


@pytest.fixture
def student(teacher, tokenizer, tmp_path):
    """A function that swaps the case's model, exports it and loads it again."""

    def make(state: State = HYBRID, layers="all", dtype: str = "float32"):
        model = teacher()
        swap(model, Swap(form="hybrid", config=Config(feature_map=FeatureMap(width=3)), layers=layers), seed=3)
        switch(model, state)
        hf.export(model, tokenizer, tmp_path / "model", hybrid=state)
        return hf.load_student(tmp_path / "model", dtype=dtype, device="cpu")[0]

    return make


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "dtype", "least"),
    [
        *((kernel, torch.float32, 3e-6) for kernel in ("auto", "chunked", "cpu")),
        *((kernel, torch.float64, 1e-14) for kernel in ("auto", "chunked")),
    ],
)
def test_a_covering_window_is_the_teacher(teacher, kernel, dtype, least):
    """`auto` takes SDPA where it can: the operator's own arithmetic is held too."""
    model = teacher(dtype)
    ids = tokens(2, 37)
    expected = logits(model, ids)
    least *= float(expected.abs().max())  # logits of up to 6
    swap(model, Swap(form="hybrid", config=Config(kernel=kernel)), seed=0)
    for state in (State(window=37), State(window=37, join="absolute"), resolve("softmax", HYBRID).state):
        switch(model, state)
        assert (logits(model, ids) - expected).abs().max() < least, state
    with torch.no_grad(), recording(model, lambda *_: None):
        assert (logits(model, ids) - expected).abs().max() < least, "recording passes the teacher's stream on"
    switch(model, State(window=5))
    assert (logits(model, ids) - expected).abs().max() > 1e-3
    restore(model)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("given", ["mask", "mask and positions"])
def test_a_covering_window_is_the_teacher_on_padded_rows(teacher, given):
    model = teacher()
    ids, mask = left_padded(tokens(3, 29), (29, 12, 3))
    extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected = logits(model, ids, **extra)
    swap(model, Swap(form="hybrid", config=Config()), seed=0)
    for state in (State(window=29), resolve("softmax", HYBRID).state):
        switch(model, state)
        assert (logits(model, ids, **extra) - expected)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("layers", [None, (1,), "all"], ids=["stock", "mixed", "all"])
def test_documents_are_separate_while_positions_run_on(teacher, layers):
    """`separate: true`: of a stock teacher, of kept softmax layers and of swapped ones. A number that comes back is new."""
    model, ids = teacher(torch.float64), tokens(2, 45)
    whole = Batch(ids, ids.clone(), torch.arange(45).expand(2, -1))
    with torch.no_grad():
        expected = hidden_states(model, whole)
    if layers:
        swap(model, Swap(form="hybrid", config=Config(), layers=layers), seed=0)
    for state in (resolve("softmax", HYBRID).state, SINKS) if layers else (None,):
        if layers:
            switch(model, state)
        segments = (torch.arange(45) // 15 % 2).expand(2, -1)  # 0 1 0: three documents
        with torch.no_grad():
            found = hidden_states(model, replace(whole, segment_ids=segments))
            for start in (0, 15, 30):
                part = slice(start, start + 15)
                alone = Batch(ids[:, part], ids[:, part].clone(), whole.position_ids[:, part])
                assert (found[:, part] - hidden_states(model, alone)).abs().max() < 1e-10
            if state != SINKS:
                assert (hidden_states(model, whole) - expected).abs().max() < 1e-10, "rows without segments: as before"
            assert (found - hidden_states(model, whole))[:, 15:].abs().max() > 1e-3


def test_an_identical_student_has_no_divergence_on_separate_documents(teacher):
    model, stock, ids = teacher(torch.float64), teacher(torch.float64), tokens(2, 40)
    swap(model, Swap(form="hybrid", config=Config()), seed=0)
    switch(model, resolve("softmax", HYBRID).state)
    segments = (torch.arange(40) // 23).expand(2, -1)
    batch = Batch(ids, ids.clone(), torch.arange(40).expand(2, -1), segment_ids=segments)
    with torch.no_grad():
        assert abs(float(token_loss(model, batch, Loss(lm=0, kl=1), stock))) < 1e-12


def test_counts_without_torch_are_the_built_model(teacher):
    model = teacher()
    found = architecture_of(model)
    assert families.parameters(found)["total"] == sum(p.numel() for p in model.parameters())
    counted = {
        n: sum(p.numel() for p in getattr(model.model.layers[0].self_attn, n).parameters())
        for n in families.projections(found)
    }
    assert families.projections(found) == counted
    again = getattr(transformers, type(model.config).__name__)(**config_json(found))
    assert architecture(again.to_dict()) == found


# --- students ---------------------------------------------------------------------------------------------------------


def test_a_student_is_exported_and_loaded_bit_for_bit(teacher, tokenizer, tmp_path):
    model = teacher()
    swap(model, Swap(form="hybrid", config=Config()), seed=3)
    switch(model, HYBRID)
    before = logits(model, tokens(2, 23))
    hf.export(model, tokenizer, tmp_path / "model", hybrid=HYBRID)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config_class, model_class = hf.STUDENTS[model.config.model_type]
    assert type(loaded) is model_class and type(loaded.config) is config_class
    assert model_class is getattr(hf, model_class.__name__)
    assert torch.equal(logits(loaded, tokens(2, 23)), before)
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded"), tokens(2, 23)), before)


def test_half_precision_is_close_and_keeps_what_is_learned_in_fp32(student):
    ids = tokens(2, 19)
    exact, half = student(), student(dtype="bfloat16")
    form = forms(half)[0]
    assert form.q_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for group in form.groups().values() for p in group} == {torch.float32}
    spread = logits(exact, ids).std()
    assert (logits(half, ids).float() - logits(exact, ids)).abs().mean() < 0.05 * spread


def test_new_parameters_are_well_defined_whatever_memory_holds(teacher, student, tokenizer, tmp_path, monkeypatch):
    """A plain checkpoint loaded into the student's class: what it lacks starts as the form says."""
    student()
    layout = json.loads((tmp_path / "model" / "config.json").read_text())["recipelin"]
    plain = teacher()
    hf.export(plain, tokenizer, tmp_path / "plain", hybrid=None)
    config_class, model_class = hf.STUDENTS[plain.config.model_type]
    config = config_class.from_pretrained(tmp_path / "plain", recipelin=layout)

    poison_memory(monkeypatch)
    model = model_class.from_pretrained(tmp_path / "plain", config=config)
    for form in forms(model):
        assert torch.equal(form.feature_map_q.weight[:, :, :8], torch.eye(8).expand(4, 8, 8))
        assert torch.allclose(form.mix(), torch.tensor(0.1))
        assert torch.equal(form.log_scale.c, torch.zeros(4))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert torch.isfinite(logits(model, tokens(1, 19))).all()
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", (1,)], ids=["all", "mixed"])
@pytest.mark.parametrize("state", [HYBRID, SINKS, resolve("softmax", HYBRID).state], ids=["hybrid", "sinks", "softmax"])
def test_generation_is_the_uncached_argmax_and_padding_does_not_change_it(student, state, layers):
    model = student(state, layers)
    model.generation_config.eos_token_id = None
    lengths, new = (17, 9, 2), 64
    rows = tokens(3, 17)
    ids, mask = left_padded(rows, lengths)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=7)[:, 17:]
    assert together.shape == (3, new)
    for row, length in enumerate(lengths):
        # Greedy of a causal model, checked in one pass: every token is the argmax of the row before it.
        whole = torch.cat((rows[row, :length], together[row]))[None]
        found = logits(model, whole)[0, length - 1 : -1]
        assert found.argmax(-1).tolist() == together[row].tolist(), row


@pytest.mark.parametrize("layers", ["all", (1,)], ids=["all", "mixed"])
def test_prefill_in_parts_is_one_prefill_and_the_cache_stays_constant(student, layers):
    model = student(SINKS, layers)
    ids, mask = left_padded(tokens(3, 29), (29, 12, 3))
    whole = logits(model, ids, attention_mask=mask)
    cache, found, sizes = DynamicCache(config=model.config), [], set()
    for start, stop in ((0, 11), (11, 12), (12, 24), *((t, t + 1) for t in range(24, 29))):
        part = logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        found.append(part)
        sizes.add(state_bytes(cache))
    assert (torch.cat(found, 1) - whole)[mask.bool()].abs().max() < 1e-5
    assert [isinstance(x, StateLayer) for x in cache.layers] == [layers == "all", True]
    assert len(sizes) == 1


def test_beams_and_samples(student):
    model = student(SINKS)
    ids = tokens(2, 14)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "pad_token_id": 7}
    beams = {"num_beams": 3, "do_sample": False}
    cached = model.generate(ids, **settings, **beams)
    assert cached.tolist() == model.generate(ids, use_cache=False, **settings, **beams).tolist()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, do_sample=True, use_cache=use_cache, **settings).tolist())
    assert drawn[0] == drawn[1]


def test_gradient_checkpointing_changes_nothing(student):
    model = student(SINKS).train()
    ids, found = tokens(2, 21), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in found[0])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_a_student_would_lose_is_refused():
    numbers = config_json(architecture({**MINIMAL, "model_type": "llama"}))
    for change, words in (
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": "recipelin_llama"}, "is a converted model; expected its teacher"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
            "rope_type 'dynamic' is not supported",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ):
        with pytest.raises(ValueError, match=words):
            architecture({**numbers, "model_type": "llama", **change})


MINIMAL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def test_config_files_of_the_hub_are_read():
    """Keys as the hub's files of 2024 and as transformers 5 write them."""
    old = {**MINIMAL, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    new = {**MINIMAL, "model_type": "llama", "rope_parameters": LLAMA3}
    assert architecture(old) == architecture(new)
    assert architecture(new).rope_scaling == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    qwen = {**MINIMAL, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert architecture({**qwen, "use_sliding_window": False}).sliding_window is None
    windowed = architecture({**qwen, "use_sliding_window": True})
    assert [windowed.own_window(i) for i in range(4)] == [None, None, None, 8]
    mistral = architecture({**MINIMAL, "model_type": "mistral", "sliding_window": 8})
    assert [mistral.own_window(i) for i in range(4)] == [8] * 4
    assert architecture({**MINIMAL, "model_type": "mistral", "sliding_window": None}).sliding_window is None


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_fills(family):
    stem = families.family(family).stem
    filled = getattr(transformers, f"{stem}Config")(**MINIMAL)
    assert architecture({**MINIMAL, "model_type": family}) == architecture(filled.to_dict())


# --- whole runs -------------------------------------------------------------------------------------------------------

RECIPE = """\
name: test/family
model: {{teacher: teacher, dtype: {dtype}}}
method: {{name: lolcats, window: 8, form: {{feature_map: {{width: 2}}}}, objective: {{outputs: 1, weights: 1}}}}
data: {{mix: [{{source: text, path: corpus.txt, documents: paragraph}}]}}
schedule:
  transfer: {{steps: 3, batch: 2, accumulation: 1, length: 32, optimizer: {{lr: 3e-2}}}}
  tune: {{steps: 3, batch: 2, accumulation: 1, length: 32, optimizer: {{lr: 1e-2}}}}
eval:
  suites: [suite.yaml]
"""
SUITE = """\
name: small
evals:
  - {eval: perplexity, rows: 4, length: 32, batch: 4, text: {source: text, path: corpus.txt}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a corpus, its tokenizer and a suite."""
    from recipelin import data
    from recipelin.sources import Stdlib

    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join(t for _, t in list(data.documents(Stdlib(source="python-stdlib"), "training", folder))[:6])
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    return folder, data.train_tokenizer([text], 300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama-3.1", "mistral-0.1", "qwen2", "qwen3"])
def test_a_whole_lolcats_run(corpus, tiny, tmp_path, home, case, dtype):
    """Three steps a stage, export, reload, generate."""
    from recipelin.load import load
    from recipelin.records import read_record
    from recipelin.run import run

    folder, tokenizer = corpus
    family, extra = CASES[case]
    hf.export(tiny(family=family, **{**extra, "vocab_size": 301}), tokenizer, tmp_path / "teacher", hybrid=None)
    for name in ("corpus.txt", "suite.yaml"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(dtype=dtype), encoding="utf-8")
    out = run(load(tmp_path / "recipe.yaml"), out=tmp_path / "run", device="cpu")
    record = read_record(out)
    assert record.status == "finished" and {r.state for r in record.rows} >= {"teacher", "hybrid", "linear", "none"}
    assert record.kernels == dict.fromkeys(("hybrid_attention", "weight_transfer_loss"), resolve_kernel("auto", "cpu"))
    merge = next(s.report["merge"] for s in record.steps if s.step == "tune")
    assert merge["dtype"] == dtype and (merge["rounding"] < 1e-3) == (dtype == "float32")
    student, _ = hf.load_student(out / "model", dtype=dtype, device="cpu")
    assert type(student) is hf.STUDENTS[family][1]
    made = student.generate(
        tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.long), max_new_tokens=12, do_sample=False
    )
    assert made.shape[1] > 9
