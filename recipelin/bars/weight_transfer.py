"""The weight transfer loss with its gradients against softmax attention and against whole T x T matrices."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recipelin_kernels import teacher_attention, weight_transfer_loss

from ..bench.measure import Bar, Fact
from .hybrid import Attention


@dataclass(frozen=True)
class Transfer:
    """The loss and its gradients on random inputs. target: `linear` or `hybrid` (window 64, join absolute).

    teacher: the teacher's attention with its log-sum-exp is part of the call.
    """

    kernel: str
    length: int
    target: str = "linear"
    teacher: bool = False
    heads: int = 8
    width: int = 64
    features: int = 128
    steps: int = 1

    def make(self) -> Callable[[], object]:
        draw = torch.Generator().manual_seed(0)

        def normal(width: int) -> torch.Tensor:
            return torch.randn(1, self.heads, self.length, width, generator=draw)

        q, k, v = (normal(self.width) for _ in range(3))
        phi_q, phi_k = (normal(self.features).softmax(-1).requires_grad_() for _ in range(2))
        c = torch.zeros(self.heads, requires_grad=True)
        known = teacher_attention(q, k, v)[1]
        hybrid = {"window": 64, "join": "absolute", "log_scale": c} if self.target == "hybrid" else {}
        learned = (phi_q, phi_k, c) if hybrid else (phi_q, phi_k)

        def call() -> object:
            lse = self._log_sum(q, k, v) if self.teacher else known
            loss = weight_transfer_loss(
                q, k, phi_q, phi_k, lse, target=self.target, kernel=self.kernel, **hybrid  # type: ignore[arg-type]
            )  # fmt: skip
            return torch.autograd.grad(loss, learned)

        return call

    def _log_sum(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.kernel != "reference":
            return teacher_attention(q, k, v)[1]
        hidden = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * self.width**-0.5).masked_fill(hidden, -torch.inf)
        _ = scores.softmax(-1) @ v
        return scores.logsumexp(-1)


_SDPA = Attention("sdpa", 4096, True)

BARS: list[Bar | Fact] = [
    Bar("weight_transfer/sdpa", "T 4096, 8 heads, d 64, F 128: time of loss and gradients over SDPA forward and backward",
        {"ours": Transfer("auto", 4096), "sdpa": _SDPA}, ("ours", "sdpa"), 1.15, at_most=True, slow=True,
        bound="both do 896 FLOP a pair (2 d + 6 F against 14 d), 60 GFLOP; what comes on top is an exponential, a logarithm "
        "and a division a pair, a tenth of the whole."),
    Bar("weight_transfer/hybrid-sdpa", "the same of the hybrid's row, window 64, join absolute",
        {"ours": Transfer("auto", 4096, "hybrid"), "sdpa": _SDPA}, ("ours", "sdpa"), None, at_most=True, slow=True),
    Bar("weight_transfer/quadratic", "T 2048: times as fast as T x T matrices, the teacher included in both",
        {"reference": Transfer("reference", 2048, teacher=True), "ours": Transfer("auto", 2048, teacher=True)},
        ("reference", "ours"), 6, slow=True),
    Bar("weight_transfer/quadratic-memory", "T 2048: times less peak memory than T x T matrices",
        {"reference": Transfer("reference", 2048), "ours": Transfer("auto", 2048)}, ("reference", "ours"), 25,
        peak=True),
]  # fmt: skip
