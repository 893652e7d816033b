"""One more token of every row by one C function (cpu/step.c), which reads the past once, where `plain_token` is many calls.

A standard map's features of keys are made some keys at once, in one reading of its weights: of those that are in the room
and leave the window before the room is full.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import cpu
from ..cpu.calls import VECTOR, dense
from .rows import JOINS, LOG2E, Options
from .softmax_map import SoftmaxMap
from .state import HybridState, RoomState, check_heads
from .step import map_leaving, moved, placed

WORTH_A_THREAD = 1 << 20  # bytes of the sums: to start a thread takes as long as to read some 0.3 MB

Maps = Callable[[Tensor], Tensor] | Tensor | SoftmaxMap | None


class Token(ctypes.Structure):
    """As in cpu/step.c."""

    _fields_ = (
        *((n, ctypes.c_long) for n in ("batch", "heads", "key_heads", "map_heads", "width", "features", "sinks", "ring")),
        *((n, ctypes.c_long) for n in ("left", "join", "is_signed", "threads", "late", "begin", "end")),
        *((n, ctypes.c_float) for n in ("scale", "clamp_q", "clamp_k")),
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "phi_q", "weight_q", "weight_k", "strength", "sums")),
        *((n, ctypes.c_void_p) for n in ("next_sums", "next_k", "next_v", "room_k", "room_v", "room_phi")),
        *((n, ctypes.c_void_p) for n in ("positions", "next_positions", "y")),
    )  # fmt: skip


@dataclass(eq=False)
class Prepared:
    """A Token whose fields of a room are filled in, for calls that ask the same.

    made: late keys, from the room's first on, whose features are there. maker: what made them, by a weight that is held.
    """

    token: Token
    signature: tuple[object, ...]
    options: Options
    sums: Tensor
    held: tuple[Maps, ...]
    made: int = 0
    maker: tuple[object, ...] = ()


@cache
def _library() -> ctypes.CDLL:
    found = cpu.library()
    found.step_token.argtypes = (ctypes.c_void_p,)
    return found


def takes(q: Tensor, k: Tensor, v: Tensor, phi_q: Maps, phi_k_fn: Maps, state: HybridState) -> bool:
    """Whether `cpu_token` computes a call that `plain_token` would: numbers in fp32, widths in whole vectors."""
    width, features = q.shape[3], state.sums.shape[2]
    weights = [m.weight for m in (phi_q, phi_k_fn) if isinstance(m, SoftmaxMap)]
    tensors = (q, k, v, state.sums, state.ring_k, state.ring_v, *weights)
    if any(x.dtype != torch.float32 or x.device != q.device for x in tensors):
        return False
    whole = not width % VECTOR and not features % VECTOR and features > 0
    return whole and all(w.is_contiguous() and not w.is_neg() and not w.shape[2] % VECTOR for w in weights)


def signature_of(
    q: Tensor, k: Tensor, v: Tensor, phi_q: object, phi_k_fn: object, *options: object
) -> tuple[object, ...]:
    """What two calls have in common of which the second needs no checks: their options, and the kinds of their tensors."""
    return _kind(q), _kind(k), _kind(v), _kind(phi_q), _kind(phi_k_fn), *options


def _kind(given: object) -> object:
    if isinstance(given, SoftmaxMap):
        weight = given.weight
        return id(weight), weight.data_ptr(), weight.dtype, given.clamp
    return (given.shape, given.dtype, given.device) if isinstance(given, Tensor) else None


def cpu_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | SoftmaxMap,
    mix: Tensor | None,
    log_scale: Tensor | None,
    phi_k_fn: Callable[[Tensor], Tensor],
    options: Options,
    state: HybridState,
    signature: tuple[object, ...],
) -> tuple[Tensor, HybridState]:
    """`plain_token` where `takes`; features of phi_q and phi_k_fn are made by the same function where they are SoftmaxMaps."""
    state = placed(state)
    room, late = state.room, state.late
    call = room.prepared
    if call is None or call.signature != signature or call.sums is not state.sums:
        token = _prepare(q, k, phi_q, phi_k_fn, options, state)
        call = room.prepared = Prepared(token, signature, options, state.sums, (phi_q, phi_k_fn))
    token = call.token
    # Held by their names, as all that is made here, until the call is over.
    q, k, v = dense(q), dense(k), dense(v)
    strength = {"shared": mix, "absolute": log_scale}.get(options.join)
    if strength is not None:
        if strength.dtype != torch.float32 or strength.shape != (token.heads,):
            strength = strength.to(q).expand(token.heads)
        strength = dense(strength)
        token.strength = strength.data_ptr()
    if isinstance(phi_q, Tensor):
        phi_q = dense(phi_q.to(q))
        token.phi_q = phi_q.data_ptr()
    else:
        token.weight_q, token.clamp_q = phi_q.weight.data_ptr(), phi_q.clamp
    by_map, following = isinstance(phi_k_fn, SoftmaxMap), None
    positions, y = torch.empty_like(state.positions), torch.empty_like(q)
    if isinstance(phi_k_fn, SoftmaxMap):
        _make_ahead(call, phi_k_fn, late)
        if late + 1 == room.left:
            full = room.full or int(state.positions.min()) + 1 >= state.ring
            sums, after = torch.empty_like(state.sums), room.empty(full)
            token.next_sums, token.next_k, token.next_v = sums.data_ptr(), after.k.data_ptr(), after.v.data_ptr()
            following = RoomState(sums, state.sink_k, state.sink_v, positions, after, 0)
    token.q, token.k, token.v, token.y = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()
    token.late, token.positions, token.next_positions = late, state.positions.data_ptr(), positions.data_ptr()
    if _library().step_token(ctypes.byref(token)):
        raise MemoryError("the C kernels found no memory for a thread")
    if by_map:
        call.made = token.end
    else:
        map_leaving(state, phi_k_fn, k.dtype)
    return y, following or moved(state, positions)


def _prepare(q: Tensor, k: Tensor, phi_q: Maps, phi_k_fn: Maps, options: Options, state: RoomState) -> Token:
    """Raises ValueError for a state of calls of other sizes."""
    (batch, heads, _, width), key_heads, room, sums = q.shape, k.shape[1], state.room, state.sums
    features = phi_q.features if isinstance(phi_q, SoftmaxMap) else phi_q.shape[3] if isinstance(phi_q, Tensor) else 0
    if (*room.k.shape[:2], room.k.shape[3]) != (batch, key_heads, width) or sums.shape[2:] != (features, width + 1):
        raise ValueError(
            f"state: holds keys {tuple(room.k.shape)} and sums {tuple(sums.shape)}, beside q {tuple(q.shape)}, "
            f"k {tuple(k.shape)} and {features} features: it was made by other calls"
        )
    if isinstance(phi_k_fn, SoftmaxMap):
        check_heads(sums.shape[1], phi_k_fn.heads)
    return Token(
        batch=batch, heads=heads, key_heads=key_heads, map_heads=sums.shape[1], width=width, features=features,
        sinks=options.sinks, ring=state.ring, left=room.left, join=JOINS.index(options.join), is_signed=options.signed,
        threads=min(torch.get_num_threads(), max(1, sums.nbytes // WORTH_A_THREAD)), scale=options.scale * LOG2E,
        sums=sums.data_ptr(), room_k=room.k.data_ptr(), room_v=room.v.data_ptr(), room_phi=room.phi.data_ptr(),
    )  # fmt: skip


def _make_ahead(call: Prepared, map_k: SoftmaxMap, late: int) -> None:
    """Has the features of all keys of the room made that leave the window before it is full, once the next one lacks them.

    A weight made in inference mode does not say when it changes: then of one key alone.
    """
    token, weight = call.token, map_k.weight
    maker = id(weight), weight.data_ptr(), None if weight.is_inference() else weight._version, map_k.clamp
    if call.maker != maker:
        call.maker, call.made = maker, late
    token.begin = call.made
    ahead = 1 if weight.is_inference() else token.ring + 1
    token.end = call.made if call.made > late else min(token.left, late + ahead)
    token.weight_k, token.clamp_k = weight.data_ptr(), map_k.clamp


__all__ = ["Prepared", "cpu_token", "signature_of", "takes"]
