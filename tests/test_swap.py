"""Swap, switch, restore, recording; the form's losses and calibration against dense formulas."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from recipelin.attention.hybrid.config import Config, FeatureMap
from recipelin.states import State
from recipelin.steps import Swap
from recipelin.swap import (
    form_parameters,
    forms,
    mark_merged,
    recording,
    restore,
    state_of,
    swap,
    switch,
)
from tests.rows import logits, tokens

STEP = Swap(form="hybrid", config=Config(feature_map=FeatureMap(width=3)))
HYBRID = State(window=5)


# --- swap, switch, restore --------------------------------------------------------------------------------------------


def test_only_the_named_layers_are_swapped_and_projections_are_shared(tiny):
    model = tiny(layers=3)
    before = dict(model.named_parameters())
    swap(model, STEP.model_copy(update={"layers": (0, 2)}), seed=0)
    new = form_parameters(model)
    assert [f.layer_index for f in forms(model)] == [0, 2]
    after = dict(model.named_parameters())
    assert after.keys() - before.keys() == new.keys() and len(new) == 8
    assert all(after[name] is p for name, p in before.items())
    assert set(model.state_dict()) == set(after) | {"lm_head.weight"}  # the kept modules are not saved twice


def test_what_cannot_be_swapped_is_refused(tiny):
    model = tiny(layers=3)
    with pytest.raises(ValueError, match=r"layers \[3, 9\]: the model has layers 0 to 2"):
        swap(model, STEP.model_copy(update={"layers": (1, 3, 9)}), seed=0)
    assert forms(model) == []
    with pytest.raises(ValueError, match="no layer of the model is swapped"):
        switch(model, HYBRID)
    swap(model, STEP.model_copy(update={"layers": (1,)}), seed=0)
    with pytest.raises(ValueError, match=r"layers \[1\] are swapped already"):
        swap(model, STEP, seed=0)
    with pytest.raises(ValueError, match="did you mean 'hybrid'"):
        swap(tiny(), STEP.model_copy(update={"form": "hybird"}), seed=0)
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11))
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama, mistral"):
        swap(other, STEP, seed=0)


def test_a_swapped_instance_of_a_stock_class_makes_and_takes_stock_caches(tiny):
    model = tiny(layers=3)
    swap(model, STEP.model_copy(update={"layers": (0, 2)}), seed=0)
    switch(model, HYBRID)
    ids = tokens(2, 21)
    with torch.no_grad():
        found = model(ids[:, :13])
        rest = model(ids[:, 13:], past_key_values=found.past_key_values)
    assert (torch.cat((found.logits, rest.logits), 1) - logits(model, ids)).abs().max() < 1e-5
    assert [type(x).__name__ for x in rest.past_key_values.layers] == ["StateLayer", "DynamicLayer", "StateLayer"]


@pytest.mark.parametrize("padded", [False, True])
def test_restore_gives_the_teacher_back_bit_for_bit_until_a_merge(tiny, padded):
    model = tiny(layers=3)
    extra = {"attention_mask": (torch.arange(21) >= torch.tensor([[0], [9]])).long()} if padded else {}
    names, before = set(model.state_dict()), logits(model, tokens(2, 21), **extra)
    for _ in range(2):
        swap(model, STEP, seed=0)
        switch(model, HYBRID)
        assert (logits(model, tokens(2, 21), **extra) - before).abs().max() > 1e-3
        restore(model)
        assert set(model.state_dict()) == names and state_of(model) is None
        assert torch.equal(logits(model, tokens(2, 21), **extra), before)
    swap(model, STEP, seed=0)
    mark_merged(model)
    with pytest.raises(RuntimeError, match="load the teacher anew"):
        restore(model)
    assert len(forms(model)) == 3


def test_start_values_are_a_function_of_seed_layer_and_side(tiny):
    def maps(seed: int, **feature_map) -> list[torch.Tensor]:
        model = tiny()
        swap(model, Swap(form="hybrid", config=Config(feature_map=FeatureMap(width=3, **feature_map))), seed=seed)
        return [w.detach() for form in forms(model) for w in form.groups()["feature_maps"]]

    first = maps(5)
    assert all(torch.equal(a, b) for a, b in zip(first, maps(5), strict=True))
    for weight in first:
        assert torch.equal(weight[:, :, :8], torch.eye(8).expand(4, 8, 8))
    drawn = [w[:, :, 8:] for w in (*first, *maps(6))]
    for i, one in enumerate(drawn):
        assert 0.5 * 8**-0.5 < one.abs().max() <= 8**-0.5  # kaiming-uniform of fan-in 8
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])
    assert not any(torch.equal(w[:, :, :8], torch.eye(8).expand(4, 8, 8)) for w in maps(5, init="random"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        maps_drawn = tiny()  # seeds torch itself
        torch.manual_seed(0)
        swap(maps_drawn, STEP, seed=1)
        assert torch.equal(torch.rand(3), expected), "a swap must not move the caller's generator"


@pytest.mark.parametrize("join", ["shared", "absolute", "replace"])
def test_window_full(tiny, join):
    model = tiny()
    teacher = logits(model, tokens(2, 21))
    swap(model, STEP, seed=0)
    for branches in (("window",), ("window", "sinks"), ("window", "linear")):
        switch(model, State(branches=branches, window="full", join=join))
        assert (logits(model, tokens(2, 21)) - teacher).abs().max() < 2e-5
    switch(model, State(branches=("linear",), window="full", join=join))
    outside = logits(model, tokens(2, 21))
    switch(model, State(branches=()))
    assert torch.equal(outside, logits(model, tokens(2, 21)))  # nothing is outside a full window


def test_an_absent_branch_leaves_its_mass_or_not(tiny):
    """With `output` the absent branch keeps its share of the denominator, so that the parts add up to the whole."""
    model = tiny(dtype=torch.float64)
    swap(model, STEP, seed=0)
    form = forms(model)[0]
    q, k, v = torch.randn(3, 1, 4, 21, 8, dtype=torch.float64).unbind()
    k, v = k[:, :1], v[:, :1]
    found = {}
    for branches in (("window",), ("linear",), ("window", "linear"), ()):
        for ablate in ("mass", "output"):
            form.state = State(branches=branches, window=5, ablate=ablate)
            found[branches, ablate] = form.join(q, k, v)
    parts = found[("window",), "output"] + found[("linear",), "output"]
    assert (parts - found[("window", "linear"), "output"]).abs().max() < 1e-12
    far = slice(6, None)
    assert (found[("window",), "mass"] - found[("window",), "output"])[:, :, far].abs().max() > 1e-3
    assert (found[("window",), "mass"] - found[("window",), "output"])[:, :, :5].abs().max() == 0
    assert found[(), "mass"].abs().max() == 0 and found[(), "output"].abs().max() == 0


# --- learning from the teacher ----------------------------------------------------------------------------------------


class Dense:
    """Everything of one layer as T x T matrices in float64, from the form's q, k, v."""

    def __init__(self, form, captured):
        heads = captured.q.shape[1]
        self.k, self.v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (captured.k, captured.v))
        length = captured.q.shape[2]
        at = torch.arange(length)
        self.causal = (at[:, None] >= at)[None, None]
        self.rows = torch.ones(captured.q.shape[0], length, dtype=torch.bool)
        if captured.key_mask is not None:
            self.rows = captured.key_mask
        self.causal = self.causal & self.rows[:, None, None, :]
        self.near = self.causal & (at[:, None] - at < form.state.window)
        self.far = self.causal & ~self.near
        scores = (captured.q @ self.k.mT) * 8**-0.5
        self.scores = torch.where(self.causal, scores, -torch.inf)
        self.teacher = torch.where(self.rows[:, None, :, None], self.scores, 0.0).softmax(-1)
        phi_q, phi_k = form.feature_map_q(captured.q), form.feature_map_k(captured.k)
        self.pairs = phi_q @ phi_k.repeat_interleave(heads // phi_k.shape[1], 1).mT
        linear = torch.where(self.causal, self.pairs, 0.0)
        self.linear = linear / linear.sum(-1, keepdim=True).clamp(min=1e-300)
        top = torch.where(self.near, scores, -torch.inf).amax(-1, keepdim=True)
        soft = torch.where(self.near, (scores - torch.where(top.isinf(), 0.0, top)).exp(), 0.0)
        joint = form.mix()[:, None, None] * soft + torch.where(self.far, self.pairs, 0.0)
        self.hybrid = joint / joint.sum(-1, keepdim=True).clamp(min=1e-300)

    def mean(self, x):
        """Over real rows and heads; x [B,H,T] or [B,H,T,D]."""
        return x.movedim(1, -1)[self.rows].mean()

    def cross_entropy(self, weights):
        return self.mean(-(self.teacher * weights.clamp(min=1e-12).log() * self.causal).sum(-1))


def captured_layers(model, **extra):
    found = []
    with torch.no_grad(), recording(model, lambda index, captured: found.append((index, captured))):
        passed_on = logits(model, tokens(2, 21), **extra)
    return passed_on, found


@pytest.mark.parametrize("key_heads", ["query", "key"])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_the_dense_formulas(tiny, padded, key_heads):
    model = tiny(6, 2, dtype=torch.float64)
    mask = (torch.arange(21) >= torch.tensor([[0], [9]])).long()
    extra = {"attention_mask": mask} if padded else {}
    teacher = logits(model, tokens(2, 21), **extra)
    swap(model, Swap(form="hybrid", config=Config(feature_map=FeatureMap(width=3, key_heads=key_heads))), seed=0)
    switch(model, HYBRID)
    passed_on, found = captured_layers(model, **extra)
    real = mask.bool() if padded else torch.ones(2, 21, dtype=torch.bool)
    # Every layer sees the teacher's stream, whatever the forms would make of it.
    assert (passed_on - teacher)[real].abs().max() < 1e-10
    assert [index for index, _ in found] == [0, 1]
    for index, captured in found:
        form = forms(model)[index]
        dense = Dense(form, captured)
        assert (captured.y - dense.teacher @ dense.v).movedim(1, -1)[real].abs().max() < 1e-10
        assert (captured.lse - dense.scores.logsumexp(-1)).movedim(1, -1)[real].abs().max() < 1e-10
        objective = {"weights": 1.0, "hybrid_weights": 1.0, "outputs": 1.0, "hybrid_outputs": 1000.0}
        losses = form.losses(captured, objective)
        expected = {
            "weights": dense.cross_entropy(dense.linear),
            "hybrid_weights": dense.cross_entropy(dense.hybrid),
            "outputs": dense.mean((dense.linear @ dense.v - captured.y).square()),
            "hybrid_outputs": dense.mean((dense.hybrid @ dense.v - captured.y).square()),
        }
        assert losses.keys() == expected.keys()
        parameters = [p for name in ("feature_maps", "mix") for p in form.groups()[name]]
        for name, loss in losses.items():
            assert loss.shape == () and abs(loss.item() - expected[name].item()) < 1e-9, name
            ours, theirs = (
                torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (loss, expected[name])
            )
            for a, b in zip(ours, theirs, strict=True):
                assert (torch.zeros(1) if a is None else a).sub(torch.zeros(1) if b is None else b).abs().max() < 1e-9


def test_calibration_is_the_closed_form_over_all_batches(tiny):
    model = tiny(6, 2, dtype=torch.float64)
    swap(model, STEP, seed=0)
    switch(model, State(window=5, join="absolute"))
    mask = (torch.arange(21) >= torch.tensor([[0], [9]])).long()
    _, first = captured_layers(model)
    _, second = captured_layers(model, attention_mask=mask)
    form = forms(model)[1]
    calibration = form.calibration("log_scale")
    rows = []
    for captured in (first[1][1], second[1][1]):
        calibration.add(captured)
        dense = Dense(form, captured)
        outside = torch.where(dense.far, dense.scores, -torch.inf).logsumexp(-1)
        ours = torch.where(dense.far, dense.pairs, 0.0).sum(-1).log()
        exposed = (dense.far.any(-1)[:, 0] & dense.rows)[..., None]
        rows.append((outside - ours).movedim(1, -1)[exposed[..., 0]])
    report = calibration.finish()
    expected = torch.cat(rows).mean(0)
    assert (form.log_scale.c - expected).abs().max() < 1e-9
    assert report["rows"] == sum(len(r) for r in rows)
    assert torch.equal(forms(model)[0].log_scale.c, torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="has no calibration 'logscale'; it has log_scale"):
        form.calibration("logscale")
    form.state = State(window=21, join="absolute")
    covered = form.calibration("log_scale")
    covered.add(first[1][1])
    with pytest.raises(ValueError, match="calibrate on longer rows"):
        covered.finish()


def test_recording_ends_with_its_block(tiny):
    model = tiny()
    swap(model, STEP, seed=0)
    with pytest.raises(ZeroDivisionError), recording(model, lambda *_: 1 / 0):
        logits(model, tokens(1, 9))
    assert all(form.recorder is None for form in forms(model))
    assert torch.isfinite(logits(model, tokens(1, 9))).all()
