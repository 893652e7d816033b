"""Both training stages by the Triton kernels: what is lost and learnt, beside the same by the torch kernels."""

from types import SimpleNamespace

import pytest
import torch

import recipelin.stages as stages
from recipelin.attention.hybrid.config import Config
from recipelin.data import Batch
from recipelin.schedule import Optimizer, Schedule
from recipelin.sources import Data
from recipelin.states import State
from recipelin.steps import Swap, Transfer, Tune
from recipelin.swap import form_parameters, swap, switch
from recipelin_kernels.hybrid import gpu_launch
from tests.kernels.gpu_device import DEVICE

pytestmark = pytest.mark.usefixtures("quick_interpreter")

LENGTH = 13
STAGES = {"transfer": (Transfer, {"objective": {"hybrid_weights": 1.0, "outputs": 100.0}}), "tune": (Tune, {})}


def batch(step: int, micro: int = 0) -> Batch:
    ids = torch.randint(0, 131, (1, LENGTH), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.clone(), torch.arange(LENGTH).expand(1, -1))


@pytest.mark.parametrize("stage", STAGES)
def test_trains_as_by_torch(stage, tiny, tmp_path, monkeypatch):
    make, fields = STAGES[stage]
    schedule = Schedule(steps=2, batch=1, length=LENGTH, log_every=1, optimizer=Optimizer(lr=1e-2))
    step = make(stage=stage, trains=("feature_maps", "mix"), schedule=schedule, data=Data(), **fields)
    launch, launched, losses, moved = gpu_launch.launch, [], [], []
    monkeypatch.setattr(gpu_launch, "launch", lambda *given: launched.append(given[0]) or launch(*given))
    for kernel in ("gpu", "chunked"):
        model = tiny(heads=2, key_heads=1).to(DEVICE)
        swap(model, Swap(form="hybrid", config=Config(kernel=kernel)), seed=0)
        switch(model, State(window=5))
        before = {n: p.detach().clone() for n, p in form_parameters(model).items()}
        count = len(launched)
        report = getattr(stages, stage)(
            model,
            step,
            SimpleNamespace(batch=batch, rows=64),
            device=DEVICE,
            folder=tmp_path / kernel,
            seed=0,
            log=tmp_path / f"{kernel}-log",
            key="k",
        )
        assert (len(launched) > count) == (kernel == "gpu")
        losses.append((report["loss_first"], report["loss_mean_of_last_tenth"]))
        moved.append(torch.cat([(p.detach() - before[n]).flatten() for n, p in form_parameters(model).items()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # Adam's first step is the sign of a gradient, however small.
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 1e-3
