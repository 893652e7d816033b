"""Looks at every address of the Triton kernels as a GPU runs them, without one (`make gpu-bounds`).

Its tests, bars and sweeps, with its sizes of blocks, in Triton's interpreter: of each launch the programs at the corners of its
grid and a few between. Nothing is compared: the numbers of a bf16 product are wrong there, and most programs do not run, so that
some tests fail. An address that lies in none of a launch's tensors is named with its kernel and line.
"""

import functools
import inspect
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import gpu_cache
import numpy as np

ROOT = gpu_cache.ROOT
BETWEEN = 3  # programs of a launch beside those at its corners
STEPS = 20  # tokens: more than enter the sums at once
LOOKED_AT = "GPU_BOUNDS_LOOKED_AT"  # names a file that every process adds a byte to at each launch


def some(grid: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Places of a grid."""
    draw = random.Random(str(grid))
    corners = itertools.product(*({0, n - 1} for n in grid))
    between = (tuple(draw.randrange(n) for n in grid) for _ in range(BETWEEN))
    return {*corners, *between}


def launch_some(self: Any, *given: Any, **named: Any) -> None:
    """`GridExecutor.__call__` for some programs, of tensors that lie on the CPU."""
    from triton.runtime import interpreter

    with open(os.environ[LOOKED_AT], "ab") as file:
        file.write(b".")
    names = inspect.getfullargspec(self.fn).args
    own, own_named = self._init_args_hst(given, {n: x for n, x in named.items() if n in names})
    scope = interpreter._patch_lang(self.fn)
    try:
        arguments = inspect.getcallargs(self.fn, *own, **own_named)
        arguments = {n: x if n in self.constexprs else interpreter._implicit_cvt(x) for n, x in arguments.items()}
        grid = (*self.grid, *(1,) * (3 - len(self.grid)))
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for place in some(grid):
            interpreter.interpreter_builder.set_grid_idx(*place)
            self.fn(**arguments)
    finally:
        scope.restore()


@functools.cache  # once: what it patches stays so
def stand_in() -> None:
    """From here on this process interprets some programs of each launch, with a GPU's sizes."""
    import triton.language as tl
    from triton.runtime import interpreter

    from recipelin_kernels.hybrid import gpu_call, gpu_step
    from recipelin_kernels.weight_transfer import gpu as transfer
    from tests.kernels.bounds import watch
    from tests.kernels.interpreter import quicken

    # Missing in the interpreter, which holds them as their bits.
    interpreter.interpreter_builder.get_bf16 = lambda value: interpreter.TensorHandle(
        (np.array([value], dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16
    )
    np.seterr(all="ignore")  # of what no program has written
    gpu_cache.pretend()
    gpu_cache.define_nothing()
    for module in (gpu_call, gpu_step, transfer):
        module.interpreted = lambda: False  # type: ignore[attr-defined]
    interpreter.GridExecutor.__call__ = launch_some
    quicken(setattr)
    watch(setattr)


def pytest_configure() -> None:
    stand_in()


def others(job: tuple[str, int, int]) -> list[str]:
    """What was found in every `jobs`-th bar or sweep."""
    what, number, jobs = job
    stand_in()
    import gpu_tune

    calls: list[tuple[str, Any]] = []
    if what == "bars":
        for case in sorted(set(gpu_cache.of_bars()), key=repr):
            case = replace(case, steps=STEPS) if hasattr(case, "steps") else case
            calls.append((repr(case), lambda case=case: case.make()()))
    else:
        for sweep, blocks, _ in gpu_tune.variants(gpu_tune.SWEEPS):
            calls.append((f"{sweep}, {blocks}", lambda s=sweep, b=blocks: gpu_tune.launched(s, b, run=True)))
        for case, name, blocks in gpu_tune.step_cases():
            calls.append((f"{case}, {name}", lambda c=case, b=blocks: gpu_tune.step_call(replace(c, steps=STEPS), b)()))
    found = []
    for name, call in calls[number::jobs]:
        try:
            call()
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
        print(f"{what}: {name}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    with tempfile.NamedTemporaryFile() as file:
        os.environ[LOOKED_AT] = file.name
        found = look()
        launches = os.path.getsize(file.name)
    said = (
        f"{launches} launches: every address lies in a tensor" if launches else "nothing was launched: nothing is shown"
    )
    print("\n".join(found) or said)
    return bool(found) or not launches


def look() -> list[str]:
    """What was found. Ends the process where the tests cannot be run at all."""
    jobs = os.cpu_count() or 1
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / ".ci")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONOPTIMIZE": "1", "RECIPELIN_TEST_GPU": "1"}
    options = f"-q -rfE -W ignore -p gpu_bounds -p no:cacheprovider -n {jobs} --tb=short --assert=plain".split()
    command = [sys.executable, "-m", "pytest", *options, *(sys.argv[1:] or gpu_cache.TESTS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout if done.returncode > 1 else done.stdout.splitlines()[-1])
    if done.returncode > 1:  # 1: tests fail, as most numbers are not there
        sys.exit(done.returncode)
    found = [part for part in re.split(r"\n(?=_{3,} .* _{3,}\n)", done.stdout) if "OutOfBounds(" in part]
    if not sys.argv[1:]:
        with ProcessPoolExecutor(jobs) as pool:
            shares = [(what, n, jobs) for what in ("bars", "sweeps") for n in range(jobs)]
            found += [line for share in pool.map(others, shares) for line in share]
    return found


if __name__ == "__main__":
    sys.exit(main())
