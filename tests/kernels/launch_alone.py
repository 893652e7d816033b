"""Launches without a GPU: what a stub of the driver is asked to launch. Run by test_gpu_launch.py, in a process of its own.

A kernel is compiled for an H100 by Triton, which also says what it would have launched; nothing runs.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".ci"))

import torch
import triton
import triton.language as tl
from gpu_compile import NoGpu
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from recipelin_kernels import hybrid_attention
from recipelin_kernels.hybrid import gpu_launch, gpu_support

OFFSET = tl.constexpr(3)


class Options(NamedTuple):
    name: str
    add: bool


@triton.jit
def copied(x, y, maybe, n, stride, factor, block: tl.constexpr, o: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(x + i * stride, mask=i < n, other=0.0).to(tl.float32) * factor + OFFSET
    if maybe is not None:
        value += tl.load(maybe + i, mask=i < n, other=0.0)
    if o.add:
        value += 1
    tl.store(y + i, value, mask=i < n)


class Launcher:
    """One a compiled kernel."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        # Between them stand what hooks are told, and the hooks.
        launched.append((self, arguments[:6], arguments[9:]))


class Driver(NoGpu):
    """Loads nothing: a kernel's function is an object."""

    device, stream = 0, 7
    launcher_cls = Launcher
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *_: (object(), object(), 0, 0, 1024),
        unload_module=lambda _: None,
    )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return self.stream


launched: list[tuple[Launcher, tuple[Any, ...], tuple[Any, ...]]] = []
by_triton: list[str] = []
run = JITFunction.run


def counted(self: Any, *arguments: Any, **more: Any) -> Any:
    by_triton.append(self.__name__)
    return run(self, *arguments, **more)


def last(*, of_triton: bool) -> tuple[Launcher, tuple[Any, ...], tuple[Any, ...]]:
    assert len(launched) == 1 and bool(by_triton) == of_triton, (launched, by_triton)
    by_triton.clear()
    return launched.pop()


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(x is y or (type(x) is type(y) and x == y) for x, y in zip(a, b, strict=True))


BASE: dict[str, Any] = {
    "x": torch.zeros(64, dtype=torch.bfloat16), "y": torch.zeros(64), "maybe": None, "n": 64, "stride": 32, "factor": 0.5,
    "block": 16, "o": Options("a", True), "num_warps": 4, "num_stages": 1,
}  # fmt: skip
# Each differs from BASE in one thing, for which Triton compiles another kernel.
OTHERS: dict[str, dict[str, Any]] = {
    "a pointer off 16 bytes": {"x": torch.zeros(64, dtype=torch.bfloat16)[1:]},
    "a dtype": {"x": torch.zeros(64)},
    "of the same width": {"x": torch.zeros(64, dtype=torch.float16)},
    "a tensor for None": {"maybe": torch.zeros(64)},
    "a stride off 16": {"stride": 40},
    "a stride of 1": {"stride": 1},
    "a stride of True": {"stride": True},
    "64 bits": {"stride": 2**31},
    "64 bits off 16": {"stride": 2**31 + 8},
    "64 bits unsigned": {"stride": 2**63},
    "an integer for a float": {"factor": 48},
    "a constant": {"block": 32},
    "one of a tuple": {"o": Options("a", False)},
    "a name in a tuple": {"o": Options("b", True)},
    "warps": {"num_warps": 8},
    "stages": {"num_stages": 2},
}  # fmt: skip
# And these in nothing that is compiled.
ALIKE: dict[str, dict[str, Any]] = {
    "another tensor": {"x": torch.ones(640, dtype=torch.bfloat16)[8:]},
    "sizes that 16 divides": {"n": 128, "stride": 48},
    "another float": {"factor": 1.0},
    "an equal tuple": {"o": Options("a", bool(1))},
}


def given(**changed: Any) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
    values = BASE | changed
    names = copied.arg_names
    return (
        [values[n] for n in names[:6]],
        {n: values[n] for n in names[6:]},
        {n: values[n] for n in BASE if n[:4] == "num_"},
    )


def launch(*, of_triton: bool, **changed: Any) -> tuple[Launcher, tuple[Any, ...], tuple[Any, ...]]:
    arguments, constants, how = given(**changed)
    gpu_launch.launch(copied, (2, 3), tuple(arguments), constants, how)
    return last(of_triton=of_triton)


def of_triton(**changed: Any) -> tuple[Launcher, tuple[Any, ...], tuple[Any, ...]]:
    arguments, constants, how = given(**changed)
    copied[(2, 3)](*arguments, **constants, **how)
    return last(of_triton=True)


def check(changed: dict[str, Any]) -> Launcher:
    """The second launch is not Triton's, and is what Triton's would be: its kernel, grid, stream, arguments."""
    expected, found = of_triton(**changed), launch(of_triton=False, **changed)
    assert found[0] is expected[0], changed
    assert same(found[1], expected[1]) and same(found[2], expected[2]), (changed, found, expected)
    assert found[1][:4] == (2, 3, 1, Driver.stream)
    return found[0]


def test_never_shares_what_triton_does_not() -> None:
    launch(of_triton=True)
    first = check({})
    for name, changed in OTHERS.items():
        launch(of_triton=True, **changed)  # not found
        assert check(changed) is not first, name
    assert len({check(changed) for changed in [{}, *OTHERS.values()]}) == 1 + len(OTHERS)
    for name, changed in ALIKE.items():
        assert check(changed) is first, name


def test_follows_device_stream_and_settings() -> None:
    first = check({})
    Driver.stream = 8
    assert check({}) is first
    Driver.device = 1
    launch(of_triton=True)
    other = check({})
    assert other is not first
    Driver.device, Driver.stream = 0, 7
    assert check({}) is first
    triton.knobs.runtime.debug = True
    launch(of_triton=True)
    assert check({}) is not first
    triton.knobs.runtime.debug = False
    assert check({}) is first


def test_hooks_and_what_was_not_read_are_tritons() -> None:
    runtime = triton.knobs.runtime
    chains = runtime.launch_enter_hook, runtime.launch_exit_hook
    for chain in chains:
        chain.add(print)
        launch(of_triton=True)
        chain.remove(print)
        launch(of_triton=False)
    runtime.launch_enter_hook = print
    launch(of_triton=True)
    runtime.launch_enter_hook = None
    launch(of_triton=False)
    runtime.launch_enter_hook = chains[0]
    copied.add_pre_run_hook(lambda *_, **__: None)
    launch(of_triton=True)
    copied.pre_run_hooks.clear()
    launch(of_triton=False)
    series, gpu_launch.SERIES = gpu_launch.SERIES, "9.9"
    launch(of_triton=True)
    gpu_launch.SERIES = series
    launch(of_triton=False)


def test_a_changed_global_is_refused_as_by_triton() -> None:
    global OFFSET
    OFFSET = tl.constexpr(4)
    try:
        launch(of_triton=True)
    except RuntimeError as error:
        assert "OFFSET has changed" in str(error)
        by_triton.clear()
    else:
        raise AssertionError("launched")
    OFFSET = tl.constexpr(3)  # another object of the same value
    launch(of_triton=True)
    launch(of_triton=False)


def test_constants_are_named() -> None:
    arguments, constants, how = given(n=96)
    for given_so in (
        ((*arguments, constants["block"]), {"o": constants["o"]}),
        (tuple(arguments[:5]), {"factor": 0.5, **constants}),
    ):
        try:
            gpu_launch.launch(copied, (1,), *given_so, how)
        except TypeError as error:
            assert "by position" in str(error)
        else:
            raise AssertionError("taken")
        last(of_triton=True)


def test_an_operator_is_launched_without_triton() -> None:
    gpu_support.why_not = lambda *_: ""

    def call(length: int) -> list[str]:
        x = [torch.randn(1, 2, length, 16, dtype=torch.bfloat16) for _ in range(5)]
        with torch.no_grad():
            hybrid_attention(*x, torch.rand(2), window=16, kernel="gpu")
        found = by_triton.copy()
        by_triton.clear()
        return found

    kernels = ["sum_keys", "scan", "output"]
    assert call(608) == kernels and call(608) == call(640) == []
    assert call(600) == kernels and call(612) == []  # which 16 does not divide
    assert len(launched) == 15


if __name__ == "__main__":
    driver.set_active(Driver())
    JITFunction.run = counted  # type: ignore[method-assign]
    for name, test in [(n, x) for n, x in globals().items() if n.startswith("test_")]:
        test()
        print(name, flush=True)
