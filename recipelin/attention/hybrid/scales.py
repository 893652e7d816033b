"""The scales that weigh the two branches against each other: one number a head."""

import math

import torch
from torch import Tensor, nn


class Mix(nn.Module):
    """g_h = sigmoid(theta_h) of the `shared` join. A module, since peft overlooks bare parameters."""

    def __init__(self, heads: int, start: float) -> None:
        super().__init__()
        self.start = math.log(start / (1 - start))
        self.theta = nn.Parameter(torch.full((heads,), self.start))

    def start_values(self) -> dict[str, Tensor]:
        return {"theta": torch.full(self.theta.shape, self.start, device="cpu")}

    def forward(self) -> Tensor:
        return self.theta.sigmoid()


class LogScale(nn.Module):
    """c_h of the `absolute` join; 0 until it is calibrated or learned."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(heads))

    def start_values(self) -> dict[str, Tensor]:
        return {"c": torch.zeros(self.c.shape, device="cpu")}

    def forward(self) -> Tensor:
        return self.c
