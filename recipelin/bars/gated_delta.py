"""The chunked gated delta rule against transformers' torch form of it and against torch's causal softmax attention."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from recipelin_kernels import gated_delta_rule

from ..bench.measure import Bar, Fact


@functools.cache
def torch_form() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Qwen3.5's torch code: with fla installed, the public name is fla's Triton kernel, on CPU tensors too."""
    from transformers.models.qwen3_5 import modeling_qwen3_5  # slow to import, and only this case needs it

    form: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = inspect.unwrap(
        modeling_qwen3_5.torch_chunk_gated_delta_rule
    )
    return form


@dataclass(frozen=True)
class Rule:
    """One call on random inputs, unit queries and keys. kind: `chunked`, `transformers` or `sdpa`, each in its own layout."""

    kind: str
    length: int
    backward: bool = False
    heads: int = 8
    width: int = 64
    steps: int = 1

    def make(self) -> Callable[[], object]:
        draw = torch.Generator().manual_seed(0)
        shape = (1, self.heads, self.length)
        q, k, v, dy = (torch.randn(*shape, self.width, generator=draw) for _ in range(4))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        inputs = [q, k, v]
        if self.kind != "sdpa":
            inputs += [-0.1 * torch.rand(shape, generator=draw), torch.rand(shape, generator=draw)]
        if self.kind == "transformers":  # [B,T,H,D]
            inputs, dy = [x.transpose(1, 2).contiguous() for x in inputs], dy.transpose(1, 2).contiguous()

        def attend() -> torch.Tensor:
            if self.kind == "sdpa":
                return F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=True)
            return (
                torch_form()(*inputs)[0] if self.kind == "transformers" else gated_delta_rule(*inputs, kernel=self.kind)
            )

        if not self.backward:
            return torch.no_grad()(attend)
        for x in inputs:
            x.requires_grad_()
        return lambda: torch.autograd.grad(attend(), inputs, dy)


def _against(other: str, length: int, backward: bool) -> dict[str, Rule]:
    return {other: Rule(other, length, backward), "ours": Rule("chunked", length, backward)}


_SHAPE = "8 heads, d 64"
_THEIRS = ("transformers", "ours")

BARS: list[Bar | Fact] = [
    Bar("gated_delta/forward", f"T 4096, {_SHAPE}: times as fast as transformers' torch form, forward",
        _against("transformers", 4096, False), _THEIRS, 1.2),
    Bar("gated_delta/both", "the same, forward and backward", _against("transformers", 4096, True), _THEIRS, 1.3, slow=True),
    Bar("gated_delta/short", "T 512, forward and backward", _against("transformers", 512, True), _THEIRS, None),
    Bar("gated_delta/memory", "T 4096, times less peak memory, forward and backward",
        _against("transformers", 4096, True), _THEIRS, None, peak=True),
    Bar("gated_delta/sdpa", "T 4096, times as fast as SDPA, forward and backward",
        _against("sdpa", 4096, True), ("sdpa", "ours"), None, slow=True),
]  # fmt: skip
