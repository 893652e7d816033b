"""Published LoLCATs checkpoints: the formula by hand, strict keys and shapes, and files that are not what they say."""

import copy
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import recipelin.hf as hf
from recipelin import data
from recipelin.attention.hybrid.config import Config, FeatureMap
from recipelin.cli import main
from recipelin.load import load
from recipelin.lolcats_checkpoint import MAPS, PublishedError, lay, read
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.recipe import Converted
from recipelin.records import read_record
from recipelin.run import run
from recipelin.states import State
from recipelin.steps import Swap
from recipelin.swap import architecture_of, restore, swap, switch

HEADS, KEYS, WIDTH, LAYERS, RANK = 6, 2, 8, 2, 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def stage_one(seed: int = 0, prefix: str = "model.", half: int = WIDTH // 2) -> "OrderedDict[str, torch.Tensor]":
    """What stage 1 saves: maps of every query head and window factors, drawn so that both branches count."""
    g = torch.Generator().manual_seed(seed)
    found = OrderedDict()
    for i in range(LAYERS):
        at = f"{prefix}layers.{i}.self_attn."
        found[at + "window_factors"] = torch.randn(1, HEADS, 1, 1, generator=g)
        for side in "qk":
            found[at + f"feature_map_{side}.mlp.layer"] = torch.randn(HEADS, WIDTH, half, generator=g)
    return found


def stage_two(model, targets=TARGETS, seed: int = 1) -> "OrderedDict[str, torch.Tensor]":
    """What stage 2 saves, names by peft itself: the trainable parameters of the wrapped model."""
    from peft import LoraConfig, get_peft_model

    names = [f"self_attn.{t}" for t in targets]
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules=names))
    g = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (n, 0.2 * torch.randn(p.shape, generator=g)) for n, p in wrapped.named_parameters() if p.requires_grad
    )


def write(folder: Path, one, two=None, *, wrapped: bool = True) -> Converted:
    files = {"distill": ("one.pt", one, "distill/eval/loss")}
    if two is not None:
        files["finetune"] = ("two.pt", two, "eval/loss")
    for name, state, metric in files.values():
        torch.save({"model_state_dict": state, "step": 300, metric: 0.5} if wrapped else dict(state), folder / name)
    return Converted(format="lolcats", **{field: name for field, (name, _, _) in files.items()})


def read_in(folder: Path, converted: Converted, model, width: int = 1):
    form = Config(feature_map=FeatureMap(width=width))
    files = {name: folder / path for name, path in converted.files().items()}
    arch = architecture_of(model)
    return read(converted, files, architecture=arch, features=form.features(arch))


def masks(state: State, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax, linear) pairs of a row: facts/peers.md A.1, and A.6 for the published terrace and its defects."""
    w, at = state.window, torch.arange(length)
    behind = at[:, None] - at
    if state.shape == "terraced":
        block = (at + (-length % w if state.compat else 0)) // w  # compat: blocks end with the sequence
        soft = (behind >= 0) & (block[:, None] - block <= 1)
    else:
        soft = (behind >= 0) & (behind < w)
    twice = state.compat is not None and length <= w  # compat: one block, every pair counted on both sides
    return soft, (behind >= 0) & (~soft | twice)


def by_hand(model, ids, one, two, state: State, alpha: float = 16.0) -> torch.Tensor:
    """Logits of LoLCATs' hybrid with the adapters beside the projections (papers/untangling.md §1.1)."""
    bare, one = model.model, {k.removeprefix("base_model.model."): v.double() for k, v in one.items()}
    x = bare.embed_tokens(ids)
    length = ids.shape[1]
    soft, linear = masks(state, length)
    cos, sin = bare.rotary_emb(x, torch.arange(length)[None])
    for i, layer in enumerate(bare.layers):
        h, at = layer.input_layernorm(x), f"model.layers.{i}.self_attn."

        def project(name, h, at=at, layer=layer):
            y = getattr(layer.self_attn, name)(h)
            a, b = (two.get(f"base_model.model.{at}{name}.lora_{s}.default.weight") for s in "AB")
            return y if a is None else y + alpha / a.shape[0] * (h @ a.double().T @ b.double().T)

        q, k, v = (project(n, h).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for n in TARGETS[:3])
        turned = [x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None] for x in (q, k)]
        q, k, v = turned[0], *(t.repeat_interleave(HEADS // KEYS, 1) for t in (turned[1], v))
        u = [torch.einsum("hdf,bhld->bhlf", one[f"{at}feature_map_{s}.mlp.layer"], t) for s, t in (("q", q), ("k", k))]
        phi_q, phi_k = (torch.cat((t.softmax(-1), (-t).softmax(-1)), -1).clamp(min=1e-12) for t in u)
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(~soft, -torch.inf)
        a = one[at + "window_factors"].sigmoid() * (scores - scores.amax(-1, keepdim=True)).exp()
        a = a + (phi_q @ phi_k.mT).masked_fill(~linear, 0)
        x = x + project("o_proj", (a / a.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(bare.norm(x))


@pytest.mark.parametrize("case", ["qkvo", "fqkvo", "qv", "stage 1", "bare, peft names"])
def test_every_logit_is_lolcats_formula(tiny, tmp_path, case):
    model = tiny(HEADS, KEYS, layers=LAYERS, dtype=torch.float64)
    one = stage_one(prefix="base_model.model.model." if "peft" in case else "model.")
    two = None if case == "stage 1" else stage_two(model, ("q_proj", "v_proj") if case == "qv" else TARGETS)
    if case == "fqkvo":
        two |= (won := stage_one(9, "base_model.model.model."))
        assert set(two) > set(won)
    converted = write(tmp_path, one, two, wrapped="bare" not in case)
    ids = torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = by_hand(model, ids, won if case == "fqkvo" else one, two or {}, State(window=5))
        plain = model(ids).logits
        swap(model, Swap(form="hybrid", config=Config()), seed=0)
        lay(model, read_in(tmp_path, converted, model))
        switch(model, State(window=5))
        found = model(ids).logits
    assert (found - expected).abs().max() < 1e-10
    assert (found - plain).abs().max() > 1e-2
    if two:
        with pytest.raises(RuntimeError, match="load the teacher anew"):
            restore(model)


@pytest.mark.parametrize("compat", [None, "lolcats_tk_v1"])
@pytest.mark.parametrize("length", [4, 5, 6, 23])
def test_the_published_window_is_lolcats_terrace(tiny, tmp_path, compat, length):
    model = tiny(HEADS, KEYS, layers=LAYERS, dtype=torch.float64)
    one, two, state = stage_one(), stage_two(model), State(window=5, shape="terraced", compat=compat)
    ids = torch.randint(0, 131, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = by_hand(model, ids, one, two, state)
        swap(model, Swap(form="hybrid", config=Config()), seed=0)
        lay(model, read_in(tmp_path, write(tmp_path, one, two), model))
        switch(model, state)
        assert (model(ids).logits - expected).abs().max() < 1e-10


def test_a_bf16_projection_is_merged_in_fp32_and_rounded_once(tiny, tmp_path):
    model = tiny(HEADS, KEYS, layers=LAYERS, dtype=torch.bfloat16)
    two = {k: v.bfloat16() for k, v in stage_two(model).items()}
    before = model.model.layers[1].self_attn.v_proj.weight.detach().float().clone()
    swap(model, Swap(form="hybrid", config=Config()), seed=0)
    one = {k: v.bfloat16() for k, v in stage_one().items()}
    lay(model, read_in(tmp_path, write(tmp_path, one, two), model))
    a, b = (two[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{s}.default.weight"].float() for s in "AB")
    form = model.model.layers[1].self_attn
    assert torch.equal(form.v_proj.weight, (before + 16 / RANK * (b @ a)).bfloat16())
    assert form.mix.theta.dtype == torch.float32
    assert torch.equal(form.mix.theta, one["model.layers.1.self_attn.window_factors"].flatten().float())


Q0, A1 = "model.layers.0.self_attn.feature_map_q.mlp.layer", "model.layers.1.self_attn.k_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (1, lambda d: d.pop(Q0), r"one\.pt does not fit.*\n  layers\.0\.self_attn\.feature_map_q\.mlp\.layer is missing"),
        (1, lambda d: d.update({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}), r"0\.mlp\.up_proj\.weight: not a key"),
        (1, lambda d: d.update({f"module.{Q0}": d.pop(Q0)}), r"module\.model\.layers\.0.*: not a key"),
        (1, lambda d: d.update({Q0.replace("layer", "bias"): torch.ones(2)}), "not a key of LoLCATs' hybrid attention"),
        (1, lambda d: d.update({f"base_model.model.{Q0}": d[Q0]}), "there already as model.layers.0"),
        (1, lambda d: d.update({Q0.replace("s.0", "s.7"): d[Q0]}), "layers.7.*: the teacher has layers 0 to 1"),
        (1, lambda d: d.update({Q0: d[Q0][:2]}), r"found shape \[2, 8, 4\], expected \[6, 8, 4\]"),
        (1, lambda d: d.update({Q0: torch.full_like(d[Q0], torch.nan)}), "or not finite"),
        (1, lambda d: d.update({Q0: d[Q0].long()}), "torch.int64, or not finite"),
        (2, lambda d: d.pop(f"base_model.model.{A1}"), r"two\.pt.*\n  layers\.1\.self_attn\.k_proj\.lora_A.* is missing"),
        (2, lambda d: d.update({f"base_model.model.{A1}": torch.ones(2, 48)}), r"\[2, 48\], expected \[3, 48\] \(rank 3\)"),
        (2, lambda d: d.update({f"base_model.model.{Q0}": torch.ones(6, 8, 4)}), r"layers\.1.*feature_map_q.* is missing"),
        (2, lambda d: [d.pop(k) for k in list(d)], "expected a state dict|no LoRA"),
    ],
)  # fmt: skip
def test_every_key_and_shape_is_held(tiny, tmp_path, file, change, words):
    model = tiny(HEADS, KEYS, layers=LAYERS)
    parts = {1: stage_one(), 2: stage_two(model)}
    change(parts[file])
    with pytest.raises(PublishedError, match=words):
        read_in(tmp_path, write(tmp_path, parts[1], parts[2]), model)


def test_another_width_is_named_and_many_mistakes_are_counted(tiny, tmp_path):
    model = tiny(HEADS, KEYS, layers=LAYERS)
    converted = write(tmp_path, stage_one(half=WIDTH))
    with pytest.raises(PublishedError, match=r"expected \[6, 8, 4\]; method.width: 2 fits it(.|\n)*and 1 more"):
        read_in(tmp_path, converted, model)
    assert read_in(tmp_path, converted, model, width=2).maps[1, MAPS[0]].shape == (6, 8, 8)
    swapped = write(tmp_path, stage_one(), stage_one(1))
    with pytest.raises(PublishedError, match="no LoRA in it"):
        read_in(tmp_path, swapped, model)


class _Code:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def _bytes_of(given) -> bytes:
    out = io.BytesIO()
    torch.save(given, out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            lambda: _bytes_of({"model_state_dict": {Q0: _Code()}}),
            r"would run code \((__builtin__\.|builtins\.)?print\)",
        ),
        (lambda: pickle.dumps({Q0: _Code()}), "a bare pickle, which was not opened"),
        (lambda: b"", "no zip archive"),
        (lambda: b"hello, this is text", r"no zip archive; expected a \.pt file"),
        (lambda: _bytes_of(stage_one())[:-200], r"a broken \.pt file: "),
        (lambda: _bytes_of(stage_one())[:40], r"a broken \.pt file: "),
        (lambda: _bytes_of([1, 2]), "holds list; expected a state dict"),
        (lambda: _bytes_of({"state": stage_one()}), "'state' is a OrderedDict; expected tensors"),
        (lambda: _bytes_of({"model_state_dict": stage_one(), "optimizer": {}}), "'optimizer' beside model_state_dict"),
    ],
)
def test_a_file_that_is_something_else(tiny, tmp_path, capfd, content, words):
    converted = write(tmp_path, stage_one())
    (tmp_path / "one.pt").write_bytes(content())
    with pytest.raises(PublishedError, match=words):
        read_in(tmp_path, converted, tiny(HEADS, KEYS, layers=LAYERS))
    assert "never be printed" not in "".join(capfd.readouterr())


def test_safetensors_are_named(tiny, tmp_path):
    save_file(dict(stage_one()), tmp_path / "one.safetensors")
    converted = Converted(format="lolcats", distill="one.safetensors")
    with pytest.raises(PublishedError, match=r"a safetensors file; expected a \.pt file"):
        read_in(tmp_path, converted, tiny(HEADS, KEYS, layers=LAYERS))


RECIPE = """\
name: test/published
model: {teacher: teacher, converted: {format: lolcats, distill: one.pt, finetune: two.pt}}
method: {name: converted, window: 5, shape: sliding, compat: null}
eval:
  suites: [suite.yaml]
  states: [teacher, softmax, hybrid, none]
"""
SUITE = "name: s\nevals: [{eval: perplexity, rows: 4, length: 48, batch: 4, text: {source: text, path: corpus.txt}}]\n"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    corpus = "\n\n".join(f"{i} sheep and {i * i} goats went over the hill at {i} o'clock" for i in range(400))
    model = tiny(HEADS, KEYS, layers=LAYERS)
    model.resize_token_embeddings(262, mean_resizing=False)
    hf.export(model, data.train_tokenizer([corpus], 262), tmp_path / "teacher", hybrid=None)
    (tmp_path / "corpus.txt").write_text(corpus)
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_a_run_lays_the_weights_in_and_records_the_files(folder, home, tiny, capsys):
    recipe = folder / "recipe.yaml"
    assert main(["check", str(recipe)]) == 0 and main(["plan", str(recipe)]) == 0
    assert "reads     distill one.pt (not here), finetune two.pt (not here)" in capsys.readouterr().out
    assert main(["run", str(recipe), "--out", str(folder / "run"), "--device", "cpu"]) == 1
    told = capsys.readouterr().err
    assert "model.converted.distill: " in told and "hazyresearch/lolcats-llama-3.1-8b-distill" in told
    assert not (folder / "run").exists(), "refused before any work"

    model = hf.load_teacher(folder / "teacher", dtype="float32", device="cpu")[0]
    one, two = stage_one(), stage_two(model)
    write(folder, one, two)
    record = read_record(run(load(recipe), out=folder / "run", device="cpu"))
    values = {r.state: r.value for r in record.rows}
    assert set(values) >= {"teacher", "softmax", "hybrid", "none"} and len(set(values.values())) == len(values)
    assert [t.step for t in record.steps] == ["swap", "switch", "evaluate"]
    first = {n: record.digests[n] for n in ("converted.distill", "converted.finetune")}
    assert all(len(d) == 64 for d in first.values())
    ids = torch.randint(0, 262, (1, 30))
    student = hf.load_student(folder / "run" / "model", dtype="float32", device="cpu")[0]
    with torch.no_grad():
        expected = by_hand(model.double(), ids, one, two, State(window=5))
        assert (student(ids).logits - expected).abs().max() < 1e-3

    write(folder, stage_one(5), two)
    again = read_record(run(load(recipe), out=folder / "run", device="cpu"))
    assert again.digests["converted.distill"] != first["converted.distill"]
    assert again.steps[0].key != record.steps[0].key, "another file is another run key"
    assert {r.state: r.value for r in again.rows}["hybrid"] != values["hybrid"]


def test_the_method_and_the_weights_belong_together(folder):
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("converted, window: 5, shape: sliding, compat: null", "lolcats"))
    with pytest.raises(PlanError, match=r"method 'lolcats' starts from the teacher.*use method: \{name: converted\}"):
        plan(load(recipe))
    recipe.write_text(RECIPE.replace(", converted: {format: lolcats, distill: one.pt, finetune: two.pt}", ""))
    with pytest.raises(PlanError, match=r"starts from published weights: give model\.converted"):
        plan(load(recipe))
