"""Hybrid attention: softmax over a window joined with linear attention over the rest (DESIGN §5)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import ignores_autocast
from ..cpu import why_not as why_no_c
from ..cpu.calls import is_traced
from ..kernel_error import KernelError
from ..packing import check_tokens
from ..ran import note
from ..transforms import refuse_transforms, under_way
from . import cpu_step, gpu_support
from .chunked import hybrid_attention_chunked
from .compat import check_compat, decoding, whole_rows
from .covered import covered_attention
from .cpu import hybrid_attention_cpu
from .reference import hybrid_attention_reference
from .rows import (
    ABLATIONS,
    BRANCHES,
    COVERS,
    DROPS,
    GRADIENTS,
    JOINS,
    SHAPES,
    Options,
    check_reach,
    check_shapes,
    learning,
    numbers_of,
    of_each_head,
    one_of,
    rows,
)
from .softmax_map import SoftmaxMap
from .state import (
    HybridState,
    check_heads,
    check_lead,
    check_state,
    continued,
    dropping,
    empty_state,
    filled,
    next_state,
    settled,
)
from .step import is_plain, one_token, plain_token
from .step_state import StepState, standing

KERNELS = ("auto", "reference", "chunked", "cpu", "gpu")


@dataclass(frozen=True)
class Components:
    """Of one pass: each branch normalised by itself [B,H,T,D]; the linear branch's share [B,H,T].

    The share is of the normaliser; of `average` and `sum`, whose branches have their own, of the branches' weights: 1/2,
    and 0 or 1 where one is empty. It is not defined for signed features.
    """

    window: Tensor
    linear: Tensor
    linear_share: Tensor


def resolve_kernel(
    kernel: str,
    device: torch.device | str,
    *,
    covered: bool = False,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    features: int | None = None,
    rows: int | None = None,
) -> str:
    """The implementation that a call takes: what `auto` means here. Raises KernelError for one that cannot run.

    covered: the window covers the sequence and nothing else is asked for: y is causal softmax, and `auto` is `sdpa`.
    `gpu`, the Triton kernels, takes CUDA tensors (or CPU ones under TRITON_INTERPRET=1) of float32, bfloat16 and float16,
    `width` up to 256, up to 1024 `features`, and 65535 `rows`: rows times heads, of one token rows alone. `cpu`, the C
    kernels, takes CPU tensors of the same dtypes where there is a C compiler, and computes in fp32. `auto` takes `gpu` on a GPU
    for which it is proven (gpu_support.py), `cpu` on a CPU where it can, neither where torch.compile or another tracer looks
    on; else `chunked`.
    """
    one_of("kernel", kernel, KERNELS)
    if kernel == "cpu" or (kernel == "auto" and not covered and torch.device(device).type == "cpu"):
        reason = _not_in_c(device, dtype)
        if not reason:
            return "cpu"
        if kernel == "cpu":
            raise KernelError(f"kernel='cpu': {reason}; use 'chunked', which runs on every device")
    if kernel == "gpu":
        reason = gpu_support.why_not(device, dtype, width, features, rows)
        if reason:
            raise KernelError(f"kernel='gpu': {reason}; use 'chunked', which runs on every device")
    if kernel == "auto":
        if covered:
            return "sdpa"
        takes = gpu_support.proven(device) and not is_traced()  # torch.compile assembles them by itself
        return "gpu" if takes and not gpu_support.why_not(device, dtype, width, features, rows) else "chunked"
    return kernel


def _not_in_c(device: torch.device | str, dtype: torch.dtype | None) -> str | None:
    """Why the C kernels cannot take tensors of a kind; None: they can."""
    if torch.device(device).type != "cpu":
        return f"the C kernels are for a CPU, found {torch.device(device).type}"
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        return f"the C kernels compute in float32, found {dtype}"
    if is_traced():
        return "torch.compile, torch.jit.trace and dispatch modes cannot look into the C kernels"
    return why_no_c()


@cpu_step.as_the_last_token
@ignores_autocast
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | SoftmaxMap,
    phi_k: Tensor | None,
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
    state: HybridState | StepState | None = None,
    output_state: bool = False,
    components: bool = False,
    kernel: str = "auto",
    phi_k_fn: Callable[[Tensor], Tensor] | None = None,
    signed: bool = False,
    reach: int | None = None,
    compat: str | None = None,
    chunk: int | None = None,
    first_query: int = 0,
) -> Any:
    """y [B,H,T,D]; with `output_state` also the HybridState, with `components` also Components, in this order.

    Query t of head h sees the softmax set W(t) (its window and the first `sinks` keys) and the linear set L(t): with
    cover `outside` every earlier key that is not in W, with `all` every key up to t. Windows, w = `window`:

        sliding   the last w keys, the query's own included
        terraced  its block floor(t / w) up to t and the whole block before: w + 1 .. 2 w keys, in block 0 1 .. w

        a_i = mix_h exp(q.k_i scale - max over W)      b_i = phi_q.phi_k_i      y_W = sum_W a v / sum_W a, y_L alike
        shared    y = (sum_W a v + sum_L b v) / (sum_W a + sum_L b)                                   (LoLCATs)
        absolute  as shared, with exp(q.k_i scale) and exp(log_scale_h) b_i: no shift, no mix
        replace   y = (M softmax_W v + sum_L b v) / (M + sum_L b),  M = sum over W of b
        average   y = 1/2 (y_W + y_L); a branch without mass leaves the other weight 1
        sum       y = y_W + y_L

    q [B,H,T,D]; k, v [B,Hkv,T,D], query head h reads key head h // (H / Hkv); phi_q [B,H,T,F]; phi_k [B,H or Hkv,T,F];
    mix, log_scale [H]; key_mask [B,T] bool, True for real tokens, which must be one run (padding left or right);
    segment_ids [B,T]: window, sinks and linear set begin anew where it changes (of cu_seqlens: `segment_ids_of`). Positions
    count from the first real token. Any float dtype; `chunked` computes in fp32 (fp64 for fp64). Autocast is off in the
    call, in `phi_k_fn` too. window 0 is an empty window.

    ablate {branch: "mass" | "output"}: the branch leaves numerator and denominator, or the numerator alone (in `average`
    its weight stays). `window` means its keys that are no sinks, `sinks` those that are not in the window; keys that are
    switched off do not become linear. window_keep [B,H] bool: where False, W is empty in training (SSD); `on_drop` says
    whether L then covers all keys, sinks too. A row without mass gives exactly 0 and passes no gradient, as padded queries: it
    sees nothing, or what it sees counts for nothing, by a mix of 0, a log_scale of -inf, or features. signed: features
    may be negative (activation `none`): |denominator| >= 1e-6. max_gradient: whether the row maximum, which `shared`
    does not cancel, carries gradient. state: goes on from there (no gradient into it); needs `phi_k_fn`, keys
    [B,Hkv,n,D] -> features, for the ring's keys. phi_k may be None, and is computed by `phi_k_fn` where it is needed. Then
    phi_q and `phi_k_fn` may be SoftmaxMaps: without gradient `gpu` makes features of queries in the launch that uses them, and
    in decoding those of both sides in one before it, `cpu` both in decoding; elsewhere maps are called. In a forward pass of
    `gpu` both are then rounded to the dtype of q: it makes up to 128 in bf16 (64 for D above 128, and in fp32; none in fp16)
    of a W whose columns are a power of two from 16 on.

    reach: the teacher's own window; W but for the sinks, and L, then hold only keys less than `reach` positions back.
    Where no key of the call is that far, it costs nothing; else, and from a state, time is O(T reach), as the teacher's,
    and the state holds reach - 1 keys. compat `lolcats_tk_v1`: the terraced window as LoLCATs published it
    (facts/peers.md A.6): for T <= w all keys are in W and in L; blocks end with the call; a state goes on by a sliding
    window of w, one token at a time. It takes no padding, segments, sinks, other cover or join.

    first_query: only the queries from there on are asked for: q, phi_q and y hold T - first_query of them, k, v and phi_k
    all T. `gpu` and SDPA compute the others too.

    Raises ValueError for unknown options, shapes that do not fit, and a state that `auto` has moved on (see
    `hybrid_attention_step`), RuntimeError for a kernel that cannot run here; all but `reference` take no part in torch.func
    (vmap, grad, jvp, ...) and forward-mode derivatives (RuntimeError). `gpu` (Triton) and `cpu` (C) compute what `chunked` does,
    forward and backward; the precision of `gpu`: gpu.py. One token after a state has a kernel of its own, see
    `hybrid_attention_step`; of more tokens `cpu` leaves to `chunked` what goes on from a state.
    """
    if kernel != "reference" and under_way():
        of_maps = (x.weight for x in (phi_q, phi_k_fn) if isinstance(x, SoftmaxMap))
        refuse_transforms(
            "hybrid_attention", q, k, v, phi_q, phi_k, mix, log_scale, key_mask, segment_ids, window_keep, *of_maps
        )
    one_of("shape", shape, SHAPES)
    one_of("cover", cover, COVERS)
    one_of("join", join, JOINS)
    one_of("max_gradient", max_gradient, GRADIENTS)
    one_of("on_drop", on_drop, DROPS)
    if not isinstance(ablate, Mapping | None):
        raise ValueError(f"ablate={ablate!r}: expected a map of branches to 'mass' or 'output'")
    for branch, how in (ablate or {}).items():
        one_of("ablate", branch, BRANCHES)
        one_of(f"ablate[{branch!r}]", how, ABLATIONS)
    if phi_k is None and phi_k_fn is None:
        raise ValueError("phi_k=None: needs phi_k_fn, the keys' feature map")
    shaped = phi_q.unmade(q) if isinstance(phi_q, SoftmaxMap) else phi_q
    check_shapes(q, k, v, shaped, phi_k, window, sinks, first_query)
    check_reach("reach", reach)
    own_numbers = numbers_of(join, mix, log_scale, q.shape[1])
    options = _options(
        window=window,
        sinks=sinks,
        cover=cover,
        join=join,
        max_gradient=max_gradient,
        ablate=frozenset((ablate or {}).items()),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        on_drop=on_drop,
        signed=signed,
        shape=shape,
        reach=reach,
    )
    if not shaped.shape[-1] and (options.has("linear") or join == "replace"):
        raise ValueError(
            f"phi_q {tuple(shaped.shape)}: without features there is no linear branch, which ablate would say"
        )
    batch, _, length, _ = k.shape
    if window_keep is not None:
        window_keep = of_each_head(window_keep, q.shape[:2])
    held = options  # of the state
    if compat is not None:
        check_compat(compat, options, key_mask, segment_ids)
        if state is not None and length != 1:
            raise ValueError(f"compat={compat!r}: a state goes on one token at a time, found {length}")
        held = decoding(options)
        options = held if state is not None else whole_rows(options, length)
    if isinstance(state, StepState):
        state.check_newest()
    plain = key_mask is None and segment_ids is None and state is None
    sizes: dict[str, Any] = {"dtype": q.dtype, "width": q.shape[-1], "features": shaped.shape[-1]}
    if state is not None and phi_k_fn is None:
        raise ValueError("state: needs phi_k_fn, the keys' feature map, for the keys of the ring")
    token = state is not None and length == 1 and output_state and not components and segment_ids is None
    many = q.shape[0] * (1 if token else q.shape[1])
    takes = resolve_kernel(kernel, q.device, rows=many, **sizes) if token or isinstance(phi_q, SoftmaxMap) else None
    steps = token and takes == "gpu" and not gpu_support.why_no_step(held, window_keep)
    maps = None  # by which the kernel makes features
    if isinstance(phi_q, SoftmaxMap):
        phi_q.check(q.shape[1], q.shape[3], shaped.shape[3])
    if isinstance(phi_k_fn, SoftmaxMap):
        phi_k_fn.check(phi_k_fn.heads, k.shape[3], shaped.shape[3])
    if token and not steps and kernel in ("auto", "cpu") and key_mask is None:
        assert state is not None and phi_k_fn is not None
        of_queries = phi_q.weight if isinstance(phi_q, SoftmaxMap) else phi_q
        if is_plain(held, window_keep, state) and not learning(q, k, v, of_queries, phi_k, mix, log_scale):
            state = standing(state, phi_k_fn)
            check_lead(state, held)
            if takes == "cpu" and cpu_step.takes(q, k, v, phi_q, phi_k_fn, state):
                state = cpu_step.prepared(q, k, phi_q, phi_k_fn, held, state)
                return cpu_step.cpu_token(q, k, v, phi_q, *own_numbers, phi_k_fn, state)
            phi_q = phi_q(q) if isinstance(phi_q, SoftmaxMap) else phi_q
            note("hybrid_attention_step", "chunked")
            return plain_token(q, k, v, phi_q, *own_numbers, phi_k_fn, held, state)
    if isinstance(phi_q, SoftmaxMap):
        if phi_k is None and isinstance(phi_k_fn, SoftmaxMap):
            learned = (q, k, v, mix, log_scale, phi_q.weight, phi_k_fn.weight)
            if not learning(*learned) and takes == "gpu":
                maps = (phi_q, phi_k_fn) if (steps if token else _makes_queries(phi_q, q, k, v)) else None
        phi_q = shaped if maps else phi_q(q)
    if steps and not learning(q, k, v, phi_q, phi_k, mix, log_scale) and not _map_learns(phi_k_fn, k):
        assert state is not None and phi_k_fn is not None
        from .gpu_step import hybrid_attention_step_gpu

        check_tokens(key_mask, None, batch, length)
        note("hybrid_attention_step", "gpu")
        y, following = hybrid_attention_step_gpu(
            q, k, v, phi_q, *own_numbers, phi_k_fn, held, key_mask, state, maps=maps
        )
        # Who asked for `gpu` knows that states move in place; with `auto` they are as on a CPU, or refused.
        return y, following if kernel == "gpu" else following.moved()
    if state is not None:
        assert phi_k_fn is not None
        state = standing(state, phi_k_fn)
    if phi_k is None:
        assert phi_k_fn is not None
        # As the kernel reads them, unless the next state is made of them.
        phi_k = phi_k_fn(k) if maps is None or output_state else maps[1].made(k, q.dtype)
        check_shapes(q, k, v, shaped, phi_k, window, sinks, first_query)
    asked = options.cover == "all" or ablate or window_keep is not None or signed or components
    own = rows(1 if plain else batch, length, q.device, key_mask, segment_ids)
    if state is None and reach is not None and (length <= reach or int(own.position.max()) < reach):
        options = replace(options, reach=None)  # no key of the call is that far
    covered = plain and not asked and options.reach is None and length <= options.span
    ran = resolve_kernel(kernel, q.device, covered=covered, rows=q.shape[0] * q.shape[1], **sizes)
    if ran == "cpu" and state is not None:
        ran = "chunked"  # goes on from it
    # Padding may hold anything, NaN included, and 0 x NaN is NaN.
    if key_mask is not None:
        real = key_mask[:, None, :, None]
        k, v, phi_k = (torch.where(real, x, 0) for x in (k, v, phi_k))
        q = torch.where(real[:, :, first_query:], q, 0)
        if maps is None:
            phi_q = torch.where(real[:, :, first_query:], phi_q, 0)
    mix, log_scale = own_numbers
    k_rows, past = own, None
    if state is not None:
        if segment_ids is not None:
            raise ValueError("state: a call that goes on from a state cannot hold segments")
        assert phi_k_fn is not None
        check_state(state, own, options)
        check_heads(state.sums.shape[1], phi_k.shape[1])
        tensors = (q, k, v, phi_q, phi_k, mix, log_scale)
        one = length == 1 and output_state and not components
        if kernel in ("auto", "cpu") and one and not learning(*tensors):
            note("hybrid_attention_step", "chunked")
            return one_token(*tensors, phi_k_fn, window_keep, options, state, own)
        state = settled(state)
        ring = state if reach is None else filled(state)
        own, k_rows, k, v, phi_k, past = continued(ring, own, k, v, phi_k, phi_k_fn)
    note("hybrid_attention", ran)
    before = first_query if ran in ("gpu", "sdpa") else 0  # queries that are computed, and left out at the end
    if before:
        q = F.pad(q, (0, 0, before, 0))
        phi_q = phi_q if maps else F.pad(phi_q, (0, 0, before, 0))
    of_heads, past_of_heads = dropping(phi_k, past, window_keep, options)
    arguments = (q, k, v, phi_q, of_heads, mix, log_scale, window_keep, options)
    if ran == "reference":
        if state is not None:
            raise ValueError("kernel='reference' computes whole rows: it takes no state; use 'chunked'")
        parts = list(hybrid_attention_reference(*arguments, own.columns(first_query), own))[: 4 if components else 1]
    elif ran == "sdpa":
        parts = [covered_attention(q, k, v, None if maps else phi_q, phi_k, mix, log_scale, options)]
    elif ran == "gpu":
        from .gpu import hybrid_attention_gpu

        if chunk is not None:
            raise ValueError(f"chunk={chunk}: kernel 'gpu' has blocks of its own; chunks are of 'chunked'")
        packed = segment_ids is not None
        parts = hybrid_attention_gpu(
            *arguments, own, k_rows, past=past_of_heads, plain=plain, segmented=packed, components=components,
            map_q=maps[0] if maps else None,
        )  # fmt: skip
    elif ran == "cpu":
        if chunk is not None:
            raise ValueError(f"chunk={chunk}: kernel 'cpu' has chunks of its own; chunks are of 'chunked'")
        parts = hybrid_attention_cpu(*arguments, own, components=components, first_query=first_query)
    else:
        parts = hybrid_attention_chunked(
            *arguments,
            own,
            k_rows,
            past=past_of_heads,
            plain=plain,
            components=components,
            chunk=chunk,
            first_query=first_query,
        )
    parts = [x[:, :, before:] for x in parts] if before else parts
    returned: list[Any] = [parts[0]]
    if output_state:
        returned.append(next_state(k, v, phi_k, held, k_rows, past, state))
    if components:
        returned.append(Components(*parts[1:]))
    return returned[0] if len(returned) == 1 else tuple(returned)


def hybrid_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | SoftmaxMap,
    phi_k_fn: Callable[[Tensor], Tensor],
    mix: Tensor | None,
    state: HybridState | StepState,
    **options: Any,
) -> tuple[Tensor, HybridState | StepState]:
    """One token a row: q [B,H,1,D], k, v [B,Hkv,1,D], phi_q [B,H,1,F] or its map -> (y [B,H,1,D], the next state).

    Options as `hybrid_attention`. Features of a key are computed by `phi_k_fn` when it leaves the window.

    kernel `cpu`: in fp32, widths multiples of 16, without gradient, of what `plain_token` takes (step.py), one C function,
    which makes the features too where they are of SoftmaxMaps, those of some keys at once before they leave: in place
    changes of a map's weight are seen by its version (not those through `.data`). Other tokens are torch's (step.py).

    kernel `gpu` without gradient, `reach` and `window_keep`: one Triton launch, and one before it for the features if phi_q and
    phi_k_fn are SoftmaxMaps. Given a HybridState, it returns a StepState; given that, it writes into it and returns the same
    one: nothing is read by the host, and such a call may be captured in a CUDA graph, its inputs being the same tensors at each
    replay. (The first call after `select` may make buffers of another shape, for fewer rows, and returns those.) A key_mask
    [B,1] leaves out rows that rest. Where `auto` takes this kernel, the StepState that was given is refused from then on
    (ValueError), so that no old state gives new numbers: of one that is to be used again keep a copy.deepcopy, and capture by
    `gpu`.
    """
    if q.shape[2] != 1:
        raise ValueError(
            f"hybrid_attention_step takes one token a row, found {q.shape[2]}; use hybrid_attention with a state"
        )
    return hybrid_attention(q, k, v, phi_q, None, mix, state=state, output_state=True, phi_k_fn=phi_k_fn, **options)


def _map_learns(phi_k_fn: Callable[[Tensor], Tensor] | None, k: Tensor) -> bool:
    """Whether features of keys are to pass a gradient on to what makes them."""
    if not torch.is_grad_enabled() or phi_k_fn is None:
        return False
    return phi_k_fn.weight.requires_grad if isinstance(phi_k_fn, SoftmaxMap) else phi_k_fn(k).requires_grad


_options = lru_cache(256)(Options)  # made at every token of every layer


def _makes_queries(phi_q: SoftmaxMap, q: Tensor, k: Tensor, v: Tensor) -> bool:
    from .gpu_call import makes_queries

    return q.dtype == k.dtype == v.dtype and makes_queries(phi_q, q.dtype, q.shape[-1])


__all__ = [
    "Components",
    "HybridState",
    "SoftmaxMap",
    "StepState",
    "empty_state",
    "hybrid_attention",
    "hybrid_attention_step",
    "resolve_kernel",
]
