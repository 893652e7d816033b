"""On Hopper no kernel is assembled by a ptxas that miscompiles `wgmma`."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' tests need Triton: pip install 'recipelin[dev]'")

from triton import knobs

from recipelin_kernels.hybrid import gpu_assembler, gpu_launch


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for cached in (gpu_assembler._other, gpu_assembler.options):
        cached.cache_clear()
    yield
    for cached in (gpu_assembler._other, gpu_assembler.options):
        cached.cache_clear()


def tools(monkeypatch, own: str, other: str | None) -> None:
    class Nvidia(SimpleNamespace):
        @property
        def ptxas_blackwell(self):
            if other is None:
                raise RuntimeError("Cannot find ptxas-blackwell")
            return SimpleNamespace(version=other, path="/later/ptxas")

    found = Nvidia(ptxas=SimpleNamespace(version=own, path="/own/ptxas"), ptxas_options=None)
    monkeypatch.setattr(gpu_assembler, "knobs", SimpleNamespace(nvidia=found))


def version(tool) -> tuple[int, ...]:
    return tuple(int(n) for n in tool.version.split("."))


def test_this_tritons_kernels_are_assembled_rightly():
    before = knobs.nvidia.ptxas.path, os.environ.get("TRITON_PTXAS_PATH")
    with gpu_assembler.assembling():
        assert version(knobs.nvidia.ptxas) >= gpu_assembler.LEAST
        assert os.environ.get("TRITON_PTXAS_PATH") == before[1]  # what is started within chooses for itself
    assert (knobs.nvidia.ptxas.path, os.environ.get("TRITON_PTXAS_PATH")) == before
    assert not gpu_assembler.why_not(9)


@pytest.mark.parametrize("own", ["12.9", "13.0"])
def test_a_right_one_is_left_alone(monkeypatch, own):
    tools(monkeypatch, own, None)
    assert not gpu_assembler.options()
    assert not gpu_assembler.why_not(9)
    with gpu_assembler.assembling():
        assert gpu_assembler.knobs.nvidia.ptxas.path == "/own/ptxas"


def test_what_an_older_one_has_assembled_is_not_found_again(monkeypatch):
    tools(monkeypatch, "12.8", "12.9")
    assert gpu_assembler.options()["ptx_options"]  # other options: another entry of Triton's cache
    assert not gpu_assembler.why_not(9)


def test_what_the_driver_cannot_load_is_not_assembled(monkeypatch):
    """Code of a newer CUDA than the driver's: `auto` goes without the kernels, in the place of an error at the first launch."""
    for own, other, driver, named in (
        ("12.8", "13.1", 12, "ptxas 13.1 (/later/ptxas)"),
        ("13.0", None, 12, "ptxas 13.0 (/own/ptxas)"),
        ("12.8", "13.1", 13, ""),
        ("12.8", "12.9", 12, ""),
        ("12.9", "13.1", 12, ""),  # by TRITON_PTXAS_PATH
        ("12.8", "13.1", None, ""),
    ):
        gpu_assembler._other.cache_clear()
        tools(monkeypatch, own, other)
        monkeypatch.setattr(gpu_assembler, "_driver", lambda driver=driver: driver)
        assert gpu_assembler.why_not(9).startswith(f"{named} assembles for newer drivers" if named else "")
        assert bool(gpu_assembler.why_not(9)) == bool(named)
        assert not gpu_assembler.why_not(8)


class Elsewhere(torch.Tensor):
    """A tensor of the second GPU, as far as a launch asks."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    current, launched = [0], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(gpu_launch, "hashed", lambda kernel: None)
    x = torch.zeros(1).as_subclass(Elsewhere)
    gpu_launch.launch({(1,): lambda *given, **named: launched.append(current[0])}, (1,), (x,), {}, {})
    current[0] = 1
    gpu_launch.launch({(1,): lambda *given, **named: launched.append(current[0])}, (1,), (x,), {}, {})
    assert launched == [1, 1] and current == [1]


@pytest.mark.parametrize("other", [None, "12.8"])
def test_without_a_right_one_hopper_says_why_not(monkeypatch, other):
    tools(monkeypatch, "12.8", other)
    assert gpu_assembler.why_not(9) == f"ptxas 12.8 (/own/ptxas) miscompiles wgmma: {gpu_assembler.ADVICE}"
    assert not gpu_assembler.why_not(8)  # has no wgmma


def test_torch_compile_is_refused_on_hopper_as_it_assembles_by_itself(monkeypatch):
    tools(monkeypatch, "12.8", "12.9")
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    with pytest.raises(RuntimeError, match="TRITON_PTXAS_PATH"):
        gpu_launch.launch(None, (1,), (), {}, {})
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    launched = []
    gpu_launch.launch({(1,): lambda *given, **named: launched.append((given, named))}, (1,), (2,), {"o": 3}, {})
    assert launched == [((2,), {"o": 3})]
