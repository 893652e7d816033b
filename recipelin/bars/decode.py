"""One more token of hybrid attention against softmax attention over a cache of all keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from recipelin_kernels import HybridState, StepState, empty_state, hybrid_attention, hybrid_attention_step

from ..attention.hybrid.config import FeatureMap
from ..attention.hybrid.feature_map import HeadFeatureMap
from ..bench.measure import Bar, Fact


@dataclass(frozen=True)
class Decode:
    """Tokens after `length` others. hybrid: with the feature maps of both sides; sdpa: over keys that lie grouped."""

    kind: str
    length: int
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    maps: str = "query"  # phi_k for each query head, or for each key head
    window: int = 64
    steps: int = 64

    @torch.no_grad()
    def make(self) -> Callable[[], object]:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(1, *shape, generator=draw)

        if self.kind == "sdpa":
            q = normal(self.key_heads, self.heads // self.key_heads, self.width)
            keys, values = (normal(self.key_heads, self.length, self.width) for _ in range(2))
            return lambda: [F.scaled_dot_product_attention(q, keys, values) for _ in range(self.steps)]
        tokens = [
            (normal(self.heads, 1, self.width), *(normal(self.key_heads, 1, self.width) for _ in range(2)))
            for _ in range(self.steps)
        ]
        own = {"query": self.heads, "key": self.key_heads}[self.maps]
        maps = [HeadFeatureMap(FeatureMap(), h, self.width, seed) for seed, h in enumerate((self.heads, own))]
        mix = torch.full((self.heads,), 0.1)
        arguments = [m.softmax_map(x) for m, x in zip(maps, tokens[0], strict=False)]
        state: HybridState | StepState = self._state(normal, *maps)

        @torch.no_grad()
        def call() -> object:
            nonlocal state
            for q, k, v in tokens:
                y, state = hybrid_attention_step(q, k, v, arguments[0] or maps[0](q), arguments[1] or maps[1], mix, state,
                                                 window=self.window)  # fmt: skip
            return y

        return call

    def _state(self, normal: Callable[..., torch.Tensor], phi_q: HeadFeatureMap, phi_k: HeadFeatureMap) -> HybridState:
        """Made by a prefill of 128 tokens; only the sums' size depends on how many there were."""
        q, k, v = (normal(h, 128, self.width) for h in (self.heads, self.key_heads, self.key_heads))
        _, state = hybrid_attention(
            q, k, v, phi_q(q), phi_k(k), torch.full((self.heads,), 0.1), window=self.window, output_state=True
        )
        return replace(state, positions=torch.full((1,), self.length))


def long_rows(quick: bool) -> Mapping[str, float]:
    """Relative errors after 32,768 tokens (quick: 4,096), against the one-token form in float64.

    Outputs of the whole-row form in float64 and float32; the sums after bf16 inputs, kept in float32 as we do, and what
    sums rounded to bf16 after each token would be.
    """
    length, heads, width, features, window = (4096 if quick else 32768), 2, 8, 8, 16
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, width, generator=draw, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(heads, width, features, generator=draw, dtype=torch.float64)
    mix = torch.full((heads,), 0.1, dtype=torch.float64)

    def phi(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight.to(x.dtype)).softmax(-1)

    state: HybridState | StepState = empty_state(1, heads, heads, width, features, window=window, sinks=0, like=q)
    exact = torch.empty_like(q)
    with torch.no_grad():
        for t in range(length):
            now = slice(t, t + 1)
            exact[:, :, now], state = hybrid_attention_step(
                q[:, :, now], k[:, :, now], v[:, :, now], phi(q[:, :, now]), phi, mix, state, window=window
            )
        found = {}
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            x = [t.to(dtype) for t in (q, k, v, phi(q), phi(k), mix)]
            y = hybrid_attention(*x, window=window)
            found[f"output, {name}"] = _error(y, exact)
        coarse = [t.bfloat16() for t in (q, k, v, phi(q), phi(k), mix)]
        _, left = hybrid_attention(*coarse, window=window, output_state=True)
        kept = left.sums
        gone = length - window + 1
        values = torch.cat((coarse[2], torch.ones_like(coarse[2][..., :1])), -1)[:, :, :gone]
        want = coarse[4][:, :, :gone].double().mT @ values.double()
        found["sums of bf16 keys, float32"] = _error(kept, want)
        rounded = torch.zeros(want.shape, dtype=torch.bfloat16)
        for t in range(gone):
            rounded += coarse[4][:, :, t, :, None] * values[:, :, t, None, :]
        found["sums of bf16 keys, bf16"] = _error(rounded, want)
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


_STEP = "32 heads over 8, d 128, F 128, window 64"

_BYTES = (
    "a token reads the sums (2.1 MB), the queries' map (1.05 MB), the ring (0.5 MB) and late keys' features (0.13 MB), and of "
    "16 tokens one the keys' map and writes new sums: 4.3 MB a token, where SDPA reads 33.5 MB at 4,096 and 537 MB at 65,536. "
    "Beyond a core's cache of 2 MiB that is 0.18 ms at the 24 GB/s that one core reads at best, which the C function takes "
    "(0.17 ms, and 0.02 a token for what is done every 16th). The rest is Python: 0.02 ms while its code and data are in the "
    "core's cache, 0.05 once the reading has driven them out of it."
)

BARS: list[Bar | Fact] = [
    Bar("decode/4k", f"a token at 4,096, {_STEP}: times as fast as SDPA over grouped keys",
        {"sdpa": Decode("sdpa", 4096, steps=1), "ours": Decode("hybrid", 4096)}, ("sdpa", "ours"), 13, unit="us", bound=_BYTES),
    Bar("decode/64k", "the same at 65,536",
        {"sdpa": Decode("sdpa", 65536, steps=1), "ours": Decode("hybrid", 65536)}, ("sdpa", "ours"), 200, unit="us",
        bound=_BYTES),
    Bar("decode/4k-shared", "4k with keys' features of key heads, `key_heads: key`: sums of 0.5 MB",
        {"sdpa": Decode("sdpa", 4096, steps=1), "ours": Decode("hybrid", 4096, maps="key")}, ("sdpa", "ours"), None, unit="us"),
    Bar("decode/64k-shared", "the same at 65,536",
        {"sdpa": Decode("sdpa", 65536, steps=1), "ours": Decode("hybrid", 65536, maps="key")}, ("sdpa", "ours"), None,
        unit="us"),
    Bar("decode/growth", "a token at 65,536 over one at 1,024",
        {"65536": Decode("hybrid", 65536), "1024": Decode("hybrid", 1024)}, ("65536", "1024"), 1.05, at_most=True,
        unit="us"),
    Fact("decode/exactness", "relative errors after 32,768 tokens against the one-token form in float64", long_rows),
]  # fmt: skip
