"""Carries out a `Select`: scores each candidate layer, and says which stay softmax. The rule itself: layers.py."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import layers
from .data import IGNORED
from .files import write_atomically
from .loop import BatchSource, StageError
from .losses import NEXT_TOKEN, token_loss
from .steps import Calibrate, Loss, Select, Swap, Switch, Transfer, Tune
from .swap import softmax_in, swap, switch

Rows = list[tuple[float, float]]  # (summed nats, tokens) of each
DIVERGENCE = Loss(lm=0.0, kl=1.0)
FILE = "scores.json"


@dataclass(frozen=True)
class Selector:
    """One Select under way. What is scored is kept in `folder` candidate by candidate, so a killed run goes on.

    `fresh()`: the model as the step found it. `teacher()`: one more, for a divergence. `rows(draw)`: held-out rows, one a
    batch. `train(model, step, folder, teacher)`: a Calibrate, Transfer or Tune of the probe. `seed(draw)`: of new parameters.
    """

    step: Select
    fresh: Callable[[], Any]
    teacher: Callable[[], Any]
    rows: Callable[[int], BatchSource]
    train: Callable[[Any, Calibrate | Transfer | Tune, Path, Any], Any]
    seed: Callable[[int], int]
    folder: Path
    device: str

    def go(self) -> dict[str, Any]:
        """The report: the layers that stay, scores, and how stable the choice is."""
        step, known = self.step, self._read()
        model = self.fresh()
        count = len(model.model.layers)
        tried, keep = layers.tried(step, count), layers.count(step, count)
        teacher = self.teacher() if step.policy == "kl_stage2" else None
        bar = tqdm(total=step.draws * len(tried), desc="select", unit="layer", file=sys.stderr, disable=None)
        wanted = [(draw, layer) for draw in range(step.draws) for layer in tried]
        bar.update(sum(_name(*each) in known for each in wanted))
        try:
            for draw in range(step.draws):
                missing = [layer for layer in tried if _name(draw, layer) not in known]
                batches = self.rows(draw)
                if step.policy == "lm_ppl" and _name(draw, None) not in known:
                    self._keep(known, draw, None, self._score(model, batches, None))
                if not missing:
                    continue
                if step.probe:
                    model = model if draw == 0 else self.fresh()
                    self._make(model, draw)
                for layer in missing:
                    bar.set_postfix_str(f"draw {draw}, layer {layer}")
                    with self._candidate(model, layer), self._tuned(model, draw, layer, teacher):
                        self._keep(known, draw, layer, self._score(model, batches, teacher))
                    bar.update()
        finally:
            bar.close()
        found = [{layer: known[_name(draw, layer)] for layer in tried} for draw in range(step.draws)]
        own = [known[_name(draw, None)] for draw in range(step.draws)] if step.policy == "lm_ppl" else []
        return {"policy": step.policy, **layers.decide(found, keep=keep, policy=step.policy, teacher=own)}

    def _make(self, model: Any, draw: int) -> None:
        """The student before any candidate: every layer converted, by the steps of the probe that are layer-local."""
        for number, each in enumerate(self.step.probe):
            if isinstance(each, Swap):
                swap(model, each, seed=self.seed(draw))
            elif isinstance(each, Switch):
                switch(model, each.state)
            elif not isinstance(each, Tune):
                self.train(model, _own(each, draw), self.folder / f"draw{draw}-probe{number}", None)

    def _candidate(self, model: Any, layer: int) -> AbstractContextManager[None]:
        if self.step.policy == "lm_ppl":
            return _without(model, layer)
        return softmax_in(model, layer)

    @contextmanager
    def _tuned(self, model: Any, draw: int, layer: int, teacher: Any) -> Iterator[None]:
        """Within: the model after the probe's `Tune` from where it stands; afterwards as before. Nothing without one."""
        tunes = [s for s in self.step.probe if isinstance(s, Tune)]
        if not tunes:
            yield
            return
        before = {n: t.detach().cpu().clone() for n, t in model.state_dict().items()}
        place = self.folder / _name(draw, layer)
        for each in tunes:
            self.train(model, _own(each, draw), place, teacher)
        yield
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])
        shutil.rmtree(place, ignore_errors=True)

    def _score(self, model: Any, batches: BatchSource, teacher: Any) -> Rows:
        """Of each row its nats and tokens: next-token log-loss, or the divergence from `teacher`."""
        loss = NEXT_TOKEN if teacher is None else DIVERGENCE
        found: Rows = []
        with torch.no_grad():
            for number in range(self.step.rows):
                batch = batches.batch(number).to(self.device)
                tokens = float((batch.labels[:, 1:] != IGNORED).sum())
                found.append((float(token_loss(model, batch, loss, teacher)) * tokens, tokens))
        return found

    def _keep(self, known: dict[str, Rows], draw: int, layer: int | None, rows: Rows) -> None:
        if not all(math.isfinite(loss) for loss, _ in rows):
            where = "the teacher itself" if layer is None else f"layer {layer}"
            raise StageError(f"select: {self.step.policy}: {where} of draw {draw} has a score that is not finite")
        known[_name(draw, layer)] = rows
        write_atomically(self.folder / FILE, json.dumps(known).encode())

    def _read(self) -> dict[str, Rows]:
        path = self.folder / FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {name: [(loss, tokens) for loss, tokens in rows] for name, rows in found.items()}


def _name(draw: int, layer: int | None) -> str:
    return f"draw{draw}-" + ("teacher" if layer is None else f"layer{layer}")


def _own(step: Any, draw: int) -> Any:
    """A step of the probe under a stage of its own, whose name draws its rows: the same for all candidates of a draw."""
    return step if isinstance(step, Calibrate) else step.model_copy(update={"stage": f"select-{step.stage}-{draw}"})


@contextmanager
def _without(model: Any, layer: int) -> Iterator[None]:
    """Within: the attention of one layer adds nothing to the stream."""
    handle = model.model.layers[layer].self_attn.register_forward_hook(
        lambda module, inputs, output: (torch.zeros_like(output[0]), *output[1:])
    )
    try:
        yield
    finally:
        handle.remove()
