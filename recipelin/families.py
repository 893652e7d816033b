"""What recipelin knows of a model family, from the numbers of its config.json alone (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Config

LayerType = Literal["full_attention", "sliding_attention"]


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
    rope_scaling: dict[str, str | bool | int | float] | None = Field(
        None, description="as in config.json, without rope_theta: rope_type linear, llama3 or yarn and its numbers"
    )
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    attention_bias: bool = Field(False, description="a bias on q, k, v and o; a family's own biases are its row's")
    mlp_bias: bool = False
    sliding_window: Annotated[int, Field(ge=1)] | None = Field(None, description="the teacher's own window in tokens")
    layer_types: tuple[LayerType, ...] | None = Field(
        None, description="which layers have the own window; None: all, where there is one"
    )

    def own_window(self, layer: int) -> int | None:
        """The teacher's own window in a layer, the query included; None: it sees all keys."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window


@dataclass(frozen=True)
class Family:
    """One model_type: what its attention has beside q, k, v and o projections."""

    model_type: str
    stem: str
    """transformers' classes are `<stem>Config`, `<stem>Model` and `<stem>ForCausalLM`."""
    qkv_bias: bool = False
    """q, k and v have a bias whatever the config says."""
    qk_norm: bool = False
    """Queries and keys pass an RMSNorm over head_dim before RoPE."""
    own_window: Literal["none", "all", "layers"] = "none"
    """Whether the config may give layers a sliding window of their own: all of them, or those of `layer_types`."""

    defaults: tuple[tuple[str, int], ...] = ()
    """Numbers that transformers fills where a config.json leaves them out (None written out is not left out)."""

    @property
    def modeling(self) -> str:
        """Module of transformers that holds the family's classes and its `apply_rotary_pos_emb`."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


_QWEN = (
    ("max_position_embeddings", 32768),
    ("num_key_value_heads", 32),
    ("sliding_window", 4096),
    ("max_window_layers", 28),
)
FAMILIES: Mapping[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "Llama", defaults=(("max_position_embeddings", 2048),)),  # 2, 3, 3.1, 3.2
        Family(
            "mistral",
            "Mistral",
            own_window="all",
            defaults=(("max_position_embeddings", 131072), ("num_key_value_heads", 8), ("sliding_window", 4096)),
        ),
        Family("qwen2", "Qwen2", qkv_bias=True, own_window="layers", defaults=_QWEN),  # and 2.5
        Family("qwen3", "Qwen3", qk_norm=True, own_window="layers", defaults=(*_QWEN, ("head_dim", 128))),
    )
}

# Rotary embeddings whose frequencies are fixed. `dynamic` and `longrope` change them with the length of the sequence,
# which keys that are already in a state cannot follow.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def family(model_type: str) -> Family:
    """The row of a model_type. Raises ValueError naming the supported families."""
    if model_type.startswith(PREFIX):
        raise ValueError(
            f"model_type {model_type!r} is a converted model; expected its teacher (see recipelin diagnose)"
        )
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


LAYOUT = 1  # version of `recipelin` in a student's config.json
PREFIX = "recipelin_"  # of a student's model_type: recipelin_llama is a converted llama


def base_type(model_type: str) -> str:
    """The family's own model_type of a teacher or a student."""
    return model_type.removeprefix(PREFIX)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The numbers of a config.json (a mapping), defaults as transformers fills them for the family.

    Raises ValueError for an unsupported family, a missing number, or a feature that a converted layer would lose.
    """
    model_type = str(config.get("model_type"))
    row = family(model_type)
    config = {**dict(row.defaults), **config}
    missing = [
        k
        for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if config.get(k) is None
    ]
    if missing:
        raise ValueError(f"config.json of model_type {model_type!r} lacks {', '.join(missing)}")
    if config.get("attention_dropout"):
        raise ValueError(f"attention_dropout: {config['attention_dropout']} is not supported; expected 0")
    heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    rope_type = rope.pop("type", None) or "default"
    rope_type = rope.pop("rope_type", rope_type)
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_type {rope_type!r} is not supported (its frequencies change with the length, and keys in a state "
            f"cannot follow); supported: {', '.join(ROPE_TYPES)}"
        )
    window, types = _own_windows(row, config, layers)
    return Architecture(
        model_type=model_type,
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(theta),
        rope_scaling=None if rope_type == "default" else {"rope_type": rope_type, **rope},
        rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        initializer_range=float(config.get("initializer_range") or 0.02),
        attention_bias=bool(config.get("attention_bias", False)) and not row.qkv_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=window,
        layer_types=types,
    )


def _own_windows(
    row: Family, config: Mapping[str, Any], layers: int
) -> tuple[int | None, tuple[LayerType, ...] | None]:
    """(sliding_window, layer_types) of a config.json; (None, None) where no layer has a window of its own."""
    window = config.get("sliding_window")
    if row.own_window == "none" or window is None:
        return None, None
    if row.own_window == "all":
        return int(window), None
    if not config.get("use_sliding_window", False):
        return None, None
    first = int(config["max_window_layers"])
    types = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if "sliding_attention" not in types:
        return None, None
    return int(window), tuple(types)


def config_json(arch: Architecture) -> dict[str, Any]:
    """The config.json of a model with these numbers, as its family's Config class of transformers takes them."""
    row = family(arch.model_type)
    own = {"model_type", "rope_theta", "rope_scaling", "sliding_window", "layer_types", "attention_bias", "mlp_bias"}
    found = arch.model_dump(exclude=own)
    found["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": arch.rope_theta,
        **(arch.rope_scaling or {}),
    }
    found |= {flag: True for flag in ("attention_bias", "mlp_bias") if getattr(arch, flag)}
    if row.own_window != "none":
        found["sliding_window"] = arch.sliding_window
    if row.own_window == "layers" and arch.sliding_window is not None:
        types = arch.layer_types or ("sliding_attention",) * arch.num_hidden_layers
        found |= {"use_sliding_window": True, "layer_types": list(types)}
    return found


def parameters(arch: Architecture) -> dict[str, int]:
    """Parameters of the plain decoder by part; `layer` is one layer with its two norms.

    Norm weights: two a layer and one at the end, hidden_size each. Held against built modules by a test.
    """
    d = arch.hidden_size
    attention = sum(projections(arch).values())
    if family(arch.model_type).qk_norm:
        attention += 2 * arch.head_dim
    mlp = 3 * d * arch.intermediate_size
    if arch.mlp_bias:
        mlp += 2 * arch.intermediate_size + d
    embeddings = arch.vocab_size * d * (1 if arch.tie_word_embeddings else 2)
    layer = attention + mlp + 2 * d
    return {
        "embeddings": embeddings,
        "attention": attention,
        "mlp": mlp,
        "layer": layer,
        "total": embeddings + arch.num_hidden_layers * layer + d,
    }


def projections(arch: Architecture) -> dict[str, int]:
    """Weights and biases of the four attention projections of one layer."""
    biased = {"q_proj", "k_proj", "v_proj"} if family(arch.model_type).qkv_bias else set()
    if arch.attention_bias:
        biased = {"q_proj", "k_proj", "v_proj", "o_proj"}
    sizes = {name: shapes(arch)[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return {name: inner * outer + (outer if name in biased else 0) for name, (inner, outer) in sizes.items()}


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
