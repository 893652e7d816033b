"""A kernel that cannot run on the device of the run is refused at its line of the recipe, before any work."""

from typing import get_args

import torch

from recipelin import lookup
from recipelin.load import load
from recipelin.mistakes import PlanError
from recipelin.plan import architecture_of
from recipelin.run import run

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
    for form in lookup.names("attention"):
        config = lookup.lookup("attention", form).Config
        for kernel in get_args(config.model_fields["kernel"].annotation):
            text = RECIPE.replace("METHOD", METHODS.get(form, METHODS["hybrid"])).replace("KERNEL", kernel)
            try:
                if form in METHODS:
                    path.write_text(text, encoding="utf-8")
                    run(load(path), out=tmp_path / "out", device="cpu")
                path.write_text(text.replace(kernel, "auto"), encoding="utf-8")
                of_form = lookup.implementation("attention", form).FORM
                of_form.kernel_on(config(kernel=kernel), architecture_of(load(path)), "cpu", torch.float32)
            except (Reached, PlanError, RuntimeError) as error:
                if not isinstance(error, Reached):
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
