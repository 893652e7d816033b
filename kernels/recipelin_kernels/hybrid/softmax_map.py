"""The standard feature map as an argument: a kernel that can makes the features where it uses them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxMap:
    """`make`(x) = [softmax(x W), softmax(-x W)] over features, at least `clamp`: x [B,h,T,D] -> [B,H,T,2 C], h dividing H.

    weight: W [H,D,C]. Whoever cannot make features itself calls `make`; the gradient to W passes through that alone.
    """

    make: Callable[[Tensor], Tensor]
    weight: Tensor
    clamp: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.make(x)

    def made(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The features by Triton, rounded to a dtype, without gradient."""
        from .gpu_features import features

        return features(x, self.weight, self.clamp, dtype)

    @property
    def heads(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[2]

    @property
    def features(self) -> int:
        return 2 * self.columns

    def check(self, heads: int, width: int, features: int) -> None:
        """ValueError for a map of other sizes."""
        expected = (heads, width, features // 2)
        if tuple(self.weight.shape) != expected:
            raise ValueError(f"map {tuple(self.weight.shape)}: expected {expected} (heads, head_dim, F / 2)")

    def unmade(self, x: Tensor) -> Tensor:
        """A tensor of the shape of the features of x, without memory: what it holds is not to be read."""
        return x.new_empty(()).expand(x.shape[0], self.heads, x.shape[2], self.features)
