"""Students as Hugging Face models: export and loading, caches, padding, packing, generation, adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

import recipelin.hf as hf
from recipelin.attention.hybrid.config import Config, FeatureMap
from recipelin.cache import StateLayer, state_bytes
from recipelin.data import train_tokenizer
from recipelin.states import State, resolve
from recipelin.steps import Swap
from recipelin.swap import forms, recording, restore, swap, switch
from tests.rows import left_padded, logits, tokens

HYBRID = State(window=5)
SINKS = State(branches=("window", "linear", "sinks"), window=5, sinks=3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a small text"] * 3, 264)


@pytest.fixture
def student(tiny, tokenizer, tmp_path):
    """A function that swaps a tiny model, exports it and loads it again."""

    def make(state: State = HYBRID, layers="all", dtype: str = "float32", **extra):
        model = tiny(**extra)
        swap(model, Swap(form="hybrid", config=Config(feature_map=FeatureMap(width=3)), layers=layers), seed=3)
        switch(model, state)
        for form in forms(model):
            torch.nn.init.normal_(form.log_scale.c, std=0.3)
        hf.export(model, tokenizer, tmp_path / "model", hybrid=state)
        return hf.load_student(tmp_path / "model", dtype=dtype, device="cpu")[0]

    return make


# --- export and loading -----------------------------------------------------------------------------------------------


def test_an_exported_student_is_the_student_bit_for_bit(tiny, tokenizer, tmp_path):
    model = tiny()
    swap(model, Swap(form="hybrid", config=Config()), seed=3)
    switch(model, HYBRID)
    for form in forms(model):
        torch.nn.init.normal_(form.mix.theta)
    before = logits(model, tokens(2, 23))
    folder = tmp_path / "model"
    hf.export(model, tokenizer, folder, hybrid=HYBRID)
    hf.export(model, tokenizer, folder, hybrid=HYBRID)  # over an earlier one
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is hf.STUDENTS["llama"][1]
    assert torch.equal(logits(loaded, tokens(2, 23)), before)
    assert [f.state for f in forms(loaded)] == [HYBRID, HYBRID]
    with pytest.raises(RuntimeError):
        restore(loaded)  # nobody knows the teacher of a loaded student
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens(2, 23)), before)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_a_student_loads_by_device_map(student, tmp_path, device_map):
    """How accelerate and lm-eval place a model."""
    expected = logits(student(), tokens(2, 23))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map)
    assert [f.state for f in forms(loaded)] == [HYBRID, HYBRID]
    assert torch.equal(logits(loaded, tokens(2, 23)), expected)


def test_a_plain_model_is_exported_as_it_is(tiny, tokenizer, tmp_path):
    model = tiny()
    hf.export(model, tokenizer, tmp_path / "model", hybrid=None)
    loaded, _ = hf.load_student(tmp_path / "model", dtype="float32", device="cpu")
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded, tokens(1, 9)), logits(model, tokens(1, 9)))


def test_a_failed_export_leaves_what_was_there(tiny, tokenizer, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    model = tiny()
    swap(model, Swap(form="hybrid", config=Config()), seed=0)
    with pytest.raises(ValueError, match="needs the state"):
        hf.export(model, tokenizer, folder, hybrid=None)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]


def test_remote_code_loads_where_nothing_was_imported(student, tmp_path):
    """What `lm_eval --model hf --model_args pretrained=DIR,trust_remote_code=True` does."""
    expected = logits(student(), tokens(1, 9))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        f"torch.save(m(torch.tensor({tokens(1, 9).tolist()})).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    root = Path(__file__).parents[1]
    paths = os.pathsep.join((str(root), str(root / "kernels")))
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert (
        torch.load(tmp_path / "logits.pt", weights_only=True) - expected
    ).abs().max() < 1e-5  # another process rounds otherwise


def test_what_does_not_fit_is_refused(student, tmp_path):
    from safetensors.torch import load_file, save_file

    student()
    folder = tmp_path / "model"
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.feature_map_q.weight"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        hf.load_student(folder, dtype="float32", device="cpu")
    config = json.loads((folder / "config.json").read_text())
    for wrong, words in (({**config["recipelin"], "version": 99}, "version 99"), (None, "missing")):
        (folder / "config.json").write_text(json.dumps({**config, "recipelin": wrong}))
        with pytest.raises(ValueError, match=words):
            hf.load_student(folder, dtype="float32", device="cpu")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama, mistral"):
        hf.load_teacher(folder, dtype="float32", device="cpu")


def test_a_teacher_that_cannot_be_read_is_said_in_one_line(tiny, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    hf.export(tiny(vocab_size=264), tokenizer, folder, hybrid=None)

    def refused(words: str) -> None:
        with pytest.raises(hf.TeacherError, match=words) as found:
            hf.load_teacher(folder, dtype="float32", device="cpu")
        assert "\n" not in str(found.value)

    (folder / "tokenizer.json").rename(folder / "tekken.json")
    lacks = r"no tokenizer.json there; found config.json, .*tekken.json.*cannot be loaded: .*"
    with monkeypatch.context() as patch:
        patch.setattr(hf.AutoTokenizer, "from_pretrained", Mock(side_effect=ImportError("\nit needs\nmistral-common")))
        refused(f"{lacks}it needs mistral-common")
    (folder / "tekken.json").unlink()
    refused("no tokenizer.json there; found config.json")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    refused(
        r"the weights do not fit the model, first 'model.layers.0.mlp.down_proj.weight' is \[48, 48\] .* not \[48, 40\]"
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"no weights")
    refused(r"model.teacher .*teacher' cannot be loaded: ")


def test_half_precision_keeps_what_is_learned_in_fp32(student):
    model = student(dtype="bfloat16")
    form = forms(model)[0]
    assert form.q_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for group in form.groups().values() for p in group} == {torch.float32}
    ids = tokens(2, 19)
    cached = model(input_ids=ids).logits
    assert cached.dtype == torch.bfloat16
    assert (cached - logits(model, ids)).abs().max() < 0.1


# --- caches -----------------------------------------------------------------------------------------------------------


def test_a_plain_call_makes_the_cache_itself(student):
    model = student(SINKS)
    ids = tokens(2, 23)
    found = model(ids, labels=ids, output_hidden_states=True)
    assert (found.logits - logits(model, ids)).abs().max() < 1e-5
    assert len(found.hidden_states) == 3 and torch.isfinite(found.loss)
    cache = found.past_key_values
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 23 and cache.get_mask_sizes(4, 0) == (27, 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and state_bytes(cache) == 0


@pytest.mark.parametrize("layers", ["all", (1,)], ids=["all", "mixed"])
@pytest.mark.parametrize("state", [HYBRID, SINKS, resolve("window", HYBRID).state, resolve("none", HYBRID).state])
def test_prefill_in_parts_with_padding(student, state, layers):
    model = student(state, layers)
    ids, mask = left_padded(tokens(3, 29), (29, 12, 3))
    whole = logits(model, ids, attention_mask=mask)
    cache, found = DynamicCache(), []
    for start, stop in ((0, 11), (11, 12), (12, 24), (24, 29)):
        part = logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        found.append(part)
    real = mask.bool()
    assert (torch.cat(found, 1) - whole)[real].abs().max() < 1e-5
    assert [isinstance(x, StateLayer) for x in cache.layers] == [layers == "all", True]


@pytest.mark.parametrize("layers", ["all", (1,)], ids=["all", "mixed"])
@pytest.mark.parametrize("state", [HYBRID, SINKS, resolve("linear", HYBRID).state, resolve("softmax", HYBRID).state])
def test_generation_is_the_uncached_argmax_and_padding_does_not_change_it(student, state, layers):
    model = student(state, layers)
    lengths = (21, 9, 2)
    rows = tokens(3, 21)
    ids, mask = left_padded(rows, lengths)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=7)[:, 21:]
    for row, length in enumerate(lengths):
        known = rows[row : row + 1, :length]
        for _ in range(12):
            known = torch.cat((known, logits(model, known)[:, -1].argmax(-1, keepdim=True)), 1)
        assert together[row].tolist() == known[0, length:].tolist(), row


def test_beams_carry_their_states(student):
    model = student(SINKS)
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "pad_token_id": 7}
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **settings)
    assert cached.tolist() == model.generate(ids, attention_mask=mask, use_cache=False, **settings).tolist()


def test_a_cache_does_not_grow(student):
    model, cache, sizes = student(SINKS), DynamicCache(), []
    for step in range(30):
        logits(model, tokens(1, 1, seed=step), past_key_values=cache, use_cache=True)
        sizes.append(state_bytes(cache))
    begun = next(
        t for t, size in enumerate(sizes) if size != sizes[0]
    )  # once the sinks are behind the window, with room
    assert len(set(sizes[begun:])) == 1 and begun <= 10 and cache.get_seq_length() == 30


def test_caches_that_cannot_work_are_refused(student):
    model = student()
    ids = tokens(1, 9)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 7, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match="cache of constant size"):
        model.generate(ids, cache_implementation="static", **settings)
    for mixed in (model, student(layers=(1,))):
        static = StaticCache(config=mixed.config, max_cache_len=64)
        with pytest.raises(ValueError, match="is a StaticCache; a recipelin student takes a DynamicCache or none"):
            mixed.generate(ids, past_key_values=static, **settings)
        with pytest.raises(ValueError, match="is a StaticCache; a recipelin student takes a DynamicCache or none"):
            logits(mixed, ids, past_key_values=static, use_cache=True)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model(ids).past_key_values.crop(-2)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model.generate(ids, prompt_lookup_num_tokens=2, **settings)
    switch(model, resolve("softmax", HYBRID).state)
    begun = model(ids).past_key_values
    switch(model, HYBRID)
    with pytest.raises(ValueError, match="holds a DynamicLayer"):
        model(ids[:, :1], past_key_values=begun)
    hybrid = model(ids).past_key_values
    switch(model, resolve("softmax", HYBRID).state)
    with pytest.raises(ValueError, match="belongs to a swapped layer"):
        model(ids[:, :1], past_key_values=hybrid)
    with pytest.raises(ValueError, match="take no cache"), recording(model, lambda *_: None):
        model(ids, use_cache=True)


# --- masks, positions, packing ----------------------------------------------------------------------------------------


def test_right_padding_without_a_mask_changes_nothing(student):
    """How lm-eval scores: rows padded on the right, no mask."""
    model = student(SINKS)
    ids = tokens(2, 21)
    padded = torch.cat((ids, torch.full((2, 8), 7)), 1)
    assert (logits(model, padded)[:, :21] - logits(model, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("layers", ["all", (0,)], ids=["all", "mixed"])
@pytest.mark.parametrize("given", ["mask", "mask and positions"])
def test_padding_left_or_right_is_the_row_alone(student, layers, given):
    model = student(SINKS, layers)
    ids, lengths = tokens(3, 21), (21, 9, 2)
    right = (torch.arange(21) < torch.tensor(lengths)[:, None]).long()
    for padded, mask in (left_padded(ids, lengths), (ids, right)):
        extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "positions" in given else {}
        found = logits(model, padded, attention_mask=mask, **extra)
        for row, length in enumerate(lengths):
            alone = logits(model, ids[row : row + 1, :length])[0]
            assert (found[row][mask[row].bool()] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("state", [SINKS, resolve("softmax", HYBRID).state])
def test_gradients_of_padded_rows_are_finite(student, state):
    model = student(state).train()
    ids, mask = left_padded(tokens(2, 21), (21, 6))
    found = model(ids, attention_mask=mask).logits
    found[mask.bool()].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_mask_that_hides_the_padding_is_refused(student):
    model = student()
    with pytest.raises(ValueError, match="cannot be told from causality"):
        logits(model, tokens(2, 9), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool).tril())


@pytest.mark.parametrize("layers", ["all", (0,)], ids=["all", "mixed"])
@pytest.mark.parametrize("state", [SINKS, resolve("softmax", HYBRID).state])
def test_packed_documents_are_alone(student, state, layers):
    model = student(state, layers)
    ids = tokens(2, 40)
    positions = torch.stack((torch.arange(40) % 23, torch.arange(40) % 30))
    found = logits(model, ids, position_ids=positions, use_cache=None)
    for row, cut in ((0, 23), (1, 30)):
        for part in (slice(0, cut), slice(cut, 40)):
            assert (found[row, part] - logits(model, ids[row : row + 1, part])[0]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="pass use_cache=False"):
        logits(model, ids, position_ids=positions, use_cache=True)


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(student):
    model = student(SINKS).train()
    ids, found = tokens(2, 21), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        result = model(ids, labels=ids)
        assert result.past_key_values is None
        result.loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-7) for n in found[0])
