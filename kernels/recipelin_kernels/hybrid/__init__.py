"""Hybrid attention: softmax over a window joined with linear attention over the rest (DESIGN §5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunked import CHUNK, Past, final_sums, hybrid_attention_chunked
from .reference import hybrid_attention_reference
from .rows import ABLATIONS, BRANCHES, COVERS, DROPS, GRADIENTS, JOINS, SHAPES, Options, Rows, one_of, rows

KERNELS = ("auto", "reference", "chunked", "gpu")


@dataclass(frozen=True)
class HybridState:
    """What decoding needs of the past; its bytes do not grow.

    sums [B,H,F,D+1]: sum of phi(k) [v, 1] over the keys that have left the window (fp32; fp64 for fp64 inputs).
    ring_k, ring_v [B,Hkv,window-1,D]: the last keys and values after RoPE, the newest last; unused places are zeros.
    sink_k, sink_v [B,Hkv,sinks,D]: the first keys of the row. positions [B]: real tokens seen.
    """

    sums: Tensor
    ring_k: Tensor
    ring_v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    positions: Tensor

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in vars(self).values())

    def select(self, index: Tensor) -> "HybridState":
        """The rows of a batch that `index` names (beam search)."""
        return HybridState(**{n: x.index_select(0, index) for n, x in vars(self).items()})


@dataclass(frozen=True)
class Components:
    """Of one pass: each branch normalised by itself [B,H,T,D]; the linear branch's share of the normaliser [B,H,T]."""

    window: Tensor
    linear: Tensor
    linear_share: Tensor


def resolve_kernel(kernel: str, device: torch.device | str) -> str:
    """The implementation that a call takes: what `auto` means here. Raises for one that is not in this build."""
    one_of("kernel", kernel, KERNELS)
    if kernel == "gpu":
        raise RuntimeError(
            "kernel='gpu': this build has no Triton kernel of hybrid_attention; use 'chunked', which runs on CUDA too"
        )
    return "chunked" if kernel == "auto" else kernel


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    *,
    window: int,
    shape: str = "sliding",
    sinks: int = 0,
    cover: str = "outside",
    join: str = "shared",
    log_scale: Tensor | None = None,
    max_gradient: str = "through",
    ablate: Mapping[str, str] | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window_keep: Tensor | None = None,
    on_drop: str = "linear_covers_all",
    state: HybridState | None = None,
    output_state: bool = False,
    components: bool = False,
    kernel: str = "auto",
    phi_k_fn: Callable[[Tensor], Tensor] | None = None,
    signed: bool = False,
    chunk: int | None = None,
) -> Any:
    """y [B,H,T,D]; with `output_state` also the HybridState, with `components` also Components, in this order.

    Query t of head h sees the softmax set W(t) (the last `window` keys, itself included, and the first `sinks` keys)
    and the linear set L(t): with cover `outside` every earlier key that is not in W, with `all` every key up to t.

        a_i = mix_h exp(q.k_i scale - max over W)      b_i = phi_q.phi_k_i
        shared    y = (sum_W a v + sum_L b v) / (sum_W a + sum_L b)                                   (LoLCATs)
        absolute  as shared, with exp(q.k_i scale) and exp(log_scale_h) b_i: no shift, no mix
        replace   y = (M softmax_W v + sum_L b v) / (M + sum_L b),  M = sum over W of b

    q [B,H,T,D]; k, v [B,Hkv,T,D], query head h reads key head h // (H / Hkv); phi_q [B,H,T,F]; phi_k [B,H or Hkv,T,F];
    mix, log_scale [H]; key_mask [B,T] bool, True for real tokens, which must be one run (padding left or right);
    segment_ids [B,T]: window, sinks and linear set begin anew where it changes. Positions count from the first real
    token. Any float dtype; `chunked` computes in fp32 (fp64 for fp64). window 0 is an empty window.

    ablate {branch: "mass" | "output"}: the branch leaves numerator and denominator, or the numerator alone. `window`
    means its keys that are no sinks, `sinks` those that are not in the window; keys that are switched off do not
    become linear. window_keep [B,H] bool: where False, W is empty in training (SSD); `on_drop` says whether L then
    covers all keys. A row that sees nothing gives exactly 0, and so do padded queries. signed: features may be
    negative (activation `none`): |denominator| >= 1e-6. max_gradient: whether the row maximum, which `shared` does not
    cancel, carries gradient. state: goes on from there (no gradient into it); needs `phi_k_fn`, keys [B,Hkv,n,D] ->
    features, for the ring's keys.

    Raises ValueError for unknown options and shapes that do not fit, RuntimeError for a kernel that is not in this
    build.
    """
    ran = resolve_kernel(kernel, q.device)
    one_of("shape", shape, SHAPES)
    one_of("cover", cover, COVERS)
    one_of("join", join, JOINS)
    one_of("max_gradient", max_gradient, GRADIENTS)
    one_of("on_drop", on_drop, DROPS)
    for branch, how in (ablate or {}).items():
        one_of("ablate", branch, BRANCHES)
        one_of(f"ablate[{branch!r}]", how, ABLATIONS)
    _check_shapes(q, k, v, phi_q, phi_k, window, sinks)
    if join == "shared" and mix is None:
        raise ValueError("join='shared' needs mix [H]")
    if join == "absolute" and log_scale is None:
        raise ValueError("join='absolute' needs log_scale [H]")
    options = Options(
        window=window,
        sinks=sinks,
        cover=cover,
        join=join,
        max_gradient=max_gradient,
        ablate=dict(ablate or {}),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        on_drop=on_drop,
        signed=signed,
    )
    batch, _, length, _ = q.shape
    plain = key_mask is None and segment_ids is None and state is None
    own = rows(1 if plain else batch, length, q.device, key_mask, segment_ids)
    # Padding may hold anything, NaN included, and 0 x NaN is NaN.
    if key_mask is not None:
        real = key_mask[:, None, :, None]
        q, k, v, phi_q, phi_k = (torch.where(real, x, 0) for x in (q, k, v, phi_q, phi_k))
    mix = mix if join == "shared" else None
    log_scale = log_scale if join == "absolute" else None
    k_rows, past = own, None
    if state is not None:
        if segment_ids is not None:
            raise ValueError("state: a call that goes on from a state cannot hold segments")
        if phi_k_fn is None:
            raise ValueError("state: needs phi_k_fn, the keys' feature map, for the keys of the ring")
        own, k_rows, k, v, phi_k, past = _continued(state, own, k, v, phi_k, phi_k_fn, window, sinks)
    arguments = (q, k, v, phi_q, phi_k, mix, log_scale, window_keep, options)
    if ran == "reference":
        if state is not None:
            raise ValueError("kernel='reference' computes whole rows: it takes no state; use 'chunked'")
        parts = list(hybrid_attention_reference(*arguments, own))[: 4 if components else 1]
    else:
        parts = hybrid_attention_chunked(
            *arguments, own, k_rows, past=past, plain=plain, components=components, chunk=chunk or CHUNK
        )
    returned: list[Any] = [parts[0]]
    if output_state:
        returned.append(_next_state(k, v, phi_k, options, k_rows, past, state, q.shape[1]))
    if components:
        returned.append(Components(*parts[1:]))
    return returned[0] if len(returned) == 1 else tuple(returned)


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k_fn: Callable[[Tensor], Tensor],
    mix: Tensor | None,
    state: HybridState,
    **options: Any,
) -> tuple[Tensor, HybridState]:
    """One token a row: q [B,H,1,D], k, v [B,Hkv,1,D], phi_q [B,H,1,F] -> (y [B,H,1,D], the next state).

    Options as `hybrid_attention`. Features of a key are computed by `phi_k_fn` when it leaves the window.
    """
    if q.shape[2] != 1:
        raise ValueError(
            f"hybrid_attention_step takes one token a row, found {q.shape[2]}; use hybrid_attention with a state"
        )
    return hybrid_attention(  # type: ignore[no-any-return]
        q, k, v, phi_q, phi_k_fn(k), mix, state=state, output_state=True, phi_k_fn=phi_k_fn, **options
    )


def empty_state(
    batch: int, heads: int, key_heads: int, width: int, features: int, *, window: int, sinks: int, like: Tensor
) -> HybridState:
    """The state before the first token, on the device and in the dtype of `like`."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    return HybridState(
        sums=like.new_zeros(batch, heads, features, width + 1, dtype=exact),
        ring_k=like.new_zeros(batch, key_heads, max(window - 1, 0), width),
        ring_v=like.new_zeros(batch, key_heads, max(window - 1, 0), width),
        sink_k=like.new_zeros(batch, key_heads, sinks, width),
        sink_v=like.new_zeros(batch, key_heads, sinks, width),
        positions=torch.zeros(batch, dtype=torch.long, device=like.device),
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, window: int, sinks: int) -> None:
    batch, heads, length, width = q.shape
    key_heads = k.shape[1]
    if isinstance(window, bool) or not isinstance(window, int) or window < 0 or sinks < 0:
        raise ValueError(f"window={window!r}, sinks={sinks!r}: expected integers of at least 0")
    if heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    for name, x, expected in (
        ("k", k, (batch, key_heads, length, width)),
        ("v", v, (batch, key_heads, length, width)),
        ("phi_q", phi_q, (batch, heads, length, phi_q.shape[-1])),
        ("phi_k", phi_k, (batch, phi_k.shape[1], length, phi_q.shape[-1])),
    ):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} {tuple(x.shape)}: expected {expected} beside q {tuple(q.shape)}")
    if phi_k.shape[1] not in (heads, key_heads):
        raise ValueError(f"phi_k has {phi_k.shape[1]} heads: expected {heads} (query heads) or {key_heads} (key heads)")


def _continued(
    state: HybridState,
    own: Rows,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    phi_k_fn: Callable[[Tensor], Tensor],
    window: int,
    sinks: int,
) -> tuple[Rows, Rows, Tensor, Tensor, Tensor, Past]:
    """The ring in front of the call's keys, positions that go on, and the state's sinks as extra columns."""
    lead = state.ring_k.shape[2]
    if lead != max(window - 1, 0) or state.sink_k.shape[2] != sinks:
        raise ValueError(
            f"state: made with window {lead + 1} and {state.sink_k.shape[2]} sinks, "
            f"called with window {window} and {sinks}"
        )
    padded_front = (own.segment[:, 0] < 0) & (own.segment >= 0).any(1)
    if bool((padded_front & (state.positions > 0)).any()):
        raise ValueError("state: a row that has begun cannot be padded on its left")
    seen = state.positions[:, None]
    own = Rows(own.position + seen, own.segment)
    ring = seen - lead + torch.arange(lead, device=k.device)
    # A row that begins behind padding in this call has nothing in the ring.
    ring_rows = Rows(ring, torch.where(ring >= 0, 0, -1))
    k_rows = Rows(torch.cat((ring_rows.position, own.position), 1), torch.cat((ring_rows.segment, own.segment), 1))
    before_ring = torch.arange(sinks, device=k.device)[None] < (seen - lead)
    sink_rows = Rows(torch.arange(sinks, device=k.device).expand(k.shape[0], sinks), torch.where(before_ring, 0, -1))
    past = Past(
        sums=state.sums,
        sink_k=state.sink_k.to(k.dtype),
        sink_v=state.sink_v.to(v.dtype),
        sink_phi=phi_k_fn(state.sink_k.to(k.dtype)) if sinks else phi_k[:, :, :0],
        sink_rows=sink_rows,
        lead=lead,
    )
    if lead:
        phi_k = torch.cat((phi_k_fn(state.ring_k.to(k.dtype)), phi_k), 2)
        k, v = torch.cat((state.ring_k.to(k.dtype), k), 2), torch.cat((state.ring_v.to(v.dtype), v), 2)
    return own, k_rows, k, v, phi_k, past


def _next_state(
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    options: Options,
    k_rows: Rows,
    past: Past | None,
    state: HybridState | None,
    heads: int,
) -> HybridState:
    batch, key_heads, length, width = k.shape
    k_rows = Rows(k_rows.position.expand(batch, -1), k_rows.segment.expand(batch, -1))
    # The last real token of a row; a row of padding alone has none, and keeps an empty state.
    real = k_rows.segment >= 0
    end = torch.where(real, torch.arange(length, device=k.device), -1).amax(1, keepdim=True)
    begun = end >= 0
    alive = torch.where(begun, k_rows.segment.gather(1, end.clamp(min=0)), -2)
    last = torch.where(begun, k_rows.position.gather(1, end.clamp(min=0)), -1)
    keep = max(options.window - 1, 0)
    sums = final_sums(v, phi_k, options, k_rows, past, heads, keep, alive, last)

    def take(x: Tensor, index: Tensor, real: Tensor) -> Tensor:
        picked = x.gather(2, index.clamp(0, length - 1)[:, None, :, None].expand(-1, key_heads, -1, width))
        return torch.where(real[:, None, :, None], picked, 0)

    ring = end + torch.arange(1 - keep, 1, device=k.device)
    ring_real = (ring >= 0) & (k_rows.segment.gather(1, ring.clamp(min=0)) == alive)
    sink_position = torch.arange(options.sinks, device=k.device).expand(batch, options.sinks)
    sink_index = end - last + sink_position
    sink_here = (sink_index >= 0) & (sink_position <= last)
    sink_k, sink_v = (take(x, sink_index, sink_here) for x in (k, v))
    if state is not None:
        known = (sink_position < state.positions[:, None])[:, None, :, None]
        sink_k, sink_v = (
            torch.where(known, state.sink_k.to(k.dtype), sink_k),
            torch.where(known, state.sink_v.to(v.dtype), sink_v),
        )
    return HybridState(
        sums=sums,
        ring_k=take(k, ring, ring_real),
        ring_v=take(v, ring, ring_real),
        sink_k=sink_k,
        sink_v=sink_v,
        positions=last[:, 0] + 1,
    )


__all__ = [
    "Components",
    "HybridState",
    "empty_state",
    "hybrid_attention",
    "hybrid_attention_step",
    "resolve_kernel",
]
