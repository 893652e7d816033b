"""Hybrid attention: softmax over a window joined with linear attention over the rest, in one row."""

from .operator import hybrid_attention, resolve_kernel
from .reference import Components
from .state import HybridState
from .step import hybrid_attention_step

__all__ = ["Components", "HybridState", "hybrid_attention", "hybrid_attention_step", "resolve_kernel"]
