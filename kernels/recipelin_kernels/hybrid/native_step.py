"""One more token of every row by one C function (native/step.c), which reads the past once, where `plain_token` is made of calls.

A standard map's features of keys are made some keys at once, in one reading of its weights: of those that are in the room
and leave the window before the room is full.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import native
from .room import Room
from .rows import LOG2E, Options
from .softmax_map import SoftmaxMap
from .state import HybridState, check_heads
from .step import map_leaving, moved, placed

JOINS = {"shared": 0, "absolute": 1, "average": 2, "sum": 3}
LANES = 16  # widths are multiples of it
WORTH_THREADS = 1 << 20  # bytes of the sums: to start a thread takes as long as it takes to read some 0.3 MB


class Token(ctypes.Structure):
    """As in native/step.c."""

    _fields_ = (
        *((n, ctypes.c_long) for n in ("batch", "heads", "key_heads", "map_heads", "width", "features", "sinks", "ring")),
        *((n, ctypes.c_long) for n in ("left", "join", "signs", "threads", "late", "begin", "end")),
        *((n, ctypes.c_float) for n in ("scale", "clamp_q", "clamp_k")),
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "phi_q", "weight_q", "weight_k", "strength", "sums")),
        *((n, ctypes.c_void_p) for n in ("room_k", "room_v", "room_phi", "positions", "next_positions", "y")),
    )


class Fold(ctypes.Structure):
    """As in native/step.c."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("sums", "phi", "v", "next")),
        *((n, ctypes.c_long) for n in ("key_heads", "map_heads", "width", "features", "late", "left", "v_head")),
    )


@dataclass(eq=False)
class Prepared:
    """A Token whose fields of a room are filled in, and what they were made for.

    made: late keys, from the room's first on, whose features are there. maker: what made them, by `weight`.
    """

    token: Token
    options: Options
    sums: Tensor
    sizes: tuple[object, ...]
    made: int = 0
    maker: tuple[object, ...] = ()
    weight: Tensor | None = None


@cache
def _library() -> ctypes.CDLL:
    found = native.library()
    found.step_token.argtypes = (ctypes.c_void_p,)
    found.step_fold.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
    return found


def takes(q: Tensor, k: Tensor, v: Tensor, phi_q: object, phi_k_fn: object, state: HybridState) -> bool:
    """Whether `native_token` computes a call that `plain_token` would: numbers in fp32, widths in whole vectors."""
    width, features = q.shape[3], state.sums.shape[2]
    tensors = (q, k, v, state.sums, state.ring_k, state.ring_v)
    if any(x.dtype != torch.float32 for x in tensors) or width % LANES or features % LANES or not features:
        return False
    weights = [m.weight for m in (phi_q, phi_k_fn) if isinstance(m, SoftmaxMap)]
    return all(w.dtype == torch.float32 and w.is_contiguous() and not w.shape[2] % LANES for w in weights)


@torch.no_grad()
def native_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | SoftmaxMap,
    mix: Tensor | None,
    log_scale: Tensor | None,
    phi_k_fn: Callable[[Tensor], Tensor],
    options: Options,
    state: HybridState,
) -> tuple[Tensor, HybridState]:
    """`plain_token` where `takes`; features of phi_q and phi_k_fn are made by the same function where they are SoftmaxMaps."""
    state, room = placed(state, options, _whole_sums)
    late = state.late_phi.shape[2]
    features = phi_q.features if isinstance(phi_q, SoftmaxMap) else phi_q.shape[3]
    sizes = q.shape, k.shape, features, phi_k_fn.heads if isinstance(phi_k_fn, SoftmaxMap) else state.sums.shape[1]
    call = room.prepared
    if call is None or call.options is not options or call.sums is not state.sums or call.sizes != sizes:
        call = room.prepared = _prepare(room, options, state.sums, sizes)
    token = call.token
    # Held by their names, as all that is made here, until the call is over.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    strength = mix if log_scale is None else log_scale
    if strength is not None:
        strength = strength.to(torch.float32).contiguous()
        token.strength = strength.data_ptr()
    if isinstance(phi_q, Tensor):
        phi_q = phi_q.to(torch.float32).contiguous()
        token.phi_q = phi_q.data_ptr()
    else:
        token.phi_q, token.weight_q, token.clamp_q = None, phi_q.weight.data_ptr(), phi_q.clamp
    by_map = isinstance(phi_k_fn, SoftmaxMap)
    if isinstance(phi_k_fn, SoftmaxMap):
        _make_ahead(call, phi_k_fn, late)
    following, y = torch.empty_like(state.positions), torch.empty_like(q)
    token.q, token.k, token.v, token.y = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()
    token.late, token.positions, token.next_positions = late, state.positions.data_ptr(), following.data_ptr()
    _check(_library().step_token(ctypes.byref(token)))
    if by_map:
        call.made = max(call.made, token.end)
    else:
        map_leaving(room, state, phi_k_fn, options, k.dtype)
    return y, moved(room, state, options, following, _whole_sums)


def _prepare(room: Room, options: Options, sums: Tensor, sizes: tuple[object, ...]) -> Prepared:
    """Raises ValueError for a state of calls of other sizes."""
    q_shape, k_shape, features, map_heads = sizes
    (batch, heads, _, width), key_heads = q_shape, k_shape[1]
    if room.k.shape[:2] != k_shape[:2] or room.k.shape[3] != width or sums.shape[2:] != (features, width + 1):
        raise ValueError(
            f"state: holds keys {tuple(room.k.shape)} and sums {tuple(sums.shape)} [B,p,F,D+1], beside q {tuple(q_shape)}, "
            f"k {tuple(k_shape)} and {features} features: it was made by other calls"
        )
    check_heads(sums.shape[1], map_heads)
    token = Token(
        batch=batch, heads=heads, key_heads=key_heads, map_heads=sums.shape[1], width=width, features=features,
        sinks=options.sinks, ring=options.window - 1, left=room.left, join=JOINS[options.join], signs=options.signed,
        threads=_threads(sums), scale=options.scale * LOG2E, sums=sums.data_ptr(), room_k=room.k.data_ptr(),
        room_v=room.v.data_ptr(), room_phi=room.phi.data_ptr(),
    )  # fmt: skip
    return Prepared(token, options, sums, sizes)


def _make_ahead(call: Prepared, map_k: SoftmaxMap, late: int) -> None:
    """Has the features of all keys of the room made that leave the window before it is full, once the next one lacks them."""
    token, weight = call.token, map_k.weight
    maker = weight.data_ptr(), None if weight.is_inference() else weight._version, map_k.clamp
    if call.weight is not weight or call.maker != maker:
        call.weight, call.maker, call.made = weight, maker, late
    token.begin = call.made
    token.end = call.made if call.made > late else min(token.left, late + token.ring + 1)
    token.weight_k, token.clamp_k = weight.data_ptr(), map_k.clamp


def _whole_sums(state: HybridState) -> Tensor:
    """As `whole_sums`."""
    late_phi, late_v, sums = state.late_phi, state.late_v, state.sums.contiguous()
    batch, map_heads, late, features = late_phi.shape
    if not late:
        return sums
    found = torch.empty_like(sums)
    fold = Fold(
        sums=sums.data_ptr(), phi=late_phi.data_ptr(), v=late_v.data_ptr(), next=found.data_ptr(),
        key_heads=late_v.shape[1], map_heads=map_heads, width=late_v.shape[3], features=features, late=late,
        left=late_phi.stride(1) // features, v_head=late_v.stride(1),
    )  # fmt: skip
    _check(_library().step_fold(ctypes.byref(fold), batch, _threads(sums)))
    return found


def _threads(sums: Tensor) -> int:
    return min(torch.get_num_threads(), max(1, sums.nbytes // WORTH_THREADS))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("the C kernels found no memory for a thread")


__all__ = ["native_token", "takes"]
