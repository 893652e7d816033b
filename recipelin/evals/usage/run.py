"""Share of the normaliser that the linear branch holds, by layer and head."""

from pathlib import Path
from typing import Any

import torch

from ...attention.captured import Captured
from ...records import Result
from ...states import NamedState
from ...swap import forms, observing
from ..perplexity.run import held_out_rows
from .config import Config


@torch.no_grad()
def run(
    config: Config,
    *,
    model: Any,
    tokenizer: Any,
    state: NamedState,
    seed: int,
    exposed_from: int | None,
    folder: Path,
    base: Path,
    device: str,
) -> tuple[Result, ...]:
    """A Result for each layer and head: mean share over queries with a non-empty linear set, on the student's own stream.

    Nothing in states without both branches and in the joins `average` and `sum`, where the share is 0, 1 or 1/2 by
    definition, for signed features, where it is not defined, and for rows that fit into the window, where no linear set has
    a key.
    """
    found = forms(model)
    if not found or state.state is None or not {"window", "linear"} <= set(state.state.branches):
        return ()
    if state.state.join in ("average", "sum"):
        return ()
    if found[0].config.feature_map.activation == "none" or exposed_from is None or config.length <= exposed_from:
        return ()
    rows = held_out_rows(config, tokenizer, base=base, seed=seed)
    sums: dict[int, torch.Tensor] = {}
    count = 0

    def look(index: int, captured: Captured) -> None:
        form = next(f for f in found if f.layer_index == index)
        share = form.components(captured).linear_share[:, :, exposed_from:].double()
        sums[index] = sums.get(index, 0) + share.sum((0, 2)).cpu()

    with observing(model, look):
        for start in range(0, len(rows), config.batch):
            ids = torch.from_numpy(rows[start : start + config.batch]).to(device)
            model(input_ids=ids, use_cache=False)
            count += ids.shape[0] * (ids.shape[1] - exposed_from)
    results = []
    for index, total in sorted(sums.items()):
        heads = (total / count).tolist()
        results.append(_result(f"layer_{index}", sum(heads) / len(heads), count))
        results += [_result(f"layer_{index}_head_{h}", share, count) for h, share in enumerate(heads)]
    return tuple(results)


def _result(task: str, value: float, n: int) -> Result:
    return Result(task=task, metric="linear_share", value=value, stderr=None, n=n, exposed=1.0, higher_is_better=True)
