"""Hybrid attention in O(T) time and memory: chunks of queries over a span of keys, and a running state for the rest.

Chunk c holds queries i0 .. i0 + C - 1. Its span begins window - 1 keys before i0; every earlier key lies outside the window
of every query of the chunk, so it is in the state sum phi(k) [v, 1] or, as a sink, in a few extra columns. One chunk is one
differentiable function; backward walks the chunks from right to left, computes each again and differentiates it, and carries
the gradient of the state. Nothing of size T x T, and no weights, are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rows import EXP_FLOOR, Options, Rows, divide, softmax_set, visible

CHUNK = 64  # measured best with window 64 (facts/performance.md §2)


@dataclass(frozen=True)
class Past:
    """What came before the first query: the state's sums, and keys that stand in front of the call's own.

    sums [B,H,F,D+1]; sink_k, sink_v [B,Hkv,s,D] with sink_phi [B,H or Hkv,s,F]; `lead` keys of the ring are in front of k.
    """

    sums: Tensor
    sink_k: Tensor
    sink_v: Tensor
    sink_phi: Tensor
    sink_rows: Rows
    lead: int


@dataclass(frozen=True)
class _Chunk:
    """Indices of one chunk: queries [q0, q1) of the call, keys [k0, k1) of the span, folded into the state afterwards: [k0, k2)."""

    q0: int
    q1: int
    k0: int
    k1: int
    k2: int


def _chunks(length: int, lead: int, window: int, size: int) -> Iterator[_Chunk]:
    back = max(window - 1, 0)
    for q0 in range(0, length, size):
        q1 = min(q0 + size, length)
        k2 = max(0, min(q1, length) + lead - back)
        yield _Chunk(q0, q1, max(0, q0 + lead - back), q1 + lead, k2)


def _cut(rows: Rows, start: int, stop: int) -> Rows:
    return Rows(rows.position[:, start:stop], rows.segment[:, start:stop])


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B,H,T,N] as [B,heads,G*T,N]: query heads that share a key head, one below the other."""
    batch, h, t, n = x.shape
    return x.reshape(batch, heads, h // heads * t, n)


def _dot(x: Tensor, keys: Tensor) -> Tensor:
    """x [B,H,C,N], keys [B,h,n,N] with h dividing H -> [B,H,C,n], without repeating the keys."""
    return (_grouped(x, keys.shape[1]) @ keys.transpose(-1, -2)).view(*x.shape[:3], keys.shape[2])


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """weights [B,H,C,n], values [B,h,n,D] -> [B,H,C,D]."""
    return (_grouped(weights, values.shape[1]) @ values).view(*weights.shape[:3], values.shape[3])


@dataclass(frozen=True)
class _Masks:
    """Of one chunk, broadcastable to [B,H,C,n]; n = extra sink columns, then the span."""

    soft: Tensor
    linear: Tensor
    hidden: Tensor | None
    sees_state: Tensor | None
    real: Tensor | None


def _masks(
    options: Options, q: Rows, k: Rows, alive: Tensor, keep: Tensor | None, plain: bool, linear_sinks: Tensor
) -> _Masks:
    """`alive` [B]: the segment that the state belongs to; `linear_sinks` [n]: columns whose linear side the state holds."""
    near, far_sinks = (m[:, None] for m in softmax_set(options, q, k))
    seen = visible(q, k)[:, None]
    sink = (k.position < options.sinks)[:, None, None, :]
    soft = torch.zeros_like(seen)
    if options.has("window"):
        soft = soft | near
    if options.has("sinks"):
        soft = soft | (seen & sink)
    pairwise = seen & ~linear_sinks
    linear = pairwise if options.cover == "all" else pairwise & ~near & ~far_sinks
    if keep is not None:
        kept = keep[:, :, None, None]
        if options.on_drop == "linear_covers_all":
            linear = torch.where(kept, linear, pairwise)
        soft = soft & kept
    if not options.has("linear"):
        linear = torch.zeros_like(linear)
    hidden = None
    if not options.shown("window"):
        hidden = near & ~sink
    if not options.shown("sinks"):
        hidden = far_sinks if hidden is None else hidden | far_sinks
    sees_state = None if plain else (q.segment == alive[:, None])[:, None, :, None]
    real = None if plain else (q.segment >= 0)[:, None, :, None]
    return _Masks(soft, linear, hidden, sees_state, real)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    sums: Tensor | None,
    mix: Tensor | None,
    c: Tensor | None,
    masks: _Masks,
    o: Options,
    components: bool,
) -> tuple[Tensor, ...]:
    """One chunk: q [B,H,C,D] against columns k, v [B,Hkv,n,D], fk [B,h,n,F], and the state.

    Returns y, and with `components` the window branch, the linear branch and the linear share, as the reference.
    """
    scores = _dot(q, k) * o.scale
    top = torch.where(masks.soft, scores, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(torch.isinf(top), 0.0, top)
    if o.max_gradient == "detached":
        top = top.detach()
    a = torch.where(masks.soft, torch.exp((scores - top).clamp(min=EXP_FLOOR, max=0.0)), 0.0)
    a_mass = a.sum(-1)
    a_value = _weigh(a if masks.hidden is None else torch.where(masks.hidden, 0.0, a), v)

    pairs = _dot(fq, fk)
    b = torch.where(masks.linear, pairs, 0.0)
    b_mass, b_value = b.sum(-1), _weigh(b, v)
    if sums is not None and o.has("linear"):
        past = fq @ sums
        if masks.sees_state is not None:
            past = torch.where(masks.sees_state, past, 0.0)
        b_mass, b_value = b_mass + past[..., -1], b_value + past[..., :-1]
    if not o.shown("linear"):
        b_value = torch.zeros_like(b_value)

    if o.join == "absolute":
        assert c is not None
        tiny = torch.finfo(a.dtype).tiny
        lse_soft = top[..., 0] + a_mass.clamp(min=tiny).log()
        lse_linear = c[:, None] + b_mass.clamp(min=tiny).log()
        share = torch.where(b_mass > 0, torch.sigmoid(lse_linear - lse_soft), 0.0)
        share = torch.where((a_mass == 0) & (b_mass > 0), 1.0, share)
        y = (1 - share)[..., None] * divide(a_value, a_mass, False)
        y = y + share[..., None] * divide(b_value, b_mass, o.signed)
    else:
        if o.join == "shared":
            assert mix is not None
            window_mass, window_value = mix[:, None] * a_mass, mix[:, None, None] * a_value
        else:
            window_mass = torch.where(masks.soft, pairs, 0.0).sum(-1)
            window_value = window_mass[..., None] * divide(a_value, a_mass, False)
        mass = window_mass + b_mass
        y = divide(window_value + b_value, mass, o.signed)
        share = divide(b_mass[..., None], mass, o.signed)[..., 0] if components else b_mass
    if masks.real is not None:
        y = torch.where(masks.real, y, 0.0)
    if not components:
        return (y,)
    return y, divide(a_value, a_mass, False), divide(b_value, b_mass, o.signed), share


def _fold(sums: Tensor, v: Tensor, fk: Tensor, counts: Tensor | None, carried: Tensor | None) -> Tensor:
    """The state after keys have left the span: sums * carried + sum over the keys of counts * phi(k) [v, 1].

    v [B,Hkv,n,D], fk [B,h,n,F], counts [B,H or 1,n] (which heads take the key up), carried [B] (0: a new segment).
    """
    batch, heads, _, width = sums.shape
    if carried is not None:
        sums = torch.where(carried[:, None, None, None], sums, 0.0)
    ones = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if counts is not None and counts.shape[1] > 1:
        fk = fk.repeat_interleave(heads // fk.shape[1], 1)
    if counts is not None:
        fk = fk * counts[..., None]
    shared = v.shape[1]
    new = fk.view(batch, shared, -1, *fk.shape[2:]).transpose(-1, -2) @ ones[:, :, None]
    return sums + new.reshape(batch, fk.shape[1], -1, width).repeat_interleave(heads // fk.shape[1], 1)


@dataclass(frozen=True)
class _Call:
    """Everything of one call that carries no gradient."""

    options: Options
    q_rows: Rows
    k_rows: Rows
    keep: Tensor | None
    past: Past | None
    plain: bool
    size: int
    dtype: torch.dtype
    heads: int
    components: bool

    @property
    def lead(self) -> int:
        return 0 if self.past is None else self.past.lead

    def chunks(self) -> list[_Chunk]:
        length = self.q_rows.position.shape[1]
        return list(_chunks(length, self.lead, self.options.window, self.size))

    def sink_columns(self, chunk: _Chunk) -> tuple[Tensor, Rows] | None:
        """Indices [B, s] into the keys of the sinks that lie before the span, and their rows; None where there are none."""
        if not self.options.sinks or chunk.k0 == 0:
            return None
        at = chunk.q0 + self.lead
        start = at - self.k_rows.position[:, at]
        index = start[:, None] + torch.arange(self.options.sinks, device=start.device)
        inside = (index >= 0) & (index < chunk.k0)
        index = index.clamp(0, self.k_rows.position.shape[1] - 1)
        segment = torch.where(inside, self.k_rows.segment.gather(1, index), -1)
        return index, Rows(self.k_rows.position.gather(1, index), segment)

    def alive(self, at: int) -> Tensor:
        return self.q_rows.segment[:, at]


class _Walk:
    """The chunks of one call, with masks that are the same for chunks of the same shape made once."""

    def __init__(self, call: _Call, batch: int) -> None:
        self.call, self.batch = call, batch
        self._known: dict[tuple[int, ...], _Masks] = {}

    def masks(self, chunk: _Chunk, columns: tuple[Tensor, Rows] | None) -> _Masks:
        call = self.call
        key = (
            chunk.q1 - chunk.q0,
            chunk.k1 - chunk.k0,
            chunk.q0 + call.lead - chunk.k0,
            min(chunk.k0, call.options.sinks),
        )
        if call.plain and key in self._known:
            return self._known[key]
        parts = [_cut(call.k_rows, chunk.k0, chunk.k1)]
        if columns is not None:
            parts.insert(0, columns[1])
        if call.past is not None and call.options.sinks:
            parts.insert(0, call.past.sink_rows)
        k_rows = Rows(*(torch.cat([getattr(p, n) for p in parts], 1) for n in ("position", "segment")))
        extra = k_rows.position.shape[1] - (chunk.k1 - chunk.k0)
        columns_before = torch.arange(k_rows.position.shape[1], device=k_rows.position.device) < extra
        q_rows = _cut(call.q_rows, chunk.q0, chunk.q1)
        made = _masks(call.options, q_rows, k_rows, call.alive(chunk.q0), call.keep, call.plain, columns_before)
        if call.plain:
            self._known[key] = made
        return made

    def step(
        self, chunk: _Chunk, inputs: dict[str, Tensor | None], columns: tuple[Tensor, Rows] | None, last: bool
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(y, ...) of the chunk and the state after it. `inputs`: its slices of q, k, v, fq, fk, sink columns, state, mix, c."""
        call = self.call
        cast = {n: None if x is None else x.to(call.dtype) for n, x in inputs.items()}
        k, v, fk = cast["k"], cast["v"], cast["fk"]
        assert k is not None and v is not None and fk is not None
        all_k, all_v, all_fk = [k], [v], [fk]
        if columns is not None:
            for whole, name in ((all_k, "sink_k"), (all_v, "sink_v"), (all_fk, "sink_fk")):
                whole.insert(0, cast[name])  # type: ignore[arg-type]
        if call.past is not None and call.options.sinks:
            for whole, past in ((all_k, call.past.sink_k), (all_v, call.past.sink_v), (all_fk, call.past.sink_phi)):
                whole.insert(0, past.to(call.dtype))
        found = _attend(
            cast["q"],  # type: ignore[arg-type]
            torch.cat(all_k, 2) if len(all_k) > 1 else k,
            torch.cat(all_v, 2) if len(all_v) > 1 else v,
            cast["fq"],  # type: ignore[arg-type]
            torch.cat(all_fk, 2) if len(all_fk) > 1 else fk,
            cast["sums"],
            cast["mix"],
            cast["c"],
            self.masks(chunk, columns),
            call.options,
            call.components,
        )
        return found, None if last else self.folded(chunk, cast["sums"], v, fk, call.alive(chunk.q1))

    def folded(self, chunk: _Chunk, sums: Tensor | None, v: Tensor, fk: Tensor, alive: Tensor) -> Tensor | None:
        """The state once the keys [k0, k2) have left the span; `alive` [B]: the segment of the next query."""
        call = self.call
        count = chunk.k2 - chunk.k0
        carried = None if call.plain else (alive == call.alive(chunk.q0)) & (alive >= 0)
        if count <= 0:
            if sums is None or carried is None:
                return sums
            return torch.where(carried[:, None, None, None], sums, 0.0)
        heads = call.heads
        if sums is None:
            sums = v.new_zeros(self.batch, heads, fk.shape[-1], v.shape[-1] + 1)
        k_rows = _cut(call.k_rows, chunk.k0, chunk.k2)
        same = ((k_rows.segment == alive[:, None]) & (alive >= 0)[:, None])[:, None]
        if call.options.cover == "outside" and call.options.sinks:
            sink = (k_rows.position < call.options.sinks)[:, None]
            dropped = (
                ~call.keep[:, :, None]
                if call.keep is not None and call.options.on_drop == "linear_covers_all"
                else torch.zeros_like(sink)
            )
            same = same & (~sink | dropped)
        if call.plain and call.options.sinks == 0:
            return _fold(sums, v[:, :, :count], fk[:, :, :count], None, None)
        return _fold(sums, v[:, :, :count], fk[:, :, :count], same.to(v.dtype), carried)


class _Hybrid(torch.autograd.Function):
    """Forward keeps the inputs and one state a chunk; backward computes each chunk again."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, mix: Any, c: Any) -> Any:
        outputs, states = _forward(walk, q, k, v, fq, fk, mix, c, remember=True)
        ctx.walk, ctx.states = walk, states
        ctx.save_for_backward(q, k, v, fq, fk, mix, c)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        q, k, v, fq, fk, mix, c = ctx.saved_tensors
        wanted = dict(zip(("q", "k", "v", "fq", "fk", "mix", "c"), ctx.needs_input_grad[1:], strict=True))
        whole = {"q": q, "k": k, "v": v, "fq": fq, "fk": fk, "mix": mix, "c": c}
        dtype = ctx.walk.call.dtype
        grads = {n: torch.zeros_like(whole[n], dtype=dtype) for n, want in wanted.items() if want}
        d_state: Tensor | None = None
        chunks = ctx.walk.call.chunks()
        for number in range(len(chunks) - 1, -1, -1):
            chunk, sums = chunks[number], ctx.states[number]
            columns = ctx.walk.call.sink_columns(chunk)
            inputs = _slices(whole, chunk, columns, sums)
            needs = {n for n in inputs if wanted.get(n.removeprefix("sink_"), False)}
            if sums is not None and (wanted["v"] or wanted["fk"]):
                needs.add("sums")
            leaves = {
                n: None if x is None else x.detach().requires_grad_(n in needs and x.is_floating_point())
                for n, x in inputs.items()
            }
            with torch.enable_grad():
                found, after = ctx.walk.step(chunk, leaves, columns, last=number == len(chunks) - 1)
            outputs, given = [found[0]], [dy[:, :, chunk.q0 : chunk.q1].to(dtype)]
            if d_state is not None and after is not None and after.requires_grad:
                outputs.append(after)
                given.append(d_state)
            names = [n for n in inputs if n in needs and leaves[n] is not None]
            found_grads = torch.autograd.grad(outputs, [leaves[n] for n in names], given, allow_unused=True)
            d_state = None
            for name, grad in zip(names, found_grads, strict=True):
                if grad is None:
                    continue
                grad = grad.to(dtype)
                if name == "sums":
                    d_state = grad
                elif name.startswith("sink_"):
                    assert columns is not None
                    target = grads[name.removeprefix("sink_")]
                    index = columns[0][:, None, :, None].expand(grad.shape[0], grad.shape[1], -1, grad.shape[3])
                    target.scatter_add_(2, index, grad)
                elif name in ("mix", "c"):
                    grads[name] += grad
                else:
                    start, stop = (chunk.q0, chunk.q1) if name in ("q", "fq") else (chunk.k0, chunk.k1)
                    grads[name][:, :, start:stop] += grad
        return None, *(grads[n].to(whole[n].dtype) if n in grads else None for n in wanted)


def _slices(
    whole: dict[str, Any], chunk: _Chunk, columns: tuple[Tensor, Rows] | None, sums: Tensor | None
) -> dict[str, Tensor | None]:
    """A chunk's own part of every input."""
    inputs: dict[str, Tensor | None] = {
        "q": whole["q"][:, :, chunk.q0 : chunk.q1],
        "fq": whole["fq"][:, :, chunk.q0 : chunk.q1],
        **{n: whole[n][:, :, chunk.k0 : chunk.k1] for n in ("k", "v", "fk")},
        "mix": whole["mix"],
        "c": whole["c"],
        "sums": sums,
    }
    if columns is not None:
        for name in ("k", "v", "fk"):
            x = whole[name]
            index = columns[0][:, None, :, None].expand(x.shape[0], x.shape[1], -1, x.shape[3])
            inputs[f"sink_{name}"] = x.gather(2, index)
    return inputs


def _forward(
    walk: _Walk, q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, mix: Any, c: Any, *, remember: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """All chunks from left to right; the state before each chunk if they are to be remembered."""
    call = walk.call
    whole = {"q": q, "k": k, "v": v, "fq": fq, "fk": fk, "mix": mix, "c": c}
    outputs: list[Tensor] = []
    states: list[Tensor | None] = []
    sums = None if call.past is None else call.past.sums.to(call.dtype)
    chunks = call.chunks()
    for number, chunk in enumerate(chunks):
        if remember:
            states.append(sums)
        columns = call.sink_columns(chunk)
        found, sums = walk.step(chunk, _slices(whole, chunk, columns, sums), columns, last=number == len(chunks) - 1)
        if not outputs:
            outputs = [x.new_empty(*x.shape[:2], q.shape[2], *x.shape[3:], dtype=q.dtype) for x in found]
        for out, x in zip(outputs, found, strict=True):
            out[:, :, chunk.q0 : chunk.q1] = x
    return outputs, states


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
    chunk: int = CHUNK,
) -> list[Tensor]:
    """y, and with `components` the three parts, as the reference has them; computed in float32 (float64 for float64)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    call = _Call(
        options=options,
        q_rows=q_rows,
        k_rows=k_rows,
        keep=window_keep,
        past=past,
        plain=plain,
        size=chunk,
        dtype=dtype,
        heads=q.shape[1],
        components=components,
    )
    walk = _Walk(call, q.shape[0])
    inputs = (q, k, v, phi_q, phi_k, mix, log_scale)
    # Inside a Function `needs_input_grad` is true under no_grad too: ask here.
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return list(_Hybrid.apply(walk, *inputs))
    return _forward(walk, *inputs, remember=False)[0]


def final_sums(
    v: Tensor,
    phi_k: Tensor,
    options: Options,
    k_rows: Rows,
    past: Past | None,
    heads: int,
    keep: int,
    alive: Tensor,
    last: Tensor,
    chunk: int = 1024,
) -> Tensor:
    """The state's sums after a call: over the keys of segment `alive` [B,1] but the `keep` up to position `last` [B,1]."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    counted = (k_rows.segment == alive) & (last - k_rows.position >= keep)
    if options.cover == "outside":
        counted = counted & (k_rows.position >= options.sinks)
    sums = v.new_zeros(v.shape[0], heads, phi_k.shape[-1], v.shape[-1] + 1, dtype=dtype)
    if past is not None:
        # Keys of the ring are in k: a state is carried only where its segment goes on, which a call with a state ensures.
        sums = sums + past.sums
    for start in range(0, v.shape[2], chunk):
        cut = slice(start, start + chunk)
        sums = _fold(sums, v[:, :, cut].to(dtype), phi_k[:, :, cut].to(dtype), counted[:, None, cut].to(dtype), None)
    return sums
