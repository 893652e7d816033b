"""What recipelin knows of a model family, from the numbers of its config.json alone (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from .base import Config


class Architecture(Config):
    """The numbers of a decoder that counts, costs and new models need; keys as in a Hugging Face config.json.

    Sample YAML: `{model_type: llama, hidden_size: 128, intermediate_size: 320, num_hidden_layers: 3,
    num_attention_heads: 4, num_key_value_heads: 1, head_dim: 32, vocab_size: 1024, max_position_embeddings: 256}`
    """

    model_type: str
    hidden_size: Annotated[int, Field(ge=1)]
    intermediate_size: Annotated[int, Field(ge=1)]
    num_hidden_layers: Annotated[int, Field(ge=1)]
    num_attention_heads: Annotated[int, Field(ge=1)]
    num_key_value_heads: Annotated[int, Field(ge=1)]
    head_dim: Annotated[int, Field(ge=2)]
    vocab_size: Annotated[int, Field(ge=2)]
    max_position_embeddings: Annotated[int, Field(ge=2)]
    tie_word_embeddings: bool = False
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    sliding_window: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True)
class Family:
    """One model_type: what its attention has beside q, k, v and o projections."""

    model_type: str
    modeling: str
    """Module of transformers that holds the family's classes and its `apply_rotary_pos_emb`."""
    classes: tuple[str, str]
    """The inner model and the causal language model."""
    qkv_bias: bool = False
    qk_norm: bool = False
    own_window: bool = False


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (Family("llama", "transformers.models.llama.modeling_llama", ("LlamaModel", "LlamaForCausalLM")),)
}


def family(model_type: str) -> Family:
    """The row of a model_type. Raises ValueError naming the supported families."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


PREFIX = "recipelin_"  # of a student's model_type: recipelin_llama is a converted llama


def base_type(model_type: str) -> str:
    """The family's own model_type of a teacher or a student."""
    return model_type.removeprefix(PREFIX)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The numbers of a config.json (a mapping), defaults as transformers fills them for the family.

    Raises ValueError for an unsupported family or a missing number.
    """
    model_type = config.get("model_type")
    family(str(model_type))
    missing = [
        k
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if config.get(k) is None
    ]
    if missing:
        raise ValueError(f"config.json of model_type {model_type!r} lacks {', '.join(missing)}")
    for flag in ("attention_bias", "mlp_bias"):
        if config.get(flag):
            raise ValueError(f"{flag}: true is not supported for model_type {model_type!r}")
    heads = int(config["num_attention_heads"])
    rope = config.get("rope_parameters") or {}
    return Architecture(
        model_type=str(model_type),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        initializer_range=float(config.get("initializer_range") or 0.02),
        sliding_window=config.get("sliding_window"),
    )


def parameters(arch: Architecture) -> dict[str, int]:
    """Parameters of the plain decoder by part; `layer` is one layer with its two norms.

    Norm weights: two a layer and one at the end, hidden_size each. Held against built modules by a test.
    """
    d = arch.hidden_size
    attention = projections(arch)
    mlp = 3 * d * arch.intermediate_size
    embeddings = arch.vocab_size * d * (1 if arch.tie_word_embeddings else 2)
    layer = sum(attention.values()) + mlp + 2 * d
    return {
        "embeddings": embeddings,
        "attention": sum(attention.values()),
        "mlp": mlp,
        "layer": layer,
        "total": embeddings + arch.num_hidden_layers * layer + d,
    }


def projections(arch: Architecture) -> dict[str, int]:
    """Weights of the four attention projections of one layer."""
    q = arch.num_attention_heads * arch.head_dim
    kv = arch.num_key_value_heads * arch.head_dim
    return {
        "q_proj": arch.hidden_size * q,
        "k_proj": arch.hidden_size * kv,
        "v_proj": arch.hidden_size * kv,
        "o_proj": q * arch.hidden_size,
    }


def shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) of every projection of a layer that adapters can name."""
    d, q, kv, ff = (
        arch.hidden_size,
        arch.num_attention_heads * arch.head_dim,
        arch.num_key_value_heads * arch.head_dim,
        arch.intermediate_size,
    )
    return {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, ff),
        "up_proj": (d, ff),
        "down_proj": (ff, d),
    }
