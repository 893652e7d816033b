"""Hybrid attention in O(T) time and memory: chunks of queries over a span of keys, and a running state for the rest.

A chunk holds queries q0 .. q0 + C - 1. Its span begins `Block.span` keys before q0; every earlier key lies outside
the window of every query of the chunk, so it is in the state sum phi(k) [v, 1] or, as a sink, in a few extra columns.
Where `reach` cuts the linear set, the span holds all of it and there is no state: time then grows with T x reach.
Heads are taken in blocks that stay in the cache. Backward runs over a block's states again, then walks its chunks from
right to left, computes each one's weights anew and carries the gradient of the state. Nothing of size T x T is kept. Of a
query its largest score and both masses are; of a call whose weights and states are smaller than its features, which autograd
keeps anyway, they are kept too and not computed anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..transforms import plain_backward
from .block import Block, Chunk, Past, spread
from .chunk import Gradients, Inputs, Masks, State, Sums, Weights, backward, forward, weigh
from .rows import Options, Rows, learning

CHUNK = 64  # measured best with window 64 (facts/performance.md §2)
SHORT_CHUNK = 32  # and with windows of at most 32: a query meets fewer keys by their features
BLOCK = 8 * 64 * 128  # weights of a block's chunk: stays in a core's cache with its inputs (facts/performance.md §1)
STRIDE = 8  # chunks whose states exist at once in backward


@dataclass(frozen=True)
class _Call:
    """One call: its blocks, each with the slices of the tensors that belong to it."""

    whole: Block
    components: bool

    def chunk_shape(self, x: Inputs) -> tuple[int, int]:
        """Queries of a whole chunk, and keys that they look at one by one."""
        size = min(self.whole.size, self.whole.length)
        return size, min(size + self.whole.span, x.k.shape[2])

    def keeps_weights(self, x: Inputs) -> bool:
        """Whether a chunk's weights and the state before it are no more numbers than its features.

        At head_dim 32 and window 32 that is so from 128 features on.
        """
        heads, map_heads, features = x.q.shape[1], x.fk.shape[1], x.fq.shape[3]
        size, columns = self.chunk_shape(x)
        weights = heads * size * (columns + size)  # of the linear side: of no more columns than there are queries
        state = map_heads * features * (x.v.shape[3] + 1) if self.whole.options.sums_up else 0
        return weights + state <= (heads + map_heads) * size * features

    def blocks(self, x: Inputs) -> Iterator[tuple[Block, tuple[slice, slice, slice, slice]]]:
        """Blocks of rows, or of key heads of one row, and (rows, query heads, key heads, heads of phi_k)."""
        batch, heads = x.q.shape[:2]
        key_heads, map_heads = x.k.shape[1], x.fk.shape[1]
        size, columns = self.chunk_shape(x)
        most = max(1, BLOCK // (size * columns))  # query heads
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
                block = replace(block, past=block.past.cut(own, keys, maps))
            yield block, (own, query, keys, maps)


def _part(x: Inputs, cut: tuple[slice, slice, slice, slice]) -> Inputs:
    own, query, keys, maps = cut
    return Inputs(
        x.q[own, query], x.k[own, keys], x.v[own, keys], x.fq[own, query], x.fk[own, maps],
        None if x.mix is None else x.mix[query], None if x.log_scale is None else x.log_scale[query],
    )  # fmt: skip


@dataclass(frozen=True)
class _Kept:
    """Of a block, for backward: the states before every `stride`-th chunk; each chunk's sums, and its weights where they are
    kept.
    """

    stride: int
    states: list[State | None]
    sums: list[Sums | None]
    weights: list[Weights | None]


def _forward(call: _Call, x: Inputs, kept: list[_Kept] | None = None) -> list[Tensor]:
    """y, and with components their three parts; into `kept` what backward needs of each block."""
    outputs = [torch.empty_like(x.q) for _ in range(3 if call.components else 1)]
    if call.components:
        outputs.append(x.q.new_empty(x.q.shape[:3]))
    keeps = kept is not None and call.keeps_weights(x)
    for block, cut in call.blocks(x):
        part = _part(x, cut)
        chunks, own = block.chunks(), _Kept(1 if keeps else STRIDE, [], [], [])
        state = held = block.first_state  # what is kept, or the caller's, stays as it is
        for number, chunk in enumerate(chunks):
            if kept is not None and number % own.stride == 0:
                held = state
                own.states.append(state)
            weights = None
            if chunk.q0 < chunk.q1:
                sinks = block.sinks(chunk)
                masks = block.masks(chunk, sinks)
                inputs = block.inputs(part, chunk, sinks, masks)
                weights = weigh(inputs, state, masks, block.options)
                into = [t[cut[0], cut[1], block.queries(chunk)] for t in outputs]
                forward(weights, inputs, state, masks, block.options, into, spend=not keeps)
            if kept is not None:
                own.sums.append(None if weights is None else weights.sums)
                own.weights.append(weights if keeps else None)
            if chunk is not chunks[-1]:
                state = block.advance(state, part, chunk, spend=state is not held)
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
    @plain_backward
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
            with without_autocast(dy.device):  # as in the forward pass
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
            if chunk.q0 == chunk.q1:
                continue
            sinks = block.sinks(chunk)
            masks = block.masks(chunk, sinks)
            inputs = block.inputs(x, chunk, sinks, masks)
            weights = kept.weights[at] or weigh(inputs, state, masks, block.options, kept.sums[at])
            own = block.queries(chunk)
            found = backward(weights, inputs, state, masks, block.options, y[:, :, own], dy[:, :, own], d_state, wants)
            _collect(found, grads, chunk, own, masks, sinks, inputs.k.shape[2])
            d_state = found.state


def _collect(
    found: Gradients,
    grads: dict[str, Tensor],
    chunk: Chunk,
    queries: slice,
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
            target[:, :, queries] = grad  # each query is in one chunk
            continue
        first, stop = (masks.first, masks.stop) if name == "fk" else (0, columns)
        grad = grad.view(*target.shape[:2], stop - first, target.shape[3])
        target[:, :, chunk.k0 : chunk.k0 + stop - extra].add_(grad[:, :, extra - first :])
        if sinks is not None and first == 0:
            index = spread(sinks[0], target)
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
    first_query: int = 0,
) -> list[Tensor]:
    """y, and with `components` the three parts, as the reference has them; in float32 (float64 for float64)."""
    given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    chunk = chunk or (SHORT_CHUNK if options.span <= SHORT_CHUNK else CHUNK)
    whole = Block(options, q_rows, k_rows, window_keep, past, plain, chunk, first_query, dtype, {})
    tensors = [None if x is None else x.to(dtype).contiguous() for x in (q, k, v, phi_q, phi_k, mix, log_scale)]
    call = _Call(whole, components)
    # Inside a Function `needs_input_grad` is true under no_grad too: ask here.
    found = _Hybrid.apply(call, *tensors) if learning(*tensors) else _forward(call, Inputs(*tensors))  # type: ignore[arg-type]
    return [x.to(given) for x in found]
