"""A kernel that cannot run on the device of the run is refused at its line of the recipe, before any work."""

from typing import get_args

import pytest
import torch

from recipelin import lookup
from recipelin.cli import main
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import architecture_of
from recipelin.run import RunError, choose_device, run
from recipelin_kernels import KernelError

# Of a form that a shipped method swaps in, that method.
METHODS = {
    "hybrid": "{name: inference_hybrid, window: 8, ",
    "gated_delta": "{name: taylor_calibrate, layers: {keep: 1}, ",
}
RECIPE = """\
name: test/kernel
model: {teacher: pocket, beyond_context: true}
method: METHODform: {
  kernel: KERNEL}}
data: {mix: [{source: python-stdlib}]}
eval: {suites: [pocket]}
"""


class Reached(Exception):
    """The run came as far as its work."""


def reached(*_):
    raise Reached


def test_every_kernel_of_every_form_runs_or_is_refused_at_its_line(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("recipelin_kernels.hybrid.why_no_c", lambda: "no C compiler is here")
    monkeypatch.setattr("recipelin.run.spool.ready", reached)
    path, refused, ran = tmp_path / "recipe.yaml", {}, []
    path.write_text(RECIPE.replace("METHOD", METHODS["hybrid"]).replace("KERNEL", "auto"), encoding="utf-8")
    numbers = architecture_of(load(path))
    for form in lookup.names("attention"):
        config = lookup.lookup("attention", form).Config
        for kernel in get_args(config.model_fields["kernel"].annotation):
            try:
                if form in METHODS:
                    path.write_text(RECIPE.replace("METHOD", METHODS[form]).replace("KERNEL", kernel), encoding="utf-8")
                    with pytest.raises(Reached):
                        run(load(path), out=tmp_path / "out", device="cpu")
                else:
                    attention = lookup.implementation("attention", form).FORM
                    attention.kernel_on(config(kernel=kernel), numbers, "cpu", torch.float32)
            except (PlanError, KernelError) as error:
                refused[form, kernel] = str(error)
                continue
            ran.append(kernel)
    assert len(ran) == 9 and set(ran) == {"auto", "reference", "chunked"}
    assert set(refused) == {("hybrid", "gpu"), ("hybrid", "cpu"), ("gated_delta", "fla"), ("native", "fla")}
    for form, kernel in refused:
        place = f"{path}:4:11: method.form: " if form in METHODS else ""
        assert refused[form, kernel].startswith(f"{place}kernel='{kernel}': ")
    assert "need a CUDA device, found cpu" in refused["hybrid", "gpu"]
    assert "no C compiler is here; use 'chunked'" in refused["hybrid", "cpu"]
    assert not (tmp_path / "out").exists()


def test_no_point_of_a_grid_runs_where_another_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("recipelin.run.spool.ready", reached)
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("METHOD", METHODS["hybrid"]).replace("KERNEL", "auto")
    path.write_text(text + "grid:\n  method.form.kernel: [chunked, gpu]\n", encoding="utf-8")
    assert main(["run", str(path), "--device", "cpu"]) == 2
    assert f"{path}:8:33: method.form: kernel='gpu': " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "cuda:"])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(RunError, match="expected auto, cpu or cuda"):
        choose_device(device)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device("cuda:1") == "cuda:1" and choose_device("cuda") == choose_device("auto") == "cuda"
    with pytest.raises(RunError, match="cuda:2: torch sees 2 here"):
        choose_device("cuda:2")
