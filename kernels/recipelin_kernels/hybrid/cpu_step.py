"""One more token of every row by one C function (cpu/step.c), which reads the past once, where `plain_token` is many calls.

A standard map's features of keys are made some keys at once, in one reading of its weights: of those that are in the room
and leave the window before the room is full.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import cpu
from ..autocast import without_autocast
from ..cpu.calls import VECTOR, dense, is_traced
from ..ran import note
from ..transforms import under_way
from .room import Room
from .rows import JOINS, LOG2E, Options
from .softmax_map import SoftmaxMap
from .state import HybridState, RoomState, check_heads
from .step import map_leaving, moved, placed

WORTH_A_THREAD = 1 << 20  # bytes of the sums: to start a thread takes as long as to read some 0.3 MB

ARGUMENTS = ("q", "k", "v", "phi_q", "phi_k", "mix")  # of `hybrid_attention` by their places
PLAIN = (Tensor, torch.nn.Parameter)  # with memory of their own
NUMBERS = frozenset((*ARGUMENTS, "log_scale"))

F = TypeVar("F", bound=Callable[..., Any])
Maps = Callable[[Tensor], Tensor] | Tensor | SoftmaxMap | None


class Token(ctypes.Structure):
    """As in cpu/step.c."""

    _fields_ = (
        *((n, ctypes.c_long) for n in ("batch", "heads", "key_heads", "map_heads", "width", "features", "sinks", "ring")),
        *((n, ctypes.c_long) for n in ("left", "join", "is_signed", "threads", "late", "begin", "end")),
        *((n, ctypes.c_float) for n in ("scale", "clamp_q", "clamp_k")),
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "phi_q", "weight_q", "weight_k", "strength", "sums")),
        *((n, ctypes.c_void_p) for n in ("next_sums", "next_k", "next_v", "room_k", "room_v", "room_phi")),
        *((n, ctypes.c_void_p) for n in ("positions", "y")),
    )  # fmt: skip


@dataclass(eq=False)
class Prepared:
    """A Token whose fields of a room and of the maps are filled in, and what the calls have in common that may use it.

    maps: of queries and keys, where the token names their weights. is_fixed: the map of keys is made in inference mode, and
    so does not say when it changes. made: late keys, from the room's first on, whose features are there, by this version of
    their map.
    """

    token: Token
    options: Options
    maps: tuple[SoftmaxMap | None, SoftmaxMap | None]
    is_fixed: bool
    signature: list[object] = field(default_factory=list)
    made: int = 0
    version: int = -1

    def of(self, room: Room) -> "Prepared":
        """The same for a room of the same sizes, of whose late keys none has features yet."""
        token = Token.from_buffer_copy(self.token)
        _place_in(token, room)
        return replace(self, token=token, made=0)


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
    if any(x.dtype != torch.float32 or x.device != q.device or type(x) not in PLAIN for x in tensors):
        return False
    whole = not width % VECTOR and not features % VECTOR and features > 0
    return whole and all(w.is_contiguous() and not w.is_neg() and not w.shape[2] % VECTOR for w in weights)


def as_the_last_token(function: F) -> F:
    """`hybrid_attention`, but a token that asks what the one before it asked, in numbers of the same kinds, is not checked.

    What a call is asked for are its arguments: NUMBERS and maps by their kinds, all others by value.
    """

    @wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        state = named.get("state")
        if not isinstance(state, HybridState) or torch.is_grad_enabled() or under_way():
            return function(*given, **named)
        asked = dict(zip(ARGUMENTS, given, strict=False)) | named
        del asked["state"]
        signature = [len(given), len(named), *asked, *map(_kind, asked, asked.values())]
        before: Prepared | None = None
        if isinstance(state, RoomState) and (before := state.room.prepared) and before.signature == signature:
            q, k, v, phi_q, map_k = (asked[name] for name in ("q", "k", "v", "phi_q", "phi_k_fn"))
            if not is_traced() and state.room.take(state.late):
                return cpu_token(q, k, v, phi_q, asked.get("mix"), asked.get("log_scale"), map_k, state)
        found = function(*given, **named)
        following = found[1] if isinstance(found, tuple) else None
        made = following.room.prepared if isinstance(following, RoomState) else None
        if made is not None and made is not before:  # by this call
            # A mapping is the caller's, who may change it.
            made.signature = [dict(x) if isinstance(x, Mapping) else x for x in signature]
        return found

    return called  # type: ignore[return-value]


def _kind(name: str, given: object) -> object:
    if isinstance(given, Tensor):
        # An option that is a tensor has a value, which is not looked at here: it is never the same.
        return (type(given), given.shape, given.dtype, given.device) if name in NUMBERS else object()
    if isinstance(given, SoftmaxMap):
        weight = given.weight
        return id(weight), weight.data_ptr(), weight.dtype, weight.is_contiguous(), given.clamp
    return given


def cpu_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor | SoftmaxMap,
    mix: Tensor | None,
    log_scale: Tensor | None,
    phi_k_fn: Callable[[Tensor], Tensor],
    state: RoomState,
) -> tuple[Tensor, HybridState]:
    """`plain_token` where `takes`, at a place of a room that is the caller's, and for which such calls are `prepared`.

    Features of phi_q and phi_k_fn are made by the same function where they are SoftmaxMaps.
    """
    note("hybrid_attention_step", "cpu")
    room, late = state.room, state.late
    call: Prepared = room.prepared
    token = call.token
    # Held by their names, as all that is made here, until the call is over.
    q, k, v = dense(q), dense(k), dense(v)
    y = torch.empty_like(q)
    token.q, token.k, token.v, token.y, token.late = q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), late
    strength = {"shared": mix, "absolute": log_scale}.get(call.options.join)
    if strength is not None:
        strength = dense(strength.to(q))
        token.strength = strength.data_ptr()
    if isinstance(phi_q, Tensor):
        phi_q = dense(phi_q.to(q))
        token.phi_q = phi_q.data_ptr()
    by_map, after = call.maps[1], None
    if by_map is not None:
        _make_ahead(call, by_map.weight, late)
        if late + 1 == room.left:
            begin = state.positions + 1
            after = room.empty(begin, room.full or int(begin.min()) >= state.ring)
            token.next_sums, token.next_k, token.next_v = after.sums.data_ptr(), after.k.data_ptr(), after.v.data_ptr()
    if _library().step_token(ctypes.byref(token)):
        raise MemoryError("the C kernels found no memory for a thread")
    if by_map is None:
        with without_autocast(q.device):
            map_leaving(state, phi_k_fn, k.dtype)
            return y, moved(state)
    call.made = token.end
    if after is None:
        return y, moved(state)
    after.prepared = call.of(after)
    return y, RoomState(after, 0)


def prepared(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor | SoftmaxMap,
    phi_k_fn: Callable[[Tensor], Tensor],
    options: Options,
    state: HybridState,
) -> RoomState:
    """The state at a place of the caller's in a room that is prepared for calls of these kinds.

    Raises ValueError for a state of calls of other sizes.
    """
    state = placed(state)
    (batch, heads, _, width), key_heads, room, sums = q.shape, k.shape[1], state.room, state.sums
    features = phi_q.features if isinstance(phi_q, SoftmaxMap) else phi_q.shape[3]
    if (*room.k.shape[:2], room.k.shape[3]) != (batch, key_heads, width) or sums.shape[2:] != (features, width + 1):
        raise ValueError(
            f"state: holds keys {tuple(room.k.shape)} and sums {tuple(sums.shape)}, beside q {tuple(q.shape)}, "
            f"k {tuple(k.shape)} and {features} features: it was made by other calls"
        )
    token = Token(
        batch=batch, heads=heads, key_heads=key_heads, map_heads=sums.shape[1], width=width, features=features,
        sinks=options.sinks, ring=state.ring, left=room.left, join=JOINS.index(options.join), is_signed=options.signed,
        scale=options.scale * LOG2E,
    )  # fmt: skip
    _place_in(token, room)
    map_q = phi_q if isinstance(phi_q, SoftmaxMap) else None
    map_k = phi_k_fn if isinstance(phi_k_fn, SoftmaxMap) else None
    if map_q is not None:
        token.weight_q, token.clamp_q = map_q.weight.data_ptr(), map_q.clamp
    if map_k is not None:
        check_heads(sums.shape[1], map_k.heads)
        token.weight_k, token.clamp_k = map_k.weight.data_ptr(), map_k.clamp
    is_fixed = map_k is not None and map_k.weight.is_inference()
    room.prepared = Prepared(token, options, (map_q, map_k), is_fixed, made=state.late)
    return state


def _place_in(token: Token, room: Room) -> None:
    token.threads = min(torch.get_num_threads(), max(1, room.sums.nbytes // WORTH_A_THREAD))
    token.sums, token.positions = room.sums.data_ptr(), room.begin.data_ptr()
    token.room_k, token.room_v, token.room_phi = room.k.data_ptr(), room.v.data_ptr(), room.phi.data_ptr()
    token.next_sums = None


def _make_ahead(call: Prepared, weight: Tensor, late: int) -> None:
    """Has the features of all keys of the room made that leave the window before it is full, once the next one lacks them.

    A weight that does not say when it changes makes those of one key alone.
    """
    token, version = call.token, -1 if call.is_fixed else weight._version
    if call.version != version:
        call.version, call.made = version, late
    token.begin = token.end = call.made
    if call.made <= late:
        token.end = min(token.left, late + (1 if call.is_fixed else token.ring + 1))


__all__ = ["Prepared", "as_the_last_token", "cpu_token", "prepared", "takes"]
