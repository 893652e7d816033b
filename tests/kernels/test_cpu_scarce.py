"""The C kernels where memory or threads are lacking: who has some does the work of who has none, else nothing is returned."""

import ctypes

import pytest
import torch

from recipelin_kernels import cpu, hybrid_attention, hybrid_attention_step, teacher_attention, weight_transfer_loss
from recipelin_kernels.hybrid import cpu_features, cpu_step
from tests.kernels.hybrid_inputs import Inputs, attend, with_gradients

# Put before each source: how many are still refused of both, in all of them together.
SCARCE = """
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
__attribute__((weak)) long rooms, starts;
static inline int less_memory(void **at, size_t alignment, size_t size) {
  return __atomic_fetch_sub(&rooms, 1, __ATOMIC_RELAXED) > 0 ? ENOMEM : posix_memalign(at, alignment, size);
}
static inline int fewer_threads(pthread_t *made, const pthread_attr_t *how, void *(*work)(void *), void *given) {
  return __atomic_fetch_sub(&starts, 1, __ATOMIC_RELAXED) > 0 ? EAGAIN : pthread_create(made, how, work, given);
}
#define posix_memalign less_memory
#define pthread_create fewer_threads
"""
NONE, ALL, THREADS = 0, 1000, 3


class Scarce:
    """A library each call of which is refused so many rooms and starts at first; met: the functions that asked for them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.refused, self.met = library, {"rooms": NONE, "starts": NONE}, set[str]()

    def __getattr__(self, name):
        function = getattr(self.library, name)
        left = {n: ctypes.c_long.in_dll(self.library, n) for n in self.refused}

        def called(*given):
            for n, count in self.refused.items():
                left[n].value = count
            failed = function(*given)
            if any(left[n].value < count for n, count in self.refused.items() if count):
                self.met.add(name)
            return failed

        return called


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scarce")
    (folder / "scarce.h").write_text(SCARCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(cpu, "FLAGS", ("-O0", *cpu.FLAGS[1:], "-include", str(folder / "scarce.h")))
        return cpu.library.__wrapped__()


@pytest.fixture
def scarce(compiled, monkeypatch):
    library, threads = Scarce(compiled), torch.get_num_threads()
    monkeypatch.setattr(cpu, "library", lambda: library)
    monkeypatch.setattr(cpu_step, "_library", lambda: library)
    monkeypatch.setattr(cpu_step, "WORTH_A_THREAD", 1)
    torch.set_num_threads(THREADS)
    yield library
    torch.set_num_threads(threads)


def inputs() -> Inputs:
    return Inputs((6, 2), 70, dtype=torch.float32, dim=16).by_maps(16)


def learned_weights(x: Inputs):
    leaves = [t.detach().clone().requires_grad_() for t in (x.phi_q, x.phi_k, x.mix)]
    lse = teacher_attention(x.q, x.k, x.v)[1]
    loss = weight_transfer_loss(
        x.q, x.k, *leaves[:2], lse, mix=leaves[2], target="hybrid", window=9, sinks=2, kernel="cpu"
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def features(x: Inputs):
    weight = x.maps[0].weight.detach().clone().requires_grad_()
    phi = cpu_features.softmax_features_cpu(x.q, weight, 1e-12)
    return [phi.detach(), *torch.autograd.grad(phi.cos().sum(), weight)]


@torch.no_grad()
def tokens(x: Inputs):
    _, state = hybrid_attention(*x.cut(0, 30), x.mix, window=9, output_state=True, kernel="chunked")
    found = []
    for t in range(30, 40):
        y, state = hybrid_attention_step(*x.cut(t, t + 1)[:3], *x.maps, x.mix, state, window=9)
        found.append(y)
    return [*found, *state.tensors.values()]


OPERATORS = {
    "hybrid": lambda x: with_gradients(x, window=9, sinks=2, kernel="cpu"),
    "transfer": learned_weights,
    "features": features,
    "tokens": tokens,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_thread_without_memory_or_that_cannot_be_started_leaves_its_share_to_the_others(name, scarce):
    expected = OPERATORS[name](inputs())
    for refused in ({"rooms": 1}, {"rooms": THREADS - 1}, {"starts": 1}):
        scarce.refused, scarce.met = {"rooms": NONE, "starts": NONE, **refused}, set()
        assert all(map(torch.equal, OPERATORS[name](inputs()), expected)), refused
        assert scarce.met


@pytest.mark.parametrize("name", OPERATORS)
def test_without_any_memory_nothing_is_returned(name, scarce):
    scarce.refused["rooms"] = ALL
    with pytest.raises(MemoryError, match="no memory for a thread"):
        OPERATORS[name](inputs())


def test_gradients_without_memory_are_none(scarce):
    x = inputs()
    leaves = [t.detach().clone().requires_grad_() for t in x.tensors()[:6]]
    y = hybrid_attention(*leaves, window=9, kernel="cpu")
    scarce.refused["rooms"] = ALL
    with pytest.raises(MemoryError, match="hybrid_backward"):
        y.sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_a_state_goes_on_after_a_token_without_memory(scarce):
    """Also where a room was full then, and where a token was like the last one."""
    x = inputs()
    with torch.no_grad():
        whole = attend(x, window=9, kernel="chunked")
        _, state = hybrid_attention(*x.cut(0, 30), x.mix, window=9, output_state=True, kernel="chunked")
        for t in range(30, 40):
            token = (*x.cut(t, t + 1)[:3], *x.maps, x.mix)
            before = {n: held.clone() for n, held in state.tensors.items()}
            scarce.refused["rooms"] = ALL
            with pytest.raises(MemoryError):
                hybrid_attention_step(*token, state, window=9)
            assert all(torch.equal(held, before[n]) for n, held in state.tensors.items())
            scarce.refused["rooms"] = NONE
            y, state = hybrid_attention_step(*token, state, window=9)
            assert (y - whole[:, :, t : t + 1]).abs().max() < 1e-5
