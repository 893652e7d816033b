"""What a `gated_delta` layer is made of: seeded gates, a short convolution, the expanded copies, and its state."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import Config


class Gate(nn.Linear):
    """A linear map of the layer's input, started from its own seed: normal with deviation `std`, bias 0."""

    def __init__(self, inner: int, outer: int, *, std: float, seed: int, bias: bool = False) -> None:
        with torch.device("meta"):  # the start comes from start_values, not from the caller's generator
            super().__init__(inner, outer, bias=bias)
        self.std, self.seed = std, seed
        for name, value in self.start_values().items():
            setattr(self, name, nn.Parameter(value))

    def start_values(self) -> dict[str, Tensor]:
        """A pure function of the seed."""
        draw = torch.Generator(device="cpu").manual_seed(self.seed)
        shape = (self.out_features, self.in_features)
        found = {"weight": torch.randn(shape, generator=draw, device="cpu") * self.std}
        if self.bias is not None:
            found["bias"] = torch.zeros(self.out_features, device="cpu")
        return found


class ShortConvolution(nn.Module):
    """y_t = sum_i w_i x_{t - width + 1 + i}, each channel by itself; starts as the identity, w_{width-1} = 1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.weight = nn.Parameter(self.start_values()["weight"])

    def start_values(self) -> dict[str, Tensor]:
        start = torch.zeros(self.channels, self.width, device="cpu")
        start[:, -1] = 1.0
        return {"weight": start}

    def forward(self, x: Tensor, before: Tensor, segment: Tensor | None) -> Tensor:
        """x [B,T,channels] and the width - 1 inputs before it; segment [B,T]: numbers that change where a document begins."""
        whole, length = torch.cat((before, x), 1), x.shape[1]
        y = torch.zeros_like(x)
        for i in range(self.width):
            back = self.width - 1 - i
            tap = whole[:, i : i + length]
            if segment is not None and back:
                inside = torch.zeros_like(segment, dtype=torch.bool)
                inside[:, back:] = segment[:, back:] == segment[:, : length - back]
                tap = torch.where(inside[..., None], tap, 0)
            y = y + tap * self.weight[:, i]
        return y


class OutputNorm(nn.Module):
    """RMSNorm over a head, one weight for all heads, times silu of the gate where there is one; in fp32 at least."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def start_values(self) -> dict[str, Tensor]:
        return {"weight": torch.ones(self.weight.shape, device="cpu")}

    def forward(self, o: Tensor, gate: Tensor | None) -> Tensor:
        exact = torch.promote_types(o.dtype, torch.float32)
        o = o.to(exact)
        y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(exact)
        return y if gate is None else y * nn.functional.silu(gate.to(exact))


@dataclass(frozen=True)
class DeltaState:
    """What decoding needs of the past, of constant size.

    memory [B,H,d,d]: S transposed, fp32 (fp64 for fp64). before [3,B,width-1,H d]: the last inputs of the short
    convolutions of q, k, v; None without them.
    """

    memory: Tensor
    before: Tensor | None

    @property
    def bytes(self) -> int:
        return self.memory.nbytes + (0 if self.before is None else self.before.nbytes)

    @property
    def batch(self) -> int:
        return self.memory.shape[0]

    def select(self, index: Tensor) -> "DeltaState":
        """The rows of a batch that `index` names (beam search)."""
        index = index.to(self.memory.device)
        before = None if self.before is None else self.before.index_select(1, index)
        return DeltaState(self.memory.index_select(0, index), before)


def decay_start(config: Config, heads: int, seed: int) -> dict[str, Tensor]:
    """A_log and dt_bias [heads]: a pure function of the seed; softplus(dt_bias) = dt exactly, as in Mamba2."""
    draw = torch.Generator(device="cpu").manual_seed(seed)
    low, high = config.decay.rate
    rate = low + (high - low) * torch.rand(heads, generator=draw, device="cpu")
    low, high = (math.log(x) for x in config.decay.step)
    step = (low + (high - low) * torch.rand(heads, generator=draw, device="cpu")).exp()
    # A draw of exactly 0 has no logarithm; such a head would never forget.
    return {"A_log": rate.clamp(min=1e-6).log(), "dt_bias": step + (-torch.expm1(-step)).log()}


@torch.no_grad()
def copy_of(
    projection: nn.Linear, config: Config, *, head_dim: int, groups: int = 1, gain: Tensor | None = None
) -> nn.Linear:
    """A copy of q_proj, k_proj or v_proj: gains [d] on a head's rows, heads repeated `groups` times, bias as `qkv_bias` says."""

    def changed(x: Tensor) -> Tensor:
        if gain is not None:
            x = (x.unflatten(0, (-1, head_dim)) * gain[:, None]).flatten(0, 1)
        if config.kv_expand == "row_interleave_legacy":
            return x.repeat_interleave(groups, 0)
        return x.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1)

    bias = projection.bias is not None and config.qkv_bias == "keep"
    with torch.device("meta"):
        made = nn.Linear(projection.in_features, projection.out_features * groups, bias=bias)
    made.weight = nn.Parameter(changed(projection.weight).clone())
    if bias:
        made.bias = nn.Parameter(changed(projection.bias[:, None])[:, 0].clone())
    return made
