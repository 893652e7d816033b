"""Triton's interpreter, as the tests of kernels use it."""

from functools import partial

import pytest

from tests.conftest import GPU
from tests.kernels.bounds import watch
from tests.kernels.interpreter import quicken


@pytest.fixture(autouse=True)
def _memory_given_back():
    """Processes side by side share a GPU: what the definition took, T x T in float64, does not stay in one's cache."""
    yield
    if GPU:
        import torch

        torch.cuda.empty_cache()


@pytest.fixture
def quick_interpreter(monkeypatch):
    """It is quick, and refuses an address that lies in none of a launch's tensors."""
    if not GPU:
        watch(monkeypatch.setattr)
        quicken(partial(monkeypatch.setattr, raising=False))
