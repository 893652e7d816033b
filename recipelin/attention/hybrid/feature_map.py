"""The feature maps of the linear branch: a learned matrix a head, or none, under an activation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recipelin_kernels import SoftmaxMap, resolve_kernel, without_autocast
from recipelin_kernels.hybrid import cpu_features

from .config import FeatureMap

ROWS_AT_ONCE = 1024  # tokens x heads: with 256 features 1 MiB
SCALE_LIMIT = 30.0  # |u.x| of a token's scale at most: exp(30) squared still fits into fp32


class HeadFeatureMap(nn.Module):
    """x [B,h,T,d] -> phi [B,H,T,F] for `heads` = H maps, h dividing H: a key head serves H / h maps and is not copied.

    u = x W (+ b), W [H, d, columns]; `fixed`: u = x. softmax: [softmax(u), softmax(-u)] over features; exp:
    [exp(u - max u), exp(-u + min u)], maximum over the features of one token; relu, elu (1 + ELU), none: [act(u), act(-u)],
    or act(u) alone (t2r, `as_lolcats`). Then clamped below (not `none`), and times exp(u_h.x) with `token_scale`.
    Computed in fp32 (fp64 for fp64). kernel: of the form; `gpu` makes softmax features by Triton, `cpu` in C.
    Source: LoLCATs' feature_map.py (softmax_dim, exp_dim, relu, pos_elu), arXiv 2510.05901 §3.4, T2R: arXiv 2103.13076.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    log_scale: nn.Parameter

    def __init__(self, config: FeatureMap, heads: int, head_dim: int, seed: int, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel
        self.config, self.heads, self.head_dim = config, heads, head_dim
        self.seed = seed
        for name, value in self.start_values().items():
            self.register_parameter(name, nn.Parameter(value))

    def start_values(self) -> dict[str, Tensor]:
        """The start: a pure function of the seed."""
        config, heads, width = self.config, self.heads, self.head_dim
        found: dict[str, Tensor] = {}
        if config.name != "fixed":
            columns = config.columns(width)
            generator = torch.Generator(device="cpu").manual_seed(self.seed)
            bound = width**-0.5  # kaiming_uniform with a = sqrt(5), as nn.Linear has it
            start = (torch.rand(heads, width, columns, generator=generator, device="cpu") * 2 - 1) * bound
            if config.init == "identity":
                same = min(width, columns)
                start[:, :, :same] = torch.eye(width, same, device="cpu")
            found["weight"] = start
            if config.bias != "none":
                found["bias"] = torch.zeros(heads, columns if config.bias == "feature" else 1, device="cpu")
        if config.token_scale:
            found["log_scale"] = torch.zeros(heads, width, device="cpu")
        return found

    def _kernel(self, x: Tensor) -> str:
        """By which the features of x are made, those of the standard map: `gpu`, `cpu`; else empty."""
        config = self.config
        if config.name != "hedgehog" or config.activation != "softmax" or config.token_scale:
            return ""
        sizes: dict[str, Any] = {"dtype": x.dtype, "width": self.head_dim, "features": config.size(self.head_dim)}
        takes = resolve_kernel(self.kernel, x.device, **sizes)
        return takes if takes in ("gpu", "cpu") else ""

    def softmax_map(self, x: Tensor) -> SoftmaxMap | None:
        """The map as an argument of the operator, whose kernels then make features of x; None where they do not.

        The C kernels do of one token, without gradient.
        """
        takes = self._kernel(x)
        if takes == "cpu" and (x.shape[2] != 1 or torch.is_grad_enabled()):
            return None
        return SoftmaxMap(self, self.weight, self.config.clamp) if takes else None

    def forward(self, x: Tensor) -> Tensor:
        takes = self._kernel(x)
        if takes == "cpu" and cpu_features.takes(self.weight):
            return cpu_features.softmax_features_cpu(x, self.weight, self.config.clamp)
        if takes == "gpu":
            from recipelin_kernels.hybrid.gpu_features import softmax_features_gpu

            return softmax_features_gpu(x, self.weight, self.config.clamp)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(exact)
        batch, h, length, width = x.shape
        group = self.heads // h
        with without_autocast(x.device):
            if self.config.name == "fixed":
                u = x[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, self.heads, length, width)
            else:
                weight = self.weight.to(exact)
                if length == 1:  # einsum copies the weights, which for one token is most of the time
                    each = x.squeeze(2).transpose(0, 1)
                    each = each if group == 1 else each.repeat_interleave(group, 0)
                    u = torch.bmm(each, weight).transpose(0, 1).unsqueeze(2)
                else:
                    u = torch.einsum("bhtd,hgdf->bhgtf", x, weight.view(h, group, width, -1))
                    u = u.reshape(batch, self.heads, length, -1)
                if self.config.bias != "none":
                    u = u + self.bias.to(exact)[:, None]
            phi = self._activate(u)
            if self.config.token_scale:
                scale = self.log_scale.to(exact).view(h, group, width)
                level = torch.einsum("bhtd,hgd->bhgt", x, scale).reshape(batch, self.heads, length, 1)
                phi = phi * level.clamp(-SCALE_LIMIT, SCALE_LIMIT).exp()
        return phi

    def _activate(self, u: Tensor) -> Tensor:
        one_sign = self.config.name == "t2r" or self.config.features == "as_lolcats"
        if self.config.activation == "softmax":
            learns = torch.is_grad_enabled() and u.requires_grad
            return _BothSoftmax.apply(u, self.config.clamp) if learns else _both(u, self.config.clamp).flatten(-2)
        both = u if one_sign else torch.cat((u, -u), -1)
        match self.config.activation:
            case "exp":
                phi = torch.cat(((u - u.amax(-1, keepdim=True)).exp(), (-u + u.amin(-1, keepdim=True)).exp()), -1)
            case "relu":
                phi = both.relu()
            case "elu":
                phi = 1 + torch.nn.functional.elu(both)
            case _:
                return both
        return phi.clamp(min=self.config.clamp)


class _BothSoftmax(torch.autograd.Function):
    """[softmax(u), softmax(-u)] over the last axis, clamped below: what autograd would do, in two thirds of the passes.

    But in the gradient a clamped feature has the clamp in the place of its softmax p: off by at most clamp |sum p g|.
    A few rows of the batch at a time, so that what one pass leaves for the next is still in a core's cache.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, least: float) -> Tensor:
        both = _both(u, least)
        ctx.save_for_backward(both)
        ctx.least = least
        return both.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        found = both.new_empty(both[..., 0, :].shape)
        for g, b, out in zip(_few(grad.unflatten(-1, (2, -1))), _few(both), _few(found), strict=True):
            passed = torch.ops.aten.threshold_backward(g, b, ctx.least)
            inner = torch.ops.aten._softmax_backward_data(passed, b, -1, b.dtype)
            torch.sub(inner[..., 0, :], inner[..., 1, :], out=out)
        return found, None


def _both(u: Tensor, least: float) -> Tensor:
    """u [B,H,T,C] -> softmax of u and of -u [B,H,T,2,C], clamped below."""
    if u.shape[2] == 1:
        return torch.softmax(torch.stack((u, -u), -2), -1).clamp_(min=least)
    both = u.new_empty(*u.shape[:-1], 2, u.shape[-1])
    for part, out in zip(_few(u), _few(both), strict=True):
        torch.softmax(torch.stack((part, -part), -2), -1, out=out).clamp_(min=least)
    return both


def _few(x: Tensor) -> tuple[Tensor, ...]:
    """x [B,H,T,...] in parts of whole rows of the batch, about as many numbers of u each."""
    return x.split(max(1, ROWS_AT_ONCE // max(1, x.shape[1] * x.shape[2])))
