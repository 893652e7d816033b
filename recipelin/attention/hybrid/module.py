"""The `hybrid` form: the module that takes the place of a layer's softmax attention."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recipelin_kernels import (
    Components,
    SoftmaxMap,
    cpu,
    hybrid_attention,
    outside_mass,
    resolve_kernel,
    weight_transfer_loss,
)

from ...base import Config as Base
from ...cache import StateLayer
from ...families import Architecture, family
from ...states import State
from ..block_loss import block_loss
from ..captured import Captured
from ..swapped import SwappedAttention, after
from .calibration import LogScaleCalibration
from .config import Config
from .feature_map import HeadFeatureMap
from .scales import LogScale, Mix


class HybridAttention(SwappedAttention):
    """Softmax over a window joined with linear attention over the rest; shares the projections of the layer it replaces."""

    NAME = "hybrid"
    OPERATOR = "hybrid_attention"

    config: Config

    def __init__(
        self, attention: Any, *, config: Config, architecture: Architecture, layer_index: int, seed: int
    ) -> None:
        super().__init__(attention, config=config, architecture=architecture, layer_index=layer_index, state=State())
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        row = family(architecture.model_type)
        self.q_norm: nn.Module | None = attention.q_norm if row.qk_norm else None
        self.k_norm: nn.Module | None = attention.k_norm if row.qk_norm else None
        key_heads = (
            architecture.num_attention_heads
            if config.feature_map.key_heads == "query"
            else architecture.num_key_value_heads
        )
        draw = seed * 1_000_003 + layer_index * 2
        self.feature_map_q, self.feature_map_k = (
            HeadFeatureMap(config.feature_map, heads, self.head_dim, draw + side, config.kernel)
            for side, heads in enumerate((architecture.num_attention_heads, key_heads))
        )
        self.mix = Mix(architecture.num_attention_heads, config.mix)
        self.log_scale = LogScale(architecture.num_attention_heads)
        weight = self.q_proj.weight
        for part in (self.feature_map_q, self.feature_map_k, self.mix, self.log_scale):
            # fp32 whatever the teacher's dtype: these are what training moves.
            part.to(device=weight.device, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The form's own parameters by the names that `trains` uses."""
        return {
            "feature_maps": [*self.feature_map_q.parameters(), *self.feature_map_k.parameters()],
            "mix": [self.mix.theta],
            "log_scale": [self.log_scale.c],
        }

    @classmethod
    def kernel_on(
        cls, config: Config, architecture: Architecture, device: torch.device | str, dtype: torch.dtype
    ) -> str:
        """See SwappedAttention: of hybrid_attention and weight_transfer_loss."""
        features = config.features(architecture)
        return resolve_kernel(config.kernel, device, dtype=dtype, width=architecture.head_dim, features=features)

    @property
    def lacking(self) -> str:
        """See SwappedAttention: the C compiler of the C kernels."""
        weight = self.q_proj.weight
        asked = self.config.kernel == "auto" and weight.device.type == "cpu" and weight.dtype != torch.float64
        return (asked and cpu.why_not()) or ""

    @property
    def sees(self) -> int | None:
        """See SwappedAttention. Without its linear branch the window's keys, unless positions of a row say more than distances:
        sinks and terraces are counted from its first token.
        """
        state = self.state
        if not state.branches:
            return 1
        alone = "linear" not in state.branches and state.ablate == "mass"
        if self.is_softmax or not alone or state.sinks or state.shape != "sliding":
            return super().sees
        nearest = (n for n in (state.most_keys, self.own_window) if n is not None)
        return min(nearest, default=None)

    @property
    def no_cache(self) -> str:
        """Why it keeps no cache in its state; empty where it does."""
        if self.is_softmax:
            return ""
        if self.state.window == "full":
            return "window `full` beside a linear branch keeps no cache"
        if self.config.kernel == "reference" and self.state.branches:
            return "kernel `reference` keeps no cache"
        return ""

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
        """q [B,H,T,d], k, v [B,Hkv,T,d] and y [B,H,T,d] before o_proj; see SwappedAttention."""
        if layer is not None and self.state.window == "full":
            raise ValueError(f"{self.no_cache}: pass use_cache=False")
        q, k, v = self.project(hidden_states, position_embeddings)
        return q, k, v, self.join(q, k, v, key_mask=key_mask, segment_ids=segment_ids, layer=layer)

    def join(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        layer: StateLayer | None = None,
    ) -> Tensor:
        """y [B,H,T,d] before o_proj in `self.state`; goes on from a cache layer, and leaves the next state there."""
        if not self.state.branches:
            if layer is not None:
                layer.advance(q.shape[2])
            return torch.zeros_like(q)
        options = self.options(self.state, k.shape[2])
        if self.drop is not None:
            options |= {"window_keep": self.drop.keep, "on_drop": self.drop.on_drop}
        previous = None if layer is None else layer.state
        first = self.asked_from if layer is None and self.kernel in ("chunked", "cpu") else 0
        q = q[:, :, first:]
        phi_q: Tensor | SoftmaxMap
        phi_k: Tensor | None
        map_k: SoftmaxMap | HeadFeatureMap = self.feature_map_k
        if layer is None and self.needs_no_features(options):
            phi_q, phi_k = (x.new_zeros(*x.shape[:3], 0) for x in (q, k))
        else:
            phi_q = self.feature_map_q.softmax_map(q) or self.feature_map_q(q)
            map_k = self.feature_map_k.softmax_map(k) or map_k
            # From a state: only of keys that leave the window.
            phi_k = map_k(k) if previous is None and not isinstance(map_k, SoftmaxMap) else None
        result = hybrid_attention(
            q,
            k,
            v,
            phi_q,
            phi_k,
            **options,
            key_mask=key_mask,
            segment_ids=segment_ids,
            state=previous,
            phi_k_fn=map_k,
            output_state=layer is not None,
            first_query=first,
        )
        if layer is None:
            y: Tensor = result
            return nn.functional.pad(y, (0, 0, first, 0)) if first else y
        y, layer.state = result
        layer.advance(q.shape[2])
        return y

    def needs_no_features(self, options: Mapping[str, Any]) -> bool:
        """Whether y does not depend on the feature maps, and they do not train: maps that train get their zero gradients."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.groups()["feature_maps"])
        return options["ablate"].get("linear") == "mass" and options["join"] != "replace" and not learns

    def options(self, state: State, length: int) -> dict[str, Any]:
        """A State as arguments of the operator for rows of `length` tokens; the one place where the two meet."""
        absent = [b for b in ("window", "linear") if b not in state.branches]
        if state.sinks and "sinks" not in state.branches:
            absent.append("sinks")
        return {
            "mix": self.mix() if state.mix is None else torch.full_like(self.mix.theta, state.mix),
            "log_scale": self.log_scale(),
            "window": length if state.window == "full" else state.window,
            "shape": state.shape,
            "reach": self.config.reach(self.architecture, self.layer_index),
            "compat": state.compat,
            "sinks": state.sinks,
            "cover": state.cover,
            "join": state.join,
            "max_gradient": state.max_gradient,
            "ablate": {b: state.ablate for b in absent},
            "scale": self.scaling,
            "kernel": self.config.kernel,
            "signed": self.config.feature_map.activation == "none",
        }

    # --- learning from the teacher ------------------------------------------------------------------------------------

    def losses(self, captured: Captured, objective: Mapping[str, float], block: str = "mse") -> dict[str, Tensor]:
        """Unweighted losses of this layer against the teacher, a scalar each.

        weights, hybrid_weights: cross-entropy of the teacher's weights, mean over real queries and heads (Hedgehog);
        outputs, hybrid_outputs: squared error of the output before o_proj, mean over real elements (LoLCATs);
        block_outputs: `block` (mse, l2norm) of the output after o_proj. It and `hybrid_*` are taken in `self.state`; the
        others of the pure linear form over all keys.
        """
        q, k = captured.q.detach(), captured.k.detach()
        where: dict[str, Any] = {"key_mask": captured.key_mask, "segment_ids": captured.segment_ids}
        found = {}
        for name in objective:
            if name.endswith("weights"):
                if captured.lse is None:
                    raise ValueError(f"{name}: needs the teacher's log-sum-exp, which only a recorder gets")
                options = self.options(self.state, q.shape[2])
                extra: dict[str, Any] = {"target": "linear", **{n: options[n] for n in ("reach", "signed", "kernel")}}
                if name == "hybrid_weights":
                    taken = ("window", "shape", "sinks", "cover", "join", "mix", "log_scale", "compat")
                    extra |= {"target": "hybrid", **{n: options[n] for n in taken}}
                found[name] = weight_transfer_loss(
                    q,
                    k,
                    self.feature_map_q(q),
                    self.feature_map_k(k),
                    captured.lse,
                    scale=self.scaling,
                    teacher_window=self.own_window,
                    **where,
                    **extra,
                )
            else:
                state = self.state
                if name == "outputs":
                    state = State(**{**state.model_dump(), "branches": ("linear",), "cover": "all", "compat": None})
                options = self.options(state, q.shape[2])
                y = hybrid_attention(
                    q, k, captured.v.detach(), self.feature_map_q(q), self.feature_map_k(k), **options, **where
                )
                if name == "block_outputs":
                    own, taught = (after(self.o_proj, x, self.o_proj.weight.dtype) for x in (y, captured.y))
                    found[name] = block_loss(own, taught.detach(), block, captured.key_mask)
                    continue
                # Not in bf16: the error of a good student is far below the outputs themselves.
                exact = torch.promote_types(y.dtype, torch.float32)
                error = (y.to(exact) - captured.y.detach().to(exact)).square()
                if captured.key_mask is None:
                    found[name] = error.mean()
                else:
                    real = captured.key_mask[:, None, :, None].expand_as(error)
                    found[name] = torch.where(real, error, 0).sum() / real.sum()
        return found

    def calibration(self, what: str, rule: Base | None = None) -> LogScaleCalibration:
        """A calibration by name: feed it batches with `add`, then `finish`. Raises ValueError for one that it does not have."""
        if why := self.config.refuses_calibration(what, rule):
            raise ValueError(why)
        return LogScaleCalibration(self)

    def components(self, captured: Captured) -> Components:
        """Both branches alone and the linear share, in `self.state`, on the teacher's or the student's own q, k, v."""
        _, found = hybrid_attention(
            captured.q,
            captured.k,
            captured.v,
            self.feature_map_q(captured.q),
            self.feature_map_k(captured.k),
            **self.options(self.state, captured.q.shape[2]),
            key_mask=captured.key_mask,
            segment_ids=captured.segment_ids,
            components=True,
        )
        return found

    def outside_mass(self, captured: Captured) -> Tensor:
        """[B,H,T]: what causal softmax of these q, k gives to keys outside the softmax set of `self.state`."""
        options = self.options(self.state, captured.q.shape[2])
        return outside_mass(
            captured.q,
            captured.k,
            **{name: options[name] for name in ("window", "shape", "reach", "compat", "scale")},
            sinks=self.state.sinks if "sinks" in self.state.branches else 0,
            key_mask=captured.key_mask,
            segment_ids=captured.segment_ids,
            teacher_window=self.own_window,
        )


FORM = HybridAttention
