"""Random inputs, padding and comparisons for the tests of hybrid attention, in float64 where exactness is the point."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from recipelin_kernels import SoftmaxMap, hybrid_attention

EXACT = 1e-10
DIM, FEATURES = 8, 6
HEADS = [(2, 2), (6, 2), (4, 1)]  # grouped 1:1, 3:1, 4:1
JOINS = ["shared", "absolute", "replace", "average", "sum"]
SHAPES = ["sliding", "terraced"]
COVERS = ["outside", "all"]


class Inputs:
    """Random q, k, v, features, mix and log-scale; phi_k is a positive map of the keys."""

    names = ("q", "k", "v", "phi_q", "phi_k", "mix", "log_scale")

    def __init__(
        self,
        heads=(6, 2),
        length=41,
        batch=2,
        per_key_head=False,
        seed=0,
        dtype=torch.float64,
        dim=DIM,
        features=FEATURES,
    ):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

        h, g = heads
        self.q, self.k, self.v = (
            normal(batch, h, length, dim),
            normal(batch, g, length, dim),
            normal(batch, g, length, dim),
        )
        self.map = normal(g if per_key_head else h, dim, features)
        self.phi_q = normal(batch, h, length, features).softmax(-1)
        self.phi_k = self.features(self.k)
        self.mix, self.log_scale = normal(h).sigmoid(), normal(h)
        self.maps = None

    def by_maps(self, columns: int, clamp: float = 1e-12) -> "Inputs":
        """Features by standard maps, 2 `columns` of them; `maps` are those of q and k as arguments, and features(k) is of k's."""
        draw, exact = torch.Generator().manual_seed(1), torch.promote_types(self.q.dtype, torch.float32)
        weights = [
            torch.randn(n, self.q.shape[3], columns, generator=draw, dtype=torch.float64).to(self.q.device, exact)
            for n in (self.phi_q.shape[1], self.phi_k.shape[1])
        ]
        self.maps = [SoftmaxMap(standard(w, clamp), w, clamp) for w in weights]
        self.features = self.maps[1]
        self.phi_q, self.phi_k = (m(x) for m, x in zip(self.maps, (self.q, self.k), strict=True))
        return self

    def with_scores_to(self, largest: float) -> "Inputs":
        """q such that the largest score in size is that."""
        scores = self.q @ self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1).mT
        self.q *= largest / (scores.abs().max() * self.q.shape[3] ** -0.5)
        return self

    def features(self, k: Tensor) -> Tensor:
        """phi_k_fn: keys [B,Hkv,n,D] -> features [B,H or Hkv,n,F]."""
        return (k.repeat_interleave(self.map.shape[0] // k.shape[1], 1) @ self.map).softmax(-1)

    def each(self, k: Tensor) -> Tensor:
        """The same for each query head: [B,H,n,F]."""
        found = self.features(k)
        return found.repeat_interleave(self.q.shape[1] // found.shape[1], 1)

    def like(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        """The same numbers, rounded to dtype."""
        made = object.__new__(Inputs)
        for name in (*self.names, "map"):
            setattr(made, name, getattr(self, name).to(device, dtype))
        made.maps = None
        if self.maps is not None:
            weights = [m.weight.to(device, torch.promote_types(dtype, torch.float32)) for m in self.maps]
            made.maps = [SoftmaxMap(standard(w, m.clamp), w, m.clamp) for w, m in zip(weights, self.maps, strict=True)]
            made.features = made.maps[1]
        return made

    def tensors(self) -> list[Tensor]:
        return [getattr(self, n) for n in self.names]

    def cut(self, start: int, stop: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        return tuple(x[rows, :, start:stop] for x in (self.q, self.k, self.v, self.phi_q, self.phi_k))


def standard(weight: Tensor, clamp: float):
    """The standard map by its formula, in fp32 at least."""

    def make(x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        u = x.to(exact).repeat_interleave(weight.shape[0] // x.shape[1], 1) @ weight.to(exact)
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), -1).clamp(min=clamp)

    return make


def attend(x: Inputs, **options):
    options = {"window": 5, "log_scale": x.log_scale, **options}
    return hybrid_attention(x.q, x.k, x.v, x.phi_q, x.phi_k, x.mix, **options)


def with_gradients(x: Inputs, real: Tensor | None = None, *, components: bool = True, **options) -> list[Tensor]:
    """y, the components (unless they are not asked for), and the gradients to every input (zeros where there is none)."""
    leaves = [t.detach().clone().requires_grad_() for t in x.tensors()]
    found = hybrid_attention(*leaves[:6], **{"log_scale": leaves[6], "components": components, **options})
    y = found[0] if components else found
    weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).to(y.dtype).view_as(y)
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)  # the gradient of y lies as a model's does
    if not components:
        return [y.detach(), *gradients((y * weight).sum(), leaves)]
    parts = found[1]
    seen = torch.ones(y.shape[0], y.shape[2], dtype=torch.bool, device=y.device) if real is None else real
    shown = [p.detach() * seen[:, None, :, None] for p in (parts.window, parts.linear)] + [
        parts.linear_share.detach() * seen[:, None]
    ]
    return [y.detach(), *shown, *gradients((y * weight).sum(), leaves)]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """To every leaf; zeros where there is none."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


OUTCOMES = ("y", "window", "linear", "linear_share", *("d_" + n for n in Inputs.names))


def assert_same(found, expected, tolerance=EXACT, *, names=OUTCOMES, cancelled=1e-2):
    """Relative errors in norm. The floor of 1e-2, or `cancelled`, is for what is 0 but for rounding (mix, where no linear key is
    seen; all gradients of a single key)."""
    for name, a, b in zip(names, found, expected, strict=True):
        size = float(b.norm())
        gradient = name not in OUTCOMES[:4] and name != "loss"
        error = float((a.to(b.dtype) - b).norm()) / max(size, cancelled if gradient and size <= 1e-9 else 1e-2)
        assert error <= tolerance, f"{name}: {error:.2e}"


def padding(kind: str, batch: int, length: int) -> dict[str, Tensor]:
    if kind == "none":
        return {}
    if kind == "segments":
        step = torch.tensor([13, max(length // 2, 1)])[:batch, None]
        return {"segment_ids": torch.arange(length) // step}
    mask = torch.ones(batch, length, dtype=torch.bool)
    gap = min(length - 1, 9)
    if gap and kind == "left":
        mask[0, :gap] = False
    elif gap:
        mask[0, -gap:] = False
    return {"key_mask": mask}


@contextmanager
def empty_is_nan(device="cpu"):
    """What torch.empty returns is full of NaN."""
    before = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not deterministic on a GPU
        torch.set_deterministic_debug_mode("warn")  # by this name without Inductor, whose import takes two seconds
        try:
            assert torch.empty(3, device=device).isnan().all()
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


class Double(Inputs):
    tolerance = EXACT

    def token(self, t, rows=slice(None)):
        """A token's arguments before mix."""
        return *(x[rows] for x in self.cut(t, t + 1)[:4]), self.features

    def whole(self, at=slice(None), **options):
        """y of tokens in float64."""
        exact = self.like(torch.float64)
        x = (t[:, :, at] for t in exact.tensors()[:5])
        return hybrid_attention(*x, exact.mix, **{**options, "log_scale": exact.log_scale})


class Single(Double):
    """In fp32, of widths that the C function of a token takes, which makes their features by standard maps."""

    tolerance = 1e-5

    def __init__(self, **sizes):
        super().__init__(dim=16, **sizes)
        self.by_maps(16)
        vars(self).update(vars(self.like(torch.float32)))

    def token(self, t, rows=slice(None)):
        return *(x[rows] for x in self.cut(t, t + 1)[:3]), *self.maps


both_kinds = pytest.mark.parametrize("kind", [Double, Single])
