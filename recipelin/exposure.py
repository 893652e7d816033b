"""How much of an item the linear branch can see at all (DESIGN §6; no torch)."""

from collections.abc import Iterable


def exposed_share(positions: Iterable[int], exposed_from: int | None) -> float:
    """Share of scored tokens, at `positions` from the row's first real token, whose query has a non-empty linear set.

    The token at position p is predicted from the query at p - 1, which has one from `exposed_from` on. None: no linear branch.
    """
    found = list(positions)
    if exposed_from is None or not found:
        return 0.0
    return sum(p - 1 >= exposed_from for p in found) / len(found)
