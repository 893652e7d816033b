"""The cache of a student: stock layers where softmax was kept, a state of constant size where it was swapped."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class LayerState(Protocol):
    """What a form keeps of the past between calls, a batch of rows: HybridState, StepState, or a form's own."""

    @property
    def bytes(self) -> int: ...
    @property
    def batch(self) -> int: ...
    def select(self, index: Tensor) -> "LayerState":
        """The rows that `index` names (beam search)."""
        ...


class StateLayer(CacheLayerMixin):
    """Holds the state of a swapped layer. Its bytes do not grow once a window is full; the layer's first call makes it."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None  # a LayerState
        self.seen = 0

    def advance(self, tokens: int) -> None:
        """Count the tokens of a call, padding included: what masks and positions are measured in."""
        self.seen += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the operator makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("this cache entry belongs to a swapped layer; a softmax layer cannot append keys to it")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + length, 0

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.batch).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        raise ValueError(
            "a swapped layer's state cannot be cropped: assisted decoding and rollback need a softmax cache"
        )

    def offload(self) -> None:
        raise ValueError("a swapped layer's state is small and constant: it is not offloaded")

    def prefetch(self) -> None:
        """Never offloaded, so always there."""


def state_entry(cache: Any, index: int) -> StateLayer:
    """The entry of a swapped layer; takes the place of a stock one that grows, as long as that holds nothing.

    Raises ValueError for an entry of another kind (static, quantised, begun in state `softmax`).
    """
    while isinstance(cache, DynamicCache) and len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    entry = cache.layers[index]
    if type(entry) in (DynamicLayer, DynamicSlidingWindowLayer) and not entry.is_initialized:
        entry = cache.layers[index] = StateLayer()
    if not isinstance(entry, StateLayer):
        raise ValueError(
            f"layer {index} is swapped, and the cache holds a {type(entry).__name__} for it: "
            "pass a new DynamicCache, or none at all"
        )
    return entry


def check_cache(cache: Any) -> None:
    """Raises ValueError for a cache that a student cannot use: anything but a DynamicCache or none."""
    if cache is not None and not isinstance(cache, DynamicCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; a recipelin student takes a DynamicCache or none: "
            "its swapped layers keep a state of constant size"
        )


def state_bytes(cache: DynamicCache) -> int:
    """Bytes that the states of swapped layers in a cache hold."""
    return sum(x.state.bytes for x in cache.layers if isinstance(x, StateLayer) and x.state is not None)


def decoding_bytes(prompt: DynamicCache, used: DynamicCache) -> int:
    """Bytes that a prompt's cache holds once tokens are decoded: as `used` shows, a copy of it from which some were, a state
    then has room for the next ones.
    """
    return cache_bytes(prompt) - state_bytes(prompt) + state_bytes(used)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache holds for the past: the states of swapped layers, keys and values of stock ones.

    Raises ValueError for an entry of another kind, whose bytes are not known.
    """
    total = state_bytes(cache)
    for entry in cache.layers:
        if isinstance(entry, DynamicLayer):
            total += sum(x.nbytes for x in (entry.keys, entry.values) if x is not None)
        elif not isinstance(entry, StateLayer):
            raise ValueError(f"the bytes of a {type(entry).__name__} are not known")
    return total
