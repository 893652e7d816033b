"""Checkpoints of a stage: one safetensors file, written whole or not at all. Nothing is pickled."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Where a stage stands after `step` optimiser steps. A new object for each step; tensors only once it is read back."""

    step: int = 0
    seconds: float = 0.0
    curve: Sequence[tuple[int, float]] = ()
    validation: tuple[tuple[int, float], ...] = ()
    best: Mapping[str, Tensor] | None = None
    best_step: int | None = None
    waited: int = 0
    plateau: float = 1.0
    since_drop: int = 0
    stopped: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer_steps: Mapping[str, float] = field(default_factory=dict)

    def after(self, step: int, seconds: float, curve: Sequence[tuple[int, float]]) -> "Checkpoint":
        """The same after one more step."""
        return replace(self, step=step, seconds=seconds, curve=curve, weights={}, optimizer={}, optimizer_steps={})

    def validated(self, *, value: float, best: Mapping[str, Tensor] | None, **fields: Any) -> "Checkpoint":
        """The same after a validation; `best`: the weights, if it was the best so far."""
        found = replace(self, validation=(*self.validation, (self.step, value)), **fields)
        return replace(found, best=best, best_step=self.step) if best is not None else found


class OtherCheckpoint(RuntimeError):
    """A checkpoint that another plan, or another version of the code, has written."""


def write_checkpoint(folder: Path, key: str, at: Checkpoint, trained: Mapping[str, Tensor], optimizers: Any) -> None:
    """Write beside the old one, flush to disk, rename. Killed at any moment, the old or the new one is whole. OSError."""
    moments, steps = optimizers.state()
    tensors = {f"weights/{n}": p.detach() for n, p in trained.items()}
    tensors |= {f"optimizer/{n}": t for n, t in moments.items()}
    tensors |= {f"best/{n}": t for n, t in (at.best or {}).items()}
    facts = {
        "key": key,
        "step": at.step,
        "seconds": at.seconds,
        "curve": list(at.curve),
        "validation": list(at.validation),
        "best_step": at.best_step,
        "waited": at.waited,
        "plateau": at.plateau,
        "since_drop": at.since_drop,
        "stopped": at.stopped,
        "optimizer_steps": steps,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f".{FILE}.*"):
        old.unlink(missing_ok=True)
    temporary = folder / f".{FILE}.{uuid.uuid4().hex[:8]}"
    try:
        try:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, temporary, {"at": json.dumps(facts)}
            )
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            raise
        except Exception as error:
            # safetensors reports a full disk as an error of its own.
            raise OSError(None, str(error)) from error
        temporary.replace(folder / FILE)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The last whole checkpoint of a folder, or None. Raises OtherCheckpoint if another key has written it."""
    path = folder / FILE
    if not path.is_file():
        return None
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "best": {}}
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["at"])
        if facts["key"] != key:
            raise OtherCheckpoint(
                f"{path} was written for {facts['key']!r}, not for {key!r}; move it away or use --fresh"
            )
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part, _, rest = name.partition("/")
            parts[part][rest] = file.get_tensor(name)
    return Checkpoint(
        step=facts["step"],
        seconds=facts["seconds"],
        curve=[(int(n), float(v)) for n, v in facts["curve"]],
        validation=tuple((int(n), float(v)) for n, v in facts["validation"]),
        best=parts["best"] or None,
        best_step=facts["best_step"],
        waited=facts["waited"],
        plateau=facts["plateau"],
        since_drop=facts["since_drop"],
        stopped=facts["stopped"],
        weights=parts["weights"],
        optimizer=parts["optimizer"],
        optimizer_steps=facts["optimizer_steps"],
    )
