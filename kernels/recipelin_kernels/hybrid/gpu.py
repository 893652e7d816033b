"""Hybrid attention by Triton kernels, forward and backward, in O(T) time and memory.

A state (sum of phi_k [v, 1] over the keys before a span) is stored every `stored` queries. Every block of queries is a
program of its own: it takes the stored state, the keys between that state and its span as linear pairs, and the span.
So batch 1 fills a GPU, and no program holds a state. Backward stores the gradients of the states in the same way; dk and
dv, and phi_k's gradient, are programs of blocks of keys. No kernel uses atomics: results repeat bit by bit
(gradients of sinks in packed rows aside, where torch's scatter adds up).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transforms import plain_backward
from . import gpu_backward, gpu_backward_keys, gpu_forward
from .block import Past
from .chunk import Inputs
from .gpu_call import Blocks, Call, cdiv, check_size, fitting, make_call, strides
from .rows import Options, Rows, learning
from .softmax_map import SoftmaxMap


def _own(x: Inputs, call: Call) -> Inputs:
    """Without the sinks of a state, which stand in front of the keys: views, before whose first key kernels may reach."""
    ahead = call.form.ahead
    return x if not ahead else replace(x, k=x.k[:, :, ahead:], v=x.v[:, :, ahead:], fk=x.fk[:, :, ahead:])


NAMES = ("q", "k", "v", "fq", "fk", "mix", "log_scale")


def _number(call: Call, length: int) -> int:
    """How many states are stored; the first one counts only where it is not zero."""
    return cdiv(length, call.form.stored) if call.form.sums else 0


def _states(call: Call, x: Inputs) -> tuple[Tensor, Tensor]:
    """The stored states [B,p,n,F,D] and their masses [B,p,n,F]."""
    o = call.form
    batch, maps, keys, features = x.fk.shape
    length, states = x.q.shape[2], _number(call, x.q.shape[2])
    if states < 2 and not o.initial:
        return x.q.new_empty(0, dtype=torch.float32), x.q.new_empty(0, dtype=torch.float32)
    parts = x.q.new_empty(batch, maps, states, features, o.width, dtype=call.stored_dtype)
    masses = x.q.new_empty(batch, maps, states, features, dtype=torch.float32)
    if call.sums is not None:
        parts[:, :, 0], masses[:, :, 0] = call.sums[..., :-1], call.sums[..., -1]
    sums = replace(call, form=o._replace(columns=o.rows))  # no pairs are held beside them
    sums.launch(
        gpu_forward.sum_keys,
        (states - 1, batch * maps, cdiv(features, o.tile)),
        x.fk, x.v, call.keep, call.q_rows[1], *call.k_rows, parts, masses,
        *strides(x.fk, x.v), maps, length, keys, call.lead, states,
    )  # fmt: skip
    call.run_sums(parts, masses, length, backward=False)
    return parts, masses


@dataclass(frozen=True)
class Kept:
    """What the output kernel makes beside y."""

    y: Tensor
    y_soft: Tensor | None
    y_linear: Tensor | None
    share: Tensor | None
    stats: Tensor | None
    bests: Tensor | None
    value: Tensor
    mass: Tensor


def _forward(call: Call, x: Inputs, *, components: bool, learns: bool) -> Kept:
    o, x = call.form, _own(x, call)
    batch, heads, length, width = x.q.shape
    value, mass = _states(call, x)
    like: dict[str, Any] = dict(dtype=x.q.dtype, device=x.q.device)
    y_soft = learns and o.join != "absolute"
    kept = Kept(
        y=torch.empty(batch, heads, length, width, **like),
        y_soft=torch.empty(batch, heads, length, width, **like) if components or y_soft else None,
        y_linear=torch.empty(batch, heads, length, width, **like) if components else None,
        share=x.q.new_empty(batch, heads, length, dtype=torch.float32) if components else None,
        stats=x.q.new_empty(4, batch, heads, length, dtype=torch.float32) if learns else None,
        bests=x.q.new_empty(batch, heads, length, dtype=torch.int32) if learns and o.through else None,
        value=value,
        mass=mass,
    )
    call.launch(
        gpu_forward.output,
        (cdiv(length, o.rows), batch * heads),
        x.q, x.k, x.v, x.fq, x.fk, x.mix, x.log_scale, call.keep, *call.q_rows, *call.k_rows, value, mass,
        call.map_weight, call.clamp, kept.y, kept.y_soft, kept.y_linear, kept.share, kept.stats, kept.bests,
        *strides(x.q, x.k, x.v, x.fq, x.fk),
        heads, length, x.k.shape[2], call.lead, _number(call, length), call.options.anchor, call.options.scale,
        COMPONENTS=components, SOFT_OUT=kept.y_soft is not None, STATS=learns, BEST=kept.bests is not None,
    )  # fmt: skip
    return kept


class _Hybrid(torch.autograd.Function):
    """Forward keeps the inputs, y, the window's own output, four numbers a row and the stored states."""

    @staticmethod
    def forward(ctx: Any, call: Call, components: bool, *tensors: Any) -> Any:
        kept = _forward(call, Inputs(*tensors), components=components, learns=True)
        ctx.call = call
        ctx.save_for_backward(*tensors, kept.y, kept.y_soft, kept.stats, kept.bests, kept.value, kept.mass)
        if not components:
            return kept.y
        # As a copy: y_soft is also kept.
        assert kept.y_soft is not None
        parts = kept.y_soft.clone(), kept.y_linear, kept.share
        ctx.mark_non_differentiable(*parts)
        return kept.y, *parts

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        *tensors, y, y_soft, stats, bests, value, mass = ctx.saved_tensors
        kept = Kept(y, y_soft, None, None, stats, bests, value, mass)
        wants = frozenset(n for n, want in zip(NAMES, ctx.needs_input_grad[2:], strict=True) if want)
        grads = _backward(ctx.call, Inputs(*tensors), kept, dy if dy.stride(-1) == 1 else dy.contiguous(), wants)
        return None, None, *(grads.get(n) for n in NAMES)


def _backward(call: Call, x: Inputs, kept: Kept, dy: Tensor, wants: frozenset[str]) -> dict[str, Tensor]:
    o, x = call.form, _own(x, call)
    batch, heads, length, width = x.q.shape
    key_heads, keys, maps, features = x.k.shape[1], x.k.shape[2], x.fk.shape[1], x.fk.shape[3]
    rows, tiles = cdiv(length, o.rows), cdiv(features, o.tile)
    states, anchor, scale, lead = _number(call, length), call.options.anchor, call.options.scale, call.lead
    of_keys = replace(call, form=o._replace(rows=o.columns, columns=o.rows))  # programs that own keys
    origin = -((o.span - lead) % o.rows)  # all keys of a block enter one state
    blocks = cdiv(keys - origin, o.rows)
    spots = (*call.q_rows, *call.k_rows)
    dy = dy.to(x.q.dtype)
    exact: dict[str, Any] = dict(dtype=torch.float32, device=dy.device)
    found: dict[str, Tensor] = {}

    terms = torch.empty(5, batch, heads, length, **exact)
    call.launch(
        gpu_backward.row_terms, (rows, batch * heads),
        kept.y, kept.y_soft, dy, x.mix, x.log_scale, *call.q_rows, kept.stats, terms, *strides(dy), heads, length,
    )  # fmt: skip
    if "mix" in wants:
        found["mix"] = terms[4].sum((0, 2))
    value = mass = torch.empty(0, **exact)  # not None: what reads them is compiled, though it does not run
    if states > 1 and wants & {"v", "fk"}:
        parts = torch.empty(batch, maps, states, features, width, dtype=call.stored_dtype, device=dy.device)
        masses = torch.empty(batch, maps, states, features, **exact)
        call.launch(
            gpu_backward.sum_queries, (states - 1, batch * maps, tiles),
            x.fq, dy, *call.q_rows, terms, parts, masses, *strides(x.fq, dy), maps, heads, batch, length, states,
        )  # fmt: skip
        call.run_sums(parts, masses, length, backward=True)
        value, mass = parts, masses
    if "q" in wants:
        found["q"] = torch.empty(x.q.shape, dtype=x.q.dtype, device=dy.device)
        call.launch(
            gpu_backward.query_gradient, (rows, batch * heads),
            x.q, x.k, x.v, dy, call.keep, *spots, kept.stats, terms, kept.bests, x.mix, found["q"],
            *strides(x.q, x.k, x.v, dy), heads, length, keys, lead, anchor, scale,
        )  # fmt: skip
    # Without a linear branch, features count in `replace` alone.
    featureless = not o.has_linear and o.join != "replace"
    if featureless:
        found |= {n: torch.zeros_like(t) for n, t in (("fq", x.fq), ("fk", x.fk)) if n in wants}
        if "log_scale" in wants:
            found["log_scale"] = torch.zeros(heads, **exact)
    elif wants & {"fq", "log_scale"}:
        found["fq"] = torch.empty(x.fq.shape, dtype=x.fq.dtype, device=dy.device)
        d_scale = torch.empty(tiles, batch, heads, length, **exact) if "log_scale" in wants else None
        call.launch(
            gpu_backward.query_features_gradient, (rows, batch * heads, tiles),
            x.v, x.fq, x.fk, dy, call.keep, *spots, kept.value, kept.mass, terms, found["fq"], d_scale,
            *strides(x.v, x.fq, x.fk, dy), heads, length, keys, lead, states, anchor, SCALE=d_scale is not None,
        )  # fmt: skip
        if d_scale is not None:
            found["log_scale"] = d_scale.sum((0, 1, 3))
    # What sinks get is added to them: not in bf16.
    sinks = o.sinks > 0 and o.has_sinks
    made = torch.float32 if sinks else x.k.dtype
    for name in sorted(wants & {"k", "v"}):  # each alone: a program that holds both sums spills
        found[name] = torch.empty(batch, key_heads, keys, width, dtype=made, device=dy.device)
        of_keys.launch(
            gpu_backward_keys.key_gradient, (blocks, batch * key_heads),
            x.q, x.k, x.v, x.fq, x.fk, dy, call.keep, *spots, kept.stats, terms, kept.bests, x.mix, value, found[name],
            *strides(x.q, x.k, x.v, x.fq, x.fk, dy), heads, batch, length, keys, lead, states, origin, anchor, scale,
            K=name == "k",
        )  # fmt: skip
    if "fk" in wants and not featureless:
        kind = torch.float32 if sinks and o.join == "replace" else x.fk.dtype
        found["fk"] = torch.empty(x.fk.shape, dtype=kind, device=dy.device)
        of_keys.launch(
            gpu_backward_keys.key_features_gradient, (blocks, batch * maps, tiles),
            x.v, x.fq, dy, call.keep, *spots, terms, value, mass, found["fk"],
            *strides(x.v, x.fq, dy), heads, batch, length, keys, lead, states, origin, anchor,
        )  # fmt: skip
    if sinks and wants & {"k", "v", "fk"}:
        _add_sinks(of_keys, x, kept, dy, terms, found)
    for name in ("k", "v", "fk") if o.ahead else ():
        if name in found:
            found[name] = F.pad(found[name], (0, 0, o.ahead, 0))  # none into a state
    kinds = {n: getattr(x, n).dtype for n in found}
    return {n: d.to(kinds[n]) for n, d in found.items() if n in wants}


def _add_sinks(call: Call, x: Inputs, kept: Kept, dy: Tensor, terms: Tensor, found: dict[str, Tensor]) -> None:
    """What sinks get of queries whose span they are before, added to the keys' gradients. call: of the programs that own keys,
    which leave out what is before the span of as many queries."""
    o = call.form
    batch, heads, length, width = x.q.shape
    keys, features = x.k.shape[2], x.fk.shape[3]
    # In packed rows sinks differ from block to block of queries; else a program takes a kilotoken.
    queries = o.rows if call.segmented else max(1024, o.rows)
    parts, tiles = cdiv(length, queries), cdiv(features, o.tile) if o.join == "replace" else 1
    exact: dict[str, Any] = dict(dtype=torch.float32, device=dy.device)
    dk, dv = (torch.empty(batch, heads, parts, o.sinks, width, **exact) for _ in range(2))
    dfk = torch.empty(batch, heads, parts, o.sinks, features, **exact) if o.join == "replace" else None
    call.launch(
        gpu_backward_keys.sink_gradient, (parts, batch * heads, tiles),
        x.q, x.k, x.v, x.fq, dy, call.keep, *call.q_rows, *call.k_rows, kept.stats, terms, kept.bests, x.mix,
        dk, dv, dfk, *strides(x.q, x.k, x.v, x.fq, dy), heads, length, keys, call.lead, parts, queries,
        call.options.anchor, call.options.scale,
    )  # fmt: skip
    start = torch.zeros(batch, 1, dtype=torch.long, device=dy.device)
    if not o.plain:
        position, segment = call.q_rows
        begins = torch.arange(length, device=dy.device) + call.lead - position
        begins = torch.where(segment >= 0, begins, -o.sinks - keys)
        start = begins[:, :: o.rows] if call.segmented else begins.amax(1, keepdim=True)
    index = start[..., None] + torch.arange(o.sinks, device=dy.device)
    inside = (index >= 0) & (index < keys)  # not: sinks of the state
    index = index.clamp(0, keys - 1).flatten(1)
    for name, part in (("k", dk), ("v", dv), ("fk", dfk)):
        if name not in found or part is None:
            continue
        target = found[name]
        part = part.unflatten(1, (target.shape[1], -1)).sum(2)
        if not call.segmented:
            part = part.sum(2, keepdim=True)
        part = torch.where(inside[:, None, :, :, None], part, 0.0).flatten(2, 3)
        target.scatter_add_(2, index[:, None, :, None].expand(-1, target.shape[1], -1, target.shape[3]), part)


def hybrid_attention_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    window_keep: Tensor | None,
    options: Options,
    q_rows: Rows,
    k_rows: Rows,
    *,
    past: Past | None = None,
    plain: bool,
    segmented: bool,
    components: bool,
    map_q: SoftmaxMap | None = None,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """y, and with `components` the three parts, as the reference has them. map_q: phi_q is not read but made, and phi_k is
    rounded as it is, to the dtype of q.

    bf16: products of bf16, summed in fp32; features may be fp32 beside it, whose pairs are then taken in tf32. fp16: what
    multiplies values in tf32. fp32: three products of tf32 in the place of one, which keep 21 bits or more. States
    are summed in fp32, of parts that are kept as the states are: in bf16 for bf16, each rounded once more on its way.
    Of a row's equally large scores the first has the maximum's gradient (the reference shares it among them).
    """
    given = q.dtype
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (x.to(kind) for x in (q, k, v))
    features = kind if map_q is not None or phi_q.dtype == phi_k.dtype == kind else torch.float32
    phi_q, phi_k = q if map_q is not None else phi_q.to(features), phi_k.to(features)
    call = make_call(
        options, q, k, phi_k, map_q, window_keep, q_rows, k_rows, past, plain, segmented,
        blocks or fitting(kind, features, q.shape[-1], phi_k.shape[-1], map_q is not None),
    )  # fmt: skip
    if call.form.ahead:
        assert past is not None
        k, v = torch.cat((past.sink_k.to(kind), k), 2), torch.cat((past.sink_v.to(kind), v), 2)
        phi_k = torch.cat((past.sink_phi.to(features), phi_k), 2)
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, phi_q, phi_k)]
    check_size(tensors)
    numbers = [None if x is None else x.float().contiguous() for x in (mix, log_scale)]
    # Inside a Function `needs_input_grad` is true under no_grad too: ask here.
    if learning(*tensors, *numbers):
        made = _Hybrid.apply(call, components, *tensors, *numbers)
        parts = list(made) if components else [made]
    else:
        kept = _forward(call, Inputs(*tensors, *numbers), components=components, learns=False)
        parts = [x for x in (kept.y, kept.y_soft, kept.y_linear, kept.share) if x is not None]
    return [x.to(given) for x in parts]
