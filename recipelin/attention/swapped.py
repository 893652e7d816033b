"""What a layer of every form is: which pass it makes, and what it shows of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recipelin_kernels import teacher_attention

from ..cache import StateLayer, state_entry
from ..families import Architecture
from ..masks import rows_of
from ..states import State
from .captured import Captured, Drop
from .form import Form
from .softmax import causal_softmax, project, rotation

Recorder = Callable[[int, Captured], None]


class SwappedAttention(nn.Module, ABC):
    """The module that takes the place of a layer's softmax attention; base of every `attention/<name>/module.py`.

    `state` says what takes part in a forward pass. With `recorder` set, the layer computes the teacher's softmax
    attention, shows it to the recorder and passes the teacher's output on: every layer then sees the teacher's stream.
    With `observer` set, it shows what it did itself. Before position `asked_from` of a row nothing that it gives is read.
    """

    config: Any
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(
        self, attention: Any, *, config: Form, architecture: Architecture, layer_index: int, state: State
    ) -> None:
        super().__init__()
        self.config, self.architecture = config, architecture
        self.layer_index = self.layer_idx = layer_index
        self.head_dim = architecture.head_dim
        self.scaling = float(attention.scaling)
        self.own_window = architecture.own_window(layer_index)
        self._rotate = rotation(architecture)
        self.state = state
        self.drop: Drop | None = None  # of the forms that have a window
        self.recorder: Recorder | None = None
        self.observer: Recorder | None = None
        self.asked_from = 0

    @property
    def is_softmax(self) -> bool:
        """Whether its state is causal softmax over all keys."""
        return self.state.window == "full" and "window" in self.state.branches and "linear" not in self.state.branches

    @property
    def sees(self) -> int | None:
        """How many keys y of a query depends on in its state, its own and those right before it; None: on any of a row."""
        return self.own_window if self.is_softmax else None

    @property
    def no_cache(self) -> str:
        """Why it keeps no cache in its state; empty where it does."""
        return ""

    @classmethod
    @abstractmethod
    def kernel_on(cls, config: Any, architecture: Architecture, device: torch.device | str, dtype: torch.dtype) -> str:
        """The implementation of its operator, and of what its objectives run, that a config of the form takes there. Raises
        KernelError for one that cannot run."""

    @property
    def kernel(self) -> str:
        """The implementation that runs."""
        weight = self.q_proj.weight
        return self.kernel_on(self.config, self.architecture, weight.device, weight.dtype)

    @property
    def lacking(self) -> str:
        """What a faster kernel than the one that runs lacks on this machine; empty: nothing."""
        return ""

    def softmax_module(self) -> Any:
        """What holds the teacher's projections: itself, where it shares them."""
        return self

    @abstractmethod
    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        layer: StateLayer | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and y before o_proj in `self.state`; goes on from a cache layer, and leaves the next state there."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if position_embeddings is None:
            raise ValueError(f"{type(self).__name__} needs position_embeddings (cos, sin)")
        if why := self.config.refuses("", self.state, self.architecture):
            raise ValueError(f"layer {self.layer_index}: {why}")
        real, key_mask, segment_ids = rows_of(attention_mask, position_ids, segment_ids, hidden_states.shape[1])
        if past_key_values is not None and (segment_ids is not None or self.recorder is not None):
            raise ValueError("packed rows and recording take no cache: pass use_cache=False")
        if self.recorder is not None:
            return self._record(self.recorder, hidden_states, position_embeddings, key_mask, segment_ids), None
        if self.is_softmax:
            q, k, v = self.project(hidden_states, position_embeddings)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_index)
            own = self.own_window
            y = causal_softmax(q, k, v, scale=self.scaling, window=own, real=real, segment_ids=segment_ids)
        else:
            layer = None if past_key_values is None else state_entry(past_key_values, self.layer_index)
            q, k, v, y = self.attend(
                hidden_states, position_embeddings, key_mask=key_mask, segment_ids=segment_ids, layer=layer
            )
        if self.observer is not None:
            self.observer(self.layer_index, Captured(q, k, v, y, None, key_mask, segment_ids))
        return after(self.o_proj, y, hidden_states.dtype), None

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,H,T,d] and k, v [B,Hkv,T,d] of its own projections after the family's q/k norm and RoPE."""
        return project(self, hidden_states, position_embeddings, head_dim=self.head_dim, rotate=self._rotate)

    def _record(
        self,
        recorder: Recorder,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        teacher, own = self.softmax_module(), self.own_window
        q, k, v = project(teacher, hidden_states, position_embeddings, head_dim=self.head_dim, rotate=self._rotate)
        y, lse = teacher_attention(q, k, v, scale=self.scaling, key_mask=key_mask, segment_ids=segment_ids, window=own)
        output = after(teacher.o_proj, y, hidden_states.dtype)
        recorder(
            self.layer_index,
            Captured(q, k, v, y, lse, key_mask, segment_ids, hidden_states, position_embeddings, output),
        )
        return output


def after(o_proj: Any, y: Tensor, dtype: torch.dtype) -> Tensor:
    """y [B,H,T,d], in `dtype`, after o_proj: [B,T,D]."""
    found: Tensor = o_proj(y.to(dtype).transpose(1, 2).flatten(2))
    return found
