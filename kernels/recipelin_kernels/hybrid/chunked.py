"""Hybrid attention in O(T) time and memory: chunks of queries over a span of keys, and a running state for the rest.

A chunk holds queries q0 .. q0 + C - 1. Its span begins `Block.span` keys before q0; every earlier key lies outside
the window of every query of the chunk, so it is in the state sum phi(k) [v, 1] or, as a sink, in a few extra columns.
Where `reach` cuts the linear set, the span holds all of it and there is no state: time then grows with T x reach.
Heads are taken in blocks that stay in the cache. Backward runs over a block's states again, then walks its chunks from
right to left, computes each one's weights anew and carries the gradient of the state. Nothing of size T x T is kept. Of a call
whose weights and states are smaller than its features, which autograd keeps anyway, they are kept too and not computed anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chunk import HIDDEN, Gradients, Inputs, Masks, State, Weights, backward, forward, weigh
from .rows import Options, Rows, softmax_set, visible

CHUNK = 64  # measured best with window 64 (facts/performance.md §2)
SHORT_CHUNK = 32  # and with windows of at most 32: a query meets fewer keys by their features
BLOCK = 8 * 64 * 128  # weights of a block's chunk: stays in a core's cache with its inputs (facts/performance.md §1)
STRIDE = 8  # chunks whose states exist at once in backward


@dataclass(frozen=True)
class Past:
    """What came before the first query: the state's sums, and keys that stand in front of the call's own.

    sums [B,H,F,D+1]; sink_k, sink_v [B,Hkv,s,D] with sink_phi [B,H or Hkv,s,F]; `lead` keys of the ring
    are in front of k.
    """

    sums: Tensor
    sink_k: Tensor
    sink_v: Tensor
    sink_phi: Tensor
    sink_rows: Rows
    lead: int

    def cut(self, rows: slice, key_heads: slice, map_heads: slice, heads: slice) -> "Past":
        """The part of one block."""
        return Past(
            self.sums[rows, heads],
            self.sink_k[rows, key_heads],
            self.sink_v[rows, key_heads],
            self.sink_phi[rows, map_heads],
            self.sink_rows.cut(rows),
            self.lead,
        )


@dataclass(frozen=True)
class Chunk:
    """Indices of one chunk: queries [q0, q1), keys [k0, k1) of the span; keys [k0, k2) then go into the state."""

    q0: int
    q1: int
    k0: int
    k1: int
    k2: int


def _chunks(length: int, lead: int, span: int, size: int) -> Iterator[Chunk]:
    for q0 in range(0, length, size):
        q1 = min(q0 + size, length)
        yield Chunk(q0, q1, max(0, q0 + lead - span), q1 + lead, max(0, q1 + lead - span))


def _columns(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(rows.position[:, start:stop], rows.segment[:, start:stop])


@dataclass(frozen=True)
class Block:
    """Some rows and heads of a call, without what carries gradient: who sees whom, chunk by chunk."""

    options: Options
    q_rows: Rows
    k_rows: Rows
    keep: Tensor | None
    past: Past | None
    plain: bool  # no padding, no segments, no state: all rows are alike
    size: int
    dtype: torch.dtype
    known: dict[tuple[int, ...], Masks]  # masks of plain chunks by their shape, shared between blocks

    @property
    def lead(self) -> int:
        return 0 if self.past is None else self.past.lead

    @property
    def covers_all(self) -> bool:
        return self.keep is not None and self.options.on_drop == "linear_covers_all"

    @property
    def span(self) -> int:
        """How many keys before a chunk are looked at one by one: none where the linear side alone counts, and all keys."""
        o = self.options
        softmax = o.has("window") or (o.sinks > 0 and o.has("sinks"))
        return o.span if softmax or o.cover == "outside" or o.reach is not None or self.past is not None else 0

    def chunks(self) -> list[Chunk]:
        return list(_chunks(self.q_rows.position.shape[1], self.lead, self.span, self.size))

    def first_state(self, p: int) -> State | None:
        """The sums that the call goes on from, for p heads of phi_k: heads of one group hold the same."""
        if self.past is None or not self.options.sums_up:
            return None
        sums = self.past.sums.to(self.dtype)[:, :: self.past.sums.shape[1] // p]
        return State(sums[..., :-1], sums[..., -1])

    def sinks(self, chunk: Chunk) -> tuple[Tensor, Rows] | None:
        """Indices [B,s] into the keys of the sinks before the span, and their rows; None where there are none."""
        if not self.options.sinks or chunk.k0 == 0:
            return None
        at = chunk.q0 + self.lead
        start = at - self.k_rows.position[:, at]
        index = start[:, None] + torch.arange(self.options.sinks, device=start.device)
        inside = (index >= 0) & (index < chunk.k0)
        index = index.clamp(0, self.k_rows.position.shape[1] - 1)
        segment = torch.where(inside, self.k_rows.segment.gather(1, index), -1)
        return index, Rows(self.k_rows.position.gather(1, index), segment)

    def masks(self, chunk: Chunk, sinks: tuple[Tensor, Rows] | None) -> Masks:
        """Columns are the sinks of the state, those before the span, and the span."""
        o = self.options
        phase = chunk.q0 % o.window if o.shape == "terraced" and o.window else 0
        key = (chunk.q1 - chunk.q0, chunk.k1 - chunk.k0, min(chunk.k0, o.sinks), phase)
        if self.plain and self.keep is None and key in self.known:
            return self.known[key]
        parts = [_columns(self.k_rows, chunk.k0, chunk.k1)]
        if sinks is not None:
            parts.insert(0, sinks[1])
        if self.past is not None and o.sinks:
            parts.insert(0, self.past.sink_rows)
        k = Rows(*(torch.cat([getattr(p, n) for p in parts], 1) for n in ("position", "segment")))
        made = self.masks_of(_columns(self.q_rows, chunk.q0, chunk.q1), k, chunk)
        if self.plain and self.keep is None:
            self.known[key] = made
        return made

    def masks_of(self, q: Rows, k: Rows, chunk: Chunk) -> Masks:
        o = self.options
        near, far_sinks = (m[:, None] for m in softmax_set(o, q, k))
        seen = visible(q, k)[:, None]
        sink = (k.position < o.sinks)[:, None, None, :]
        soft = torch.zeros_like(seen)
        if o.has("window"):
            soft = soft | near
        if o.has("sinks"):
            soft = soft | (seen & sink)
        # The linear side of sinks before the span is in the state.
        columns = k.position.shape[1]
        extra = columns - (chunk.k1 - chunk.k0)
        reached = seen if o.reach is None else visible(q, k, o.reach)[:, None]
        own = reached & (torch.arange(columns, device=k.position.device) >= extra)
        linear = own if o.cover == "all" else own & ~near & ~far_sinks
        if self.keep is not None:
            kept = self.keep[:, :, None, None]
            if self.covers_all:
                linear = torch.where(kept, linear, own)
            soft = soft & kept
        hidden = torch.zeros_like(seen)
        if not o.shown("window"):
            hidden = hidden | (near & ~sink)
        if not o.shown("sinks"):
            hidden = hidden | far_sinks
        first, stop = extra, columns
        if o.join == "replace":
            first = 0
        elif not o.has("linear"):
            stop = first
        elif o.cover == "outside" and not self.covers_all:
            stop = extra + max(0, chunk.q1 + self.lead - o.window - chunk.k0)
        if not o.has("linear"):
            linear = torch.zeros_like(linear)
        first_segment = self.q_rows.segment[:, chunk.q0 : chunk.q0 + 1]
        whole = self.plain
        return Masks(
            soft=soft.to(self.dtype),
            bias=torch.where(soft, 0.0, HIDDEN).to(self.dtype),
            linear=linear[..., first:stop].to(self.dtype),
            first=first,
            stop=stop,
            shown=None if o.shown("window") and o.shown("sinks") else (~hidden).to(self.dtype),
            sees_state=None if whole else (q.segment == first_segment)[:, None, :, None].to(self.dtype),
            real=None if whole else (q.segment >= 0)[:, None, :, None].to(self.dtype),
        )

    def inputs(self, whole: Inputs, chunk: Chunk, sinks: tuple[Tensor, Rows] | None, masks: Masks) -> Inputs:
        """The chunk's own part of a block's tensors."""
        span = slice(chunk.k0, chunk.k1)
        past = self.past if self.options.sinks else None
        k, v = ([x[:, :, span]] for x in (whole.k, whole.v))
        # Features of the sinks before the span are asked for by `replace` alone.
        extra = masks.soft.shape[-1] - (chunk.k1 - chunk.k0)
        fk = [whole.fk[:, :, chunk.k0 : chunk.k0 + masks.stop - extra]]
        if sinks is not None:
            k, v = ([x.gather(2, _spread(sinks[0], x)), *p] for x, p in ((whole.k, k), (whole.v, v)))
            if masks.first == 0:
                fk.insert(0, whole.fk.gather(2, _spread(sinks[0], whole.fk)))
        if past is not None:
            k, v = ([x.to(self.dtype), *p] for x, p in ((past.sink_k, k), (past.sink_v, v)))
            if masks.first == 0:
                fk.insert(0, past.sink_phi.to(self.dtype))
        q, fq = (x[:, :, chunk.q0 : chunk.q1] for x in (whole.q, whole.fq))
        return Inputs(q, _join(k), _join(v), fq, _join(fk), whole.mix, whole.log_scale)

    def leaving(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """Which keys of [k0, k2) the next chunk's state counts [B,1 or H,n,1], and which rows' states go on [B,1,1].

        None: all.
        """
        sinks_stay = self.options.cover == "outside" and self.options.sinks > 0
        if self.plain and not sinks_stay:
            return None, None
        now, then = (self.q_rows.segment[:, at : at + 1] for at in (chunk.q0, chunk.q1))
        k = _columns(self.k_rows, chunk.k0, chunk.k2)
        counts = ((k.segment == then) & (then >= 0))[:, None]
        if sinks_stay:
            enters = k.position[:, None] >= self.options.sinks
            if self.covers_all:
                assert self.keep is not None
                enters = enters | ~self.keep[:, :, None]
            counts = counts & enters
        carried = None if self.plain else ((now == then) & (then >= 0)).to(self.dtype)[..., None]
        return counts.to(self.dtype)[..., None], carried

    def advance(self, state: State | None, whole: Inputs, chunk: Chunk, *, spend: bool = False) -> State | None:
        """The state before the next chunk; `spend`: in the place of this one."""
        if not self.options.sums_up:
            return None
        counts, carried = self.leaving(chunk)
        if state is not None and carried is not None:
            state = State(state.value * carried[..., None], state.mass * carried)
        if chunk.k2 == chunk.k0:
            return state
        fk, v = whole.fk[:, :, chunk.k0 : chunk.k2], whole.v[:, :, chunk.k0 : chunk.k2]
        if counts is not None:
            fk = fk * counts
        mass = fk.sum(2)
        flat, values = fk.flatten(0, 1).transpose(1, 2), repeat(v, fk.shape[1])
        if state is None:
            return State(torch.bmm(flat, values).view(*mass.shape, -1), mass)
        if spend:
            state.value.flatten(0, 1).baddbmm_(flat, values)
            return State(state.value, mass.add_(state.mass))
        value = torch.baddbmm(state.value.flatten(0, 1), flat, values)
        return State(value.view_as(state.value), state.mass + mass)

    def retreat(
        self, d_state: State, whole: Inputs, grads: dict[str, Tensor], chunk: Chunk, wants: frozenset[str]
    ) -> State:
        """`advance` backward: adds to the gradients of the keys that left; the gradient of the state before."""
        counts, carried = self.leaving(chunk)
        if chunk.k2 > chunk.k0:
            part = slice(chunk.k0, chunk.k2)
            fk, v = whole.fk[:, :, part], whole.v[:, :, part]
            value = d_state.value.flatten(0, 1)
            if "fk" in wants:
                found = torch.baddbmm(
                    d_state.mass.flatten(0, 1)[:, None], repeat(v, fk.shape[1]), value.transpose(1, 2)
                ).view_as(fk)
                grads["fk"][:, :, part] += found if counts is None else found * counts
            if "v" in wants:
                found = torch.bmm((fk if counts is None else fk * counts).flatten(0, 1), value)
                grads["v"][:, :, part] += found.view(*v.shape[:2], -1, *v.shape[2:]).sum(2)
        if carried is None:
            return d_state
        return State(d_state.value * carried[..., None], d_state.mass * carried)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _spread(index: Tensor, x: Tensor) -> Tensor:
    return index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])


def repeat(v: Tensor, heads: int) -> Tensor:
    """[B,g,n,D] -> [B heads,n,D], each key head repeated for its heads."""
    batch, own, rows, width = v.shape
    if own == heads:
        return v.flatten(0, 1)
    return v[:, :, None].expand(-1, -1, heads // own, -1, -1).reshape(batch * heads, rows, width)


def _add(total: State | None, more: State | None) -> State | None:
    """Their sum, in the place of `more`."""
    if total is None or more is None:
        return total or more
    return State(more.value.add_(total.value), more.mass.add_(total.mass))


@dataclass(frozen=True)
class _Call:
    """One call: its blocks, each with the slices of the tensors that belong to it."""

    whole: Block
    components: bool

    def keeps_weights(self, x: Inputs) -> bool:
        """Whether a chunk's weights and the state before it are no more numbers than its features.

        So with few features a chunk is small beside its state, and with many small beside its features: at head_dim 32,
        window 32 they are kept from 128 features on.
        """
        heads, map_heads, features = x.q.shape[1], x.fk.shape[1], x.fq.shape[3]
        size = min(self.whole.size, x.q.shape[2])
        columns = min(size + self.whole.span, x.k.shape[2]) + size
        state = features * (x.v.shape[3] + 1) if self.whole.options.sums_up else 0
        return heads * size * columns + map_heads * state <= (heads + map_heads) * size * features

    def blocks(self, x: Inputs) -> Iterator[tuple[Block, tuple[slice, slice, slice, slice]]]:
        """Blocks of rows, or of key heads of one row, and (rows, query heads, key heads, heads of phi_k)."""
        batch, heads, rows, _ = x.q.shape
        key_heads, map_heads = x.k.shape[1], x.fk.shape[1]
        size = min(self.whole.size, rows)
        most = max(1, BLOCK // (size * min(size + self.whole.span, x.k.shape[2])))  # query heads
        if heads <= most:
            step = max(1, most // heads)
            cuts = [(slice(b, b + step), slice(0, key_heads)) for b in range(0, batch, step)]
        else:
            step = max(1, most * key_heads // heads)
            cuts = [(slice(b, b + 1), slice(g, g + step)) for b in range(batch) for g in range(0, key_heads, step)]
        for own, keys in cuts:
            stop = min(keys.stop, key_heads)
            query, maps = (slice(keys.start * (n // key_heads), stop * (n // key_heads)) for n in (heads, map_heads))
            block = self.whole
            if not block.plain:
                block = replace(block, q_rows=block.q_rows.cut(own), k_rows=block.k_rows.cut(own))
            if block.keep is not None:
                block = replace(block, keep=block.keep[own, query])
            if block.past is not None:
                block = replace(block, past=block.past.cut(own, keys, maps, query))
            yield block, (own, query, keys, maps)


def _part(x: Inputs, cut: tuple[slice, slice, slice, slice]) -> Inputs:
    own, query, keys, maps = cut
    return Inputs(
        x.q[own, query], x.k[own, keys], x.v[own, keys], x.fq[own, query], x.fk[own, maps],
        None if x.mix is None else x.mix[query], None if x.log_scale is None else x.log_scale[query],
    )  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    """Of a block, for backward: the states before every `stride`-th chunk, and all chunks' weights or none."""

    stride: int
    states: list[State | None]
    weights: list[Weights]


def _forward(call: _Call, x: Inputs, kept: list[_Kept] | None = None) -> list[Tensor]:
    """y, and with components their three parts; into `kept` what backward needs of each block."""
    outputs = [torch.empty_like(x.q) for _ in range(3 if call.components else 1)]
    if call.components:
        outputs.append(x.q.new_empty(x.q.shape[:3]))
    keeps = kept is not None and call.keeps_weights(x)
    for block, cut in call.blocks(x):
        part = _part(x, cut)
        state = block.first_state(part.fk.shape[1])
        chunks, own = block.chunks(), _Kept(1 if keeps else STRIDE, [], [])
        for number, chunk in enumerate(chunks):
            fresh = number % own.stride == 0
            if fresh:
                own.states.append(state)
            sinks = block.sinks(chunk)
            masks = block.masks(chunk, sinks)
            inputs = block.inputs(part, chunk, sinks, masks)
            weights = weigh(inputs, state, masks, block.options)
            if keeps:
                own.weights.append(weights)
            into = [t[cut[0], cut[1], chunk.q0 : chunk.q1] for t in outputs]
            forward(weights, inputs, state, masks, block.options, into, spend=not keeps)
            if chunk is not chunks[-1]:
                # What is kept, or the caller's, stays as it is.
                state = block.advance(state, part, chunk, spend=not fresh)
        if kept is not None:
            kept.append(own)
    return outputs


NAMES = ("q", "k", "v", "fq", "fk", "mix", "log_scale")


class _Hybrid(torch.autograd.Function):
    """Forward keeps the inputs, y and `_Kept`; backward computes the states and weights that are not kept again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Any:
        ctx.kept = list[_Kept]()
        outputs = _forward(call, Inputs(*tensors), ctx.kept)
        ctx.call = call
        ctx.save_for_backward(*tensors, outputs[0])
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        *tensors, y = ctx.saved_tensors
        x = Inputs(*tensors)
        wanted = {n for n, want in zip(NAMES, ctx.needs_input_grad[1:], strict=True) if want}
        grads = {
            n: torch.empty_like(t) if n in ("q", "fq") else torch.zeros_like(t)
            for n, t in zip(NAMES, tensors, strict=True)
            if n in wanted
        }
        wants = frozenset(wanted | ({"state"} if wanted & {"v", "fk"} else set()))
        for (block, cut), kept in zip(ctx.call.blocks(x), ctx.kept, strict=True):
            own, query, keys, maps = cut
            pick = {"q": query, "fq": query, "k": keys, "v": keys, "fk": maps}
            mine = {n: grad[own, pick[n]] if n in pick else grad[query] for n, grad in grads.items()}
            with torch.autocast(dy.device.type, enabled=False):  # as in the forward pass
                _block_backward(block, _part(x, cut), kept, mine, y[own, query], dy[own, query], wants)
        return None, *(grads.get(n) for n in NAMES)


def _block_backward(
    block: Block,
    x: Inputs,
    kept: _Kept,
    grads: dict[str, Tensor],
    y: Tensor,
    dy: Tensor,
    wants: frozenset[str],
) -> None:
    """Adds the gradients of one block to `grads`, views of the whole ones."""
    chunks = block.chunks()
    d_state: State | None = None
    for number in reversed(range(len(kept.states))):
        first = number * kept.stride
        few = chunks[first : first + kept.stride]
        states = [kept.states[number]]
        for chunk in few[:-1]:
            states.append(block.advance(states[-1], x, chunk))
        for at, chunk in reversed(list(enumerate(few, first))):
            state = states.pop()
            if d_state is not None:
                d_state = block.retreat(d_state, x, grads, chunk, wants)
            sinks = block.sinks(chunk)
            masks = block.masks(chunk, sinks)
            inputs = block.inputs(x, chunk, sinks, masks)
            weights = kept.weights[at] if kept.weights else weigh(inputs, state, masks, block.options)
            part = slice(chunk.q0, chunk.q1)
            found = backward(weights, inputs, state, masks, block.options, y[:, :, part], dy[:, :, part], wants)
            _collect(found, grads, chunk, masks, sinks, inputs.k.shape[2])
            d_state = _add(d_state, found.state)


def _collect(
    found: Gradients,
    grads: dict[str, Tensor],
    chunk: Chunk,
    masks: Masks,
    sinks: tuple[Tensor, Rows] | None,
    columns: int,
) -> None:
    """Adds a chunk's gradients where they belong."""
    extra = columns - (chunk.k1 - chunk.k0)  # columns before the span
    for name, target in grads.items():
        grad = getattr(found, name)
        if name in ("mix", "log_scale"):
            target += grad
            continue
        if name in ("q", "fq"):
            target[:, :, chunk.q0 : chunk.q1] = grad  # each query is in one chunk
            continue
        first, stop = (masks.first, masks.stop) if name == "fk" else (0, columns)
        grad = grad.view(*target.shape[:2], stop - first, target.shape[3])
        target[:, :, chunk.k0 : chunk.k0 + stop - extra] += grad[:, :, extra - first :]
        if sinks is not None and first == 0:
            index = _spread(sinks[0], target)
            target.scatter_add_(2, index, grad[:, :, extra - index.shape[2] : extra])


def hybrid_attention_chunked(
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
    components: bool,
    chunk: int | None = None,
) -> list[Tensor]:
    """y, and with `components` the three parts, as the reference has them; in float32 (float64 for float64)."""
    given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if window_keep is not None and options.sinks and phi_k.shape[1] < q.shape[1]:
        # Whether a sink is in the state depends on the query head here.
        phi_k = phi_k.repeat_interleave(q.shape[1] // phi_k.shape[1], 1)
        if past is not None:
            past = replace(past, sink_phi=past.sink_phi.repeat_interleave(q.shape[1] // past.sink_phi.shape[1], 1))
    chunk = chunk or (SHORT_CHUNK if options.span <= SHORT_CHUNK else CHUNK)
    whole = Block(options, q_rows, k_rows, window_keep, past, plain, chunk, dtype, {})
    tensors = [None if x is None else x.to(dtype).contiguous() for x in (q, k, v, phi_q, phi_k, mix, log_scale)]
    call = _Call(whole, components)
    with torch.autocast(q.device.type, enabled=False):  # it would take the products in half precision
        # Inside a Function `needs_input_grad` is true under no_grad too: ask here.
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            found = list(_Hybrid.apply(call, *tensors))
        else:
            found = _forward(call, Inputs(*tensors))  # type: ignore[arg-type]
    return [x.to(given) for x in found]
