"""The cross-entropy between attention weights in O(T) memory: gradients by hand, in the same pass as the loss.

A block of queries meets all its keys, for so few heads at a time that their weights stay in the cache: at most
max(TILE, group x BLOCK x T) of them exist at once. With X = phi.phi, J the student's unnormalised row (J = X for the
linear form), N = sum J, A = J / N and u = [A >= 1e-12], the pairs that the clamp leaves alone:

    loss_i = - sum_j P_ij log max(A_ij, 1e-12)        dloss_i / dJ_ij = (sum_j P_ij u_ij - P_ij u_ij / A_ij) / N_i

As A does not change with the scale of J, sum_j J_ij dloss_i / dJ_ij = 0; hence the gradient of log_scale, the sum over
the linear part, is minus the sum over the softmax part, which has few columns.

Signed features: N and the linear mass may be negative, and below 1e-6 in size they are divided by as if they were that
large, and constant: then the first term of the gradient is not there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hybrid.rows import LOG2E, SEPARATE, SIGNED_FLOOR, Options, Rows, divisor, softmax_set, visible
from .made import LEARNED
from .reference import LEAST

BLOCK = 128  # 64 to 192 measured within 5 % of each other
TILE = 1 << 17  # weights of a tile: 512 KiB of fp32, so that the few arrays of a tile share a level-2 cache
Part = tuple[slice, Tensor]  # some columns, and a mask over them


def cut(rows: Rows, start: int, stop: int) -> Rows:
    """Tokens start .. stop - 1."""
    return Rows(rows.position[:, start:stop], rows.segment[:, start:stop])


@dataclass(frozen=True)
class Sets:
    """Keys 0 .. stop - 1 of a block of queries, [B,1,C,stop] bool each.

    teacher: the teacher's, within its own window; seen: the student's, within `reach`; near, sinks: its window, and the
    sinks beside it, seen or not. `seen` is `teacher` itself where both are cut alike.
    """

    teacher: Tensor
    seen: Tensor
    near: Tensor
    sinks: Tensor


def sets(options: Options, rows: Rows, start: int, stop: int, teacher_window: int | None) -> Sets:
    """Who sees whom in the block of queries start .. stop - 1."""
    q_rows, k_rows = cut(rows, start, stop), cut(rows, 0, stop)
    teacher = visible(q_rows, k_rows, teacher_window)[:, None]
    seen = teacher if options.reach == teacher_window else visible(q_rows, k_rows, options.reach)[:, None]
    near, sinks = (m[:, None] for m in softmax_set(options, q_rows, k_rows))
    return Sets(teacher, seen, near, sinks)


def columns(mask: Tensor) -> slice:
    """The shortest run of columns that holds every True of [..., n]; empty if there is none."""
    found = mask.flatten(0, -2).any(0).nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def spans_of(*masks: Tensor) -> list[Part]:
    """The columns of each mask that holds any True, and the mask over them."""
    return [(s, m[..., s]) for m in masks if (s := columns(m)).stop]


class _Soft:
    """The softmax part of the rows of a tile: e = exp(s - top) over its few columns, 0 elsewhere."""

    def __init__(self, above: Tensor, parts: list[Part]) -> None:
        """above [n,G,C,K]: scores minus the teacher's log-sum-exp, times log2 e; parts: columns and mask of each set."""
        self.parts = parts
        tops = [above[..., s].masked_fill(~m, -torch.inf).amax(-1, keepdim=True) for s, m in parts]
        top = torch.stack(tops).amax(0) if tops else torch.full_like(above[..., :1], -torch.inf)
        self.present = ~torch.isinf(top)
        self.top = torch.where(self.present, top, 0.0)
        self.e = [(above[..., s] - self.top).clamp_(max=0.0).exp2_().masked_fill_(~m, 0.0) for s, m in parts]
        self.mass = self.over(self.e, None)

    def over(self, values: list[Tensor], other: Tensor | None) -> Tensor:
        """Row sums [n,G,C,1] of values, times the columns of `other` if given."""
        total = torch.zeros_like(self.top)
        for (s, _), x in zip(self.parts, values, strict=True):
            total += (x if other is None else x * other[..., s]).sum(-1, keepdim=True)
        return total


def student(
    x: Tensor,
    soft: _Soft,
    silent: list[Part],
    mix: Tensor | None,
    log_scale: Tensor | None,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Turns X of a tile, 0 at hidden keys, into J in place. Returns (a of a = a e, b of b = b X or None for 1, N, the
    mass that N follows), [n,G,C,1].

    silent: keys of the softmax side that the linear side leaves out.

    `absolute` is divided by its row's largest part, exp(top) or exp(c) sum X: the scale of J is free.
    """
    if options.join == "replace":
        held = [torch.where(m, x[..., s], 0.0).sum(-1, keepdim=True) for s, m in soft.parts]
        weight = sum(held, torch.zeros_like(soft.top)) / torch.where(soft.present, soft.mass, 1.0)
    for s, m in silent:
        x[..., s].masked_fill_(m, 0.0)
    scale = None
    if options.join in SEPARATE:
        # Both sides weigh the same: the softmax side gets the linear side's mass. Without linear mass it stands alone.
        mass = x.sum(-1, keepdim=True)
        scale = (mass.abs() >= torch.finfo(x.dtype).tiny).to(x.dtype)
        size = divisor(mass, options.signed)
        weight = torch.where(scale > 0, size / torch.where(soft.present, soft.mass, 1.0), 1.0)
        total = torch.where(scale > 0, size * (1 + soft.present.to(x.dtype)), soft.mass)
        x.mul_(scale)
    elif options.join == "shared":
        assert mix is not None
        weight = mix.expand_as(soft.top)
    elif options.join == "absolute":
        assert log_scale is not None
        mass = x.sum(-1, keepdim=True)
        unit = log_scale - lse
        linear = torch.where(mass > 0, unit + mass.clamp(min=torch.finfo(x.dtype).tiny).log(), -torch.inf)
        top = soft.top / LOG2E
        most = torch.maximum(torch.where(soft.present, top, -torch.inf), linear).clamp(min=torch.finfo(x.dtype).min)
        weight = torch.where(soft.present, (top - most).exp(), 0.0)
        scale = torch.where(mass > 0, (unit - most).exp(), 0.0)
        x.mul_(scale)
    for (s, _), e in zip(soft.parts, soft.e, strict=True):
        x[..., s].add_(weight * e)
    if options.join not in SEPARATE:
        mass = x.sum(-1, keepdim=True)
        total = divisor(mass, options.signed)
    return weight, scale, total, mass


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Sums over the last two dimensions of x y, both [n,G,C,K] and without gaps: one pass."""
    pairs = zip(x.flatten(0, 1).flatten(1), y.flatten(0, 1).flatten(1), strict=True)
    return torch.stack([torch.dot(one, other) for one, other in pairs]).view(x.shape[:2])


@torch.no_grad()
def weight_transfer_chunked(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor | None,
    log_scale: Tensor | None,
    lse: Tensor,
    target: str,
    options: Options,
    rows: Rows,
    teacher_window: int | None,
    learn: frozenset[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of the loss over rows [H], and the gradients of each head's sum to what learns, by the names of LEARNED."""
    given = dict(zip(LEARNED, (phi_q, phi_k, mix, log_scale), strict=True))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, heads, length, _), key_heads = q.shape, k.shape[1]
    units, group, each = batch * key_heads, heads // key_heads, phi_k.shape[1] // key_heads

    # A unit is a key head of a row with its group of query heads; `each` of the heads of phi_k belong to it.
    q, phi_q, lse = (x.to(dtype).reshape(units, group, length, -1) for x in (q, phi_q, lse))
    k, phi_k = (x.to(dtype).reshape(-1, length, x.shape[-1]) for x in (k, phi_k))
    mix, log_scale = (
        None if x is None else x.to(dtype).view(1, key_heads, group, 1, 1).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        for x in (mix, log_scale)
    )  # fmt: skip
    grads = {n: torch.zeros_like(x) for n, x in (("phi_q", phi_q), ("phi_k", phi_k)) if n in learn}
    grads |= {n: q.new_zeros(units, group) for n in ("mix", "log_scale") if n in learn}
    total = q.new_zeros(units, group)
    row = torch.arange(units, device=q.device) // key_heads

    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        found = sets(options, rows, start, stop, teacher_window)
        untaught, hidden = ~found.teacher, ~(found.seen | found.sinks if target == "hybrid" else found.seen)
        far, shut = columns(untaught), columns(hidden)
        spans = spans_of(found.near, found.sinks) if target == "hybrid" else []
        unheard = spans if options.cover == "outside" else spans_of(found.sinks & ~found.seen)
        step = max(1, TILE // (group * (stop - start) * stop))
        for first in range(0, units, step):
            tile = slice(first, min(first + step, units))
            here, wide = tile.stop - first, slice(first * each, tile.stop * each)
            shape = (here, group, stop - start, stop)

            def of(mask: Tensor, tile: slice = tile) -> Tensor:
                return mask if mask.shape[0] == 1 else mask[row[tile]]

            no_p, closed = of(untaught[..., far]), of(hidden[..., shut])
            parts, silent = ([(s, of(m)) for s, m in each] for each in (spans, unheard))
            q_tile = q[tile, :, start:stop].reshape(here, group * (stop - start), -1)
            fq = phi_q[tile, :, start:stop].reshape(here * each, group // each * (stop - start), -1)
            fk = phi_k[wide, :stop]
            lse_tile = lse[tile, :, start:stop]
            # Base 2: exp2 and log2 take less time on a CPU than exp and log, whatever they meet.
            above = lse_tile.reshape(here, -1, 1) * -LOG2E
            p = torch.baddbmm(above, q_tile, k[tile, :stop].mT, alpha=options.scale * LOG2E)
            p = p.view(shape)
            a = torch.bmm(fq, fk.mT).view(shape)
            a[..., shut].masked_fill_(closed, 0.0)
            scale = None
            if target == "hybrid":
                soft = _Soft(p, parts)
                own_mix, own_scale = (None if x is None else x[tile] for x in (mix, log_scale))
                weight, scale, n, mass = student(a, soft, silent, own_mix, own_scale, lse_tile, options)
            else:
                mass = a.sum(-1, keepdim=True)
                n = divisor(mass, options.signed)
            p.exp2_()
            p[..., far].masked_fill_(no_p, 0.0)
            inverse = torch.where(n != 0, 1.0 / n, 0.0)
            a.mul_(inverse)
            a[..., far].masked_fill_(no_p, 1.0)
            clamped = a < LEAST if bool(a.amin() < LEAST) else None
            if clamped is not None:
                a.clamp_(min=LEAST)
            total[tile].sub_(_products(p, a.log2()) / LOG2E)
            if not grads:
                continue
            if clamped is not None:
                p.masked_fill_(clamped, 0.0)
            kept = p.sum(-1, keepdim=True)
            held = mass.abs() < SIGNED_FLOOR if options.signed else None  # where N does not follow its sum
            if held is not None:
                kept.masked_fill_(held, 0.0)
            g = torch.addcdiv(kept, p, a, value=-1.0, out=a)  # dloss / dJ times N
            if target == "hybrid":
                pull = soft.over(soft.e, g)
                if "mix" in grads:
                    grads["mix"][tile] += (pull * inverse).sum((-2, -1))
                if "log_scale" in grads:
                    grads["log_scale"][tile] -= (pull * inverse * weight).sum((-2, -1))
                # Where the softmax side's weight is a linear mass: of the window, or of the linear side.
                shared = pull / torch.where(soft.present, soft.mass, 1.0)
                if options.join in SEPARATE:
                    g += shared if held is None else shared.masked_fill(held, 0.0)
                for s, m in silent:
                    g[..., s].masked_fill_(m, 0.0)
                if options.join == "replace":
                    for s, m in parts:
                        g[..., s].add_(torch.where(m, shared, 0.0))
            g[..., shut].masked_fill_(closed, 0.0)
            g = g.view(here * each, -1, stop)
            factor = (inverse if scale is None else inverse * scale).reshape(here * each, -1, 1)
            if "phi_q" in grads:
                grads["phi_q"][tile, :, start:stop] = (torch.bmm(g, fk) * factor).view(*shape[:3], -1)
            if "phi_k" in grads:
                grads["phi_k"][wide, :stop].baddbmm_(g.mT, fq * factor)
    whole = {n: x.view(given[n].shape) if x.ndim > 2 else x.view(batch, heads).sum(0) for n, x in grads.items()}  # type: ignore[union-attr]
    return total.view(batch, heads).sum(0), whole
