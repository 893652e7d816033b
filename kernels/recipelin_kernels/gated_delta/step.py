"""One more token of every row under the gated delta rule: a state of constant size goes in and out."""

import torch
from torch import Tensor


def one_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """(o [B,H,E], the next state [B,H,D,E]) of q, k [B,H,D], v [B,H,E], g, beta [B,H] and a state; all of one dtype.

    The state is S transposed, so that o = S' q: with P = exp(g) S', S' = P + k (beta (v - P k))^T.
    """
    state = state * g.exp()[..., None, None]
    # (k * state).sum(-2): a product with one column is slow on a CPU (facts/performance.md §1).
    write = beta[..., None] * (v - (k[..., None] * state).sum(-2))
    state = torch.addcmul(state, k[..., None], write[..., None, :])
    return scale * (q[..., None] * state).sum(-2), state
