"""What both implementations of hybrid attention share: checked options, positions, and who may see whom."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

JOINS = ("shared", "absolute", "replace")
SHAPES = ("sliding",)
COVERS = ("outside", "all")
GRADIENTS = ("through", "detached")
DROPS = ("linear_covers_all", "linear_outside")
BRANCHES = ("window", "linear", "sinks")
ABLATIONS = ("mass", "output")

SIGNED_FLOOR = 1e-6  # |denominator| of signed features is at least this (DESIGN §5, activation `none`)
EXP_FLOOR = -85.0  # exp of less is below 1.2e-37, and subnormal inputs make exp six times slower on a CPU


def one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Raises ValueError with what was found, what is valid and the nearest name."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), valid, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(valid)}{hint}")


@dataclass(frozen=True)
class Options:
    """The options of one call, checked."""

    window: int
    sinks: int
    cover: str
    join: str
    max_gradient: str
    ablate: Mapping[str, str]
    scale: float
    on_drop: str
    signed: bool

    def has(self, branch: str) -> bool:
        """Whether a branch is part of the row's mass."""
        return self.ablate.get(branch) != "mass"

    def shown(self, branch: str) -> bool:
        """Whether a branch is part of the numerator."""
        return branch not in self.ablate


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


def rows(batch: int, length: int, device: torch.device, key_mask: Tensor | None, segment_ids: Tensor | None) -> Rows:
    """Positions and segments. Real tokens of a row must be one run (padding left or right): ValueError otherwise."""
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
    """(keys in the window, sinks beside the window): causal, in the same segment, [B, Tq, Tk] bool each."""
    same = visible(q, k)
    distance = q.position[:, :, None] - k.position[:, None, :]
    near = same & (distance < options.window)
    return near, same & ~near & (k.position < options.sinks)[:, None, :]


def visible(q: Rows, k: Rows) -> Tensor:
    """Causal pairs of real tokens in the same segment, [B, Tq, Tk] bool."""
    same = (q.segment[:, :, None] == k.segment[:, None, :]) & (k.segment >= 0)[:, None, :]
    return same & (k.position[:, None, :] <= q.position[:, :, None])


def divide(numerator: Tensor, denominator: Tensor, signed: bool) -> Tensor:
    """numerator [..., D] / denominator [...]; 0 where the denominator is 0: a row that sees nothing gives nothing.

    Signed features: den = sign(den) max(|den|, 1e-6).
    """
    if signed:
        size = denominator.abs()
        sign = torch.where(denominator < 0, -1.0, 1.0).to(denominator.dtype)
        denominator = torch.where(size > 0, sign * size.clamp(min=SIGNED_FLOOR), denominator)
    empty = denominator == 0
    quotient = numerator / torch.where(empty, 1.0, denominator)[..., None]
    return torch.where(empty[..., None], 0.0, quotient)
