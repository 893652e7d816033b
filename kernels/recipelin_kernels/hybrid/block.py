"""Some rows and heads of a call of the chunked form: its chunks, who sees whom in them, and the running state between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .chunk import HIDDEN, Inputs, Masks, State
from .rows import Options, Rows, rows, softmax_set, visible

MOST_KEPT = 64 * 512  # numbers of a mask that is kept from call to call


@dataclass(frozen=True)
class Past:
    """What came before the first query: the state's sums, and keys that stand in front of the call's own.

    sums [B,p,F,D+1]; sink_k, sink_v [B,Hkv,s,D] with sink_phi [B,p,s,F]; `lead` keys of the ring are in front of k.
    """

    sums: Tensor
    sink_k: Tensor
    sink_v: Tensor
    sink_phi: Tensor
    sink_rows: Rows
    lead: int

    def cut(self, rows: slice, key_heads: slice, map_heads: slice) -> "Past":
        """The part of one block."""
        return Past(
            self.sums[rows, map_heads],
            self.sink_k[rows, key_heads],
            self.sink_v[rows, key_heads],
            self.sink_phi[rows, map_heads],
            self.sink_rows.cut(rows),
            self.lead,
        )


@dataclass(frozen=True)
class Chunk:
    """Indices of one chunk of tokens [begin, q1): queries [q0, q1), keys [k0, k1) of the span; keys [k0, k2) then go into the
    state. No query is asked for before q0."""

    begin: int
    q0: int
    q1: int
    k0: int
    k1: int
    k2: int


def _chunks(length: int, lead: int, span: int, size: int, first: int) -> Iterator[Chunk]:
    for begin in range(0, length, size):
        stop = min(begin + size, length)
        asked = min(max(begin, first), stop)
        yield Chunk(begin, asked, stop, max(0, begin + lead - span), stop + lead, max(0, stop + lead - span))


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
    first: int  # the first query that is asked for
    dtype: torch.dtype
    known: dict[tuple[int, ...], Masks]  # masks of plain chunks by their shape, shared between blocks

    @property
    def length(self) -> int:
        """Tokens of the call."""
        return self.q_rows.position.shape[1]

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
        return list(_chunks(self.length, self.lead, self.span, self.size, self.first))

    def queries(self, chunk: Chunk) -> slice:
        """Where a chunk's queries are in q."""
        return slice(chunk.q0 - self.first, chunk.q1 - self.first)

    @property
    def first_state(self) -> State | None:
        """The sums that the call goes on from."""
        if self.past is None or not self.options.sums_up:
            return None
        sums = self.past.sums.to(self.dtype)
        return State(sums[..., :-1], sums[..., -1])

    def sinks(self, chunk: Chunk) -> tuple[Tensor, Rows] | None:
        """Indices [B,s] into the keys of the sinks before the span, and their rows; None where there are none."""
        if not self.options.sinks or chunk.k0 == 0:
            return None
        at = chunk.begin + self.lead
        start = at - self.k_rows.position[:, at]
        index = start[:, None] + torch.arange(self.options.sinks, device=start.device)
        inside = (index >= 0) & (index < chunk.k0)
        index = index.clamp(0, self.k_rows.position.shape[1] - 1)
        segment = torch.where(inside, self.k_rows.segment.gather(1, index), -1)
        return index, Rows(self.k_rows.position.gather(1, index), segment)

    def masks(self, chunk: Chunk, sinks: tuple[Tensor, Rows] | None) -> Masks:
        """Columns are the sinks of the state, those before the span, and the span."""
        if not self.plain or self.keep is not None:
            return self._masks(chunk, sinks)
        o = self.options
        phase = chunk.q0 % o.window if o.shape == "terraced" and o.window else 0
        key = (chunk.q1 - chunk.q0, chunk.k1 - chunk.k0, min(chunk.k0, o.sinks), phase)
        if key not in self.known:
            few = key[0] * (key[1] + key[2]) <= MOST_KEPT and _stays(self.q_rows.position)
            self.known[key] = (
                _plain_masks(o, self.dtype, self.q_rows.position.device, *key) if few else self._masks(chunk, sinks)
            )
        return self.known[key]

    def _masks(self, chunk: Chunk, sinks: tuple[Tensor, Rows] | None) -> Masks:
        o = self.options
        parts = [self.k_rows.columns(chunk.k0, chunk.k1)]
        if sinks is not None:
            parts.insert(0, sinks[1])
        if self.past is not None and o.sinks:
            parts.insert(0, self.past.sink_rows)
        k = Rows(*(torch.cat([getattr(p, n) for p in parts], 1) for n in ("position", "segment")))
        return self.masks_of(self.q_rows.columns(chunk.q0, chunk.q1), k, chunk)

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
        first_segment = self.q_rows.segment[:, chunk.begin : chunk.begin + 1]
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
            k, v = ([x.gather(2, spread(sinks[0], x)), *p] for x, p in ((whole.k, k), (whole.v, v)))
            if masks.first == 0:
                fk.insert(0, whole.fk.gather(2, spread(sinks[0], whole.fk)))
        if past is not None:
            k, v = ([x.to(self.dtype), *p] for x, p in ((past.sink_k, k), (past.sink_v, v)))
            if masks.first == 0:
                fk.insert(0, past.sink_phi.to(self.dtype))
        q, fq = (x[:, :, self.queries(chunk)] for x in (whole.q, whole.fq))
        return Inputs(q, _join(k), _join(v), fq, _join(fk), whole.mix, whole.log_scale)

    def leaving(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """Which keys of [k0, k2) the next chunk's state counts [B,1 or H,n,1], and which rows' states go on [B,1,1].

        None: all.
        """
        sinks_stay = self.options.cover == "outside" and self.options.sinks > 0
        if self.plain and not sinks_stay:
            return None, None
        now, then = (self.q_rows.segment[:, at : at + 1] for at in (chunk.begin, chunk.q1))
        k = self.k_rows.columns(chunk.k0, chunk.k2)
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
                grads["fk"][:, :, part].add_(found if counts is None else found * counts)
            if "v" in wants:
                found = torch.bmm((fk if counts is None else fk * counts).flatten(0, 1), value)
                grads["v"][:, :, part].add_(found.view(*v.shape[:2], -1, *v.shape[2:]).sum(2))
        if carried is None:
            return d_state
        return State(d_state.value * carried[..., None], d_state.mass * carried)


def _stays(x: Tensor) -> bool:
    """Whether what is made beside x may be kept from call to call: real numbers, not of a graph that is being made."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _plain_masks(
    options: Options, dtype: torch.dtype, device: torch.device, queries: int, keys: int, sinks: int, phase: int
) -> Masks:
    """`Block.masks` of a plain chunk, made at the earliest place where they are the same; nobody writes into them.

    sinks: how many lie before its keys; phase: of its first query in the terraced window.
    """
    first = sinks + keys - queries
    later = (phase - first) % options.window if options.shape == "terraced" and options.window else 0
    chunk = Chunk(first + later, first + later, sinks + later + keys, sinks + later, sinks + later + keys, 0)
    own = rows(1, chunk.q1, device, None, None)
    block = Block(options, own, own, None, None, True, queries, 0, dtype, {})
    return block._masks(chunk, block.sinks(chunk))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def spread(index: Tensor, x: Tensor) -> Tensor:
    return index[:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])


def repeat(v: Tensor, heads: int) -> Tensor:
    """[B,g,n,D] -> [B heads,n,D], each key head repeated for its heads."""
    batch, own, rows, width = v.shape
    if own == heads:
        return v.flatten(0, 1)
    return v[:, :, None].expand(-1, -1, heads // own, -1, -1).reshape(batch * heads, rows, width)
