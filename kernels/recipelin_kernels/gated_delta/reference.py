"""The gated delta rule as it is defined: one token after the other, in any float dtype, gradients by autograd."""

import torch
from torch import Tensor


def gated_delta_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, begins: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """(o [B,H,T,E], the last state [B,H,D,E]) of q, k [B,H,T,D], v [B,H,T,E], g, beta [B,H,T].

        S_t = exp(g_t) (S_{t-1} - beta_t S_{t-1} k_t k_t^T) + beta_t v_t k_t^T        o_t = scale S_t q_t

    S in R^{E x D}; begins [B,T] bool: S_{t-1} is 0 there. The state that comes and goes is S transposed.
    """
    s = state.transpose(-1, -2)
    outputs = []
    for t in range(q.shape[2]):
        s = torch.where(begins[:, t, None, None, None], 0, s)
        kt, vt = k[:, :, t, :, None], v[:, :, t, :, None]
        bt, decay = beta[:, :, t, None, None], g[:, :, t, None, None].exp()
        s = decay * (s - bt * s @ kt @ kt.transpose(-1, -2)) + bt * vt @ kt.transpose(-1, -2)
        outputs.append(scale * (s @ q[:, :, t, :, None])[..., 0])
    return torch.stack(outputs, 2), s.transpose(-1, -2)
