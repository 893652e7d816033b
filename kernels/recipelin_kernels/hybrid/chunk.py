"""One chunk of hybrid attention, forward and backward by hand: weights over its few columns, and the running state.

Shapes inside: B rows, H query heads, g key heads, p heads of phi_k (H or g), C queries, n columns. Products fold the
query heads that share a key head into one matrix, so keys are never repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import LOG2E, SEPARATE, SIGNED_FLOOR, Options, branch_weights

HIDDEN = -1e30  # added to scores outside the softmax set
LOG_TINY = -69.0  # about log(1e-30): no factor of `absolute` is larger than exp(69)


class State(NamedTuple):
    """Sums over the keys before the span: phi_k v [B,p,F,D] and phi_k [B,p,F]."""

    value: Tensor
    mass: Tensor


@dataclass(frozen=True)
class Masks:
    """Of one chunk, 1 and 0 in the dtype of the computation, broadcastable to [B,H,C,n].

    bias: 0 in the softmax set, -1e30 elsewhere; linear: of the columns first..stop, for which phi_q.phi_k is computed;
    shown: softmax columns that count in the numerator, None: all; sees_state, real: [B,1,C,1], None: all.
    """

    soft: Tensor
    bias: Tensor
    linear: Tensor
    first: int
    stop: int
    shown: Tensor | None
    sees_state: Tensor | None
    real: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """q [B,H,C,D]; k, v [B,g,n,D]; fq [B,H,C,F]; fk [B,p,n,F], of a chunk of keys first .. stop - 1 alone; mix, log_scale [H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    fq: Tensor
    fk: Tensor
    mix: Tensor | None
    log_scale: Tensor | None


def fold(x: Tensor, heads: int) -> Tensor:
    """[B,H,C,N] -> [B heads, H / heads C, N]: the heads that share one of `heads`, one below the other."""
    batch, own, rows, width = x.shape
    return x.reshape(batch * heads, own // heads * rows, width)


def dot(x: Tensor, keys: Tensor) -> Tensor:
    """x [B,H,C,N], keys [B,h,n,N] with h dividing H -> [B,H,C,n]."""
    folded = torch.bmm(fold(x, keys.shape[1]), keys.flatten(0, 1).transpose(1, 2))
    return folded.view(*x.shape[:3], keys.shape[2])


class Sums(NamedTuple):
    """Of each query [B,H,C,1]: the largest score in base 2, and the masses of both sides."""

    top: Tensor
    a_mass: Tensor
    b_mass: Tensor


@dataclass
class Weights:
    """Unnormalised weights of a chunk: a on the softmax set, b on the linear set; y = (A a v + B b v) / den."""

    a: Tensor
    b: Tensor
    sums: Sums
    a_factor: Tensor
    b_factor: Tensor | None  # None: 1
    den: Tensor  # inf where no side has mass, so that everything divided by it is 0
    live: Tensor | None  # 0 where a signed denominator is held at its floor; None: all live


def weigh(x: Inputs, state: State | None, masks: Masks, o: Options, sums: Sums | None = None) -> Weights:
    """The weights of one chunk; `sums`: those of the same chunk, found before."""
    # Base 2: on a CPU exp2 takes a third of the time of exp, also of large negative numbers, whose power is exactly 0.
    a = dot(x.q * (o.scale * LOG2E), x.k)
    a += masks.bias
    top = a.amax(-1, keepdim=True).clamp_(min=0.1 * HIDDEN) if sums is None else sums.top
    a.sub_(top).exp2_()
    b = dot(x.fq, x.fk)
    window_mass = (b * masks.soft).sum(-1, keepdim=True) if o.join == "replace" else None
    b *= masks.linear
    if sums is None:
        b_mass = b.sum(-1, keepdim=True)
        if state is not None:
            held = (fold(x.fq, x.fk.shape[1]) * state.mass.flatten(0, 1)[:, None]).sum(-1).view(b_mass.shape)
            b_mass += held if masks.sees_state is None else held * masks.sees_state
        sums = Sums(top, a.sum(-1, keepdim=True), b_mass)

    a_factor, b_factor, den, live = factors(o, x.mix, x.log_scale, sums, window_mass)
    return Weights(a, b, sums, a_factor, b_factor, den, live)


def factors(
    o: Options,
    mix: Tensor | None,
    log_scale: Tensor | None,
    sums: Sums,
    window_mass: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """a_factor, b_factor, den and live of `Weights`; window_mass: of `replace`, M."""
    (top, a_mass, b_mass), b_factor = sums, None
    if o.join in SEPARATE:
        a_weight, b_weight = branch_weights(o.join, a_mass, b_mass)
        linear_den, live = floored(b_mass) if o.signed else (b_mass, None)
        a_factor, b_factor = (
            w / x.masked_fill(w == 0, torch.inf) for w, x in ((a_weight, a_mass), (b_weight, linear_den))
        )
        return a_factor, b_factor, torch.ones_like(a_mass), live
    if o.join == "shared":
        assert mix is not None
        a_factor = mix[:, None, None]
    elif o.join == "replace":
        assert window_mass is not None
        a_factor = window_mass / a_mass.masked_fill(a_mass == 0, torch.inf)
    else:
        assert log_scale is not None
        c = log_scale[:, None, None]
        top = top / LOG2E
        level = absolute_level(top, a_mass, b_mass, c)
        a_factor, b_factor = (top - level).clamp(max=0.0).exp(), (c - level).clamp(max=-LOG_TINY).exp()
    den = a_factor * a_mass + (b_mass if b_factor is None else b_factor * b_mass)
    live = None
    if o.signed:
        den, live = floored(den)
    return a_factor, b_factor, den.masked_fill(den == 0, torch.inf), live


def floored(den: Tensor) -> tuple[Tensor, Tensor]:
    """A signed denominator kept away from 0, and where it is not at its floor: 1, else 0."""
    return den.sign() * den.abs().clamp(min=SIGNED_FLOOR), (den.abs() >= SIGNED_FLOOR).to(den.dtype)


def absolute_level(top: Tensor, a_mass: Tensor, b_mass: Tensor, log_scale: Tensor) -> Tensor:
    """The shift of an `absolute` row: the larger logarithm of its two sides. y does not depend on it: no gradient."""
    with torch.no_grad():
        tiny = torch.finfo(a_mass.dtype).tiny
        soft = torch.where(a_mass > 0, top, -torch.inf)
        linear = torch.where(b_mass != 0, log_scale + b_mass.abs().clamp(min=tiny).log(), -torch.inf)
        level = torch.maximum(soft, linear)
        return level.masked_fill(level == -torch.inf, 0.0)


def forward(
    w: Weights, x: Inputs, state: State | None, masks: Masks, o: Options, into: Sequence[Tensor], *, spend: bool
) -> None:
    """Writes y [B,H,C,D]; where `into` has places for them also the window branch, the linear branch and its share [B,H,C].

    spend: w is not needed any more.
    """
    key_heads, shape = x.k.shape[1], (*x.q.shape[:3], x.v.shape[-1])
    v = x.v.flatten(0, 1)
    past = None
    if state is not None and o.shown("linear"):
        past = torch.bmm(fold(x.fq, x.fk.shape[1]), state.value.flatten(0, 1)).view(shape)
        if masks.sees_state is not None:
            past *= masks.sees_state
    if len(into) > 1:
        a = w.a if masks.shown is None else w.a * masks.shown
        a_value = torch.bmm(fold(a, key_heads), v).view(shape)
        b_value = None
        if o.shown("linear"):
            b_value = torch.bmm(fold(w.b, key_heads), v[:, masks.first : masks.stop]).view(shape)
            b_value = b_value if past is None else b_value.add_(past)
        y = w.a_factor * a_value
        if b_value is not None:
            y += b_value if w.b_factor is None else w.b_factor * b_value
        _parts(w, a_value, b_value, o, into[1:])
    else:
        weights = fold(numerator(w, masks, o, spend=spend), key_heads)
        if past is None:
            y = torch.bmm(weights, v).view(shape)
        else:
            y = past if w.b_factor is None else past.mul_(w.b_factor)
            y.view(weights.shape[0], -1, shape[-1]).baddbmm_(weights, v)
    torch.div(y, w.den, out=into[0])
    if masks.real is not None:
        into[0].mul_(masks.real)


def _parts(w: Weights, a_value: Tensor, b_value: Tensor | None, o: Options, into: Sequence[Tensor]) -> None:
    """Writes each branch normalised by itself, and the linear share."""
    window, linear, share = into
    torch.div(a_value, w.sums.a_mass.masked_fill(w.sums.a_mass == 0, torch.inf), out=window)
    if b_value is None:
        linear.zero_()
    else:
        linear_den = floored(w.sums.b_mass)[0] if o.signed else w.sums.b_mass
        torch.div(b_value, linear_den.masked_fill(linear_den == 0, torch.inf), out=linear)
    if o.join in SEPARATE:
        a_weight, b_weight = branch_weights(o.join, w.sums.a_mass, w.sums.b_mass)
        torch.div(b_weight, (a_weight + b_weight).clamp_(min=0.5), out=share[..., None])
    else:
        torch.div(w.sums.b_mass if w.b_factor is None else w.b_factor * w.sums.b_mass, w.den, out=share[..., None])


def numerator(w: Weights, masks: Masks, o: Options, *, spend: bool = False) -> Tensor:
    """[B,H,C,n]: what multiplies v within the columns; `spend` puts it in the place of w.a."""
    weights = w.a.mul_(w.a_factor) if spend else w.a * w.a_factor
    if masks.shown is not None:
        weights *= masks.shown
    if o.shown("linear") and masks.stop > masks.first:
        weights[..., masks.first : masks.stop].add_(w.b if w.b_factor is None else w.b * w.b_factor)
    return weights


@dataclass
class Gradients:
    """Of the tensors of `Inputs` (None where not wanted) and of the state."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    fq: Tensor | None = None
    fk: Tensor | None = None
    mix: Tensor | None = None
    log_scale: Tensor | None = None
    state: State | None = None


def backward(
    w: Weights,
    x: Inputs,
    state: State | None,
    masks: Masks,
    o: Options,
    y: Tensor,
    dy: Tensor,
    d_state: State | None,
    wants: frozenset[str],
) -> Gradients:
    """Gradients of one chunk from its weights, its output y and dy [B,H,C,D]; `wants` names inputs, and "state": that of later
    chunks is `d_state`, which is spent.
    """
    batch, heads, rows, _ = x.q.shape
    key_heads, map_heads = x.k.shape[1], x.fk.shape[1]
    first, stop = masks.first, masks.stop
    v, fk = x.v.flatten(0, 1), x.fk.flatten(0, 1)
    dn = dy / w.den if masks.real is None else dy * masks.real / w.den
    d_den = (dn * y).sum(-1, keepdim=True).neg_()
    found = Gradients()
    if "v" in wants:
        found.v = torch.bmm(fold(numerator(w, masks, o), key_heads).transpose(1, 2), fold(dn, key_heads))

    # dx: gradient to each column's weight but for its part in the denominator.
    alone = o.join == "replace" or o.join in SEPARATE  # the softmax side has a denominator of its own
    scores = bool(wants & {"q", "k", "mix"})
    begin, end = (0, v.shape[1]) if scores or alone else (first, stop)
    dx = torch.bmm(fold(dn, key_heads), v[:, begin:end].transpose(1, 2)).view(batch, heads, rows, -1)
    if scores or alone:
        da = dx if masks.shown is None else dx * masks.shown
    if alone:
        p = w.a / w.sums.a_mass.masked_fill(w.sums.a_mass == 0, torch.inf)
        mean = (p * da).sum(-1, keepdim=True)
    if o.join in SEPARATE:
        # Of the linear side's own denominator: what of dn y is not the softmax side's.
        b_weight = branch_weights(o.join, w.sums.a_mass, w.sums.b_mass)[1]
        d_den += w.a_factor * w.sums.a_mass * mean
        d_den /= b_weight.masked_fill(b_weight == 0, torch.inf)
        if not o.shown("linear"):
            d_den.zero_()
    if w.live is not None:
        d_den *= w.live
    db = (dx[..., first - begin : stop - begin] + d_den) if o.shown("linear") else d_den
    db = db * masks.linear
    if w.b_factor is not None:
        db *= w.b_factor

    if o.join == "replace":
        db += (mean + d_den) * masks.soft
    if scores:
        ds = (da - mean).mul_(p).mul_(w.a_factor * w.sums.a_mass) if alone else (da + d_den).mul_(w.a)
        _through_scores(found, ds, w, x, o, wants)

    db, fq = fold(db, map_heads), fold(x.fq, map_heads)
    features = bool(wants & {"fq", "log_scale"})
    if "fk" in wants:
        found.fk = torch.bmm(db.transpose(1, 2), fq)
    if state is not None and (features or "state" in wants):
        factor = w.b_factor
        if masks.sees_state is not None:
            factor = masks.sees_state if factor is None else factor * masks.sees_state
        dn, d_den = (dn, d_den) if factor is None else (dn * factor, d_den * factor)
        dn, d_den = fold(dn, map_heads), fold(d_den.contiguous(), map_heads)
        if features:
            found.fq = d_den * state.mass.flatten(0, 1)[:, None]
            if o.shown("linear"):
                found.fq.baddbmm_(dn, state.value.flatten(0, 1).transpose(1, 2))
            found.fq.baddbmm_(db, fk)
        if "state" in wants:
            d_state = d_state or State(torch.zeros_like(state.value), torch.zeros_like(state.mass))
            if o.shown("linear"):
                d_state.value.flatten(0, 1).baddbmm_(fq.transpose(1, 2), dn)
            d_state.mass.flatten(0, 1).add_((fq * d_den).sum(1))
    elif features:
        found.fq = torch.bmm(db, fk)
    found.state = d_state
    if "log_scale" in wants:
        assert found.fq is not None
        found.log_scale = (found.fq * fq).view(batch, heads, -1).sum((0, 2))
    if found.fq is not None:
        found.fq = found.fq.view(x.fq.shape)
    return found


def _through_scores(found: Gradients, ds: Tensor, w: Weights, x: Inputs, o: Options, wants: frozenset[str]) -> None:
    """Gradients of mix, q and k from ds [B,H,C,n], which is spent: to the scores; where the denominator is shared, to a score
    of weight a, that is without `a_factor` and the row maximum's part.
    """
    through = o.join == "shared" and o.max_gradient == "through" and bool(wants & {"q", "k"})
    if through or "mix" in wants:
        row = ds.sum(-1, keepdim=True)
    if "mix" in wants:
        found.mix = row.sum((0, 2, 3))
    if not wants & {"q", "k"}:
        return
    if through:
        # a = 1 where the score is the row's maximum; amax shares its gradient between equal ones.
        top = w.a.floor()
        ds.addcmul_(top, row / top.sum(-1, keepdim=True).clamp_(min=1.0), value=-1.0)
    factor = o.scale * w.a_factor if o.join in ("shared", "absolute") else o.scale
    key_heads = x.k.shape[1]
    ds = fold(ds, key_heads)
    if "q" in wants:
        found.q = torch.bmm(ds, x.k.flatten(0, 1)).view(x.q.shape).mul_(factor)
    if "k" in wants:
        found.k = torch.bmm(ds.transpose(1, 2), fold(x.q * factor, key_heads))
