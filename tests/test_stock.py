"""Form `native`: its students are models of a stock architecture, which load without recipelin and give the same logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM

from recipelin import hf, stock
from recipelin.attention.gated_delta.config import STATE, Decay
from recipelin.attention.native.config import Config
from recipelin.data import train_tokenizer
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.steps import Swap
from recipelin.swap import form_parameters, forms, swap
from tests.rows import logits, tokens

LIVELY = {"gate_std": 0.3, "decay": Decay(rate=(0.5, 4.0), step=(0.05, 0.3))}
QWEN3 = {"family": "qwen3", "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a small text"] * 3, 264)


def student(model, layers=(0, 2), **config):
    """Swapped, and moved from its start as training would."""
    swap(model, Swap(form="native", config=Config(**LIVELY, **config), layers=layers), seed=3)
    for parameter in form_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", [None, 3])
def test_a_stock_model_gives_the_students_logits(tiny, tokenizer, tmp_path, width, tied):
    model = student(tiny(6, 2, layers=3, tie_word_embeddings=tied, **QWEN3), short_convolution=width)
    stock.export(model, tokenizer, tmp_path / "stock")
    stock.export(model, tokenizer, tmp_path / "stock")  # over an earlier one
    assert [p.name for p in tmp_path.iterdir()] == ["stock"]
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert type(loaded) is Qwen3_5ForCausalLM and not report["missing_keys"] and not report["unexpected_keys"]
    assert not list((tmp_path / "stock").glob("*.py"))  # nothing of ours is needed to load it
    assert "recipelin" not in (tmp_path / "stock" / "config.json").read_text()
    ids, model, loaded = tokens(2, 71), model.double().eval(), loaded.double().eval()
    expected = logits(model, ids)
    # The stock rule computes in fp32, and the norm of a small output magnifies rounding.
    assert (logits(loaded, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    mask = (torch.arange(71) >= torch.tensor([[0], [40]])).long()
    found, expected = (logits(m, ids, attention_mask=mask)[mask.bool()] for m in (loaded, model))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 7, "attention_mask": mask}
    assert torch.equal(loaded.generate(ids, **settings)[1], model.generate(ids, **settings)[1])


def test_what_the_architecture_cannot_hold_is_refused(tiny, tokenizer, tmp_path):
    for changed, words in (
        ({"rope": "keep"}, "qwen3_5_text has no rope: keep; use form gated_delta"),
        ({"output_gate": "none", "activation": "none"}, "no activation: none, no output_gate: none"),
        ({"short_convolution": 8}, "less than or equal to 4"),
    ):
        with pytest.raises(ValueError, match=words):
            Config(**changed)
    for model, layers, words in (
        (tiny(4, 2, layers=2), (0,), "model_type 'llama', expected 'qwen3'"),
        (tiny(4, 2, layers=2, **QWEN3), "all", "needs a softmax layer"),
        (
            tiny(4, 2, layers=2, **{**QWEN3, "rms_norm_eps": 1e-5}),
            (0,),
            "found norm_eps 1e-06 beside the teacher's 1e-05",
        ),
        (tiny(4, 2, layers=2, **QWEN3, attention_bias=True), (0,), "which has no biases"),
    ):
        with pytest.raises(ValueError, match=words):
            stock.export(student(model, layers), tokenizer, tmp_path / "stock")
    model = tiny(4, 2, layers=2, **QWEN3)
    with pytest.raises(ValueError, match="only a student of form native"):
        stock.export(model, tokenizer, tmp_path / "stock")
    model = student(model.bfloat16(), (0,))
    model.model.norm.weight.data[3] = 0.01  # 0.01 - 1 keeps no digit of it in eight bits
    with pytest.raises(
        ValueError, match=r"model.norm.weight: 1 of its 48 weights cannot be held as 1 \+ w in bfloat16"
    ):
        stock.export(model, tokenizer, tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_student_keeps_its_logits(tiny, tokenizer, tmp_path):
    model = student(tiny(4, 2, layers=3, **QWEN3).bfloat16())
    stock.export(model, tokenizer, tmp_path / "stock")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert loaded.dtype == torch.bfloat16
    expected = logits(model, tokens(2, 19)).float()
    assert (logits(loaded, tokens(2, 19)).float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_plan_refuses_a_teacher_with_file_and_line(tiny, tokenizer, tmp_path):
    """And plans the student of a Qwen3, whose states are two: its softmax would lack the q/k norm."""
    for family, extra in (("llama", {}), ("qwen3", QWEN3)):
        model = student(tiny(4, 2, layers=3, **{**extra, "family": family}))
        hf.export(model, tokenizer, tmp_path / family, hybrid=STATE)
        text = f"name: s\nmodel: {{student: {family}}}\nmethod: {{name: exported}}\neval: {{suites: [small.yaml]}}\n"
        (tmp_path / f"{family}.yaml").write_text(text)
    (tmp_path / "small.yaml").write_text("name: small\nevals: [{eval: perplexity, rows: 2, length: 64}]\n")
    with pytest.raises(PlanError, match=r"llama.yaml:3.*form native is written as qwen3_5_text.*expected 'qwen3'"):
        plan(load(tmp_path / "llama.yaml"))
    text = (tmp_path / "qwen3.yaml").read_text().replace("[small.yaml]", "[small.yaml], states: [hybrid, none]")
    (tmp_path / "qwen3.yaml").write_text(text)
    assert [s.name for s in plan(load(tmp_path / "qwen3.yaml")).steps[-1].step.states] == ["hybrid", "none"]
    assert forms(hf.load_student(tmp_path / "qwen3", dtype="float32", device="cpu")[0])[0].NAME == "native"
