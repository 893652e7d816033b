"""Operators of recipelin: each a plain reference beside its fast form. Knows nothing of recipelin itself."""

from .autocast import without_autocast
from .gated_delta import gated_delta_rule, resolve_gated_delta_kernel
from .hybrid import (
    Components,
    HybridState,
    SoftmaxMap,
    StepState,
    empty_state,
    hybrid_attention,
    hybrid_attention_step,
    resolve_kernel,
)
from .kernel_error import KernelError
from .outside_mass import outside_mass
from .packing import segment_ids_of
from .ran import kernels_ran
from .weight_transfer import log_scale_closed_form, teacher_attention, weight_transfer_loss

__all__ = [
    "Components",
    "HybridState",
    "KernelError",
    "SoftmaxMap",
    "StepState",
    "empty_state",
    "gated_delta_rule",
    "hybrid_attention",
    "hybrid_attention_step",
    "kernels_ran",
    "log_scale_closed_form",
    "outside_mass",
    "resolve_gated_delta_kernel",
    "resolve_kernel",
    "segment_ids_of",
    "teacher_attention",
    "weight_transfer_loss",
    "without_autocast",
]
