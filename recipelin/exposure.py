"""How much of an item the linear branch can see at all (DESIGN §6; no torch)."""

from collections.abc import Iterable

from .states import State


def exposed_share(positions: Iterable[int], exposed_from: int | None) -> float:
    """Share of scored tokens, at `positions` from the row's first real token, whose query has a non-empty linear set.

    The token at position p is predicted from the query at p - 1, which has one from `exposed_from` on. None: no linear branch.
    """
    found = list(positions)
    if exposed_from is None or not found:
        return 0.0
    return sum(p - 1 >= exposed_from for p in found) / len(found)


def exposed_from(hybrid: State | None, reach: int | None = None) -> int | None:
    """First query position (from 0) with a non-empty linear set in the hybrid; None where no query has one.

    Cover `all`: 0. Sliding: window + sinks. Terraced: the first block whose window begins behind the sinks and at least
    one key more, 2 window without sinks. reach: how far the linear branch may look at all (the teacher's own window).
    Under `compat: lolcats_tk_v1` blocks end with the row, and rows of at most `window` tokens are counted twice, so that
    some earlier queries have one too; they are not counted.
    """
    if hybrid is None or "linear" not in hybrid.branches:
        return None
    if hybrid.cover == "all":
        return 0
    if hybrid.window == "full":
        return None
    sinks = hybrid.sinks if "sinks" in hybrid.branches else 0
    if hybrid.shape == "terraced":
        first, nearest = (sinks // hybrid.window + 2) * hybrid.window, hybrid.window + 1
    else:
        first, nearest = hybrid.window + sinks, hybrid.window
    return first if reach is None or nearest < reach else None
