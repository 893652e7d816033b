"""Students of form `native` as checkpoints of a stock architecture: they load with transformers alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from .files import folder_atomically
from .swap import architecture_of, forms

CONVOLUTION = 4  # taps that are written where the student has none: GPU kernels know 2 to 4


@torch.no_grad()
def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a student of form `native` as a `qwen3_5_text` folder, the same logits in the weights' own dtype.

    Made beside `folder` and renamed. Raises ValueError for another form, for a teacher or layers that the architecture
    cannot hold, and where a norm's weight cannot be held as 1 + w in the weights' dtype.
    """
    found = forms(model)
    if not found or not found[0].config.STOCK:
        raise ValueError("only a student of form native has the shape of a stock architecture")
    arch = architecture_of(model)
    if why := found[0].config.refuses_teacher(arch, arch.num_hidden_layers - len(found)):
        raise ValueError(why)
    with torch.device("meta"):
        made = Qwen3_5ForCausalLM(_config(model, found))
    made.load_state_dict(_weights(model, found), strict=True, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    with folder_atomically(folder) as partial:
        made.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)


def _config(model: Any, found: list[Any]) -> Qwen3_5TextConfig:
    arch, linear = architecture_of(model), {form.layer_index for form in found}
    fields: dict[str, Any] = {name: getattr(arch, name) for name in _SAME}
    fields |= {name: getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Qwen3_5TextConfig(
        **fields,
        initializer_range=arch.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta, "partial_rotary_factor": 1.0},
        layer_types=["linear_attention" if i in linear else "full_attention" for i in range(arch.num_hidden_layers)],
        linear_conv_kernel_dim=found[0].config.short_convolution or CONVOLUTION,
        linear_key_head_dim=arch.head_dim,
        linear_value_head_dim=arch.head_dim,
        linear_num_key_heads=arch.num_attention_heads,
        linear_num_value_heads=arch.num_attention_heads,
        dtype=model.dtype,
    )


def _weights(model: Any, found: list[Any]) -> dict[str, Tensor]:
    """The student's weights by the names of the stock model."""
    head_dim, dtype = architecture_of(model).head_dim, model.dtype
    linear = {form.layer_index: form for form in found}
    weights = {}
    for name, x in model.state_dict().items():
        if name.endswith("norm.weight") and ".o_norm." not in name:
            x = _less_one(name, x)
        if ".self_attn." not in name:
            weights[name] = x
        elif int(name.split(".")[2]) not in linear:
            if name.endswith("q_proj.weight"):
                heads = x.unflatten(0, (-1, head_dim))
                x = torch.cat((heads, torch.zeros_like(heads)), 1).flatten(0, 1)  # a gate of sigmoid(0) = 1/2 ...
            elif name.endswith("o_proj.weight"):
                x = 2 * x  # ... and what undoes it, exact in every dtype
            weights[name] = x
    for index, form in linear.items():
        q, k, v = form.q_proj.weight, form.k_proj.weight, form.v_proj.weight
        own = {
            "in_proj_qkv.weight": torch.cat((q, k, v)),
            "in_proj_z.weight": form.g_proj.weight,
            "in_proj_a.weight": form.a_proj.weight,
            "in_proj_b.weight": form.b_proj.weight,
            "out_proj.weight": form.o_proj.weight,
            "norm.weight": form.o_norm.weight,
            "A_log": form.A_log,
            "dt_bias": form.dt_bias,
            "conv1d.weight": _taps(form)[:, None],
        }
        weights |= {f"model.layers.{index}.linear_attn.{name}": x for name, x in own.items()}
    return {name: x.detach().to(dtype).clone() for name, x in weights.items()}


def _taps(form: Any) -> Tensor:
    """[3 H d, width] of the convolutions of q, k and v; without them, of one that passes on the newest input alone."""
    if form.convolutions:
        return torch.cat([form.convolutions[name].weight for name in ("q", "k", "v")])
    taps = form.q_proj.weight.new_zeros(3 * len(form.q_proj.weight), CONVOLUTION)
    taps[:, -1] = 1
    return taps


def _less_one(name: str, weight: Tensor) -> Tensor:
    """w - 1, as the stock norm multiplies by 1 + w. Raises ValueError where rounding it moves w by more than 1 in 128."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    less = (exact - 1).to(weight.dtype)
    moved = ((1 + less.to(exact.dtype)) - exact).abs() > (exact.abs() / 128).clamp(min=1e-6)
    if bool(moved.any()):
        raise ValueError(
            f"{name}: {int(moved.sum())} of its {moved.numel()} weights cannot be held as 1 + w in "
            f"{str(weight.dtype).removeprefix('torch.')}; convert in float32 (model: {{dtype: float32}})"
        )
    return less
