"""The gated_delta form alone: its formula, what it takes from the teacher, its states, its losses, and a whole run."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

import recipelin.hf as hf
from recipelin.attention.captured import Captured
from recipelin.attention.gated_delta.config import STATE, Config, Decay, WriteGate
from recipelin.cache import state_bytes
from recipelin.exposure import exposed_from
from recipelin.families import Architecture
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import plan
from recipelin.states import NAMES, State, resolve
from recipelin.steps import Swap
from recipelin.swap import architecture_of, forms, observing, recording, swap, switch
from tests.rows import logits, tokens

LIVELY = {"gate_std": 0.3, "decay": Decay(rate=(0.5, 4.0), step=(0.05, 0.3))}


def swapped(model, layers="all", **config):
    swap(model, Swap(form="gated_delta", config=Config(**config), layers=layers), seed=3)
    return model


def captured_of(model, **extra):
    found = []
    with torch.no_grad(), recording(model, lambda index, captured: found.append(captured)):
        logits(model, tokens(2, 21), **extra)
    return found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"activation": "none", "value_activation": "none", "l2_norm": False, "output_gate": "none", "scale": 0.01},
        {"rope": "keep", "write_gate": WriteGate(bias=True), "allow_negative_eigenvalues": True, "norm_eps": 0.1},
        {"short_convolution": 3},
    ],
    ids=str,
)
def test_a_layer_is_the_formula(tiny, config):
    """One token after the other from the input of a layer, as arXiv 2606.16429 §2 writes the student."""
    model = swapped(tiny(4, 2, dtype=torch.float64), **LIVELY, **config)
    form, known = forms(model)[0], Config(**LIVELY, **config)
    for parameter in form.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, 13, 48, dtype=torch.float64)
    at = torch.arange(13)[None]
    cos, sin = model.model.rotary_emb(x, at)
    with torch.no_grad():
        found = form(x, position_embeddings=(cos, sin), position_ids=at)[0]

    def head(name, t, h, act):
        rows = getattr(form, f"{name}_proj").weight[h * 8 : h * 8 + 8]
        if known.short_convolution:
            taps = form.convolutions[name].weight[h * 8 : h * 8 + 8]
            y = sum(taps[:, 2 - i] * (rows @ x[0, t - i]) for i in range(3) if t >= i)
        else:
            y = rows @ x[0, t]
        y = y * y.sigmoid() if act == "silu" else y
        if name == "v":
            return y
        y = y / (y.norm() ** 2 + 1e-6).sqrt() if known.l2_norm else y
        turned = torch.cat((-y[4:], y[:4]))
        return y * cos[0, t] + turned * sin[0, t] if known.rope == "keep" else y

    expected = torch.zeros(13, 32, dtype=torch.float64)
    for h in range(4):
        s = torch.zeros(8, 8, dtype=torch.float64)
        for t in range(13):
            q, k, v = (head(n, t, h, known.value_activation if n == "v" else known.activation) for n in "qkv")
            bias = form.b_proj.bias[h] if known.write_gate.bias else 0.0
            beta = (form.b_proj.weight[h] @ x[0, t] + bias).sigmoid() * (2 if known.allow_negative_eigenvalues else 1)
            g = -form.A_log[h].exp() * F.softplus(form.a_proj.weight[h] @ x[0, t] + form.dt_bias[h])
            s = g.exp() * (s - beta * torch.outer(s @ k, k)) + beta * torch.outer(v, k)
            o = (known.scale or 8**-0.5) * s @ q
            o = o / (o.square().mean() + known.norm_eps).sqrt() * form.o_norm.weight
            if known.output_gate == "silu":
                o = o * F.silu(form.g_proj.weight[h * 8 : h * 8 + 8] @ x[0, t])
            expected[t, h * 8 : h * 8 + 8] = o
    assert (found[0] - expected @ form.o_proj.weight.T).abs().max() < 1e-10


# --- what it takes from the teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2), (4, 1)])
def test_key_and_value_heads_are_repeated_whole(tiny, heads, key_heads):
    """A model whose key and value heads were repeated beforehand gives the same student; the legacy copy does not."""
    grouped, plain = tiny(heads, key_heads, dtype=torch.float64), tiny(heads, heads, dtype=torch.float64)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.unflatten(0, (key_heads, 8)).repeat_interleave(heads // key_heads, 0).flatten(0, 1)
    plain.load_state_dict(state)
    ids, teacher = tokens(2, 31), logits(grouped, tokens(2, 31))
    assert (logits(plain, ids) - teacher).abs().max() < 1e-12
    for model in (grouped, plain):
        swapped(model, **LIVELY)
    assert torch.equal(logits(grouped, ids), logits(plain, ids))
    legacy = swapped(tiny(heads, key_heads, dtype=torch.float64), **LIVELY, kv_expand="row_interleave_legacy")
    assert ((logits(legacy, ids) - logits(plain, ids)).abs().max() > 1e-3) == (heads != key_heads)
    weight, group = tiny(heads, key_heads).model.layers[0].self_attn.k_proj.weight, heads // key_heads
    rows = torch.stack([weight[(j * 8 + i) // group] for j in range(heads) for i in range(8)])
    assert torch.equal(forms(legacy)[0].k_proj.weight.float(), rows)  # facts: papers/taylor-calibrate.md, bug B1


def test_the_students_copies_leave_the_teacher_alone(tiny):
    model = tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    kept = model.model.layers[0].self_attn
    swapped(model)
    for form in forms(model):
        for parameter in form.parameters():
            parameter.data.fill_(0.5)
    assert all(torch.equal(p, before[f"model.layers.0.self_attn.{n}"]) for n, p in kept.named_parameters())
    assert not any("teacher" in n for n in model.state_dict())


def test_biases_and_norms_are_dropped_kept_or_folded(tiny):
    qwen2, qwen3 = tiny(family="qwen2"), tiny(family="qwen3")
    bias = qwen2.model.layers[0].self_attn.k_proj.bias.clone()
    attention = qwen3.model.layers[0].self_attn
    swapped(qwen2, (0,), qkv_bias="keep")
    assert torch.equal(forms(qwen2)[0].k_proj.bias, bias.repeat(4))
    assert forms(swapped(tiny(family="qwen2")))[0].q_proj.bias is None
    dropped, folded = (forms(swapped(tiny(family="qwen3"), qk_norm=n))[0] for n in ("drop", "fold"))
    assert torch.equal(dropped.q_proj.weight, attention.q_proj.weight)
    for name in "qk":
        gain = getattr(attention, f"{name}_norm").weight.repeat(4)[:, None]
        plain, scaled = (getattr(form, f"{name}_proj").weight for form in (dropped, folded))
        assert not torch.equal(plain, scaled) and torch.equal(scaled, plain * gain)


def test_gates_start_as_flas(tiny):
    model = swapped(tiny(64, 64, layers=1, hidden_size=512))
    form = forms(model)[0]
    assert 0 < form.A_log.exp().min() < 2 and 14 < form.A_log.exp().max() <= 16
    step = F.softplus(form.dt_bias)
    assert 1e-3 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1001
    assert abs(step.log().mean() - torch.tensor([1e-3, 0.1]).log().mean()) < 0.4
    for gate in (form.a_proj, form.b_proj, form.g_proj):
        assert abs(float(gate.weight.detach().std()) - 0.02) < 1e-3 and gate.bias is None
    assert not torch.equal(form.a_proj.weight, form.b_proj.weight)


def test_the_state_is_small_and_constant(tiny):
    model = swapped(tiny(4, 2), **LIVELY, short_convolution=4)
    cache = model(tokens(3, 50)).past_key_values
    assert state_bytes(cache) == 2 * 4 * 3 * (4 * 8 * 8 + 3 * 3 * 32)
    assert cache.get_seq_length() == 50


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_softmax_state_is_the_teachers_attention_with_the_students_weights(tiny, family):
    extra = {"sliding_window": 9} if family == "mistral" else {}
    model, ids = tiny(4, 2, family=family, **extra), tokens(2, 33)
    teacher = logits(model, ids)
    swapped(model, **LIVELY, qkv_bias="keep")
    switch(model, resolve("softmax", STATE).state)
    assert (logits(model, ids) - teacher).abs().max() < 1e-5
    out = model(ids[:, :20])
    rest = model(ids[:, 20:], past_key_values=out.past_key_values).logits
    assert (torch.cat((out.logits, rest), 1) - teacher).abs().max() < 1e-5


def test_states_that_mean_nothing_are_refused_in_a_sentence(tiny):
    arch = architecture_of(tiny(4, 2))
    config = Config()
    assert exposed_from(STATE) == 0
    have = {n for n in NAMES if (s := resolve(n, STATE).state) and not config.refuses(n, s, arch)}
    assert have == {"softmax", "hybrid", "none"}
    for name in sorted(set(NAMES) - have - {"teacher"}):
        assert "its states are teacher, softmax, hybrid, none" in config.refuses(name, resolve(name, STATE).state, arch)
    softmax = resolve("softmax", STATE).state
    for family, changed, words in (
        ("llama", {"kv_expand": "row_interleave_legacy"}, "scrambled their heads"),
        ("llama", {"short_convolution": 4}, "short convolutions"),
        ("qwen2", {}, "qkv_bias: keep has the state"),
        ("qwen3", {"qk_norm": "fold"}, r"q/k norm of qwen3 is not in them (qk_norm: fold)"),
    ):
        arch = architecture_of(tiny(4, 2, family=family))
        assert words in Config(**changed).refuses("softmax", softmax, arch)
    model = swapped(tiny(4, 2))
    switch(model, State(window=5))
    with pytest.raises(ValueError, match="layer 0: gated_delta has no window"):
        logits(model, tokens(1, 9))


def test_settings_that_do_not_fit_are_refused():
    for changed, words in (
        ({"decay": {"rate": (4.0, 1.0)}}, r"rate: \[4, 1\] does not rise"),
        ({"rope": "keep", "kv_expand": "row_interleave_legacy"}, "has scrambled"),
        ({"short_convolution": 1}, "greater than or equal to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            Config(**changed)


# --- learning from the teacher ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_against_the_teachers_own_output(tiny, padded):
    model = tiny(6, 2, dtype=torch.float64)
    mask = (torch.arange(21) >= torch.tensor([[0], [9]])).long()
    extra, real = ({"attention_mask": mask} if padded else {}), mask.bool() if padded else torch.ones(2, 21).bool()
    attention = model.model.layers[1].self_attn
    seen = []
    hook = attention.o_proj.register_forward_hook(lambda m, a, out: seen.append((a[0], out)))
    logits(model, tokens(2, 21), **extra)
    hook.remove()
    (before, after), *_ = seen
    swapped(model, **LIVELY)
    form, captured = forms(model)[1], captured_of(model, **extra)[1]
    assert isinstance(captured, Captured) and (captured.output - after)[real].abs().max() < 1e-10
    *_, y = form.attend(captured.hidden_states, captured.position_embeddings, key_mask=captured.key_mask)
    flat = y.transpose(1, 2).flatten(2)
    expected = {
        "outputs": (flat - before)[real].square().mean(),
        "block_outputs": (flat @ form.o_proj.weight.T - after)[real].square().mean(),
    }
    far = form.losses(captured, {"block_outputs": 1.0}, "l2norm")["block_outputs"]
    apart = (flat @ form.o_proj.weight.T - after)[real].norm(dim=-1) / 48**0.5
    assert abs(float(far.detach()) - float(apart.mean().detach())) < 1e-10
    found = form.losses(captured, dict.fromkeys(expected, 1.0))
    assert all(abs(float(found[n].detach()) - float(x.detach())) < 1e-10 for n, x in expected.items())
    found["block_outputs"].backward()
    assert all(p.grad is not None for ps in form.groups().values() for p in ps)
    assert all(p.grad is None for p in attention.parameters())
    with pytest.raises(ValueError, match="no objective 'weights'; it has outputs, block_outputs"):
        form.losses(captured, {"weights": 1.0})
    observed = []
    with observing(model, lambda _, c: observed.append(c)):
        logits(model, tokens(2, 21), **extra)
    with pytest.raises(ValueError, match="only a recorder gets"):
        form.losses(observed[1], {"outputs": 1.0})


def test_a_loaded_student_has_no_teacher_to_record(tiny, tmp_path):
    from recipelin.data import train_tokenizer

    hf.export(swapped(tiny()), train_tokenizer(["a small text"] * 3, 264), tmp_path / "model", hybrid=STATE)
    model, _ = hf.load_student(tmp_path / "model", dtype="float32", device="cpu")
    with pytest.raises(RuntimeError, match="a loaded student has no teacher"), recording(model, lambda *_: None):
        logits(model, tokens(1, 9))


# --- a plan and a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def pocket_student(tmp_path):
    """The folder of an untrained student of the pocket teacher: gated_delta in all layers but the first."""
    from recipelin.shipped import POCKET

    model, tokenizer = hf.load_teacher(POCKET, dtype="float32", device="cpu")
    swapped(model, tuple(range(1, model.config.num_hidden_layers)))
    hf.export(model, tokenizer, tmp_path / "model", hybrid=STATE)
    return tmp_path / "model"


RECIPE = """name: exported-delta
model: {{student: {student}, teacher: pocket}}
method: {{name: exported}}
eval:
  suites: [small.yaml]
{states}"""
SUITE = "name: small\nevals: [{eval: perplexity, rows: 2, length: 64}, {eval: decode, contexts: [32], repeats: 1}]\n"


def recipe(tmp_path, student, states=""):
    (tmp_path / "small.yaml").write_text(SUITE)
    (tmp_path / "r.yaml").write_text(RECIPE.format(student=student, states=states))
    return load(tmp_path / "r.yaml")


def test_a_plan_refuses_states_with_file_and_line(tmp_path, pocket_student):
    for state, words in (
        ("window", r"r.yaml:7.*'window': gated_delta has no window.*its states are teacher, softmax, hybrid, none"),
        ("linear", r"r.yaml:7.*'linear'.*`linear` is `hybrid`"),
        ("{name: short, of: hybrid, window: 16}", r"r.yaml:7.*'short': gated_delta has no window"),
    ):
        with pytest.raises(PlanError) as found:
            plan(recipe(tmp_path, pocket_student, f"  states:\n  - {state}\n"))
        assert re.search(words, str(found.value)), str(found.value)
    planned = plan(recipe(tmp_path, pocket_student))
    assert [s.name for s in planned.steps[-1].step.states] == ["teacher", "softmax", "hybrid", "none"]
    assert planned.hybrid == STATE and planned.reach is None
    student = json.loads((pocket_student / "config.json").read_text())
    arch = Architecture.model_validate(planned.architecture.model_dump())
    added = Config().added(arch) * len(student["recipelin"]["layers"])
    assert f"{added:,} new parameters" in planned.steps[0].what and "linear over all keys" in planned.steps[1].what


def test_what_a_stage_asks_of_the_wrong_form_is_refused(tmp_path, pocket_student):
    from recipelin.formcheck import unfit
    from recipelin.schedule import Curve, Schedule, Validation
    from recipelin.sources import Data
    from recipelin.steps import Switch, Transfer

    arch = plan(recipe(tmp_path, pocket_student)).architecture
    schedule = Schedule(
        steps=4,
        batch=2,
        length=32,
        validation=Validation(every=2, watch=(Validation.Watch(state="hybrid"), Validation.Watch(state="window"))),
        curve=Curve(tokens=(128,), suites=("pocket",), states=("hybrid", "linear")),
    )
    objective = {"block_outputs": 1.0, "weights": 1.0}
    trains = ("decay", "feature_maps")
    stage = Transfer(stage="align", objective=objective, trains=trains, schedule=schedule, data=Data())
    steps = (Swap(form="gated_delta", config=Config(), layers=(1,)), Switch(state=STATE), stage)
    found = list(unfit(arch, steps))
    assert [where for where, _ in found] == [
        ("method",),
        ("method",),
        ("schedule", "align", "validation", "watch", 1, "state"),
        ("schedule", "align", "curve", "states", 1),
    ]
    for (_, text), words in zip(
        found,
        ("no parameters 'feature_maps'", "no objective 'weights'", "'window': gated_delta has no window", "'linear'"),
        strict=True,
    ):
        assert words in text
    fitting = stage.model_copy(update={"objective": {"block_outputs": 1.0}, "trains": ("decay",), "schedule": None})
    plain = Schedule(steps=4, batch=2, length=32)
    assert not list(unfit(arch, (*steps[:2], fitting.model_copy(update={"schedule": plain}))))


def test_a_student_with_a_retained_layer_is_evaluated_in_its_states(tmp_path, home, pocket_student):
    from recipelin.records import read_items, read_record
    from recipelin.render import render
    from recipelin.run import run
    from recipelin.runtable import run_table
    from recipelin.verdict import verdict

    folder = run(recipe(tmp_path, pocket_student), out=tmp_path / "out", device="cpu")
    record = read_record(folder / "record.json")
    assert (
        record.kernels == dict.fromkeys(("gated_delta_rule", "gated_delta_rule_step"), "chunked")
        and record.window is None
    )
    losses = {r.state: r.value for r in record.rows if r.metric == "log_loss"}
    assert losses.keys() == {"teacher", "softmax", "hybrid", "none"}
    assert abs(losses["teacher"] - losses["softmax"]) < 1e-4  # untrained: the teacher's own weights
    assert losses["hybrid"] > losses["teacher"] and losses["none"] > losses["teacher"]
    judged = verdict(record, read_items(folder))
    assert judged.word == "not testable" and "no window beside them to be judged against" in judged.sentence
    assert "linear branch brings" not in render(run_table(record, read_items(folder)), "markdown")
    exposed = {r.exposed for r in record.rows if r.state == "hybrid" and r.metric == "log_loss"}
    assert exposed == {1.0}
    sizes = {r.state: r.value for r in record.rows if r.metric == "cache_bytes"}
    assert sizes.keys() == {"teacher", "softmax", "hybrid"} and len(set(sizes.values())) > 1
