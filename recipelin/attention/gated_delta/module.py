"""The `gated_delta` form: the module that takes the place of a layer's softmax attention."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipelin_kernels import gated_delta_rule, resolve_gated_delta_kernel

from ...base import Config as Base
from ...cache import StateLayer
from ...families import Architecture, family
from ...masks import runs
from ..block_loss import block_loss
from ..calibration import Calibration
from ..captured import Captured
from ..swapped import SwappedAttention, after
from .calibration import Fit, calibration
from .config import STATE, Config
from .parts import DeltaState, Gate, OutputNorm, ShortConvolution, copy_of, decay_start
from .rules import Rule

L2_EPS = 1e-6  # fla's and transformers' l2norm


class GatedDeltaAttention(SwappedAttention):
    """The gated delta rule with copies of the projections of the layer that it replaces (see Config for the formulas).

    Parameters, by their names in fla: q_proj, k_proj, v_proj [H d, D], o_proj [D, H d], a_proj, b_proj [H, D], g_proj
    [H d, D], A_log, dt_bias [H] (in fp32 whatever the teacher's dtype), o_norm.weight [d].
    """

    NAME = "gated_delta"
    OPERATOR = "gated_delta_rule"

    config: Config
    g_proj: Gate | None
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    teacher: Any

    def __init__(
        self, attention: Any, *, config: Config, architecture: Architecture, layer_index: int, seed: int
    ) -> None:
        super().__init__(attention, config=config, architecture=architecture, layer_index=layer_index, state=STATE)
        self.heads = architecture.num_attention_heads
        # Out of sight of parameters() and of the state dict: what `recorder` shows.
        object.__setattr__(self, "teacher", attention)
        hidden, wide = architecture.hidden_size, self.heads * self.head_dim
        groups = self.heads // architecture.num_key_value_heads
        fold = family(architecture.model_type).qk_norm and config.qk_norm == "fold"
        gains = (attention.q_norm.weight, attention.k_norm.weight) if fold else (None, None)
        self.q_proj = copy_of(attention.q_proj, config, head_dim=self.head_dim, gain=gains[0])
        self.k_proj = copy_of(attention.k_proj, config, head_dim=self.head_dim, gain=gains[1], groups=groups)
        self.v_proj = copy_of(attention.v_proj, config, head_dim=self.head_dim, groups=groups)
        self.o_proj = copy.deepcopy(attention.o_proj)
        self.seed = seed * 1_000_003 + layer_index * 4
        std = config.gate_std
        self.a_proj = Gate(hidden, self.heads, std=std, seed=self.seed)
        self.b_proj = Gate(hidden, self.heads, std=std, seed=self.seed + 1, bias=config.write_gate.bias)
        self.g_proj = Gate(hidden, wide, std=std, seed=self.seed + 2) if config.output_gate == "silu" else None
        self.o_norm = OutputNorm(self.head_dim, config.norm_eps)
        width = config.short_convolution
        self.convolutions = nn.ModuleDict(
            {name: ShortConvolution(wide, width) for name in ("q", "k", "v")} if width else {}
        )
        weight = attention.q_proj.weight
        for part in (self.a_proj, self.b_proj, self.g_proj, self.o_norm, self.convolutions):
            if part is not None:
                part.to(device=weight.device, dtype=weight.dtype)
        exact = torch.promote_types(weight.dtype, torch.float32)
        for name, value in self.start_values().items():
            self.register_parameter(name, nn.Parameter(value.to(device=weight.device, dtype=exact)))

    def start_values(self) -> dict[str, Tensor]:
        """A_log and dt_bias: a pure function of the seed."""
        return decay_start(self.config, self.heads, self.seed + 3)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The layer's parameters by the names that `trains` uses."""
        return {
            "projections": [p for m in (self.q_proj, self.k_proj, self.v_proj) for p in m.parameters()],
            "output_projection": list(self.o_proj.parameters()),
            "decay": [*self.a_proj.parameters(), self.A_log, self.dt_bias],
            "write_gate": list(self.b_proj.parameters()),
            "output_gate": [] if self.g_proj is None else list(self.g_proj.parameters()),
            "output_norm": list(self.o_norm.parameters()),
            "short_convolution": list(self.convolutions.parameters()),
        }

    @classmethod
    def kernel_on(
        cls, config: Config, architecture: Architecture, device: torch.device | str, dtype: torch.dtype
    ) -> str:
        """See SwappedAttention: of gated_delta_rule."""
        return resolve_gated_delta_kernel(config.kernel, device)

    def softmax_module(self) -> Any:
        """The teacher's own: what is here is a copy, which may train."""
        if self.teacher is None:
            raise RuntimeError("recording: a loaded student has no teacher; swap the teacher itself")
        return self.teacher

    # --- forward ------------------------------------------------------------------------------------------------------

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        layer: StateLayer | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and y before o_proj, [B,H,T,d] each; see SwappedAttention."""
        state: DeltaState | None = None if layer is None else layer.state
        segment = None if segment_ids is None else runs(segment_ids)
        q, k, v, before = self.prepare(hidden_states, position_embeddings, key_mask, segment, state)
        if not self.state.branches:
            y = torch.zeros_like(v)
            if layer is not None:
                layer.advance(v.shape[2])
            return q, k, v, y
        o, memory = gated_delta_rule(
            q,
            k,
            v,
            *self.gates(hidden_states),
            scale=self.config.scale,
            key_mask=key_mask,
            segment_ids=segment,
            state=None if state is None else state.memory,
            output_state=True,
            kernel=self.config.kernel,
        )
        gate = None if self.g_proj is None else self.g_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        y = self.o_norm(o, None if gate is None else gate.transpose(1, 2))
        if key_mask is not None:
            y = torch.where(key_mask[:, None, :, None], y, 0)  # a gate may hold NaN where the input does
        if layer is not None:
            layer.state = DeltaState(memory.detach(), None if before is None else before.detach())
            layer.advance(v.shape[2])
        return q, k, v, y

    def prepare(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        key_mask: Tensor | None = None,
        segment: Tensor | None = None,
        state: DeltaState | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [B,H,T,d] as the rule takes them, and what the convolutions keep for the next call."""
        raw = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        before = None
        if width := self.config.short_convolution:
            if key_mask is not None:
                raw = [torch.where(key_mask[..., None], x, 0) for x in raw]
            past = raw[0].new_zeros(3, raw[0].shape[0], width - 1, raw[0].shape[2])
            past = past if state is None or state.before is None else state.before.to(raw[0].dtype)
            before = torch.stack([torch.cat((p, x), 1)[:, -past.shape[2] :] for p, x in zip(past, raw, strict=True)])
            raw = [self.convolutions[n](x, p, segment) for n, x, p in zip("qkv", raw, past, strict=True)]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in raw)
        if self.config.activation == "silu":
            q, k = nn.functional.silu(q), nn.functional.silu(k)
        if self.config.value_activation == "silu":
            v = nn.functional.silu(v)
        if self.config.l2_norm:
            q, k = unit(q), unit(k)
        if self.config.rope == "keep":
            q, k = self._rotate(q, k, *position_embeddings)
        return q, k, v, before

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """g = -exp(A_log) softplus(a_proj x + dt_bias) <= 0 and beta, [B,H,T] each, in fp32 at least."""
        exact = self.A_log.dtype
        step = nn.functional.softplus(self.a_proj(hidden_states).to(exact) + self.dt_bias)
        beta = self.b_proj(hidden_states).to(exact).sigmoid()
        if self.config.allow_negative_eigenvalues:
            beta = 2 * beta
        return (-self.A_log.exp() * step).transpose(1, 2), beta.transpose(1, 2)

    # --- learning from the teacher ------------------------------------------------------------------------------------

    def losses(self, captured: Captured, objective: Mapping[str, float], block: str = "mse") -> dict[str, Tensor]:
        """Unweighted losses of this layer, fed the teacher's stream, against the teacher: a scalar each.

        outputs: squared error before o_proj (of the gated norm against the teacher's attention), mean over real elements;
        block_outputs: `block` (mse, l2norm) of the output after o_proj (arXiv 2606.16429, phase 2). Raises ValueError for
        another name.
        """
        if captured.hidden_states is None or captured.position_embeddings is None or captured.output is None:
            raise ValueError("losses: need the layer's input, which only a recorder gets")
        hidden = captured.hidden_states.detach()
        *_, y = self.attend(
            hidden, captured.position_embeddings, key_mask=captured.key_mask, segment_ids=captured.segment_ids
        )
        found = {}
        for name in objective:
            if name == "outputs":
                made, target = (x.transpose(1, 2).flatten(2) for x in (y, captured.y))
                found[name] = block_loss(made, target.detach(), "mse", captured.key_mask)
            elif name == "block_outputs":
                made = after(self.o_proj, y, hidden.dtype)
                found[name] = block_loss(made, captured.output.detach(), block, captured.key_mask)
            else:
                raise ValueError(f"{self.NAME} has no objective {name!r}; it has {', '.join(self.config.OBJECTIVES)}")
        return found

    def calibration(self, what: str, rule: Base | None = None) -> Calibration:
        """A calibration by name: feed it batches with `add`, then `finish`. `rule`: its settings (rules.py).

        Raises ValueError for an unknown name, and settings that are not its own.
        """
        if why := self.config.refuses_calibration(what, rule):
            raise ValueError(why)
        assert isinstance(rule, Rule)
        return calibration(self, what, rule)

    def fit(self) -> Fit:
        """How near the layer is to the teacher's: feed it batches with `add`, then `finish`."""
        return Fit(self)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in fp32 at least; 0 stays 0."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


FORM = GatedDeltaAttention
