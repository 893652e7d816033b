"""LoRA by peft: into a model in place, and merged out of it."""

from typing import Any

import torch
from torch import nn

from .steps import Tune


def adapt(model: nn.Module, step: Tune, seed: int) -> None:
    """Put peft's adapters into the model in place, A from the seed, B zero, both in fp32."""
    from peft import LoraConfig, inject_adapter_in_model

    assert step.lora is not None
    config = LoraConfig(
        r=step.lora.rank,
        lora_alpha=int(step.lora.alpha) if float(step.lora.alpha).is_integer() else step.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=step.lora.dropout,
        target_modules=list(step.lora.targets),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, Any]:
    """W + alpha / r B A in fp32, then back to the weight's dtype; plain Linear modules take the adapters' places.

    Reports what the weight's dtype cost: rounding = |W' - (W + change)| / |change|, Frobenius norms over all merged
    matrices. Near 0 in fp32; in bf16 it may pass 1, since a change smaller than a weight's last bit is rounded away.
    """
    from peft.tuners.lora import Linear as LoraLinear

    lost = gained = 0.0
    dtype = None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                plain: Any = child.get_base_layer()
                scale = child.scaling["default"]
                a, b = (part["default"].get_parameter("weight").float() for part in (child.lora_A, child.lora_B))
                change = b @ a * scale
                exact = plain.weight.float() + change
                plain.weight.copy_(exact.to(plain.weight.dtype))
                lost += float((plain.weight.float() - exact).square().sum())
                gained += float(change.square().sum())
                dtype = str(plain.weight.dtype).removeprefix("torch.")
                setattr(parent, name, plain)
    if hasattr(model, "peft_config"):
        delattr(model, "peft_config")
    return {"dtype": dtype, "rounding": (lost / gained) ** 0.5 if gained else 0.0}
