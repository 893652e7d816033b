"""Which layers a `Select` keeps as softmax: what is known ahead, and the rule from scores to layers (no torch)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .steps import Choice, FromSelect, Layers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 1_000  # of rows, for `overlap_of_rows`
LARGEST = ("lm_ppl",)  # policies whose largest scores stay


def count(choice: Choice, layers: int) -> int:
    """How many of `layers` layers stay softmax. Raises ValueError: none or all would, or a share that is no whole number."""
    if choice.policy == "explicit":
        found = len(choice.layers)
    elif isinstance(choice.keep, float):
        exact = choice.keep * layers
        found = round(exact)
        if abs(exact - found) > 1e-9 * layers:
            raise ValueError(f"keep: {choice.keep:g} of {layers} layers is {exact:g}; give a whole number of layers")
    else:
        assert choice.keep is not None
        found = choice.keep
    if not 0 < found < layers:
        raise ValueError(f"{found} of {layers} layers would stay softmax; expected 1 to {layers - 1}")
    return found


def tried(choice: Choice, layers: int) -> tuple[int, ...]:
    """The candidates, ascending. Raises ValueError for layers that are not there, or no more of them than stay."""
    if choice.candidates == "all":
        return tuple(range(layers))
    found = _there(choice.candidates, layers, "candidates")
    if len(found) <= (kept := count(choice, layers)):
        text = f"candidates: {len(found)} for {kept} layers that stay leave no choice; expected more"
        raise ValueError(f"{text}, or policy: explicit")
    return found


def ahead(choice: Choice, layers: int) -> tuple[int, ...] | None:
    """The layers that stay, where nothing needs measuring; None for a scored policy. Raises ValueError."""
    kept = count(choice, layers)
    if choice.policy == "explicit":
        return _there(choice.layers, layers, "layers")
    if choice.scored:
        return None
    found = [choice.offset + i * layers // kept for i in range(kept)]
    if found[-1] >= layers:
        most = choice.offset - (found[-1] - layers + 1)
        raise ValueError(f"offset: {choice.offset} leaves the {layers} layers; expected at most {most}")
    return tuple(found)


def converted(where: Layers, choice: Choice | None, layers: int, kept: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers that a Swap converts. `kept`: what its Select chose; before that is known, every layer that it may convert."""
    if where == "all":
        return tuple(range(layers))
    if not isinstance(where, FromSelect):
        return where
    assert choice is not None
    stay = kept if kept is not None else ahead(choice, layers) or ()
    return tuple(i for i in range(layers) if i not in stay)


def how_many(where: Layers, choice: Choice | None, layers: int) -> int:
    """Layers that a Swap converts, also before its Select has chosen which."""
    if isinstance(where, FromSelect):
        assert choice is not None
        return layers - count(choice, layers)
    return len(converted(where, choice, layers))


def _there(given: Sequence[int], layers: int, field: str) -> tuple[int, ...]:
    if wrong := [i for i in given if i >= layers]:
        raise ValueError(f"{field}: {', '.join(map(str, wrong))}: the model has layers 0 to {layers - 1}")
    if twice := sorted({i for i in given if given.count(i) > 1}):
        raise ValueError(f"{field}: {', '.join(map(str, twice))} given twice")
    return tuple(sorted(given))


def best(scores: Mapping[int, float], keep: int, policy: str) -> tuple[int, ...]:
    """The `keep` layers with the best scores, ascending; of equal ones the lower layer."""
    sign = -1.0 if policy in LARGEST else 1.0
    return tuple(sorted(sorted(scores, key=lambda layer: (sign * scores[layer], layer))[:keep]))


def overlap(sets: Sequence[Sequence[int]]) -> float | None:
    """Mean over all pairs of equally large sets of |A and B| / |A|; None for fewer than two sets."""
    pairs = [len(set(a) & set(b)) / len(a) for a, b in itertools.combinations(sets, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def decide(
    losses: Sequence[Mapping[int, Sequence[tuple[float, float]]]],
    *,
    keep: int,
    policy: str,
    teacher: Sequence[Sequence[tuple[float, float]]] = (),
) -> dict[str, object]:
    """The choice and its stability, for the report of the step.

    `losses[draw][layer]`: (summed nats, tokens) of each row; every layer of a draw meets the same rows. score = nats a token
    over all rows of all draws, under `lm_ppl` less the teacher's own (`teacher[draw]`), which leaves the order as it is;
    `scores_by_draw` are without that.

    * `overlap_of_draws`: mean share of kept layers that two draws, each by itself, have in common (`overlap`).
    * `overlap_of_rows`: mean share of the kept layers that a choice from resampled rows keeps (with replacement, within each
      draw, the same rows for all layers; RESAMPLES times, seed 0).
    * `overlap_by_chance`: the share that two random choices have in common, keep / candidates.
    """
    import numpy as np

    layers = sorted(losses[0])
    arrays = [np.array([draw[layer] for layer in layers], dtype=np.float64) for draw in losses]  # [layers, rows, 2]
    base = _score([np.array([rows], dtype=np.float64) for rows in teacher])[0] if teacher else 0.0

    def choose(found: "Array") -> tuple[int, ...]:
        return best(dict(zip(layers, found.tolist(), strict=True)), keep, policy)

    scores = _score(arrays)
    kept = choose(scores)
    draw = np.random.default_rng(0)
    shared = 0
    for _ in range(RESAMPLES):
        taken = [a[:, draw.integers(0, a.shape[1], a.shape[1])] for a in arrays]
        shared += len(set(choose(_score(taken))) & set(kept))
    each = [_score([a]) for a in arrays]
    return {
        "layers": list(kept),
        "scores": {str(layer): float(x - base) for layer, x in zip(layers, scores, strict=True)},
        "scores_by_draw": [{str(layer): float(x) for layer, x in zip(layers, s, strict=True)} for s in each],
        "layers_by_draw": [list(choose(s)) for s in each],
        "overlap_of_draws": overlap([choose(s) for s in each]),
        "overlap_of_rows": shared / (RESAMPLES * keep),
        "overlap_by_chance": keep / len(layers),
    }


def _score(draws: "Sequence[Array]") -> "Array":
    """Nats a token [layers] over the rows of all draws."""
    whole = sum(a.sum(axis=1) for a in draws)  # [layers, 2]
    found: Array = whole[:, 0] / whole[:, 1]
    return found
