"""Hybrid attention against its quadratic definition and against torch's causal softmax attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from recipelin_kernels import hybrid_attention

from ..bench.measure import Bar, Fact


@dataclass(frozen=True)
class Attention:
    """One call on random inputs. kind: `chunked`, `auto`, `reference`, or `sdpa`; backward: with gradients to all inputs."""

    kind: str
    length: int
    backward: bool = False
    batch: int = 1
    heads: int = 8
    key_heads: int = 8
    width: int = 64
    features: int = 128
    maps: str = "query"  # phi_k for each query head, or for each key head
    window: int = 64
    components: bool = False
    steps: int = 1

    def make(self) -> Callable[[], object]:
        draw = torch.Generator().manual_seed(0)

        def normal(heads: int, width: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, self.length, width, generator=draw)

        q, k, v = (normal(h, self.width) for h in (self.heads, self.key_heads, self.key_heads))
        inputs: list[torch.Tensor] = [q, k, v]
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": self.heads != self.key_heads}
        attend: Callable[..., Any] = F.scaled_dot_product_attention
        if self.kind != "sdpa":
            own = {"query": self.heads, "key": self.key_heads}[self.maps]
            inputs += [normal(h, self.features).softmax(-1) for h in (self.heads, own)]
            inputs.append(torch.full((self.heads,), 0.1))
            options = {"window": self.window, "kernel": self.kind, "components": self.components}
            attend = hybrid_attention
        if not self.backward:
            with torch.no_grad():
                return lambda: _without_gradient(attend, inputs, options)
        dy = normal(self.heads, self.width)
        for x in inputs:
            x.requires_grad_()
        return lambda: torch.autograd.grad(attend(*inputs, **options), inputs, dy)


@torch.no_grad()
def _without_gradient(attend: Callable[..., Any], inputs: list[torch.Tensor], options: dict[str, Any]) -> object:
    return attend(*inputs, **options)


def _both(other: str, length: int, backward: bool, **shape: Any) -> dict[str, Attention]:
    return {name: Attention(k, length, backward, **shape) for name, k in ((other, other), ("ours", "auto"))}


def _growth(backward: bool) -> dict[str, Attention]:
    return {str(length): Attention("auto", length, backward) for length in (4096, 8192)}


_GROUPED: dict[str, Any] = {"key_heads": 2, "width": 128}
_SHAPE = "8 heads, d 64, F 128, window 64"
_FROM = ("reference", "ours")
_OVER = ("sdpa", "ours")

_BOUND = (
    "a query of a head takes 4 (w + 16) d for scores and values, some 48 F for pairs of features and 4 F d for the state: 60 "
    "kFLOP, 2 GFLOP at T 4096, 18 ms at 110 and 12 at 165 GFLOP/s, which is all that a core of the Xeon gives at one clock or "
    "another; 18 / 5 of it with backward. The rest is exponentials and masks (a tenth), keys and features that are turned (a "
    "tenth), and memory that is written for the first time."
)
_SHORT = (
    "of 128 queries as of the first 128 of a long row; in memory that is written for the first time, half of the time."
)

_CHECKS = "the call is SDPA itself; what is left is the check of shapes and options, 0.1 ms."
_ZEROS = (
    "the call is SDPA itself and returns zeros that take no memory; what is left is the check of shapes and options."
)
_PARTS = "each branch's own product with v adds half a product to five, 1.10, and three more outputs to write for the first time."
_RESULTS = (
    "output (4 MiB) and gradients (28 MiB) are results and count: 32 of at most 39 MiB; states of eight chunks and a chunk's "
    "temporaries take the rest."
)

BARS: list[Bar | Fact] = [
    Bar("hybrid/quadratic-forward", f"T 2048, {_SHAPE}: times as fast as the quadratic definition, forward",
        _both("reference", 2048, False), _FROM, 50, slow=True, bound=_BOUND),
    Bar("hybrid/quadratic-both", "the same, forward and backward",
        _both("reference", 2048, True), _FROM, 30, slow=True, bound=_BOUND),
    Bar("hybrid/quadratic-memory", "the same, times less peak memory, forward and backward",
        _both("reference", 2048, True), _FROM, 25, peak=True,
        bound=_RESULTS),
    Bar("hybrid/sdpa-forward", f"T 4096, {_SHAPE}: times as fast as SDPA, forward",
        _both("sdpa", 4096, False), _OVER, 5, bound=_BOUND),
    Bar("hybrid/sdpa-both", "the same, forward and backward",
        _both("sdpa", 4096, True), _OVER, 4.5, slow=True, bound=_BOUND),
    Bar("hybrid/grouped-forward", "T 4096, 8 heads over 2, d 128, F 128, window 64: times as fast as SDPA, forward",
        _both("sdpa", 4096, False, **_GROUPED), _OVER, 6, slow=True, bound=_BOUND),
    Bar("hybrid/grouped-both", "the same, forward and backward",
        _both("sdpa", 4096, True, **_GROUPED), _OVER, 6, slow=True, bound=_BOUND),
    Bar("hybrid/shared-forward", "grouped-forward with keys' features of key heads, `key_heads: key`",
        _both("sdpa", 4096, False, maps="key", **_GROUPED), _OVER, None, slow=True),
    Bar("hybrid/shared-both", "the same, forward and backward",
        _both("sdpa", 4096, True, maps="key", **_GROUPED), _OVER, None, slow=True),
    Bar("hybrid/chunked-forward", f"T 4096, {_SHAPE}: times as fast as `chunked`, which is plain torch, forward",
        _both("chunked", 4096, False), ("chunked", "ours"), None),
    Bar("hybrid/chunked-both", "the same, forward and backward",
        _both("chunked", 4096, True), ("chunked", "ours"), None),
    Bar("hybrid/short-64", "T 64, B 32, window 64: speed beside SDPA, forward",
        _both("sdpa", 64, False, batch=32), _OVER, 0.95,
        bound=_CHECKS),
    Bar("hybrid/short-64-both", "the same, forward and backward",
        _both("sdpa", 64, True, batch=32), _OVER, 0.95,
        bound=_ZEROS),
    Bar("hybrid/short-128", "T 128, B 32: speed beside SDPA, forward",
        _both("sdpa", 128, False, batch=32), _OVER, 0.85, bound=_SHORT),
    Bar("hybrid/short-512", "T 512, B 1: times as fast as SDPA, forward",
        _both("sdpa", 512, False), _OVER, 1.4, bound=_SHORT),
    Bar("hybrid/growth-forward", "T 8192 over T 4096, time, forward",
        _growth(False), ("8192", "4096"), 2.1, at_most=True),
    Bar("hybrid/growth-memory-forward", "T 8192 over T 4096, peak memory, forward",
        _growth(False), ("8192", "4096"), 2.1, at_most=True, peak=True),
    Bar("hybrid/growth-memory-both", "the same, forward and backward",
        _growth(True), ("8192", "4096"), 2.1, at_most=True, peak=True),
    Bar("hybrid/components", "T 2048: both branches and the share beside the output, over one forward",
        {"with": Attention("auto", 2048, components=True), "without": Attention("auto", 2048)},
        ("with", "without"), 1.12, at_most=True,
        bound=_PARTS),
]  # fmt: skip
