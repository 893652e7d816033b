"""What both implementations of hybrid attention share: checked options, positions, and who may see whom."""

import difflib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..packing import check_tokens

JOINS = ("shared", "absolute", "replace", "average", "sum")
SEPARATE = ("average", "sum")  # joins of branches that are normalised each by itself
SHAPES = ("sliding", "terraced")
COMPATS = ("lolcats_tk_v1",)
COVERS = ("outside", "all")
GRADIENTS = ("through", "detached")
DROPS = ("linear_covers_all", "linear_outside")
BRANCHES = ("window", "linear", "sinks")
ABLATIONS = ("mass", "output")

SIGNED_FLOOR = 1e-6  # |denominator| of signed features is at least this (DESIGN §5, activation `none`)
LOG2E = 1.4426950408889634  # exp(x) = 2^(x log2 e)


def one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Raises ValueError with what was found, what is valid and the nearest name."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(valid)}{hint}")


def learning(*tensors: Tensor | None) -> bool:
    """Whether a gradient to any of them is asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor | None,
    window: int,
    sinks: int,
    first_query: int = 0,
) -> None:
    """Raises ValueError for what does not fit beside q, and for a window, sinks or first query that are none."""
    if q.dim() != 4 or k.dim() != 4 or not q.is_floating_point():
        raise ValueError(
            f"q of {q.dtype} {tuple(q.shape)}, k {tuple(k.shape)}: expected floating-point numbers [B,H,T,D] and [B,Hkv,T,D]"
        )
    batch, heads, queries, width = q.shape
    key_heads = k.shape[1]
    if (
        isinstance(first_query, bool)
        or not isinstance(first_query, int)
        or first_query < 0
        or (first_query and not queries)
    ):
        raise ValueError(f"first_query={first_query!r}: expected the position of a query, {queries} of them in q")
    length = first_query + queries
    for size in (window, sinks):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"window={window!r}, sinks={sinks!r}: expected integers of at least 0")
    if not k.shape[2] or not width or not key_heads:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}: expected at least one token, one head and a width of 1"
        )
    if heads % key_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    features, map_heads = phi_q.shape[-1], key_heads if phi_k is None else phi_k.shape[1]
    for name, x, expected in (
        ("k", k, (batch, key_heads, length, width)),
        ("v", v, (batch, key_heads, length, width)),
        ("phi_q", phi_q, (batch, heads, queries, features)),
        ("phi_k", phi_k, (batch, map_heads, length, features)),
    ):
        if x is not None and x.shape != expected:
            raise ValueError(f"{name} {tuple(x.shape)}: expected {expected} beside q {tuple(q.shape)}")
    if map_heads not in (heads, key_heads):
        raise ValueError(f"phi_k has {map_heads} heads: expected {heads} (query heads) or {key_heads} (key heads)")


def numbers_of(
    join: str, mix: Tensor | None, log_scale: Tensor | None, heads: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mix of `shared`, log_scale of `absolute`), None for other joins. ValueError where a join lacks its number of each head."""
    for its, name, x in (("shared", "mix", mix), ("absolute", "log_scale", log_scale)):
        if join == its and (not isinstance(x, Tensor) or x.shape != (heads,)):
            found = tuple(x.shape) if isinstance(x, Tensor) else x
            raise ValueError(f"join={join!r} needs {name} [{heads}], a number for each query head, found {found}")
    return mix if join == "shared" else None, log_scale if join == "absolute" else None


def check_reach(name: str, reach: int | None) -> None:
    """Raises ValueError for what is no number of keys that a query may look back, or None."""
    if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int) or reach < 1):
        raise ValueError(f"{name}={reach!r}: expected an integer of at least 1, or None")


def of_each_head(window_keep: Tensor, expected: torch.Size) -> Tensor:
    """window_keep [B,H], which may be given once for all rows or heads. Raises ValueError for others."""
    fits = len(window_keep.shape) == 2 and all(n in (1, m) for n, m in zip(window_keep.shape, expected, strict=True))
    if window_keep.dtype != torch.bool or not fits:
        raise ValueError(
            f"window_keep of {window_keep.dtype} {tuple(window_keep.shape)}: expected bool {tuple(expected)}, by row and head"
        )
    return window_keep.expand(expected)


def span_of(window: int, shape: str, reach: int | None, *, linear: bool) -> int:
    """How far back keys are looked at one by one, the query included; what is farther is summed up, or cut off.

    As far as W can reach: w, terraced 2 w. With `reach` and a linear branch: reach, as sums could not forget its keys.
    """
    softmax = 2 * window if shape == "terraced" else window
    if reach is None:
        return softmax
    return reach if linear else min(softmax, reach)


@dataclass(frozen=True)
class Options:
    """The options of one call, checked. anchor: a position at which a block of the terraced window begins."""

    window: int
    sinks: int
    cover: str
    join: str
    max_gradient: str
    ablate: frozenset[tuple[str, str]]  # (branch, how)
    scale: float
    on_drop: str
    signed: bool
    shape: str = "sliding"
    reach: int | None = None
    anchor: int = 0

    @property
    def span(self) -> int:
        """`span_of` these options."""
        return span_of(self.window, self.shape, self.reach, linear=self.has("linear"))

    @property
    def sums_up(self) -> bool:
        """Whether keys before the span go on to count, in sums."""
        return self.has("linear") and self.reach is None

    @property
    def drops_onto_sinks(self) -> bool:
        """Whether sums hold the sinks of heads whose window is dropped, and of no others."""
        covers = self.sinks > 0 and self.cover == "outside" and self.on_drop == "linear_covers_all"
        return covers and self.sums_up

    def has(self, branch: str) -> bool:
        """Whether a branch is part of the row's mass."""
        return (branch, "mass") not in self.ablate

    def shown(self, branch: str) -> bool:
        """Whether a branch is part of the numerator."""
        return self.has(branch) and (branch, "output") not in self.ablate


@dataclass(frozen=True)
class Rows:
    """Positions of tokens, [B, T] each: in their segment from its first real token, and the number of the segment.

    Padding has segment -1. A segment is a run of equal `segment_ids`; the same id coming back later is a new one.
    """

    position: Tensor
    segment: Tensor

    def cut(self, rows: slice) -> "Rows":
        """Some rows of a batch."""
        return Rows(self.position[rows], self.segment[rows])

    def columns(self, start: int, stop: int | None = None) -> "Rows":
        """Some tokens of every row."""
        return Rows(self.position[:, start:stop], self.segment[:, start:stop])


class PlainRows(Rows):
    """Without padding and segments: made when they are read, which a GPU's kernels do not; to make them takes it two launches."""

    size: tuple[int, int]
    device: torch.device

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        vars(self).update(size=(batch, length), device=device)  # frozen, as Rows is

    @cached_property
    def position(self) -> Tensor:
        return torch.arange(self.size[1], device=self.device).expand(self.size)

    @cached_property
    def segment(self) -> Tensor:
        return torch.zeros(1, dtype=torch.long, device=self.device).expand(self.size)


def rows(batch: int, length: int, device: torch.device, key_mask: Tensor | None, segment_ids: Tensor | None) -> Rows:
    """Positions and segments. ValueError for masks that are not [B,T], and real tokens of a row that are not one run."""
    if segment_ids is None and key_mask is None:
        return PlainRows(batch, length, device)
    check_tokens(key_mask, segment_ids, batch, length)
    index = torch.arange(length, device=device).expand(batch, length)
    if segment_ids is None:
        segment = torch.zeros(batch, length, dtype=torch.long, device=device)
    else:
        changed = torch.zeros(batch, length, dtype=torch.long, device=device)
        changed[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]).long()
        segment = changed.cumsum(1)
    if key_mask is not None:
        edges = torch.diff(key_mask.long(), dim=1, prepend=key_mask.new_zeros(batch, 1).long()).clamp(min=0).sum(1)
        if int(edges.max()) > 1:
            raise ValueError(
                "key_mask: the real tokens of a row must be one run, with padding on the left or right only"
            )
        segment = torch.where(key_mask, segment, -1)
    first = torch.ones(batch, length, dtype=torch.bool, device=device)
    first[:, 1:] = segment[:, 1:] != segment[:, :-1]
    start = torch.where(first, index, 0).cummax(1).values
    return Rows(index - start, segment)


def softmax_set(options: Options, q: Rows, k: Rows) -> tuple[Tensor, Tensor]:
    """(keys in the window, sinks beside the window): causal, in the same segment, [B, Tq, Tk] bool each.

    Of position p, the window holds sliding p - w + 1 .. p, terraced the block of p and the whole block before it, up to
    p. `reach` cuts the window, not the sinks: softmax always sees them.
    """
    same = visible(q, k)
    if options.shape == "terraced":
        size = max(options.window, 1)
        q_block, k_block = ((x.position - options.anchor) // size for x in (q, k))
        near = same & (q_block[:, :, None] - k_block[:, None, :] <= 1) & (options.window > 0)
    else:
        near = same & (q.position[:, :, None] - k.position[:, None, :] < options.window)
    if options.reach is not None:
        near = near & (q.position[:, :, None] - k.position[:, None, :] < options.reach)
    return near, same & ~near & (k.position < options.sinks)[:, None, :]


def visible(q: Rows, k: Rows, reach: int | None = None) -> Tensor:
    """Causal pairs of real tokens in the same segment, less than `reach` apart, [B, Tq, Tk] bool."""
    same = (q.segment[:, :, None] == k.segment[:, None, :]) & (k.segment >= 0)[:, None, :]
    same = same & (k.position[:, None, :] <= q.position[:, :, None])
    if reach is None:
        return same
    return same & (q.position[:, :, None] - k.position[:, None, :] < reach)


def branch_weights(join: str, a_mass: Tensor, b_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the softmax and the linear branch in `average` and `sum`, in the masses' shape.

    A branch without mass has weight 0, and in `average` the other then has 1.
    """
    tiny = torch.finfo(a_mass.dtype).tiny
    a, b = ((mass.abs() >= tiny).to(mass.dtype) for mass in (a_mass, b_mass))
    return (a / (1 + b), b / (1 + a)) if join == "average" else (a, b)


def divisor(mass: Tensor, signed: bool) -> Tensor:
    """What a row is divided by: its mass; of signed features sign(mass) max(|mass|, 1e-6), and 0 stays 0."""
    if not signed:
        return mass
    size = mass.abs()
    sign = torch.where(mass < 0, -1.0, 1.0).to(mass.dtype)
    return torch.where(size > 0, sign * size.clamp(min=SIGNED_FLOOR), mass)


def divide(numerator: Tensor, denominator: Tensor, signed: bool) -> Tensor:
    """numerator [..., D] / denominator [...]; 0 where the denominator is 0: a row that sees nothing gives nothing.

    Signed features: by `divisor`.
    """
    denominator = divisor(denominator, signed)
    empty = denominator == 0
    quotient = numerator / torch.where(empty, 1.0, denominator)[..., None]
    return torch.where(empty[..., None], 0.0, quotient)
