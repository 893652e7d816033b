"""The gated delta rule in chunks: O(T) time and memory, forward and backward, any device that torch has.

Within a chunk, with G_i the sum of g up to token i, D_ij = exp(G_i - G_j) for j <= i and S the state before the chunk
(the columns of S are its values; q carries the scale):

    A_ij = beta_i (k_i.k_j) D_ij for j < i        M = (I + A)^-1, one batched triangular solve
    V = M (beta v) - M (beta e^G k) S             what each token writes into the state
    o = (e^G q) S + ((q k^T) D) V                 S <- e^{G_C} S + (e^{G_C - G} k)^T V

Only the two products with S go from chunk to chunk; all else is batched over a span of chunks small enough for the cache.
Where a segment begins, D, e^G and e^{G_C - G} are 0 across its beginning. Exponents are never positive. Sums of g are
taken in fp64: after a strong decay, fp32 would lose the weak ones behind it. The backward pass computes a span again
from the state that it began with, and runs through the chunks from the last to the first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import without_autocast

EXP_FLOOR = -85.0  # exp of less is below 1.2e-37, and subnormal inputs make exp six times slower on a CPU
# Tokens of a chunk: on a CPU 16 and 64 were slower for heads of 64 and 128; on a GPU fla's, not measured here.
CHUNK = {"cpu": 32, "cuda": 64}
# Chunks x heads at once: on a CPU their states of 64 x 64 are 1 MiB in fp32; on a GPU few launches matter, not measured.
SPAN = {"cpu": 64, "cuda": 16384}


class _Span(NamedTuple):
    """What a span of chunks computes, [N,n,...] for N rows x heads and n chunks; names as in the module's docstring."""

    decay: Tensor  # D, 0 for j > i
    head: Tensor  # e^G, 0 behind the beginning of a segment
    tail: Tensor  # e^{G_C - G}, 0 before the last segment
    inverse: Tensor  # M
    keys: Tensor  # k k^T
    pairs: Tensor  # q k^T
    solved_v: Tensor  # M beta v
    solved_k: Tensor  # M beta e^G k
    states: Tensor  # S before each chunk
    writes: Tensor  # V


def gated_delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    begins: Tensor | None,
    state: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_reference`, all tensors of one dtype, fp32 or fp64; begins None: no segment begins in the call."""
    batch, heads, length, _ = q.shape
    chunk = min(chunk or CHUNK[_place(q)], length)
    short = -length % chunk
    if short:  # tokens that change nothing: g = beta = 0
        pad = torch.nn.functional.pad
        q, k, v = (pad(x, (0, 0, 0, short)) for x in (q, k, v))
        g, beta = (pad(x, (0, short)) for x in (g, beta))
        begins = None if begins is None else pad(begins, (0, short))
    q, k, v, g, beta = (x.flatten(0, 1).unflatten(1, (-1, chunk)) for x in (q, k, v, g, beta))
    if begins is not None:
        begins = begins.repeat_interleave(heads, 0).unflatten(1, (-1, chunk))
    arguments = (q, k, v, g, beta, state.flatten(0, 1))
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments):
        o, last = _Chunked.apply(*arguments, begins, scale)
    else:
        o, last, _ = _forward(*arguments, begins, scale)
    return o.flatten(1, 2)[:, :length].unflatten(0, (batch, heads)), last.unflatten(0, (batch, heads))


def _place(x: Tensor) -> str:
    return "cpu" if x.device.type == "cpu" else "cuda"


def _spans(q: Tensor) -> list[slice]:
    """Spans of chunks that are computed at once."""
    size = max(1, SPAN[_place(q)] // q.shape[0])
    return [slice(at, at + size) for at in range(0, q.shape[1], size)]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, begins: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """o [N,n,C,E], the last state [N,D,E], and the state before each span."""
    o, before = torch.empty_like(v), []
    for at in _spans(q):
        before.append(state)
        scaled = q[:, at] * scale
        x, state = _span(scaled, k[:, at], v[:, at], g[:, at], beta[:, at], state, _cut(begins, at))
        o[:, at] = (scaled * x.head[..., None]) @ x.states + (x.pairs * x.decay) @ x.writes
    return o, state, before


def _cut(begins: Tensor | None, at: slice) -> Tensor | None:
    return None if begins is None else begins[:, at]


def _span(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, begins: Tensor | None
) -> tuple[_Span, Tensor]:
    size = q.shape[2]
    total = g.double().cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).to(q.dtype).clamp_(EXP_FLOOR, 0).exp_().tril_()
    head = total.clamp(min=EXP_FLOOR).to(q.dtype).exp_()
    tail = (total[..., -1:] - total).clamp_(min=EXP_FLOOR).to(q.dtype).exp_()
    if begins is not None:
        number = begins.long().cumsum(-1)
        decay.mul_(number[..., :, None] == number[..., None, :])
        head.mul_(number == 0)
        tail.mul_(number == number[..., -1:])
    keys = k @ k.mT
    a = (beta[..., None] * keys).mul_(decay)
    identity = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
    solved_v = inverse @ (beta[..., None] * v)
    solved_k = inverse @ ((beta * head)[..., None] * k)
    writes = torch.empty_like(v)
    states = v.new_empty(*k.shape[:2], k.shape[-1], v.shape[-1])
    kept = (tail[..., None] * k).mT
    for n in range(q.shape[1]):
        states[:, n] = state
        torch.baddbmm(solved_v[:, n], solved_k[:, n], state, alpha=-1, out=writes[:, n])
        state = torch.baddbmm(head[:, n, -1, None, None] * state, kept[:, n], writes[:, n])
    return _Span(decay, head, tail, inverse, keys, q @ k.mT, solved_v, solved_k, states, writes), state


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        state: Tensor,
        begins: Tensor | None,
        scale: float,
    ) -> Any:
        o, last, before = _forward(q, k, v, g, beta, state, begins, scale)
        ctx.save_for_backward(q, k, v, g, beta, torch.stack(before), begins)
        ctx.scale = scale
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor, d_state: Tensor) -> Any:
        q, k, v, g, beta, before, begins = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v, g, beta))
        for at, state in reversed(list(zip(_spans(q), before, strict=True))):
            with without_autocast(q.device):  # as in the forward pass
                scaled, cut = q[:, at] * ctx.scale, _cut(begins, at)
                d_q, *found, d_state = _backward(
                    scaled, k[:, at], v[:, at], g[:, at], beta[:, at], state, cut, d_o[:, at], d_state
                )
                found = [d_q.mul_(ctx.scale), *found]
            for whole, part in zip(grads, found, strict=True):
                whole[:, at] = part
        return *grads, d_state, None, None


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    begins: Tensor | None,
    d_o: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients to q, k, v, g, beta of a span and to the state before it, from those to its o and to the state behind it."""
    x, _ = _span(q, k, v, g, beta, state, begins)
    pairs = x.pairs * x.decay
    head, tail, b = x.head[..., None], x.tail[..., None], beta[..., None]
    d_writes = pairs.mT @ d_o
    into = (head * q).mT @ d_o  # to S, from o alone
    behind = torch.empty_like(x.states)  # to the state after each chunk
    for n in reversed(range(q.shape[1])):
        behind[:, n] = d_state
        d_writes[:, n].baddbmm_(tail[:, n] * k[:, n], d_state)
        d_state = torch.baddbmm(head[:, n, -1:] * d_state, x.solved_k[:, n].mT, d_writes[:, n], alpha=-1)
        d_state += into[:, n]
    d_head_q = d_o @ x.states.mT
    d_kept = x.writes @ behind.mT
    d_solved = torch.cat((d_writes, -(d_writes @ x.states.mT)), -1)
    d_right = x.inverse.mT @ d_solved  # to [beta v | beta e^G k]
    d_bv, d_bk = d_right.split((v.shape[-1], k.shape[-1]), -1)
    d_a = (d_right @ torch.cat((x.solved_v, x.solved_k), -1).mT).neg_().tril_(-1)
    d_pairs = d_o @ x.writes.mT
    # To the exponent of D: everything that D multiplies, times its gradient.
    d_a *= x.decay
    a_keys = d_a * x.keys
    d_exponent = (b * a_keys).add_(d_pairs * pairs)
    d_pairs *= x.decay
    d_keys = b * d_a
    d_q = head * d_head_q + d_pairs @ k
    bhk_g = b * d_bk
    d_k = (d_keys + d_keys.mT) @ k + d_pairs.mT @ q + tail * d_kept + head * bhk_g
    at_head = ((d_head_q * q).sum(-1) + (bhk_g * k).sum(-1)) * x.head
    at_tail = (d_kept * k).sum(-1) * x.tail
    d_total = at_head - at_tail + d_exponent.sum(-1) - d_exponent.sum(-2)
    d_total[..., -1] += at_tail.sum(-1) + (behind * x.states).sum((-1, -2)) * x.head[..., -1]
    d_g = d_total.flip(-1).cumsum(-1).flip(-1)
    d_beta = (d_bv * v).sum(-1) + (d_bk * k).sum(-1) * x.head + a_keys.sum(-1)
    return d_q, d_k, b * d_bv, d_g, d_beta, d_state
