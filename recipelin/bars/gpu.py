"""The Triton kernels against flash attention, fla and the arithmetic of an H100 (`bench --device cuda`)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from recipelin_kernels import (
    SoftmaxMap,
    empty_state,
    hybrid_attention,
    hybrid_attention_step,
    teacher_attention,
    weight_transfer_loss,
)

from ..attention.hybrid.config import FeatureMap
from ..attention.hybrid.feature_map import HeadFeatureMap
from ..bench import cuda
from ..bench.measure import Bar, Fact


def _normal(length: int, batch: int = 1) -> Callable[[int, int], torch.Tensor]:
    """(heads, width) -> the next normal numbers [B,heads,T,width] in bf16."""
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int, width: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, width, generator=draw, device="cuda").to(torch.bfloat16)

    return normal


def _maps(width: int, heads: int, head_dim: int, seed: int = 0) -> list[HeadFeatureMap]:
    """Those of queries and keys; `width` features for each one of head_dim."""
    return [
        HeadFeatureMap(FeatureMap(width=width), heads, head_dim, 2 * seed + side, "gpu").cuda() for side in range(2)
    ]


def _argument(feature_map: HeadFeatureMap, x: torch.Tensor) -> SoftmaxMap:
    made = feature_map.softmax_map(x)
    assert made is not None, "kernel gpu makes the standard map"
    return made


@dataclass(frozen=True)
class OnGpu:
    """A layer of Llama-3.1-8B's shape in bf16, features given. kind: `gpu`, `made` (features made too), `chunked`, `sdpa`
    (flash) or `fla`."""

    kind: str
    length: int
    backward: bool = False
    features: int = 128
    window: int = 64
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    steps: int = 1

    def make(self) -> Callable[[], object]:
        normal = _normal(self.length)
        inputs = [normal(h, self.width) for h in (self.heads, self.key_heads, self.key_heads)]
        if self.kind not in ("sdpa", "made"):
            inputs += [normal(self.heads, self.features).softmax(-1) for _ in range(2)]
        if self.kind != "sdpa":
            inputs.append(torch.full((self.heads,), 0.1, device="cuda"))
        attend = getattr(self, f"_{self.kind}")
        if not self.backward:
            return lambda: _without_gradient(attend, inputs)
        dy = normal(self.heads, self.width)
        for x in inputs:
            x.requires_grad_()
        return lambda: torch.autograd.grad(attend(*inputs), inputs, dy)

    def _gpu(self, *inputs: torch.Tensor) -> Any:
        return hybrid_attention(*inputs, window=self.window, kernel="gpu")

    @cached_property
    def _maps(self) -> list[HeadFeatureMap]:
        return _maps(self.features // self.width, self.heads, self.width)

    def _made(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mix: torch.Tensor) -> Any:
        map_q, map_k = (_argument(m, x) for m, x in zip(self._maps, (q, k), strict=True))
        return hybrid_attention(q, k, v, map_q, None, mix, window=self.window, kernel="gpu", phi_k_fn=map_k)

    def _chunked(self, *inputs: torch.Tensor) -> Any:
        return hybrid_attention(*inputs, window=self.window, kernel="chunked")

    def _sdpa(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def _fla(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fq: torch.Tensor, fk: torch.Tensor, _: Any
    ) -> Any:
        """Without a window, q and k: its own layout [B,T,H,.], values repeated for the heads, no denominator."""
        from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]

        fq, fk, v = (x.transpose(1, 2) for x in (fq, fk, v.repeat_interleave(self.heads // self.key_heads, 1)))
        return chunk_linear_attn(fq, fk, v, scale=1.0, normalize=False)[0]


@dataclass(frozen=True)
class TransferOnGpu:
    """The weight transfer loss with its gradients, of the same layer; the log-sum-exp is given. target: `linear` or `hybrid`."""

    kernel: str
    length: int
    target: str = "linear"
    features: int = 128
    feature_dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    steps: int = 1

    def make(self) -> Callable[[], object]:
        normal = _normal(self.length)
        q, k = normal(self.heads, self.width), normal(self.key_heads, self.width)
        lse = teacher_attention(q, k, k)[1]
        phi_q, phi_k = (
            normal(self.heads, self.features).to(self.feature_dtype).softmax(-1).requires_grad_() for _ in range(2)
        )
        options: dict[str, Any] = {"target": self.target, "kernel": self.kernel}
        learned = [phi_q, phi_k]
        if self.target == "hybrid":
            options |= {"window": 64, "join": "absolute", "log_scale": torch.zeros(self.heads, device="cuda")}
            learned.append(options["log_scale"].requires_grad_())
        return lambda: torch.autograd.grad(weight_transfer_loss(q, k, phi_q, phi_k, lse, **options), learned)


@torch.no_grad()
def _without_gradient(attend: Callable[..., Any], inputs: list[torch.Tensor]) -> object:
    return attend(*inputs)


@dataclass(frozen=True)
class DecodeOnGpu:
    """A token of every row under a CUDA graph, feature maps made too. A step is a layer: each has a state and maps of its own,
    and there are so many that an H100's 50 MB of L2 do not hold them from one replay to the next. made: by one
    launch, which the token's overlaps, else by each map's own."""

    batch: int
    steps: int
    made: bool = True
    heads: int = 32
    key_heads: int = 8
    width: int = 128
    window: int = 64

    @torch.no_grad()
    def make(self) -> Callable[[], object]:
        normal = _normal(1, self.batch)
        q, k, v = (normal(h, self.width) for h in (self.heads, self.key_heads, self.key_heads))
        mix = torch.full((self.heads,), 0.1, device="cuda")
        layers = [_maps(1, self.heads, self.width, n) for n in range(self.steps)]
        empty = empty_state(
            self.batch, self.heads, self.key_heads, self.width, self.width, window=self.window, sinks=0, like=q
        )
        seen = torch.full((self.batch,), 1000, device="cuda")
        states: list[Any] = [replace(empty, positions=seen) for _ in layers]

        @torch.no_grad()
        def token() -> list[torch.Tensor]:
            found = []
            for n, (map_q, map_k) in enumerate(layers):
                phi_q = _argument(map_q, q) if self.made else map_q(q)
                phi_k_fn = _argument(map_k, k) if self.made else map_k
                y, states[n] = hybrid_attention_step(
                    q, k, v, phi_q, phi_k_fn, mix, states[n], window=self.window, kernel="gpu"
                )
                found.append(y)
            return found

        return token

    @property
    def floor(self) -> float:
        """Seconds a step for the bytes that must move of many rows, at an H100's 3.35 TB/s: gpu_step.py counts them."""
        sums = self.heads * self.width * self.width * 4
        late = 8 * self.heads * self.width * 4  # features of 8 of 16 keys that are not yet in the sums, on average
        ring = 2 * self.key_heads * self.window * self.width * 2
        given = (2 * self.heads + 2 * self.key_heads) * self.width * 2 + 2 * self.heads * self.width * 4
        maps = 2 * self.heads * self.width * self.width // 2 * 4
        return (self.batch * (sums + sums / 16 + late + ring + given) + maps) / 3.35e12


def _over(other: str, length: int, backward: bool = False, **shape: Any) -> dict[str, OnGpu]:
    return {other: OnGpu(other, length, backward, **shape), "ours": OnGpu("gpu", length, backward, **shape)}


_SHAPE = "32 heads over 8, d 128, F 128, window 64, bf16"
_FLOOR = (
    7.2e-9  # seconds a token: 4.72 + 1.05 MFLOP at 800 TFLOP/s, F 128 with fused maps (facts: a Llama-3.1-8B layer)
)
_UNFUSED = (
    "features are read, not made: with F 128 they are 8 KB of phi_q and twice 8 KB of phi_k a token beside 20 KB of q, k, v and "
    "y, and states in bf16 a further 16 KB: 60 KB, 20 ns at 3.0 TB/s and 14 at 4.3 (nine tenths of an H100's and of an H200's), "
    "where the bar is 18. `output` is held by L2: of 64 queries it takes 232 KB (q, phi_q, y 48, a state 32, keys and values of "
    "128 keys 64, features and values of 160 others 80), 3.8 GB in all or 5.6 TB/s, of the about 7 that L2 gives. Blocks of 128 "
    "queries take 160 KB for 64, but registers leave them 8 to 16 warps. Fused maps would take 24 of the 60 KB."
)
_UNFUSED_256 = (
    "as with F 128; features then are 48 KB a token and states 32 KB: 100 KB, 33 ns at 3 TB/s, so that the bar needs fused maps "
    "and a state less often than every 256 tokens."
)
_LAUNCHES = (
    "two launches a layer, 0.6 us each where it begins while the one ahead ends: features, and meanwhile the window; then the "
    "sums, about 350 instructions of one warp a scheduler with a dozen barriers between them. The bytes (4.8 MB with maps in "
    "fp32) are 1.4 us."
)
_SUMMED = (
    "a head is one warp, of 5,900 instructions, and waits for what it loads: at batch 32 the bytes are 26 us at an H100's 3.35 "
    "TB/s, 18 at an H200's 4.8 (data sheets), if loads were always under way."
)
_AGAINST_FLASH = (
    "flash attention is bound by arithmetic and takes as long on an H100 as on an H200; ours by L2 and memory (gpu/floor), which "
    "on an H100 gives 3.35 TB/s for 4.8 (data sheets). 2026-11-28: forward at 32k 1.007 ms on an H100, 0.926 on an H200 the day "
    "before by the same Triton, flash 24.9 and 25.5."
)
_LONGER = (
    "2026-11-28: 65536 tokens took 5 % more a token than 32768 on an H100, 1 % on an H200; why was not looked into."
)
_MADE = (
    "phi_q is made in the launch that uses it, phi_k in one before it, in bf16: 24 KB a token beside 20 KB of q, k, v and y and "
    "16 KB of states, 60 KB, 20 ns at 3 TB/s, if nothing of it is found in L2. Each program makes W's two parts anew from L2."
)
_TRANSFER = (
    "gradients of queries and keys are two passes over the pairs, as results repeat bit by bit: 4 d + 8 F FLOP a pair, 0.41 "
    "TFLOP, against 14 d, 0.48 TFLOP (T 4096): even, if the kernels reach 86 % of flash attention's rate."
)
_CUDA: dict[str, Any] = {"device": "cuda"}


def _transfer(length: int, **more: Any) -> dict[str, Any]:
    return {"ours": TransferOnGpu("gpu", length, **more), "sdpa": OnGpu("sdpa", length, True)}


def _host(quick: bool) -> dict[str, float]:
    cases: dict[str, OnGpu | TransferOnGpu] = {
        "forward us": OnGpu("gpu", 1024),
        "forward and backward us": OnGpu("gpu", 1024, True),
        "sdpa forward us": OnGpu("sdpa", 1024),
        "sdpa forward and backward us": OnGpu("sdpa", 1024, True),
        "weight transfer us": TransferOnGpu("gpu", 1024),
    }
    return {name: cuda.host_seconds(case.make(), 10 if quick else 50) * 1e6 for name, case in cases.items()}


BARS: list[Bar | Fact] = [
    Fact("gpu/host", f"T 1024, {_SHAPE}: what the host takes to launch a call, which no other row holds", _host, **_CUDA),
    Bar("gpu/floor", f"T 32768, {_SHAPE}: times the arithmetic's floor of 7.2 ns a token, forward",
        {"ours": OnGpu("gpu", 32768)}, ("ours", "floor"), 2.5, at_most=True, floors={"floor": _FLOOR * 32768},
        bound=_UNFUSED, **_CUDA),
    *(
        Bar(f"gpu/floor-{size}k", f"the same at T {1024 * size}",
            {"ours": OnGpu("gpu", 1024 * size)}, ("ours", "floor"), 2.5, at_most=True,
            floors={"floor": _FLOOR * 1024 * size}, bound=_UNFUSED, **_CUDA)
        for size in (4, 128)
    ),
    Bar("gpu/floor-made", "T 32768 again, features made too, which the floor counts",
        {"ours": OnGpu("made", 32768)}, ("ours", "floor"), 2.5, at_most=True, floors={"floor": _FLOOR * 32768},
        bound=_MADE, **_CUDA),
    Bar("gpu/floor-256", "the same, features given, with F 256, against the same 7.2 ns",
        {"ours": OnGpu("gpu", 32768, features=256)}, ("ours", "floor"), 2.5, at_most=True,
        floors={"floor": _FLOOR * 32768}, bound=_UNFUSED_256, **_CUDA),
    *(
        Bar(f"gpu/sdpa-forward-{size}k", f"T {1024 * size}, {_SHAPE}: times as fast as flash attention, forward",
            _over("sdpa", 1024 * size), ("sdpa", "ours"), reach, slow=size > 64, bound=_AGAINST_FLASH, **_CUDA)
        for size, reach in ((4, 4), (32, 25), (128, 100))
    ),
    *(
        Bar(f"gpu/sdpa-both-{size}k", f"T {1024 * size}: the same, forward and backward",
            _over("sdpa", 1024 * size, True), ("sdpa", "ours"), reach, bound=_AGAINST_FLASH, **_CUDA)
        for size, reach in ((4, 3), (32, 20))
    ),
    Bar("gpu/fla", "T 32768, window 0: time over fla's chunk_linear_attn, forward (which has no denominator)",
        {"fla": OnGpu("fla", 32768, window=0), "ours": OnGpu("gpu", 32768, window=0)}, ("ours", "fla"), 1.3,
        at_most=True, needs="fla", **_CUDA),
    Bar("gpu/chunked-forward", "T 4096: times as fast as the chunked form in torch, forward",
        _over("chunked", 4096), ("chunked", "ours"), 1, slow=True, **_CUDA),
    Bar("gpu/chunked-both", "the same, forward and backward",
        _over("chunked", 4096, True), ("chunked", "ours"), 1, slow=True, **_CUDA),
    Bar("gpu/growth", "T 65536 over T 32768, time, forward",
        {str(n): OnGpu("gpu", n) for n in (32768, 65536)}, ("65536", "32768"), 2.1, at_most=True,
        bound=_LONGER, **_CUDA),
    Bar("gpu/growth-memory-both", "T 65536 over T 32768, peak memory, forward and backward",
        {str(n): OnGpu("gpu", n, True) for n in (32768, 65536)}, ("65536", "32768"), 2.1, at_most=True, peak=True,
        **_CUDA),
    Bar("gpu/decode-1", f"a token under a CUDA graph, batch 1, {_SHAPE}, with both feature maps: time of a layer over 6 us",
        {"ours": DecodeOnGpu(1, 32)}, ("ours", "6 us"), 1, at_most=True, unit="us", floors={"6 us": 6e-6},
        bound=_LAUNCHES, **_CUDA),
    *(
        Bar(f"gpu/decode-{batch}", f"the same at batch {batch}: time over that of its bytes at 3.35 TB/s (1.43: 70 % of them)",
            {"ours": DecodeOnGpu(batch, steps)}, ("ours", "bytes"), 1.43, at_most=True, unit="us",
            floors={"bytes": DecodeOnGpu(batch, steps).floor}, bound=_SUMMED, **_CUDA)
        for batch, steps in ((32, 2), (256, 1))
    ),
    *(
        Bar(f"gpu/decode-launches-{batch}", f"batch {batch}, features given, made by their maps: time over the above",
            {"given": DecodeOnGpu(batch, steps, made=False), "ours": DecodeOnGpu(batch, steps)}, ("given", "ours"), None,
            unit="us", **_CUDA)
        for batch, steps in ((1, 32), (32, 2))
    ),
    *(
        Bar(f"gpu/transfer-{size}k", f"T {1024 * size}: weight transfer's loss and gradients, time over flash attention, forward "
            "and backward", _transfer(1024 * size), ("ours", "sdpa"), 1, at_most=True, bound=_TRANSFER, **_CUDA)
        for size in (4, 32)
    ),
    Bar("gpu/transfer-hybrid", "T 4096: the same of the hybrid's row, window 64, join absolute",
        _transfer(4096, target="hybrid"), ("ours", "sdpa"), None, at_most=True, **_CUDA),
    Bar("gpu/transfer-float32", "T 4096: the same with float32 features, as the feature maps make them",
        _transfer(4096, feature_dtype=torch.float32), ("ours", "sdpa"), None, at_most=True, **_CUDA),
    Bar("gpu/transfer-chunked", "T 4096: weight transfer, times as fast as the chunked form in torch (calls by the host)",
        {n: TransferOnGpu(k, 4096) for n, k in (("chunked", "chunked"), ("ours", "gpu"))}, ("chunked", "ours"), 1,
        slow=True, eager=True, **_CUDA),
    Bar("gpu/transfer-memory", "T 32768 over T 16384: weight transfer's peak memory",
        {str(n): TransferOnGpu("gpu", n) for n in (16384, 32768)}, ("32768", "16384"), 2.1, at_most=True, peak=True,
        **_CUDA),
]  # fmt: skip
