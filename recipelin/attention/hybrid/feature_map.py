"""The hedgehog feature map: phi(x) = [act(xW); act(-xW)], one W a head."""

import torch
from torch import Tensor, nn

from .config import FeatureMap


class HedgehogFeatureMap(nn.Module):
    """x [B,h,T,d] -> phi [B,H,T,F] for `heads` = H maps, h dividing H: a key head serves H / h maps and is not copied.

    u = x W, W [H, d, F/2]; softmax: [softmax(u), softmax(-u)] over features; exp: [exp(u - max u), exp(-u + min u)],
    maximum over the features of one token; relu, elu (1 + ELU), none: [act(u), act(-u)]. Then clamped below (not
    `none`). Computed in fp32 (fp64 for fp64).
    Source: LoLCATs' feature_map.py (softmax_dim, exp_dim), arXiv 2510.05901 §3.4.
    """

    def __init__(self, config: FeatureMap, heads: int, head_dim: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(heads, head_dim, config.width * head_dim // 2))
        with torch.no_grad():
            self.weight.copy_(self.start_values()["weight"])

    def start_values(self) -> dict[str, Tensor]:
        """The start: a pure function of the seed."""
        heads, width, half = self.weight.shape
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        bound = width**-0.5  # kaiming_uniform with a = sqrt(5), as nn.Linear has it
        start = (torch.rand(heads, width, half, generator=generator, device="cpu") * 2 - 1) * bound
        if self.config.init == "identity":
            same = min(width, half)
            start[:, :, :same] = torch.eye(width, same, device="cpu")
        return {"weight": start.to(self.weight.dtype)}

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, weight = x.to(exact), self.weight.to(exact)
        batch, h, length, width = x.shape
        heads, _, half = weight.shape
        grouped = weight.view(h, heads // h, width, half)
        with torch.autocast(x.device.type, enabled=False):  # autocast would take the product in bf16
            u = torch.einsum("bhtd,hgdf->bhgtf", x, grouped).reshape(batch, heads, length, half)
        match self.config.activation:
            case "softmax":
                phi = torch.cat((u.softmax(-1), (-u).softmax(-1)), -1)
            case "exp":
                phi = torch.cat(((u - u.amax(-1, keepdim=True)).exp(), (-u + u.amin(-1, keepdim=True)).exp()), -1)
            case "relu":
                phi = torch.cat((u.relu(), (-u).relu()), -1)
            case "elu":
                phi = 1 + torch.nn.functional.elu(torch.cat((u, -u), -1))
            case "none":
                return torch.cat((u, -u), -1)
        return phi.clamp(min=self.config.clamp)
