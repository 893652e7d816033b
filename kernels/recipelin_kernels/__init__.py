"""The operators of recipelin: public functions only; knows nothing of recipelin itself."""

from .hybrid import Components, HybridState, empty_state, hybrid_attention, hybrid_attention_step, resolve_kernel

__all__ = [
    "Components",
    "HybridState",
    "empty_state",
    "hybrid_attention",
    "hybrid_attention_step",
    "resolve_kernel",
]
