"""Phase 1 of Taylor-Calibrate: each rule against the formula of arXiv 2606.16429 written out in float64, and its report."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from recipelin import families
from recipelin.attention.captured import Captured
from recipelin.attention.gated_delta.calibration import constant_from, lookback
from recipelin.attention.gated_delta.config import Config, WriteGate
from recipelin.attention.gated_delta.rules import (
    RULES,
    DecayRule,
    OutputGateRule,
    SmallGateRule,
    ValueRule,
    WriteGateRule,
    ZeroGateRule,
)
from recipelin.load import load
from recipelin.plan import plan
from recipelin.points import points
from recipelin.stages import calibrate
from recipelin.steps import Calibrate, Swap, Transfer, Tune
from recipelin.strict_yaml import RecipeError
from recipelin.swap import forms, recording, swap

HEADS, D, T = 4, 8, 19


def student(tiny, heads=HEADS, key_heads=2, **config):
    model = tiny(heads, key_heads, dtype=torch.float64)
    swap(model, Swap(form="gated_delta", config=Config(**{"gate_std": 0.3, **config})), seed=3)
    return model


def captured_of(model, rows=2, length=T, seed=1, **extra):
    ids = torch.randint(0, 131, (rows, length), generator=torch.Generator().manual_seed(seed))
    found: dict[int, Captured] = {}
    with torch.no_grad(), recording(model, found.__setitem__):
        model(input_ids=ids, use_cache=False, **extra)
    return found[1]  # of the second layer: its input is no embedding


def attention(form, captured):
    """A [B,H,T,T] of the teacher, by a loop over heads."""
    b, heads, t, _ = captured.q.shape
    group = heads // captured.k.shape[1]
    found = torch.zeros(b, heads, t, t, dtype=torch.float64)
    for h in range(heads):
        s = captured.q[:, h] @ captured.k[:, h // group].transpose(1, 2) * form.scaling
        found[:, h] = s.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1)
    return found


def recurrence(form, x, scale):
    """y_S [B,H,T,d] token by token, from the weights."""

    def heads(w):
        return F.silu(x @ w.T).unflatten(-1, (HEADS, D)).transpose(1, 2)

    q, k, v = (heads(p.weight) for p in (form.q_proj, form.k_proj, form.v_proj))
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    beta = (x @ form.b_proj.weight.T).sigmoid()
    decay = (-form.A_log.exp() * F.softplus(x @ form.a_proj.weight.T + form.dt_bias)).exp()
    found = torch.zeros_like(v)
    for b in range(x.shape[0]):
        for h in range(HEADS):
            s = torch.zeros(D, D, dtype=torch.float64)
            for t in range(x.shape[1]):
                kt, bt = k[b, h, t], beta[b, t, h]
                s = decay[b, t, h] * (s - bt * torch.outer(s @ kt, kt)) + bt * torch.outer(v[b, h, t], kt)
                found[b, h, t] = scale * s @ q[b, h, t]
    return found


def calibrated(form, captured, rule):
    made = form.calibration(rule.WHAT, rule)
    made.add(captured)
    return made.finish()


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_the_teachers_statistics(tiny, chunk):
    model = student(tiny)
    form, captured = forms(model)[1], captured_of(model)
    a = attention(form, captured)
    far = torch.arange(T)[:, None] - torch.arange(T).double() + 0.5 * torch.eye(T)
    distance, entropy, rows = lookback(form, captured, chunk=chunk)
    assert rows == 2 * T
    assert (distance / rows - (a * far).sum(-1).mean((0, 2))).abs().max() < 1e-12
    logs = torch.where(a > 0, a, 1).log()
    assert (entropy / rows + (a * logs).sum(-1).mean((0, 2))).abs().max() < 1e-12


def test_statistics_pass_over_padding_and_other_documents(tiny):
    """A padded row counts as the row alone, whatever the padding holds; a packed one as its documents."""
    model = student(tiny)
    form = forms(model)[1]
    alone = lookback(form, captured_of(model, rows=1))
    captured = captured_of(model, rows=1)
    pad = {n: F.pad(getattr(captured, n), (0, 0, 5, 0), value=math.nan) for n in ("q", "k", "v", "y")}
    mask = torch.arange(T + 5)[None] >= 5
    padded = lookback(form, Captured(**pad, lse=None, key_mask=mask, segment_ids=None))
    twice = {n: torch.cat([getattr(captured, n)] * 2, 2) for n in ("q", "k", "v", "y")}
    segments = torch.arange(2 * T)[None] // T
    packed = lookback(form, Captured(**twice, lse=None, key_mask=None, segment_ids=segments))
    for one, other, both in zip(alone, padded, packed, strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), atol=1e-12)
        assert torch.allclose(2 * torch.as_tensor(one), torch.as_tensor(both), atol=1e-12)


def test_decay(tiny):
    model = student(tiny)
    form, captured = forms(model)[1], captured_of(model)
    far = torch.arange(T)[:, None] - torch.arange(T).double() + 0.5 * torch.eye(T)
    distance = (attention(form, captured) * far).sum(-1).mean((0, 2)).clamp(min=0.5)
    before = form.a_proj.weight.clone()
    report = calibrated(form, captured, DecayRule())
    assert report["clamped"] == 0 and torch.equal(form.a_proj.weight, before) and not form.A_log.any()
    assert (math.log(2) / F.softplus(form.dt_bias.double()) - distance).abs().max() < 1e-5, "a half-life of d_h tokens"
    assert report["lookback"] == [float(f"{x:.4g}") for x in distance.tolist()]
    report = calibrated(form, captured, DecayRule(max_rate=0.05, zero_a_proj=True))
    assert report["clamped"] == 1 and not form.a_proj.weight.any()
    fit = form.fit()
    fit.add(captured)
    assert fit.finish()["half_life"] == pytest.approx([math.log(2) / 0.05] * HEADS, rel=1e-3), "reached, as a_proj = 0"


@pytest.mark.parametrize("mode", ["rescale_rows", "bias", "ridge"])
def test_write_gate(tiny, mode):
    model = student(tiny, write_gate=WriteGate(bias=mode == "bias"))
    form, captured = forms(model)[1], captured_of(model)
    a = attention(form, captured)
    entropy = -(a * torch.where(a > 0, a, 1).log()).sum(-1).mean((0, 2))
    target = 0.3 + 0.4 * (1 - (entropy - entropy.min()) / max(entropy.max() - entropy.min(), 1e-3))
    logit = (target / (1 - target)).log()
    before, x = form.b_proj.weight.clone(), captured.hidden_states.flatten(0, 1)
    report = calibrated(form, captured, WriteGateRule(mode=mode))
    assert report["target"] == [float(f"{v:.4g}") for v in target.tolist()]
    assert max(report["target"]) == 0.7 and min(report["target"]) == 0.3
    made = x @ form.b_proj.weight.T + (form.b_proj.bias if mode == "bias" else 0)
    if mode == "rescale_rows":
        for h in range(HEADS):
            expected = logit[h] / math.sqrt(x.shape[1]) * before[h] / before[h].abs().mean()
            assert (form.b_proj.weight[h] - expected).abs().max() < 1e-12
    elif mode == "bias":
        assert torch.equal(form.b_proj.weight, before)
        assert (made.mean(0) - logit).abs().max() < 1e-10, "the mean logit is the wanted one"
    else:
        penalty = 1e-2 * x.shape[0] * x.square().mean()
        u = torch.linalg.inv(x.T @ x + penalty * torch.eye(48).double()) @ x.T @ torch.ones(x.shape[0]).double()
        assert (form.b_proj.weight - logit[:, None] * u).abs().max() < 1e-9
        assert report["constant_reached"] == pytest.approx(float((x @ u).mean()))


def test_ridge_is_solved_in_the_smaller_dimension():
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tall = torch.cat([x] * 2)  # the same problem with more rows than columns
    penalty = 0.3 * 7 * x.square().mean()
    u = torch.linalg.inv(x.T @ x + penalty * torch.eye(12).double()) @ x.T @ torch.ones(7).double()
    assert (constant_from(x, 0.3) - u).abs().max() < 1e-12 and (constant_from(tall, 0.3) - u).abs().max() < 1e-12


@pytest.mark.parametrize("matched", [True, False])
def test_value(tiny, matched):
    model = student(tiny)
    form, captured = forms(model)[1], captured_of(model)
    y = recurrence(form, captured.hidden_states, D**-0.5 if matched else 1.0)
    exact = (captured.y * y).sum((0, 2, 3)) / y.square().sum((0, 2, 3))
    before = form.v_proj.weight.clone()
    report = calibrated(form, captured, ValueRule(match_kernel_scale=matched))
    sigma = exact.clamp(0.1, 10)
    for h in range(HEADS):
        assert (form.v_proj.weight[h * D : h * D + D] - sigma[h] * before[h * D : h * D + D]).abs().max() < 1e-9
    assert report["clamped_low"] == float((exact <= 0.1).double().mean())
    tight = calibrated(form, captured, ValueRule(match_kernel_scale=matched, clip=(1e-9, 2e-9)))
    assert tight["clamped_low"] + tight["clamped_high"] == 1 and tight["sigma"][0] in (1e-9, 2e-9)


def test_output_gate_and_the_other_arms(tiny):
    model = student(tiny)
    form, captured = forms(model)[1], captured_of(model)
    drawn = form.g_proj.weight.clone()
    value = F.silu(captured.hidden_states @ form.v_proj.weight.T)
    alpha = 0.01 * captured.y.square().mean(-1).sqrt().mean() / value.square().mean().sqrt()
    report = calibrated(form, captured, OutputGateRule())
    assert report["alpha"] == float(f"{alpha:.4g}")
    assert (form.g_proj.weight - alpha * form.v_proj.weight).abs().max() < 1e-12
    form.g_proj.weight.data.copy_(drawn)
    calibrated(form, captured, SmallGateRule())
    assert torch.allclose(form.g_proj.weight, 0.02 * drawn)
    calibrated(form, captured, ZeroGateRule())
    assert not form.g_proj.weight.any()


def test_what_a_form_lacks_is_refused(tiny):
    form = forms(student(tiny, output_gate="none"))[0]
    with pytest.raises(ValueError, match="did you mean 'decay'"):
        form.calibration("decays", DecayRule())
    with pytest.raises(ValueError, match="takes a DecayRule, found NoneType"):
        form.calibration("decay")
    with pytest.raises(ValueError, match=r"needs form: \{write_gate: \{bias: true\}\}"):
        form.calibration("write_gate", WriteGateRule(mode="bias"))
    with pytest.raises(ValueError, match="sets the output gate"):
        form.calibration("zero_gate", ZeroGateRule())
    assert len({rule.WHAT for rule in RULES}) == len(RULES) == 6


class Rows:
    """One batch by number, without a corpus."""

    def batch(self, number):
        from recipelin.data import Batch

        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, 131, (2, T), generator=draw)
        return Batch(ids, ids, torch.arange(T).expand(2, T))


def test_the_report_holds_the_fit_before_and_after(tiny):
    """On rows that the calibration has not seen, against the layer's own forward pass."""
    from recipelin.sources import Data

    model = student(tiny)
    form = forms(model)[1]
    with torch.no_grad():
        batch = Rows().batch(5)
        captured = captured_of(model)
        made, _ = form(captured.hidden_states, captured.position_embeddings, position_ids=batch.position_ids)
        fit = form.fit()
        fit.add(captured)
        expected = (made - captured.output).square().sum() / captured.output.square().sum()
        assert fit.finish()["error"] == float(f"{expected:.4g}")
    step = Calibrate(what="zero_gate", rule=ZeroGateRule(), data=Data(), batches=1, batch=2, length=T, held_out=2)
    report = calibrate(model, step, Rows(), device="cpu", held_out=Rows())["layers"]
    assert list(report) == ["0", "1"]
    for layer in report.values():
        assert layer["before"]["error"] != 1 and layer["after"]["error"] == 1 and layer["after"]["cosine"] == 0
        assert len(layer["before"]["head_cosine"]) == len(layer["after"]["write_gate_mean"]) == HEADS


# --- the method -------------------------------------------------------------------------------------------------------

RECIPE = """\
name: test/taylor
model: {teacher: pocket-qwen3}
method: {name: taylor_calibrate, layers: {policy: explicit, layers: [0]}, METHOD}
data: {mix: [{source: python-stdlib}]}
eval: {suites: [pocket-claims]}
"""
PHASE1 = ["decay", "write_gate", "value", "output_gate"]


def made_of(tmp_path, method, more=""):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("METHOD", method) + more, encoding="utf-8")
    return plan(load(path))


@pytest.mark.parametrize(
    ("method", "calibrations", "stages"),
    [
        ("arm: baseline", [], []),
        ("arm: zero_gate", ["zero_gate"], []),
        ("arm: small_gate", ["small_gate"], []),
        ("arm: taylor_only", PHASE1, []),
        ("arm: alignment_only", [], ["align"]),
        ("arm: zero_gate_alignment", ["zero_gate"], ["align"]),
        ("arm: taylor_calibrate", PHASE1, ["align"]),
        ("arm: taylor_calibrate, phase1: {value: null, decay: null}", ["write_gate", "output_gate"], ["align"]),
    ],
)
def test_what_each_arm_does(tmp_path, method, calibrations, stages):
    planned = made_of(tmp_path, method)
    found = [p.step for p in planned.steps]
    assert [s.what for s in found if isinstance(s, Calibrate)] == calibrations
    transfers = [s for s in found if isinstance(s, Transfer)]
    assert [s.stage for s in transfers] == stages
    for step in transfers:
        assert step.objective == {"block_outputs": 1.0} and step.block_loss == "mse"
        assert set(step.trains) == {"projections", "decay", "write_gate", "output_gate"}, "o_proj and the norm stay"
    assert {s.data.first_rows for s in found if isinstance(s, (Calibrate, Transfer))} <= {4}
    assert all(s.data.only_part is None for s in found if isinstance(s, (Calibrate, Transfer)))


STAGES = """schedule:
  transfer: {steps: 3, batch: 1, length: 64}
  tune: {steps: 3, batch: 1, length: 64, optimizer: {lr: 7.0e-6, group_lr: {attention: 1.0e-4, attention_norms: 1.0e-4}}}
"""


@pytest.mark.parametrize("policy", ["single_keep_ppl", "kl_stage2", "lm_ppl"])
def test_a_candidate_is_tried_as_its_arm_starts(tmp_path, policy):
    """The paper's GA-S2 scores untrained students, the original one students after the paper's stage 1."""
    tune = ", tune: {steps: 2, batch: 1, length: 64}" if policy == "kl_stage2" else ""
    layers = f"layers: {{policy: {policy}, keep: 1, rows: 2, length: 64{tune}}}"
    path = tmp_path / "r.yaml"
    text = RECIPE.replace("layers: {policy: explicit, layers: [0]}", layers).replace("METHOD", "as_published: true")
    path.write_text(text + STAGES, encoding="utf-8")
    select = plan(load(path)).steps[0].step
    probed = [getattr(s, "stage", s.step) for s in select.probe]
    start = ["swap", "switch", *["calibrate"] * 4, "align"]
    assert probed == {"single_keep_ppl": start, "kl_stage2": [*start, "transfer", "tune"], "lm_ppl": []}[policy]
    assert (select.data.only_part, select.data.order, select.data.first_rows) == ("test", "first", None)
    assert all(s.held_out == 0 for s in select.probe if isinstance(s, Calibrate))
    for step in (s for s in select.probe if isinstance(s, Calibrate) or getattr(s, "stage", "") == "align"):
        assert (step.data.only_part, step.data.order, step.data.first_rows) == ("test", "first", 4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("phase1: {write_gate: {mode: bias}}", r"needs form: \{write_gate: \{bias: true\}\}"),
        ("form: {output_gate: none}", "sets the output gate"),
        ("phase1: {decay: null, write_gate: null, value: null, output_gate: null}", "every piece is null"),
        ("phase1: {value: {clip: [2, 1]}}", "does not rise"),
        ("phase1: {write_gate: {base: 0.7}}", "expected less than 1"),
        ("phase1: {write_gate: {ridge: 0.1}}", "ridge is of mode ridge"),
        ("phase1: {decay: {min_rate: 9}}", "is not below max_rate"),
        ("arm: taylor", "taylor_only"),
        ("as_published: true, same_rows: false", "leave same_rows out"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(tmp_path, method, message):
    with pytest.raises(RecipeError, match=message) as refused:
        made_of(tmp_path, method)
    assert "r.yaml:3" in str(refused.value)


def test_rows_that_come_again(tmp_path):
    """`first_rows`: stages with the same rows; `only_part`: the part that is read, whichever is asked for."""
    from recipelin import data, hf
    from recipelin.sources import Data

    tokenizer = hf.load_tokenizer(hf.__file__.replace("hf.py", "pocket"))
    common = {"part": "selection", "length": 64, "batch": 2, "seed": 1, "folder": tmp_path, "cache": tmp_path}
    free = data.Batches(Data(), tokenizer, **common)
    fixed = data.Batches(Data(), tokenizer, **common, first_rows=3)
    rows = torch.cat([fixed.batch(i).input_ids for i in range(3)])
    assert torch.equal(rows[:3], rows[3:]) and torch.equal(rows[:2], free.batch(0).input_ids)
    assert fixed.rows == 3 and not torch.equal(free.batch(1).input_ids, fixed.batch(1).input_ids)


def test_as_published_reads_the_first_tokens_of_the_test_part(tmp_path, home):
    """4 x 64 in order, the same for every stage; held-out rows are those behind; a mixture is refused."""
    from recipelin import data, hf
    from recipelin.mistakes import PlanError
    from recipelin.run import _Walk

    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "line {i} holds {i * 7}"}}\n' for i in range(200)))
    mine = "{source: jsonl, path: t.jsonl, parts: {selection: [0, 1], test: [9, 199]}}"
    text = RECIPE.replace("{source: python-stdlib}", mine).replace("METHOD", "as_published: true")
    (tmp_path / "r.yaml").write_text(text + "schedule: {align: {steps: 2, batch: 4, length: 64}}\n")
    loaded = load(tmp_path / "r.yaml")
    walk = _Walk(loaded, plan(loaded), tmp_path, "cpu", fresh=False, published=None)
    walk.tokenizer = hf.load_tokenizer(hf.__file__.replace("hf.py", "pocket"))
    steps = [p.step for p in walk.plan.steps if isinstance(p.step, (Calibrate, Transfer))]
    source = steps[0].data.mix[0]
    tokens = data.stream(source, walk.tokenizer, part="test", folder=tmp_path, cache=None).tokens
    expected = torch.from_numpy(tokens[: 3 * 4 * 64].astype("int64")).view(3, 4, 64)
    assert len(steps) == 5
    for step in steps:
        for part, numbers in (("training", [0, 0, 0]), ("selection", [1, 2])):
            found = walk._batches(step.data, part=part, length=64, batch=4, stage=step.step)
            for number, batch in enumerate(numbers):
                assert torch.equal(found.batch(number).input_ids, expected[batch]), (step.step, part)
    mixture = RECIPE.replace("{source: python-stdlib}", "{source: python-stdlib}, {source: recall}")
    (tmp_path / "m.yaml").write_text(mixture.replace("METHOD", "as_published: true"), encoding="utf-8")
    with pytest.raises(PlanError, match=r"m.yaml:3.*as_published: order: first is of one source that is read"):
        plan(load(tmp_path / "m.yaml"))


def test_a_whole_run_at_tiny_size(tmp_path):
    """Layers by GA-S2, phase 1, alignment, both stages of distillation on a random teacher; the report is in the Record."""
    from recipelin import hf
    from recipelin.load import expand
    from recipelin.records import read_record
    from recipelin.run import run
    from recipelin.shrink import shrink, tiny_folder, tiny_of

    path = tmp_path / "r.yaml"
    text = RECIPE.replace("METHOD", "form: {gate_std: 0.1}").replace(
        "pocket-claims]", "pocket-claims], states: [hybrid]"
    )
    path.write_text(text + STAGES, encoding="utf-8")
    point = expand(load(path))[0]
    folder = tiny_folder(tmp_path, tiny_of(point))
    hf.tiny_teacher(tiny_of(point), folder, hf.__file__.replace("hf.py", "pocket"))
    record = read_record(run(shrink(point, str(folder)), device="cpu"))
    assert [s.step for s in record.steps] == [
        "select", "swap", "switch", *["calibrate"] * 4, "align", "transfer", "tune", "evaluate",
    ]  # fmt: skip
    (kept,) = record.steps[0].report["layers"]
    reports = [s.report["layers"][str(1 - kept)] for s in record.steps if s.step == "calibrate"]
    for one, other in pairwise(reports):
        assert one["after"]["error"] == other["before"]["error"], "the same held-out rows"
    assert reports[0]["lookback"] and reports[1]["target"] and reports[2]["sigma"] and reports[3]["alpha"] > 0
    assert all(math.isfinite(r.value) for r in record.rows)


def test_what_alignment_costs_by_hand(tmp_path):
    """A token: the teacher's stream, the rule and what is new three times, and the layer's own q, k, v, o forward and back."""
    planned = made_of(tmp_path, "arm: alignment_only")
    architecture, align = planned.architecture, next(p for p in planned.steps if isinstance(p.step, Transfer))
    form = next(p.step for p in planned.steps if isinstance(p.step, Swap)).config
    converted = architecture.num_hidden_layers - 1
    attention = families.parameters(architecture)["attention"]
    stream = architecture.num_hidden_layers * (attention + families.parameters(architecture)["mlp"])
    stream += architecture.vocab_size * architecture.hidden_size
    heads, d, length = architecture.num_attention_heads, architecture.head_dim, align.step.schedule.length
    softmax = 2 * length * d * heads * architecture.num_hidden_layers
    rule = heads * (10 * 32 * d + 32**2 + 6 * d * d) + 2 * form.added(architecture)
    assert form.added(architecture) > 0
    each = 2 * stream + softmax + converted * (3 * rule + 4 * attention)
    assert align.cost.flops == pytest.approx(align.cost.tokens * each)


def test_the_rivals_of_claim_14_need_equal_states():
    """fp32 bytes of a layer: heads x d x d against the window's keys and values and F x (d + 1) sums a key head."""
    delta, window = (plan(points(f"pocket/claims/taylor-{name}/seed=1")[0]) for name in ("delta", "window"))
    a, features = delta.architecture, next(p.step for p in window.steps if isinstance(p.step, Swap)).config.feature_map
    assert a == window.architecture and features.key_heads == "key" and window.hybrid is not None
    ring = 2 * a.num_key_value_heads * window.hybrid.window * a.head_dim
    sums = a.num_key_value_heads * features.size(a.head_dim) * (a.head_dim + 1)
    assert 4 * a.num_attention_heads * a.head_dim**2 == 24_576 and 4 * (ring + sums) == 25_088
    read = [sum(p.cost.tokens for p in each.steps if isinstance(p.step, (Transfer, Tune))) for each in (delta, window)]
    assert read[0] == read[1] == 400 * 4 * 256
