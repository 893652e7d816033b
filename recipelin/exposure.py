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


def exposed_from(hybrid: State | None) -> int | None:
    """First query position (from 0) with a non-empty linear set in the hybrid: window (terrace: two) + sinks; cover all: 0.

    Under `compat: lolcats_tk_v1` blocks end with the row, so that some earlier queries have one too; they are not counted.
    """
    if hybrid is None or "linear" not in hybrid.branches:
        return None
    if hybrid.cover == "all":
        return 0
    if hybrid.most_keys is None:
        return None
    return hybrid.most_keys + (hybrid.sinks if "sinks" in hybrid.branches else 0)
