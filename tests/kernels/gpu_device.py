"""Where the Triton kernels' tests run: in Triton's interpreter on a CPU, or, by `make test-gpu`, on a CUDA device."""

import importlib

import pytest
import torch

from recipelin_kernels.hybrid import gpu_support
from tests.conftest import GPU

DEVICE = "cuda" if GPU else "cpu"
if GPU:
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    assert torch.get_float32_matmul_precision() == "highest", "the definition's products are not of tf32"
else:
    pytest.importorskip("triton", reason="the kernels' tests need Triton: pip install 'recipelin[dev]'")

# Against float64, relative norm; found in the interpreter: at most 8e-7. A GPU's products are made of three of tf32.
FP32 = 1e-5 if GPU else 3e-6
# Products of 8 or 11 bits, and what backward takes its row terms from, rounded to them.
COARSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}

# What cancels exactly, as a single key's gradients do, leaves the rounding of terms whose norms are 30 to 2000.
CANCELLED = 100.0 if GPU else 1e-2


def auto_is_gpu(monkeypatch, proven=True):
    """From here on `auto` takes the Triton kernels where they can run, as on a GPU for which they are proven; or torch's."""
    monkeypatch.setattr(gpu_support, "proven", lambda device: proven)
    monkeypatch.setattr(importlib.import_module("recipelin_kernels.hybrid"), "_not_in_c", lambda *_: "not here")


def on_device(options):
    return {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
