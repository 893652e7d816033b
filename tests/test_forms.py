"""The laws of DESIGN §5 that hold for every form of recipelin/attention, on all layers and on some of them."""

import json
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache

import recipelin.hf as hf
from recipelin import families, lookup
from recipelin.attention.form import Form
from recipelin.attention.gated_delta.config import STATE, Decay, WriteGate
from recipelin.attention.gated_delta.config import Config as GatedDelta
from recipelin.attention.hybrid.config import Config as Hybrid
from recipelin.attention.hybrid.config import FeatureMap
from recipelin.attention.native.config import Config as Native
from recipelin.cache import StateLayer, cache_bytes, state_bytes
from recipelin.data import train_tokenizer
from recipelin.states import NAMES, State, resolve
from recipelin.steps import Swap
from recipelin.swap import (
    architecture_of,
    form_parameters,
    forms,
    mark_merged,
    observing,
    recording,
    restore,
    swap,
    switch,
)
from tests.rows import left_padded, logits, poison_memory, tokens

WINDOW = State(branches=("window", "linear", "sinks"), window=6, sinks=2)
LIVELY = {"gate_std": 0.3, "decay": Decay(rate=(0.5, 4.0), step=(0.05, 0.3))}  # gates that move in rows this short
OTHER = {
    "activation": "none",
    "value_activation": "none",
    "rope": "keep",
    "output_gate": "none",
    "scale": 0.7,
    "write_gate": WriteGate(bias=True),
}
FOLDED = {"qkv_bias": "keep", "qk_norm": "fold", "short_convolution": 4, "allow_negative_eigenvalues": True}
CASES: dict[str, tuple[str, Form, State]] = {
    "hybrid": ("hybrid", Hybrid(feature_map=FeatureMap(width=3)), WINDOW),
    "gated_delta": ("gated_delta", GatedDelta(**LIVELY), STATE),
    "gated_delta-other": ("gated_delta", GatedDelta(**LIVELY, **OTHER), STATE),
    "gated_delta-folded": ("gated_delta", GatedDelta(**LIVELY, **FOLDED), STATE),
    "gated_delta-legacy": ("gated_delta", GatedDelta(**LIVELY, kv_expand="row_interleave_legacy"), STATE),
    "native": ("native", Native(**LIVELY), STATE),  # of any teacher: what it is for is in test_stock.py
}
DELTA = [c for c in CASES if c.startswith("gated_delta")]
LAYERS = ["all", (1,)]
every_case = pytest.mark.parametrize("case", CASES)
all_or_some = pytest.mark.parametrize("layers", LAYERS, ids=["all", "mixed"])


def test_the_folder_is_covered(record_property):
    assert {form for form, *_ in CASES.values()} == set(lookup.names("attention")), "a new form: add it to CASES"
    record_property("forms under the laws", f"{len(set(lookup.names('attention')))} in {len(CASES)} settings")
    for name in lookup.names("attention"):
        assert issubclass(lookup.lookup("attention", name).Config, Form)
    for knob, default in GatedDelta().model_dump().items():  # each knob leaves its default in some case
        values = [c.model_dump()[knob] for form, c, _ in CASES.values() if form == "gated_delta"]
        assert knob in ("l2_norm", "norm_eps", "kernel") or any(v != default for v in values), knob


def swapped(model, case: str, layers="all", seed: int = 3):
    form, config, state = CASES[case]
    swap(model, Swap(form=form, config=config, layers=layers), seed=seed)
    switch(model, state)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a small text"] * 3, 264)


@pytest.fixture
def student(tiny, tokenizer, tmp_path):
    """A function that swaps a tiny model, exports it and loads it again."""

    def make(case: str, layers="all", dtype: str = "float32", **extra):
        model = swapped(tiny(**extra), case, layers)
        hf.export(model, tokenizer, tmp_path / "model", hybrid=CASES[case][2])
        return hf.load_student(tmp_path / "model", dtype=dtype, device="cpu")[0]

    return make


# --- what a row is ----------------------------------------------------------------------------------------------------


@every_case
def test_causal_and_prefix_invariant(tiny, case):
    model = swapped(tiny(4, 2, dtype=torch.float64), case)
    ids = tokens(2, 71)
    whole = logits(model, ids)
    for length in (1, 4, 33, 70):
        assert (logits(model, ids[:, :length]) - whole[:, :length]).abs().max() < 1e-10
    other = ids.clone()
    other[:, 40:] = tokens(2, 31, seed=2)
    found = logits(model, other)
    assert (found[:, :40] - whole[:, :40]).abs().max() < 1e-12
    assert (found[:, 40:] - whole[:, 40:]).abs().max() > 1e-3


@all_or_some
@every_case
def test_prefill_and_decoding_are_the_parallel_form(tiny, case, layers):
    model = swapped(tiny(4, 2, dtype=torch.float64), case, layers)
    ids = tokens(2, 43)
    whole, cache, found, sizes = logits(model, ids), DynamicCache(config=model.config), [], []
    for start, stop in ((0, 3), (3, 27), (27, 35), *((t, t + 1) for t in range(35, 43))):
        found.append(logits(model, ids[:, start:stop], past_key_values=cache, use_cache=True))
        sizes.append((state_bytes(cache), cache_bytes(cache)))
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-10
    for some in (sizes[:3], sizes[3:]):  # in parts, and token by token with room for the next ones
        assert len({s for s, _ in some}) == 1, "the states' bytes must not grow"
    kept = {b - a for (_, a), (_, b) in pairwise(sizes[3:])}
    assert kept == ({0} if layers == "all" else {2 * 2 * 2 * 8 * 8})  # k, v of the retained layer, float64
    assert [isinstance(x, StateLayer) for x in cache.layers] == [layers == "all", True]


@all_or_some
@every_case
@pytest.mark.parametrize("given", ["mask", "mask and positions"])
def test_a_padded_row_is_the_row_alone(student, case, layers, given):
    model = student(case, layers).double()  # the norm of a small output magnifies rounding
    ids, lengths = tokens(3, 29), (29, 11, 2)
    right = (torch.arange(29) < torch.tensor(lengths)[:, None]).long()
    for padded, mask in (left_padded(ids, lengths), (ids, right)):
        extra = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "positions" in given else {}
        together = logits(model, padded, attention_mask=mask, **extra)
        for row, length in enumerate(lengths):
            alone = logits(model, ids[row : row + 1, :length])[0]
            assert (together[row][mask[row].bool()] - alone).abs().max() < 1e-10


@all_or_some
@every_case
def test_prefill_in_parts_with_padding(student, case, layers):
    model = student(case, layers).double()  # the norm of a small output magnifies rounding
    ids, mask = left_padded(tokens(3, 29), (29, 12, 3))
    whole, cache, found = logits(model, ids, attention_mask=mask), DynamicCache(), []
    for start, stop in ((0, 11), (11, 12), (12, 24), (24, 29)):
        part = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
        found.append(logits(model, ids[:, start:stop], **part))
    assert (torch.cat(found, 1) - whole)[mask.bool()].abs().max() < 1e-10


@all_or_some
@every_case
def test_packed_documents_are_alone(student, case, layers):
    model = student(case, layers).double()  # the norm of a small output magnifies rounding
    ids = tokens(2, 40)
    positions = torch.stack((torch.arange(40) % 23, torch.arange(40) % 30))
    by_position = logits(model, ids, position_ids=positions, use_cache=None)
    segments = torch.stack((torch.arange(40) // 23, torch.arange(40) // 30))
    by_segment = logits(model, ids, position_ids=positions, segment_ids=segments, use_cache=None)
    for row, cut in ((0, 23), (1, 30)):
        for part in (slice(0, cut), slice(cut, 40)):
            alone = logits(model, ids[row : row + 1, part])[0]
            assert (by_position[row, part] - alone).abs().max() < 1e-10
            assert (by_segment[row, part] - alone).abs().max() < 1e-10
    with pytest.raises(ValueError, match="pass use_cache=False"):
        logits(model, ids, position_ids=positions, use_cache=True)


@all_or_some
@every_case
def test_generation_is_the_uncached_argmax_and_padding_does_not_change_it(student, case, layers):
    model = student(case, layers)
    lengths, rows = (21, 9, 2), tokens(3, 21)
    ids, mask = left_padded(rows, lengths)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 7}
    together = model.generate(ids, attention_mask=mask, **settings)[:, 21:]
    for row, length in enumerate(lengths):
        known = rows[row : row + 1, :length]
        for _ in range(8):
            known = torch.cat((known, logits(model, known)[:, -1].argmax(-1, keepdim=True)), 1)
        assert together[row].tolist() == known[0, length:].tolist(), row


@pytest.mark.parametrize("case", ["hybrid", "gated_delta-folded"])
def test_beams_carry_their_states(student, case):
    model, ids = student(case, (1,)), tokens(2, 14)
    settings = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "pad_token_id": 7}
    settings["attention_mask"] = torch.ones_like(ids)
    assert model.generate(ids, **settings).tolist() == model.generate(ids, use_cache=False, **settings).tolist()


# --- structure --------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_counts_without_torch_are_the_built_modules(tiny, family, case):
    model = tiny(6, 2, layers=3, family=family)
    architecture, plain = architecture_of(model), sum(p.numel() for p in model.parameters())
    form, config, _ = CASES[case]
    swap(model, Swap(form=form, config=config, layers=(0, 2)), seed=0)
    counted = config.parameters(architecture)
    for each in forms(model):
        assert {name: sum(p.numel() for p in ps) for name, ps in each.groups().items()} == counted
        shapes = config.shapes(architecture)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert shapes[name] == tuple(reversed(getattr(each, name).weight.shape))
    assert sum(p.numel() for p in model.parameters()) == plain + 2 * config.added(architecture)
    assert families.parameters(architecture)["total"] == plain
    apart = {n for n, c in counted.items() if n not in config.PROJECTIONS for _ in range(c > 0)}
    named = {n for n in form_parameters(model, projections=False) if not n.endswith(("proj.bias", "o_proj.weight"))}
    assert apart and named and not any(n.endswith(("q_proj.weight", "v_proj.weight")) for n in named)


@every_case
def test_start_values_are_a_function_of_the_seed_and_move_no_generator(tiny, case):
    def parameters(seed):
        model = tiny()
        torch.manual_seed(0)
        swapped(model, case, seed=seed)
        drawn = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.rand(3))
        return {n: p.detach() for n, p in form_parameters(model).items()}

    one, again, other = parameters(5), parameters(5), parameters(6)
    assert one.keys() == again.keys() and all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


@all_or_some
@every_case
def test_export_and_loading_keep_every_bit(tiny, tokenizer, tmp_path, case, layers):
    for family in ("llama", "qwen2", "qwen3"):
        rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        model = swapped(tiny(4, 2, family=family, rope_parameters=rope), case, layers)
        for parameter in form_parameters(model).values():
            parameter.data += 0.1 * torch.randn_like(parameter)
        before = logits(model, tokens(2, 23))
        hf.export(model, tokenizer, tmp_path / family, hybrid=CASES[case][2])
        loaded, _ = hf.load_student(tmp_path / family, dtype="float32", device="cpu")
        assert torch.equal(logits(loaded, tokens(2, 23)), before)
        assert [f.layer_index for f in forms(loaded)] == ([0, 1] if layers == "all" else [1])
        assert [f.config for f in forms(loaded)] == [CASES[case][1]] * len(forms(loaded))
        with pytest.raises(RuntimeError):
            restore(loaded)


@every_case
def test_new_parameters_are_well_defined_whatever_memory_holds(student, tiny, tmp_path, monkeypatch, case):
    """A checkpoint without the form's parameters, with memory that holds NaN: every start value is the seed's."""
    from safetensors.torch import load_file, save_file

    trained = student(case)
    expected = form_parameters(swapped(tiny(), case, seed=0))
    folder = tmp_path / "model"
    weights = load_file(folder / "model.safetensors")
    own = {n for n in form_parameters(trained, projections=False) if ".o_proj" not in n}
    save_file(
        {n: w for n, w in weights.items() if n not in own}, folder / "model.safetensors", metadata={"format": "pt"}
    )

    poison_memory(monkeypatch)
    model = hf.STUDENTS["llama"][1].from_pretrained(folder)
    for name, parameter in form_parameters(model).items():
        assert torch.equal(parameter, expected[name] if name in own else weights[name]), name


@every_case
def test_half_precision(student, case):
    model = student(case, dtype="bfloat16")
    form = forms(model)[0]
    assert form.q_proj.weight.dtype == torch.bfloat16
    exact = {"A_log", "dt_bias", "theta", "c"}
    assert all(p.dtype == torch.float32 for n, p in form.named_parameters() if n.rpartition(".")[2] in exact)
    ids = tokens(2, 19)
    cached = model(input_ids=ids).logits
    assert cached.dtype == torch.bfloat16 and (cached - logits(model, ids)).abs().max() < 0.1


# --- the retained layers, and the teacher -----------------------------------------------------------------------------


@contextmanager
def outputs_of(model, layer: int):
    seen = []
    hook = model.model.layers[layer].self_attn.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    try:
        yield seen
    finally:
        hook.remove()


@every_case
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_retained_layer_is_the_teachers_bit_for_bit(tiny, case, family):
    extra = {"sliding_window": 9} if family == "mistral" else {}
    model, ids = tiny(4, 2, layers=3, family=family, **extra), tokens(2, 23)
    before = {n: p for n, p in model.model.layers[0].named_parameters()}
    with outputs_of(model, 0) as seen:
        logits(model, ids)
        swapped(model, case, (1, 2))
        logits(model, ids)
    assert torch.equal(*seen) and all(p is before[n] for n, p in model.model.layers[0].named_parameters())


@all_or_some
@every_case
def test_recording_passes_the_teachers_stream_on_and_restore_gives_it_back(tiny, case, layers):
    for family in ("llama", "qwen3"):
        model, ids = tiny(4, 2, family=family, dtype=torch.float64), tokens(2, 41)
        mask = (torch.arange(41) >= torch.tensor([[0], [9]])).long()
        teacher = logits(model, ids, attention_mask=mask)
        swapped(model, case, layers)
        for parameter in form_parameters(model, projections=CASES[case][0] != "hybrid").values():
            parameter.data += 0.1  # what a stage trains is not the teacher's
        assert (logits(model, ids, attention_mask=mask) - teacher)[mask.bool()].abs().max() > 1e-3
        captured = []
        with torch.no_grad(), recording(model, lambda i, c, captured=captured: captured.append((i, c))):
            passed_on = logits(model, ids, attention_mask=mask)
        assert (passed_on - teacher)[mask.bool()].abs().max() < 1e-10
        assert [i for i, _ in captured] == ([0, 1] if layers == "all" else [1])
        assert all(c.lse is not None for _, c in captured)
        restore(model)
        assert torch.equal(logits(model, ids, attention_mask=mask), teacher)
        swapped(model, case, layers)
        mark_merged(model)
        with pytest.raises(RuntimeError, match="load the teacher anew"):
            restore(model)


# --- states -----------------------------------------------------------------------------------------------------------


@every_case
def test_every_state_that_the_form_has_runs_and_none_gives_zeros(tiny, case):
    model = swapped(tiny(4, 2), case)
    _, config, hybrid = CASES[case]
    architecture, seen = architecture_of(model), {}
    for name in NAMES:
        state = resolve(name, hybrid).state
        if state is None or config.refuses(name, state, architecture):
            continue
        switch(model, state)
        seen[name] = logits(model, tokens(1, 23))
        assert torch.isfinite(seen[name]).all()
    assert {"hybrid", "none"} <= seen.keys()
    assert len({tuple(v.flatten()[-5:].tolist()) for v in seen.values()}) == len(seen), "two states give the same"
    outputs = []
    switch(model, resolve("none", hybrid).state)
    with torch.no_grad(), observing(model, lambda _, captured: outputs.append(captured.y)):
        model(input_ids=tokens(1, 23), use_cache=False)
    assert len(outputs) == 2 and all(float(y.abs().sum()) == 0.0 for y in outputs)
    # What `student_digest` rests on: nothing of the attention is read, so that students share what `none` finds.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".self_attn." in name:
                parameter.normal_()
    assert torch.equal(logits(model, tokens(1, 23)), seen["none"])


@every_case
def test_objectives_that_read_no_state_are_the_same_in_all(tiny, case):
    """What `reuse.lineage` rests on: loss and gradients, bit for bit; and those that read it differ."""
    model = swapped(tiny(4, 2), case)
    _, config, hybrid = CASES[case]
    architecture, found = architecture_of(model), {}
    for name in NAMES:
        state = resolve(name, hybrid).state
        if state is None or config.refuses(name, state, architecture) or not state.branches:
            continue
        switch(model, state)
        for objective in config.OBJECTIVES:
            made = []
            model.zero_grad()

            def learn(index, captured, objective=objective, made=made):
                with torch.enable_grad():
                    loss = forms(model)[index].losses(captured, {objective: 1.0})[objective]
                    loss.backward()
                made.append(float(loss))

            with torch.no_grad(), recording(model, learn):
                model(input_ids=tokens(2, 23), use_cache=False)
            gradients = [p.grad.sum() for p in model.parameters() if p.grad is not None]
            assert len(made) == 2 and gradients
            found.setdefault(objective, set()).add((*made, *map(float, gradients)))
    assert all(len(found[objective]) == 1 for objective in config.STATELESS)
    assert set(config.STATELESS) <= set(config.OBJECTIVES)
    assert case != "hybrid" or (config.STATELESS == ("weights",) and len(found["hybrid_outputs"]) > 3)


# --- training ---------------------------------------------------------------------------------------------------------


@all_or_some
@every_case
def test_every_parameter_gets_a_finite_gradient(student, case, layers):
    model = student(case, layers).train()
    ids, mask = left_padded(tokens(2, 21), (21, 6))
    found = model(ids, attention_mask=mask).logits
    found[mask.bool()].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    for form in forms(model):
        silent = {n for n, p in form.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        assert silent <= {"log_scale.c"}, silent  # of another join


@pytest.mark.parametrize("case", DELTA)
def test_gradient_checkpointing_changes_nothing(student, case):
    model = student(case, (1,)).train()
    ids, found = tokens(2, 21), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 15
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-7) for n in found[0])


# peft 0.21 asks transformers 5.23 for a property by its former name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("case", [*DELTA, "hybrid"])
def test_adapters_train_and_merge_into_plain_modules(student, case):
    from peft import LoraConfig, get_peft_model

    from recipelin.cost import lora_parameters
    from recipelin.steps import Lora

    model = student(case, (1,))
    names = {name for name, _ in model.named_modules()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "g_proj"]
    config = CASES[case][1]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).train()
    counted = lora_parameters(
        Lora(rank=4), families.architecture({**model.config.to_dict(), "model_type": "llama"}), config, 1
    )
    found = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n and "g_proj" not in n)
    assert counted == found
    ids, losses = tokens(2, 21), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    adapted.eval()
    before = logits(adapted, ids)
    merged = adapted.merge_and_unload()
    assert {name for name, _ in merged.named_modules()} == names
    assert type(forms(merged)[0].q_proj) is torch.nn.Linear
    assert (logits(merged, ids) - before).abs().max() < 1e-4 * before.abs().max()


def test_the_layout_of_a_folder_is_one_line_of_json_that_a_plan_can_read(student, tmp_path):
    from recipelin.load import read_student

    for case in CASES:
        student(case, (1,))
        found, _ = read_student(tmp_path / "model")
        form, config, state = CASES[case]
        assert (found.form, found.config, found.layers, found.state) == (form, config, (1,), state)
        json.loads((tmp_path / "model" / "config.json").read_text())
