"""What passes between a form and who trains it: what a layer saw, and which windows are dropped."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Captured:
    """q [B,H,T,d], k, v [B,Hkv,T,d] after RoPE; the output y [B,H,T,d] before o_proj.

    While recording, y and the log-sum-exp `lse` [B,H,T] are the teacher's; while observing, y is the layer's own and
    lse is None. key_mask [B,T] bool or None; segment_ids [B,T] or None. No gradient passes through any of them.

    Only while recording: hidden_states [B,T,D], the layer's input; (cos, sin); output [B,T,D], the teacher's, after o_proj.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor
    lse: Tensor | None
    key_mask: Tensor | None
    segment_ids: Tensor | None
    hidden_states: Tensor | None = None
    position_embeddings: tuple[Tensor, Tensor] | None = None
    output: Tensor | None = None


@dataclass(frozen=True)
class Drop:
    """The draw of one micro-batch: `keep` [B,H] bool, False where the window is dropped; `on_drop` as in BranchSchedule."""

    keep: Tensor
    on_drop: str
