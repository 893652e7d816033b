"""What the tests of Triton kernels rely on: an address outside of a launch's tensors is refused."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels' tests need Triton: pip install 'recipelin[dev]'")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.usefixtures("quick_interpreter")


@triton.jit
def copied(x, y, first, n, step: tl.constexpr):
    i = tl.program_id(0) * step + tl.arange(0, step)
    tl.store(y + i, tl.load(x + first + i, mask=i < n, other=0.0))


@pytest.mark.parametrize(
    ("first", "n", "size", "where"),
    [
        (0, 20, 32, None),
        (12, 20, 32, None),
        (-8, 20, 32, None),  # what stands before a view
        (13, 20, 32, "1 of 4 elements, up to 4 bytes behind"),
        (-9, 20, 32, "1 of 16 elements"),
        (0, 20, 24, "8 of 16 elements, up to 32 bytes behind"),  # written, all of them
    ],
)
def test_an_address_outside_of_the_tensors_is_refused(first, n, size, where):
    x, y = torch.arange(40.0)[8:], torch.full((size,), -1.0)
    if where is None:
        copied[(2,)](x, y, first, n, 16)
        assert y.tolist() == [*range(8 + first, 28 + first), *[0] * 12]
    else:
        with pytest.raises(triton.runtime.errors.InterpreterError, match=where):
            copied[(2,)](x, y, first, n, 16)
