"""A model by the Triton kernels beside the same by torch's: what both stages lose and learn, and a layer that decodes."""

import copy
from types import SimpleNamespace

import pytest
import torch

from recipelin_kernels import HybridState
from recipelin_kernels.hybrid import gpu_launch
from recipelin_kernels.hybrid.step_state import StepState
from tests.kernels.gpu_device import DEVICE, FP32, auto_is_gpu

pytestmark = pytest.mark.usefixtures("quick_interpreter")

LENGTH = 9


def test_trains_as_by_torch(tiny, tmp_path, monkeypatch):
    # Here, as with them comes transformers, for seconds.
    from recipelin import stages
    from recipelin.attention.hybrid.config import Config
    from recipelin.data import Batch
    from recipelin.schedule import Optimizer, Schedule
    from recipelin.sources import Data
    from recipelin.states import State
    from recipelin.steps import Swap, Transfer, Tune
    from recipelin.swap import form_parameters, swap, switch

    def batch(step: int, micro: int = 0) -> Batch:
        ids = torch.randint(0, 131, (1, LENGTH), generator=torch.Generator().manual_seed(step))
        return Batch(ids, ids.clone(), torch.arange(LENGTH).expand(1, -1))

    launch, launched = gpu_launch.launch, []
    monkeypatch.setattr(gpu_launch, "launch", lambda *given: launched.append(given[0]) or launch(*given))
    schedule = Schedule(steps=2, batch=1, length=LENGTH, log_every=1, optimizer=Optimizer(lr=1e-2))
    fields = {"trains": ("feature_maps", "mix"), "schedule": schedule, "data": Data()}
    transfer = Transfer(stage="transfer", objective={"hybrid_weights": 1.0, "outputs": 100.0}, **fields)
    for step in (transfer, Tune(stage="tune", **fields)):
        losses, moved = [], []
        for kernel in ("gpu", "chunked"):
            model = tiny(heads=2, key_heads=1).to(DEVICE)
            swap(model, Swap(form="hybrid", config=Config(kernel=kernel)), seed=0)
            switch(model, State(window=5))
            before = {n: p.detach().clone() for n, p in form_parameters(model).items()}
            place = tmp_path / f"{step.stage}-{kernel}"
            around = {"device": DEVICE, "folder": place / "work", "log": place / "log", "seed": 0, "key": "k"}
            launched.clear()
            report = getattr(stages, step.stage)(model, step, SimpleNamespace(batch=batch, rows=64), **around)
            assert bool(launched) == (kernel == "gpu")
            losses.append((report["loss_first"], report["loss_mean_of_last_tenth"]))
            moved.append(torch.cat([(p.detach() - before[n]).flatten() for n, p in form_parameters(model).items()]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        # Adam's first step is the sign of a gradient, however small.
        assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 1e-3


@pytest.mark.parametrize("taken", ["gpu", "auto"])
def test_a_layer_decodes_by_it(tiny, taken, monkeypatch):
    """After a prompt, the cache holds a StepState; by `auto` too, where the kernels are proven."""
    if taken == "auto":
        auto_is_gpu(monkeypatch)
    from recipelin.attention.hybrid.config import Config
    from recipelin.cache import StateLayer
    from recipelin.states import State
    from recipelin.steps import Swap
    from recipelin.swap import forms, swap, switch

    found = []
    hidden = torch.randn(1, 8, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for kernel in (taken, "chunked"):
        model = tiny(heads=2, key_heads=1, layers=1).to(DEVICE)
        swap(model, Swap(form="hybrid", config=Config(kernel=kernel)), seed=0)
        switch(model, State(window=3))
        form, layer = forms(model)[0], StateLayer()
        called: list[object] = []
        for one in (form.feature_map_q, form.feature_map_k):
            one.register_forward_hook(lambda *given, called=called: called.append(given[0]))
        with torch.no_grad():
            y = []
            for a, b in ((0, 5), (5, 6), (6, 7), (7, 8)):
                q, k, v = (
                    x[:, a:b].unflatten(2, (-1, 8)).transpose(1, 2)
                    for x in (p(hidden) for p in (form.q_proj, form.k_proj, form.v_proj))
                )
                before = len(called)
                y.append(form.join(q, k, v, layer=layer))
        assert isinstance(layer.state, StepState if kernel == taken else HybridState) and layer.state.bytes > 0
        assert (len(called) == before) == (kernel == taken), "a launch before that of the token makes its features"
        found.append(torch.cat(y, 2))
    assert float((found[0] - found[1]).norm() / found[1].norm()) <= FP32


def test_generates_by_auto(tiny, monkeypatch):
    """Beams, left padding, and a cache that is copied, repeated and gone on from: by the decode kernel as in torch."""
    from transformers import DynamicCache

    from recipelin.attention.hybrid.config import Config
    from recipelin.states import State
    from recipelin.steps import Swap
    from recipelin.swap import swap, switch

    model = tiny(heads=2, key_heads=1, layers=1).to(DEVICE).eval()
    swap(model, Swap(form="hybrid", config=Config()), seed=0)
    switch(model, State(window=3))
    ids = torch.randint(8, 60, (2, 6), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    texts, logits = [], []
    for proven in (False, True):
        auto_is_gpu(monkeypatch, proven)
        options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 7}
        texts.append(model.generate(ids, attention_mask=mask, **options))
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            for part in (ids, ids[:, :1]):
                model(input_ids=part, past_key_values=cache)
            copied = copy.deepcopy(cache)
            found = [model(input_ids=ids[:, 1:2], past_key_values=one).logits for one in (cache, copied)]
            assert isinstance(cache.layers[0].state, StepState) == proven and torch.equal(*found)
            cache.batch_repeat_interleave(2)
            for part in (ids[:, 2:3], ids[:, 3:6]):
                found.append(model(input_ids=part.repeat_interleave(2, 0), past_key_values=cache).logits)
        logits.append(torch.cat([x.flatten() for x in found]))
    assert torch.equal(*texts) and texts[0].shape == (2, 9)
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) <= FP32
