"""A synthetic Record of realistic size: 7 states; perplexity, next line short and long, recall by distance, usage."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recipelin.records import Item, ItemColumns, ItemsOf, Record, Row
from recipelin.states import State, resolve
from recipelin.steps import Evaluate

# log-loss; next line short, long; recall near (6, 24), far (96, 150, 201): prototype figures of a LoLCATs student
FIGURES: dict[str, tuple[float, float, float, float, float]] = {
    "teacher": (2.97, 0.50, 0.53, 0.99, 0.97),
    "softmax": (2.98, 0.50, 0.52, 0.98, 0.95),
    "hybrid": (3.12, 0.48, 0.47, 0.60, 0.40),
    "window": (3.17, 0.48, 0.44, 0.98, 0.02),
    "linear": (6.81, 0.31, 0.30, 0.01, 0.00),
    "linear_outside": (6.90, 0.30, 0.30, 0.00, 0.00),
    "none": (6.58, 0.30, 0.30, 0.00, 0.00),
}
DISTANCES = (6, 24, 96, 150, 201)

Make = Callable[..., tuple[Record, dict[ItemsOf, ItemColumns]]]


def make_record(
    figures: dict[str, tuple[float, float, float, float, float]] = FIGURES,
    *,
    rows: int = 120,
    questions: int = 200,
    recalls: int = 48,
    exposed: float = 0.9,
    seed: int = 0,
    noise: float = 0.02,
    seeds: tuple[int, ...] = (0,),
    **changes: Any,
) -> tuple[Record, dict[ItemsOf, ItemColumns]]:
    """Scores share an item effect between states, so that pairing matters. `seed`: the student's noise."""
    found: list[Row] = []
    items: dict[ItemsOf, ItemColumns] = {}

    def add(
        state: str, task: str, metric: str, scores: Any, length: int, exposure: float, draw: int, **more: Any
    ) -> None:
        each = ItemColumns.of(
            Item(id=f"{task}-{i}", score=float(s), length=length, exposed=exposure) for i, s in enumerate(scores)
        )
        items[ItemsOf(state, "pocket", task, metric, draw)] = each
        found.append(
            Row(
                state=state,
                suite="pocket",
                task=task,
                metric=metric,
                value=float(np.mean(scores)),
                stderr=float(np.std(scores) / np.sqrt(len(scores))),
                n=len(scores),
                exposed=exposure,
                seed=draw,
                **{"chance": None, "higher_is_better": True} | more,
            )
        )

    for draw in seeds:
        shared = np.random.default_rng(100 + draw)
        text = np.random.default_rng(7).normal(0, 0.5, rows)  # the same held-out text in every draw
        tasks = {"next_line_short": (40, 0.1), "next_line_long": (160, exposed)}
        luck = {t: shared.uniform(size=questions) for t in tasks}
        recall_luck = {d: shared.uniform(size=recalls) for d in DISTANCES}
        for state, (loss, short, long, near, far) in figures.items():
            own = np.random.default_rng([seed, sum(map(ord, state))])
            add(
                state,
                "perplexity",
                "log_loss",
                loss + text - text.mean() + own.normal(0, noise, rows),
                256,
                exposed,
                draw,
                higher_is_better=False,
            )
            for (task, (length, exposure)), score in zip(tasks.items(), (short, long), strict=True):
                add(state, task, "acc_norm", luck[task] < score, length, exposure, draw, chance=0.25)
            for d in DISTANCES:
                add(
                    state,
                    f"recall@{d}",
                    "acc",
                    recall_luck[d] < (near if d <= 93 else far),
                    256,
                    1.0,
                    draw,
                    chance=0.125,
                    distance=d,
                )
    for layer, share in enumerate((0.01, 0.0, 0.12)):
        found.append(
            Row(
                state="hybrid",
                suite="pocket",
                task=f"layer_{layer}",
                metric="linear_share",
                value=share,
                stderr=None,
                n=8,
                exposed=None,
                chance=None,
                seed=0,
                higher_is_better=True,
            )
        )
    hybrid = State(window=32)
    states = tuple(resolve(name, hybrid) for name in figures)
    evaluate = Evaluate(suites=(), states=states, hybrid=hybrid, seeds=seeds, margin=0.01)
    plan = {
        "name": "pocket/lolcats",
        "parameters": 885888,
        "hybrid": hybrid.model_dump(mode="json"),
        "steps": [{"step": evaluate.model_dump(mode="json")}],
    }
    fields: dict[str, Any] = {
        "name": "pocket/lolcats",
        "recipe": "name: pocket/lolcats\n",
        "plan": plan,
        "plan_hash": "1a2b3c4d" * 8,
        "status": "finished",
        "commit": "0123456789abcdef" * 2,
        "dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "digests": {"teacher": "aa"},
        "device": "cpu",
        "threads": 2,
        "dtype": "float32",
        "seed": seed,
        "started": "2026-11-24T13:00:00+00:00",
        "seconds": 96.0,
        "layers": 3,
        "window": 32,
        "branches": ("window", "linear"),
        "margin": 0.01,
        "rows": tuple(found),
    }
    return Record(**fields | changes), items


@pytest.fixture(scope="session")
def make() -> Make:
    return make_record
