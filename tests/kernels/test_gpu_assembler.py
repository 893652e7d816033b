"""On Hopper no kernel is assembled by a ptxas that miscompiles `wgmma`."""

import os
from types import SimpleNamespace

import pytest

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
