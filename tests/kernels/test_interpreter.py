"""The quickened interpreter computes and refuses what Triton's own does."""

import pytest
import torch

from tests.kernels.interpreter import quicken

triton = pytest.importorskip("triton", reason="the kernels' tests need Triton: pip install 'recipelin[dev]'")
tl = pytest.importorskip("triton.language")


@triton.jit
def mixed(x, n, out, refused):
    """Blocks, scalars and numbers of several types, met in both orders, twice each."""
    rows, columns = tl.arange(0, 4), tl.arange(0, 8)
    at = rows[:, None] * 8 + columns[None, :]
    a = tl.load((x + n - 2) + at - 3, mask=(columns < n)[None, :] & (rows >= 1)[:, None], other=-0.0)
    for turn in range(2):
        half, large = a.to(tl.float16), at.to(tl.int64) * 3000000000
        a = 1.5 * a + half * 2 - a / 3 + (at % 5) * a + (7 // (at + 1)) - n * turn
        a = tl.where(large > 9000000000, a, tl.maximum(a, -1.0)) + (at == 3) * 0.25 + (half < 0.5) * (half / 7)
        a += (at * 1000000000 > 0) + at * 1000000000.0 * 1e-9 + at * 0.3 + (a > 0) * 0.7
        a = (a - tl.sum(a, 0)[None, :]) / (1.0 + tl.max(tl.abs(a), 1)[:, None])
    if refused == 1:
        a += x * n
    if refused == 2:
        a += 2 - x
    if refused == 3:
        a += rows
    if refused == 4:
        a += at.to(tl.uint8) + 256
    tl.store(out + at, a)


def run(refused: int = 0) -> torch.Tensor:
    out = torch.full((32,), torch.nan)
    mixed[(1,)](torch.linspace(-2, 2, 32), 5, out, refused)
    return out


def test_computes_and_refuses_as_tritons_own(monkeypatch):
    def patch(obj, name, value):  # takes no more than `setattr`, by which `make gpu-bounds` does it
        monkeypatch.setattr(obj, name, value, raising=False)

    found, errors = [], []
    for quick in (False, True):
        if quick:
            quicken(patch)
        found += [run(), run()]
        for refused in range(1, 5):
            with pytest.raises(triton.runtime.errors.InterpreterError) as error:
                run(refused)
            errors.append(str(error.value))
    assert bool(found[0].isfinite().all()) and all(torch.equal(found[0], y) for y in found[1:])
    assert len(set(errors)) == 3 and errors[:4] == errors[4:]
