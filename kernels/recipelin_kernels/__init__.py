"""Operators of recipelin: each a plain reference beside its fast form. Knows nothing of recipelin itself."""

from .hybrid import Components, HybridState, empty_state, hybrid_attention, hybrid_attention_step, resolve_kernel
from .outside_mass import outside_mass
from .weight_transfer import log_scale_closed_form, teacher_attention, weight_transfer_loss

__all__ = [
    "Components",
    "HybridState",
    "empty_state",
    "hybrid_attention",
    "hybrid_attention_step",
    "log_scale_closed_form",
    "outside_mass",
    "resolve_kernel",
    "teacher_attention",
    "weight_transfer_loss",
]
