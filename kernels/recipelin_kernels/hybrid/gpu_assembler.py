"""By which ptxas Triton assembles these kernels on Hopper.

The ptxas 12.8 that Triton 3.6 and 3.7 take there miscompiles `wgmma`: descriptors of shared memory are put together from
registers that were set on another way through the kernel. In rows before the first stored state `output`, with phi_q made in
it, took wrong values, the same ones at each call, and `row_masses` read beyond shared memory (seen on an H200, by
compute-sanitizer, and in the machine code). 12.9 assembles the same PTX rightly. Beside 12.8 both bring a ptxas for later GPUs,
Triton 3.6 that 12.9 and 3.7 13.1, whose kernels pass the same tests: it is taken on Hopper. Triton 3.8 takes 12.9 there itself.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from triton import knobs

from .gpu_support import interpreted

LEAST = (12, 9)
HOPPER = 9  # the major capability whose products are `wgmma`
ADVICE = f"set TRITON_PTXAS_PATH to a ptxas of CUDA {'.'.join(map(str, LEAST))} or later"


def _version(tool: "knobs.NvidiaTool") -> tuple[int, ...]:
    return tuple(int(n) for n in tool.version.split("."))


@functools.cache
def _other() -> str | None:
    """The ptxas to be taken in the place of Triton's choice; None where that one is right, or there is no other."""
    if _version(knobs.nvidia.ptxas) >= LEAST:
        return None
    with contextlib.suppress(RuntimeError, AttributeError):  # this Triton does not bring it
        other = knobs.nvidia.ptxas_blackwell
        if _version(other) >= LEAST:
            return str(other.path)
    return None


@functools.cache
def _driver() -> int | None:
    """The major version of CUDA that the driver is of; None where torch cannot say."""
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if asked is None else asked() // 1000


def why_not(major: int) -> str:
    """Why there is no ptxas for GPUs of that major capability; empty where there is one."""
    own = knobs.nvidia.ptxas
    if major != HOPPER:
        return ""
    if not _other() and _version(own) < LEAST:
        return f"ptxas {own.version} ({own.path}) miscompiles wgmma: {ADVICE}"
    taken, driver = knobs.nvidia.ptxas_blackwell if _other() else own, _driver()
    if driver is not None and _version(taken)[0] > driver:
        found = f"ptxas {taken.version} ({taken.path}) assembles for newer drivers than that of CUDA {driver}, which is here"
        return f"{found}: {ADVICE} that is not newer"
    return ""


@functools.cache
def options() -> Mapping[str, str]:
    """What a launch adds to Triton's options: what 12.8 has assembled lies in Triton's cache by other ones."""
    if interpreted() or _other() is None:
        return {}
    return {"ptx_options": " ".join(filter(None, ("--warn-on-spills", knobs.nvidia.ptxas_options)))}  # changes no code


@contextlib.contextmanager
def assembling() -> Iterator[None]:
    """Within it Triton assembles by the right ptxas."""
    other = _other()
    if other is None:
        yield
        return
    with knobs.nvidia.scope():
        # Not through the environment, which a process that starts within would take for the user's choice.
        passed_on, knobs.propagate_env = knobs.propagate_env, False
        try:
            knobs.nvidia.ptxas = other
        finally:
            knobs.propagate_env = passed_on
        yield
