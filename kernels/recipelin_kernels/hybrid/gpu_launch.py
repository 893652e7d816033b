"""Launches of what Triton has compiled, without most of the Python by which Triton finds it anew each time.

`kernel[grid](...)` binds its arguments by name, writes out its options and compares global constants by value: of our 10 to 50
arguments a launch takes it 15 to 40 us, and this 9 to 20. A launch is looked up by what Triton compiles for, as its own native
function says of each argument (dtype, alignment, None, equal to 1, divisible by 16, bits of an integer). What is not found,
Triton launches, and says which compiled kernel that was.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import driver, jit
from triton.runtime.jit import JITFunction

from . import gpu_assembler
from .gpu_support import interpreted

# Series of Triton whose `JITFunction.run` was read: what it compiles for and what it gives the launcher. Another one may do
# more before a launch, which would be left out here silently, or lack what is called here: it launches by itself.
READ = ("3.6", "3.7", "3.8", "3.9")
SERIES = ".".join(triton.__version__.split(".")[:2])
# Settings that Triton compiles for, beside a launch's own; not each series has all.
MODES = [name for name in ("instrumentation_mode", "fpsan_homomorphic_casts") if hasattr(knobs.compilation, name)]


class Known(NamedTuple):
    """A compiled kernel, its constants in the order of its parameters, and the globals that it was compiled with."""

    compiled: CompiledKernel
    constants: tuple[Any, ...]
    used: tuple[tuple[dict[str, Any], str, Any], ...]


known: dict[tuple[Any, ...], Known] = {}


_hashed: set[Any] = set()  # functions of kernels: to hash a kernel hashes it


def hashed(kernel: Any) -> None:
    """Has Triton hash a kernel after all that it calls, so that any process finds in Triton's cache what another has compiled.

    Triton's own hash takes from what a kernel calls the globals that were noted when *that* was hashed: none, if it was not yet.
    """
    if not isinstance(kernel, JITFunction) or kernel.fn in _hashed:
        return
    _hashed.add(kernel.fn)
    for name in kernel.fn.__code__.co_names:
        hashed(kernel.fn.__globals__.get(name))
    kernel.cache_key  # noqa: B018


@functools.cache
def _backend() -> Any:
    return make_backend(driver.active.get_current_target())


@functools.cache
def _dependent(device: int | None) -> bool:
    return not interpreted() and driver.active.get_current_target().arch >= 90


def overlaps(device: int | None) -> bool:
    """Whether a launch there may begin before the one ahead of it ends, and wait where it needs that (sm_90 and later)."""
    return _dependent(device) and not torch.compiler.is_compiling()  # which knows no such option


def ordinary(kernel: Any) -> bool:
    """Whether Triton is to launch: its interpreter, a series that was not read, and where a launch has hooks."""
    runtime = knobs.runtime
    return (
        type(kernel) is not JITFunction
        or SERIES not in READ
        or bool(kernel.pre_run_hooks)
        or runtime.add_stages_inspection_hook is not None
        # Of a chain of hooks its hooks, none of which is there as a rule; a hook set in the place of the chain is one.
        or bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook))
        or bool(getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook))
    )


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    how: Mapping[str, int | str],
) -> None:
    """`kernel[grid](*arguments, **constants, **how)`: arguments of the run by position, constants by name."""
    if torch.compiler.is_compiling():
        if gpu_assembler.options() and torch.cuda.get_device_capability()[0] == gpu_assembler.HOPPER:
            raise RuntimeError(f"torch.compile assembles the kernels by itself: {gpu_assembler.ADVICE}")
        kernel[grid](*arguments, **constants, **how)
        return
    first = arguments[0]
    if isinstance(first, Tensor) and first.is_cuda and first.device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors' own is.
        with torch.cuda.device(first.device):
            launch(kernel, grid, arguments, constants, how)
        return
    if ordinary(kernel):
        _by_triton(kernel, grid, arguments, constants, how)
        return
    device = driver.active.get_current_device()
    backend, specialise = _backend(), jit.native_specialize_impl
    key = (
        kernel.fn, device, kernel.debug or knobs.runtime.debug, *[getattr(knobs.compilation, name) for name in MODES],
        *constants, *constants.values(), *how, *how.values(),
        # As Triton's binder asks for a parameter without annotations; one with some is asked for no more than that.
        *[specialise(backend, x, False, True, True) for x in arguments],
    )  # fmt: skip
    found = known.get(key)
    # As Triton compares them; if one is another object, Triton says whether it is another value.
    if found is None or any([names.get(name) is not value for names, name, value in found.used]):
        compiled = _by_triton(kernel, grid, arguments, constants, how)
        if isinstance(compiled, CompiledKernel):
            known[key] = _known(kernel, compiled, len(arguments), constants)
        return
    compiled = found.compiled
    stream = driver.active.get_current_stream(device)
    compiled.run(
        *grid, *(1,) * (3 - len(grid)), stream, compiled.function, compiled.packed_metadata, None, None, None,
        *arguments, *found.constants,
    )  # fmt: skip


def _by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: Mapping[str, Any],
    how: Mapping[str, int | str],
) -> Any:
    """The launch by Triton, which compiles what is not compiled yet."""
    hashed(kernel)
    with gpu_assembler.assembling():
        return kernel[grid](*arguments, **constants, **how)


def _known(kernel: JITFunction[Any], compiled: CompiledKernel, count: int, constants: Mapping[str, Any]) -> Known:
    names = [p.name for p in kernel.params if p.is_constexpr]
    if names != kernel.arg_names[count:] or set(names) != set(constants):
        raise TypeError(f"{kernel.__name__}: expected arguments by position, then the constants {names} by name")
    used = tuple((names, name, names.get(name)) for (name, _), (_, names) in kernel.used_global_vals.items())
    return Known(compiled, tuple(constants[name] for name in names), used)
