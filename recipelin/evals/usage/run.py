"""Where attention goes by layer, head and position: shares of normaliser, output and softmax mass."""

from itertools import pairwise

import torch
from torch import Tensor

from recipelin_kernels import Components

from ... import exposure
from ...attention.captured import Captured
from ...records import Bands, Result
from ...swap import forms, observing
from ..held_out import held_out_rows
from ..subject import Subject
from .config import Config


@torch.no_grad()
def run(config: Config, subject: Subject) -> tuple[Result, ...]:
    """A Result for each layer and metric, on the student's own stream: mean over heads and over queries with a linear set.

    Its `bands` hold the means by head and position. Nothing in states without both branches, or of rows that fit into the
    window. No `linear_share` where there is none: in the joins `average` and `sum`, whose branches have a normaliser each,
    and of signed features, whose normaliser has no parts.
    """
    found = forms(subject.model)
    if not found or subject.state.state is None or not {"window", "linear"} <= set(subject.state.state.branches):
        return ()
    own, window = exposure.exposed_from(subject.state.state), subject.state.state.most_keys
    if subject.exposed_from is None or own is None or window is None:
        return ()
    # The queries of all states are those of the hybrid, but for states with a wider window than it.
    first = max(subject.exposed_from, own)
    if config.length <= first:
        return ()
    edges = config.bands(first, window)
    cuts = [e - first for e in edges[1:-1]]
    layers = {form.layer_index: form for form in found}
    joint = subject.state.state.join not in ("average", "sum") and found[0].config.feature_map.activation != "none"
    sums: dict[tuple[int, str], Tensor] = {}

    def look(index: int, captured: Captured) -> None:
        parts = layers[index].components(captured)
        shares = {"output_share": output_share(parts), "outside_share": layers[index].outside_mass(captured)}
        if joint:
            shares["linear_share"] = parts.linear_share
        for metric, values in shares.items():
            bands = values[:, :, first:].double().sum(0).tensor_split(cuts, dim=-1)
            total = torch.stack([b.sum(-1) for b in bands], -1).cpu()  # [H, bands]
            sums[index, metric] = sums.get((index, metric), 0) + total

    rows = held_out_rows(config, subject.tokenizer, base=subject.base, seed=subject.seed)
    with observing(subject.model, look):
        for start in range(0, len(rows), config.batch):
            subject.model(
                input_ids=torch.from_numpy(rows[start : start + config.batch]).to(subject.device), use_cache=False
            )
    counts = tuple(len(rows) * (b - a) for a, b in pairwise(edges))
    return tuple(
        _result(index, metric, sums[index, metric], edges, counts)
        for metric in ("linear_share", "output_share", "outside_share")
        for index in layers
        if (index, metric) in sums
    )


def output_share(parts: Components) -> Tensor:
    """[B,H,T]: |b-part| / (|a-part| + |b-part|); 0 where both are 0.

    With y = (1 - s) y_W + s y_L, s the linear share, the parts are (1 - s) y_W and s y_L: the numerators over the joint
    denominator. `sum` has twice both.
    """
    softmax = (1 - parts.linear_share).abs() * parts.window.norm(dim=-1)
    linear = parts.linear_share.abs() * parts.linear.norm(dim=-1)
    whole = softmax + linear
    return linear / torch.where(whole == 0, 1.0, whole)


def _result(index: int, metric: str, sums: Tensor, edges: tuple[int, ...], counts: tuple[int, ...]) -> Result:
    n = sum(counts)
    heads: list[list[float]] = (sums / torch.tensor(counts)).tolist()
    return Result(
        task=f"layer_{index}",
        metric=metric,
        value=float(sums.sum() / (n * len(sums))),
        stderr=None,
        n=n,
        exposed=1.0,
        bands=Bands(edges=edges, counts=counts, heads=tuple(map(tuple, heads))),
    )
