"""Compiles the Triton kernels for an H100 without one: registers, spills and shared memory of each (`make gpu-compile`).

The operators are called on CPU tensors; in the place of a launch its kernel is compiled for sm_90. It shows that kernels
compile and fit, that no product reads what a loop has copied ahead without a fence in between (`gpu_parts.copied`), and that one
which begins while another ends writes nothing before it has waited; nothing of their results or speed. Exit 1 where one does not
fit, lacks a fence or writes early.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from recipelin_kernels import SoftmaxMap, empty_state, hybrid_attention, hybrid_attention_step, weight_transfer_loss
from recipelin_kernels.hybrid import gpu_assembler, gpu_call, gpu_support
from recipelin_kernels.hybrid.gpu_features import softmax_features_gpu

SHARED = 227 * 1024  # bytes that a program may have on an H100
CASES: dict[str, dict[str, Any]] = {
    "F 128": {},
    "F 256": {"features": 256},
    "float32 features": {"feature_dtype": torch.float32},
    "float32": {"dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "d 64": {"width": 64},
    "d 256, F 256": {"width": 256, "features": 256},
    "replace, sinks": {"join": "replace", "sinks": 4},
    "average, terraced, left padding": {"join": "average", "shape": "terraced", "padded": True, "sinks": 4},
    "absolute": {"join": "absolute"},
    "reach": {"reach": 200},
    "one head, one token": {"heads": 1, "key_heads": 1, "length": 1},
    "from a state, sinks": {"resumed": True, "sinks": 4, "join": "absolute"},
    "one head": {"heads": 1, "key_heads": 1, "length": 300},
    "features made": {"made": True},
    "features made, replace, sinks, padding": {"made": True, "join": "replace", "sinks": 4, "padded": True},
    "features made, d 64, from a state": {"made": True, "width": 64, "resumed": True, "join": "absolute"},
    "one head, short, window alone": {"heads": 1, "key_heads": 1, "length": 33, "ablate": {"linear": "mass"}},
    "dropped windows": {"drop": True, "sinks": 4},
}  # fmt: skip
TRANSFERS: dict[str, dict[str, Any]] = {
    "transfer, F 128": {},
    "transfer, F 256": {"features": 256},
    "transfer, float32 features": {"feature_dtype": torch.float32},
    "transfer, float32 features, F 256": {"feature_dtype": torch.float32, "features": 256},
    "transfer, float32": {"dtype": torch.float32},
    "transfer, float32, F 256": {"dtype": torch.float32, "features": 256},
    "transfer, float32, d 256, F 512": {"dtype": torch.float32, "width": 256, "features": 512},
    "transfer of the hybrid's row, float32, d 256, F 512": {
        "dtype": torch.float32, "width": 256, "features": 512, "target": "hybrid", "join": "average", "window": 64,
    },
    "transfer, fp16": {"dtype": torch.float16},
    "transfer, d 64": {"width": 64},
    "transfer, d 256, F 512": {"width": 256, "features": 512},
    "transfer, padding": {"padded": True},
    "transfer, both windowed": {"reach": 200, "teacher_window": 200},
    "transfer, one head, one token": {"heads": 1, "key_heads": 1, "length": 1},
    "transfer of the hybrid's row": {"target": "hybrid", "join": "absolute", "window": 64},
    "transfer of the hybrid's row, replace, sinks": {"target": "hybrid", "join": "replace", "window": 64, "sinks": 4},
    "transfer of the hybrid's row, average, signed, padding": {
        "target": "hybrid", "join": "average", "window": 64, "shape": "terraced", "signed": True, "padded": True,
    },
}  # fmt: skip


# One token from a state: batch, and as above.
STEPS: dict[str, dict[str, Any]] = {
    "decode, batch 1": {},
    "decode, batch 9": {"batch": 9},
    "decode, batch 9, float32": {"batch": 9, "dtype": torch.float32},
    "decode, batch 9, window 128": {"batch": 9, "window": 128},
    "decode, batch 3, F 256": {"batch": 3, "features": 256},
    "decode, batch 31, phi_k of key heads, window 120, sinks": {"batch": 31, "maps": 8, "window": 120, "sinks": 4},
    "decode, batch 31, phi_k of key heads, float32": {"batch": 31, "maps": 8, "dtype": torch.float32},
    "decode, batch 32": {"batch": 32},
    "decode, batch 32, F 256": {"batch": 32, "features": 256},
    "decode, phi_k of key heads": {"maps": 8},
    "decode, float32, d 64": {"dtype": torch.float32, "width": 64},
    "decode, fp16, d 80, F 96": {"dtype": torch.float16, "width": 80, "features": 96, "batch": 32},
    "decode, d 256, F 256": {"width": 256, "features": 256, "batch": 32},
    "decode, replace, sinks, padding": {"join": "replace", "sinks": 4, "padded": True},
    "decode, absolute, terraced": {"join": "absolute", "shape": "terraced", "batch": 32},
    "decode, cover all, average": {"join": "average", "cover": "all", "sinks": 4, "batch": 32},
    "decode, one head, window 0": {"heads": 1, "key_heads": 1, "maps": 1, "window": 0},
    "decode, window alone": {"ablate": {"linear": "mass"}},
    "decode, features made, batch 1": {"made": True},
    "decode, features made, batch 32": {"made": True, "batch": 32},
    "decode, features made, batch 32, replace": {"made": True, "batch": 32, "join": "replace"},
    "decode, features made, phi_k of key heads": {"made": True, "maps": 8},
    "decode, features made, d 256, F 512": {"made": True, "width": 256, "features": 512, "heads": 8, "maps": 8},
    "decode, features made, d 80, F 96, window 0": {"made": True, "width": 80, "features": 96, "window": 0, "batch": 32},
    "decode, d 256, F 512": {"width": 256, "features": 512, "heads": 8, "maps": 8},
    "decode, d 256, F 1024": {"width": 256, "features": 1024, "heads": 8, "maps": 8},
}  # fmt: skip


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


EVENTS = {"cp.async.c": "copy", "cp.async.wait": "wait", "fence.proxy.async": "fence", "wgmma.mma_async": "product"}


def unfenced(ptx: str) -> int:
    """Products of loops that copy ahead which follow the wait for a copy without a fence."""
    lines = ptx.splitlines()
    labels = {found[1]: n for n, line in enumerate(lines) if (found := re.match(r"(\$L\w+):", line))}
    count = 0
    for n, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if not jump or labels.get(jump[1], n) >= n:
            continue
        events = [name for inner in lines[labels[jump[1]] : n] for start, name in EVENTS.items() if start in inner]
        if "copy" in events:
            fenced = False
            for event in events:
                fenced = event == "fence" or (fenced and event != "wait")
                count += event == "product" and not fenced
    return count


def early(ptx: str) -> int:
    """What stands before the wait for the launch ahead and may not: stores, and letting the next launch begin."""
    before = ptx.partition("griddepcontrol.wait")[0] if "griddepcontrol.wait" in ptx else ""
    return before.count("st.global") + before.count("griddepcontrol.launch_dependents")


def compiled(self: gpu_call.Compiled, kernel: Any, grid: tuple[int, ...], *arguments: Any, **more: Any) -> None:
    """In the place of `Compiled.launch`."""
    if 0 in grid:
        return
    how = self.how(kernel.__name__)
    begun = time.monotonic()
    with gpu_assembler.assembling():
        made = kernel.warmup(*arguments, o=self.form, grid=grid, **more, **how)
        ptxas = knobs.nvidia.ptxas.path
    seconds = time.monotonic() - begun
    if made.hash in known:
        return
    known.add(made.hash)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        int(re.findall(pattern, said)[-1]) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill st")
    )
    shared, bare, stores = made.metadata.shared, unfenced(made.asm["ptx"]), early(made.asm["ptx"])
    faults = {
        "DOES NOT FIT": shared > SHARED,
        f"{bare} PRODUCTS WITHOUT A FENCE": bare,
        f"{stores} STORES OR LAUNCHES BEFORE THE WAIT": stores,
    }
    wrong = "".join(f"  {fault}" for fault, there in faults.items() if there)
    fits.append(not wrong)
    print(
        f"  {kernel.__name__:24} {how['num_warps']} warps {how['num_stages']} stages {registers:4} registers "
        f"{spilled:5} bytes spilled {shared / 1024:4.0f} KiB shared {seconds:5.1f} s{wrong}",
        flush=True,
    )


fits: list[bool] = []
known: set[str] = set()


def normal(heads: int, length: int, width: int, kind: torch.dtype) -> torch.Tensor:
    return torch.randn(1, heads, length, width).to(kind)


def softmax_map(heads: int, width: int, features: int) -> SoftmaxMap:
    weight = torch.rand(heads, width, features // 2)
    return SoftmaxMap(lambda x: softmax_features_gpu(x, weight, 1e-12), weight, 1e-12)


def call(
    *, dtype: torch.dtype = torch.bfloat16, feature_dtype: torch.dtype | None = None, width: int = 128, features: int = 128,
    heads: int = 8, key_heads: int = 2, length: int = 600, learns: bool = True, padded: bool = False, drop: bool = False,
    resumed: bool = False, made: bool = False, **options: Any,
) -> None:  # fmt: skip
    x = [normal(h, length, width, dtype) for h in (heads, key_heads, key_heads)]
    x += [normal(heads, length, features, feature_dtype or dtype) for _ in range(2)]
    for one in x:
        one.requires_grad_(learns)
    if padded:
        options["key_mask"] = torch.arange(length)[None] >= 5
    if drop:
        options["window_keep"] = torch.ones(1, heads, dtype=torch.bool)
    if resumed:

        def phi_k_fn(k: torch.Tensor) -> torch.Tensor:
            return torch.rand(1, heads, k.shape[2], features, dtype=x[3].dtype)

        more: dict[str, Any] = {"window": 64, "log_scale": torch.zeros(heads), "phi_k_fn": phi_k_fn, **options}
        with torch.no_grad():
            state = hybrid_attention(*x, torch.rand(heads), kernel="chunked", output_state=True, **more)[1]
        options |= {"state": state, "phi_k_fn": phi_k_fn}
    if made:
        map_q, map_k = (softmax_map(heads, width, features) for _ in range(2))
        options |= {"phi_k_fn": map_k, "log_scale": torch.zeros(heads), "window": 64, "kernel": "gpu"}
        with torch.no_grad():
            hybrid_attention(*x[:3], map_q, None, torch.rand(heads), **options)
        return
    log_scale = torch.zeros(heads, requires_grad=learns)
    y = hybrid_attention(*x, torch.rand(heads), window=64, log_scale=log_scale, kernel="gpu", **options)
    if learns:
        y.sum().backward()


def decode(
    *, dtype: torch.dtype = torch.bfloat16, width: int = 128, features: int = 128, heads: int = 32, key_heads: int = 8,
    maps: int = 32, batch: int = 1, window: int = 64, sinks: int = 0, shape: str = "sliding", padded: bool = False,
    made: bool = False, **options: Any,
) -> None:  # fmt: skip
    def normal(h: int, w: int) -> torch.Tensor:
        return torch.randn(batch, h, 1, w).to(dtype)

    def phi_k_fn(k: torch.Tensor) -> torch.Tensor:
        return torch.rand(batch, maps, k.shape[2], features)

    q, k, v = (normal(h, width) for h in (heads, key_heads, key_heads))
    state = empty_state(batch, maps, key_heads, width, features, window=window, sinks=sinks, shape=shape, like=q)
    if padded:
        options["key_mask"] = torch.ones(batch, 1, dtype=torch.bool)
    with torch.enable_grad():
        weight = torch.rand(heads, width, features // 2, requires_grad=True)
        softmax_features_gpu(q.expand(-1, -1, 100, -1), weight, 1e-12).sum().backward()
    softmax_features_gpu(q, weight, 1e-12)
    phi_q: Any = softmax_map(heads, width, features) if made else torch.rand(batch, heads, 1, features)
    hybrid_attention_step(
        q, k, v, phi_q, softmax_map(maps, width, features) if made else phi_k_fn, torch.rand(heads), state, window=window,
        sinks=sinks, shape=shape, log_scale=torch.zeros(heads), kernel="gpu", **options,
    )  # fmt: skip


def transfer(
    *, dtype: torch.dtype = torch.bfloat16, feature_dtype: torch.dtype | None = None, width: int = 128, features: int = 128,
    heads: int = 8, key_heads: int = 2, length: int = 600, learns: bool = True, padded: bool = False, **options: Any,
) -> None:  # fmt: skip
    q, k = (normal(h, length, width, dtype) for h in (heads, key_heads))
    phi = [normal(heads, length, features, feature_dtype or dtype).requires_grad_(learns) for _ in range(2)]
    if padded:
        options["key_mask"] = torch.arange(length)[None] >= 5
    scales = {n: torch.rand(heads, requires_grad=learns) for n in ("mix", "log_scale")}
    weight_transfer_loss(q, k, *phi, torch.zeros(1, heads, length), kernel="gpu", **scales, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=sorted(CASES | TRANSFERS | STEPS), help="a case; may be repeated"
    )
    parser.add_argument("--forward", action="store_true", help="without gradients")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    driver.set_active(NoGpu())
    gpu_support.why_not = lambda *_: ""
    gpu_call.Compiled.launch = compiled  # type: ignore[method-assign]
    asked = arguments.only or [*CASES, *TRANSFERS, *STEPS]
    for name, case in (CASES | TRANSFERS).items():
        if name in asked:
            print(f"{name}{', forward' if arguments.forward else ''}", flush=True)
            (transfer if name in TRANSFERS else call)(learns=not arguments.forward, **case)
    for name, case in STEPS.items():
        if name in asked:
            print(name, flush=True)
            decode(**case)
    return 0 if all(fits) else 1


if __name__ == "__main__":
    sys.exit(main())
