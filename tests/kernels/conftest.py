"""Triton's interpreter, as the tests of kernels use it."""

import pytest

from tests.conftest import GPU


@pytest.fixture(autouse=True)
def _memory_given_back():
    """Processes side by side share a GPU: what the definition took, T x T in float64, does not stay in one's cache."""
    yield
    if GPU:
        import torch

        torch.cuda.empty_cache()


class _Nothing:
    def restore(self):
        pass


@pytest.fixture
def language_patched_once(monkeypatch):
    """The interpreter patches Triton's language at every call of a kernel's function, two fifths of its time: once a launch."""
    if GPU:
        return
    from triton.runtime import interpreter

    patch, launch, known = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patched(fn):
        module = id(fn.__globals__)
        if module in known:
            return _Nothing()
        known.add(module)
        return patch(fn)

    def launched(self, *arguments, **more):
        known.clear()
        return launch(self, *arguments, **more)

    monkeypatch.setattr(interpreter, "_patch_lang", patched)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
