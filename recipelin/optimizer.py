"""Optimisers of a stage and their learning rate: AdamW, or Muon for the matrices of the layers beside AdamW."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .schedule import Decay, Optimizer


class Optimizers:
    """One or two torch optimisers that step together; states by parameter name, so that safetensors can hold them."""

    def __init__(self, parts: list[torch.optim.Optimizer], names: Mapping[int, str]) -> None:
        self.parts, self.names = parts, names
        self.rates = [[group["lr"] for group in part.param_groups] for part in parts]

    def set_rates(self, factor: float) -> None:
        """Every group's own rate times `factor`."""
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, base in zip(part.param_groups, rates, strict=True):
                group["lr"] = base * factor

    def step(self) -> None:
        """Step, and drop the gradients."""
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(moments `name|key`, step counts `name`) of all parameters."""
        tensors, steps = {}, {}
        for part in self.parts:
            for parameter, state in part.state.items():
                name = self.names[id(parameter)]
                for key, value in state.items():
                    if key == "step":
                        steps[name] = float(value)
                    else:
                        tensors[f"{name}|{key}"] = value
        return tensors, steps

    def load(self, tensors: Mapping[str, Tensor], steps: Mapping[str, float]) -> None:
        """Take up what `state` gave."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            name, _, key = path.rpartition("|")
            by_name.setdefault(name, {})[key] = value
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    name = self.names[id(parameter)]
                    if name in by_name:
                        state = {k: v.to(parameter.device).clone() for k, v in by_name[name].items()}
                        if name in steps:
                            state["step"] = torch.tensor(steps[name])
                        part.state[parameter] = state


def make_optimizers(
    config: Optimizer, trained: Mapping[str, nn.Parameter], groups: Mapping[str, list[nn.Parameter]]
) -> Optimizers:
    """The optimisers of the named parameters; `group_lr` gives the parameters of a group their own rate; of several groups
    of a parameter that have one, the last counts.

    muon: the 2-d matrices inside layers; AdamW at `adamw_lr` has embeddings, norms and the rest.
    """
    own_rate = {id(p): config.group_lr[name] for name, ps in groups.items() if name in config.group_lr for p in ps}
    if unknown := sorted(set(config.group_lr) - set(groups)):
        raise ValueError(
            f"group_lr: {', '.join(unknown)} do not train in this stage; groups that do: {', '.join(groups) or 'none'}"
        )
    rates: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        own = own_rate.get(id(parameter))
        matrix = config.name == "muon" and parameter.ndim == 2 and ".layers." in name and own is None
        if matrix:
            rates.setdefault(("muon", config.lr), []).append(parameter)
        else:
            lr = own if own is not None else config.adamw_lr if config.name == "muon" else config.lr
            rates.setdefault(("adamw", lr), []).append(parameter)
    parts: list[torch.optim.Optimizer] = []
    adamw = [{"params": ps, "lr": lr} for (kind, lr), ps in rates.items() if kind == "adamw"]
    muon = [{"params": ps, "lr": lr} for (kind, lr), ps in rates.items() if kind == "muon"]
    if adamw:
        parts.append(torch.optim.AdamW(adamw, betas=config.betas, weight_decay=config.weight_decay))
    if muon:
        parts.append(torch.optim.Muon(muon, weight_decay=config.weight_decay))
    return Optimizers(parts, {id(p): n for n, p in trained.items()})


def rate(decay: Decay, step: int, total: int) -> float:
    """Factor of the learning rate at a step counted from 0: linear warm-up, then the decay over what is left.

    cosine: final + (1 - final) (1 + cos(pi x)) / 2; linear: 1 - (1 - final) x; x runs from 0 to 1 after warm-up.
    """
    if step < decay.warmup:
        return (step + 1) / decay.warmup
    if decay.name in ("constant", "plateau"):
        return 1.0
    x = (step - decay.warmup) / max(1, total - decay.warmup)
    if decay.name == "linear":
        return 1.0 - (1.0 - decay.final) * x
    return decay.final + (1.0 - decay.final) * (1.0 + math.cos(math.pi * x)) / 2.0
