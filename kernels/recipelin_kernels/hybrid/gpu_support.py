"""Whether the Triton kernels of hybrid attention can run: asked without importing triton where there is no GPU."""

import functools
import importlib.metadata
import importlib.util
import os

import torch

from .rows import Options

WIDEST = 256  # head_dim: a block of 64 rows of it in float32 is 64 KiB
MOST_FEATURES = 1024
MOST_ROWS = 65535  # of a grid's second and third axis
# With which Triton, on which compute capability all tests of `make test-gpu` that launch a kernel have passed, with these
# sources. There `auto` takes them; elsewhere they are taken by name, as what a compiler makes of them may race (seen-on-gpus.md).
PROVEN: frozenset[tuple[str, tuple[int, int]]] = frozenset({("3.6", (9, 0)), ("3.7", (9, 0))})
LEAST_CAPABILITY = (8, 0)  # bf16 and tf32 products


def interpreted() -> bool:
    """Whether Triton's interpreter is on: kernels then run on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _series() -> str:
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _assembles(major: int) -> str:
    from . import gpu_assembler  # with triton, which is there

    return gpu_assembler.why_not(major)


def proven(device: torch.device | str) -> bool:
    """Whether `auto` may take the kernels there."""
    device = torch.device(device)
    return device.type == "cuda" and _installed() and (_series(), _capability(device.index)) in PROVEN


def why_no_step(options: Options, keep: object) -> str:
    """Why the decode kernel does not take one token with these options; empty where it does."""
    if options.reach is not None:
        return "the decode kernel keeps sums, which cannot forget the keys that a `reach` leaves behind"
    return "" if keep is None else "the decode kernel drops no windows: `window_keep` is of training"


def why_not(
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    features: int | None = None,
    rows: int | None = None,
) -> str:
    """Why the kernels do not take such a call; empty where they do. What is None is not asked for."""
    device = torch.device(device)
    if not _installed():
        return "Triton is not installed: pip install 'recipelin[gpu]'"
    if interpreted():
        if device.type != "cpu":
            return f"TRITON_INTERPRET=1 runs kernels on the CPU, and the tensors are on {device}"
    elif device.type != "cuda":
        return f"Triton kernels need a CUDA device, found {device} (on a CPU, TRITON_INTERPRET=1 interprets them)"
    elif torch.version.hip is not None:
        return "the Triton kernels were never compiled for ROCm"
    elif _capability(device.index) < LEAST_CAPABILITY:
        found = ".".join(map(str, _capability(device.index)))
        return f"the Triton kernels need compute capability 8.0 (Ampere) or newer, found {found}"
    elif reason := _assembles(_capability(device.index)[0]):
        return reason
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, found {dtype}"
    if width is not None and width > WIDEST:
        return f"the Triton kernels take head_dim up to {WIDEST}, found {width}"
    if features is not None and features > MOST_FEATURES:
        return f"the Triton kernels take up to {MOST_FEATURES} features, found {features}"
    if rows is not None and rows > MOST_ROWS:
        return f"the Triton kernels take up to {MOST_ROWS} rows times heads (of one token: rows), found {rows}"
    return ""
