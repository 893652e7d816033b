"""Which finished work still holds: digests, run keys and the store of finished steps (no torch)."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import __version__, reads
from .attention.form import Form
from .files import digest_file as digest_file
from .files import home as home
from .files import locked, write_atomically
from .load import Loaded
from .mistakes import PlanError
from .plan import Plan, Planned, digest, hashed, hub_commit, teacher_folder
from .sources import fingerprint
from .steps import Calibrate, Evaluate, Select, Step, Swap, Switch, Transfer, Tune

PACKAGE = Path(__file__).parent
LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "tokenizers", "numpy")


def threads() -> int:
    """Threads of a CPU run: OMP_NUM_THREADS, or the cores that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS")
    if not given:
        return len(os.sched_getaffinity(0))
    if not given.isdecimal() or int(given) < 1:
        raise PlanError(f"the environment's OMP_NUM_THREADS is {given!r}; expected a whole number of threads")
    return int(given)


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Versions that can move a number: Python, the libraries that compute, and `more`."""
    found = {"python": platform.python_version(), "recipelin": __version__}
    for name in (*LIBRARIES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def processor() -> str:
    """The model of this machine's CPU."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.is_file() else []
    named = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def machine() -> str:
    """What tells this machine from others, for results that are times."""
    return digest([platform.node(), processor(), len(os.sched_getaffinity(0))])


def digest_folder(folder: Path, names: Sequence[str] = ("*.safetensors", "config.json")) -> str:
    """Digest of a model folder: what decides its logits."""
    files = sorted({f for pattern in names for f in folder.glob(pattern)})
    return digest({f.name: digest_file(f) for f in files})


_TOKENIZER = ("tokenizer*", "chat_template*")


def digests(loaded: Loaded, planned: Plan) -> dict[str, str]:
    """Digests of what the run reads: teacher, published weights, tokenizer, data.

    A hub id is known by the commit that the cache has of its revision; a published file that is not here is `absent`.
    """
    found = {}
    folder = teacher_folder(loaded)
    model = loaded.recipe.model
    for name, path in published(loaded).items():
        found[f"converted.{name}"] = digest_file(path) if path.is_file() else "absent"
    student = student_folder(loaded)
    if student is not None:
        found["student"] = digest_folder(student)
        found["tokenizer"] = digest_folder(student, _TOKENIZER)
    if folder is not None:
        found["teacher"] = digest_folder(folder)
        found.setdefault("tokenizer", digest_folder(folder, _TOKENIZER))
    elif model.teacher:
        # A branch moves; what a run reads is the commit that it found.
        found["teacher_commit"] = hub_commit(loaded) or model.revision or "not known"
        found["teacher"] = digest({"teacher": model.teacher, "commit": found["teacher_commit"]})
    elif model.scratch:
        found["teacher"] = digest(model.model_dump(mode="json", exclude={"dtype", "converted"}))
    found["data"] = digest(
        {
            source.model_dump_json(): fingerprint(source, loaded.path.parent)
            for source in reads.sources((p.step for p in planned.steps), loaded.path)
        }
    )
    return found


def student_folder(loaded: Loaded) -> Path | None:
    """The folder of `model.student`; None where there is none."""
    student = loaded.recipe.model.student
    return (loaded.path.parent / student.folder).resolve() if student else None


def published(loaded: Loaded) -> dict[str, Path]:
    """Files of `model.converted` by field; relative paths start at the recipe's folder. Empty where none is given."""
    converted = loaded.recipe.model.converted
    files = converted.files() if converted else {}
    return {name: (loaded.path.parent / path).resolve() for name, path in files.items()}


# The source files that compute a step: a mended bug must never meet weights of before. Patterns below the package.
_MODEL = ("swap.py", "masks.py", "cache.py", "states.py", "families.py", "attention/**/*.py")
_DATA = ("data.py", "sources.py", "templates.py", "chat.py", "hub.py", "documents.py", "spool.py")
_LOOP = (
    "stages.py",
    "teacher_stream.py",
    "loop.py",
    "losses.py",
    "head_loss.py",
    "adapters.py",
    "checkpoint.py",
    "optimizer.py",
)
_TRAINING = (*_MODEL, *_DATA, *_LOOP, "hf.py", "schedule.py", "branches.py")
_EVALUATION = (
    "evaluate.py",
    "exposure.py",
    "evals/**/*.py",
)  # of a stage too, where it may ask a suite while it trains
_SOURCES: Mapping[type, tuple[str, ...]] = {
    Select: (*_TRAINING, "selection.py", "layers.py"),
    Swap: (*_MODEL, "lolcats_checkpoint.py"),
    Switch: ("states.py",),
    Calibrate: _TRAINING,
    Transfer: _TRAINING,
    Tune: _TRAINING,
    Evaluate: (*_MODEL, *_DATA, "hf.py", *_EVALUATION),
}


def source_digest(step: Step) -> str:
    """Digest of the source files that compute a step: its own, and the operators'."""
    watches = isinstance(step, (Transfer, Tune)) and (step.schedule.validation or step.schedule.curve)
    patterns = (*_SOURCES[type(step)], *(_EVALUATION if watches else ()))
    return _digest_of(patterns, operators=not isinstance(step, Switch))


@cache
def _digest_of(patterns: tuple[str, ...], *, operators: bool) -> str:
    """Once in a process, whose code is what it loaded, whatever becomes of the files while it runs."""
    kernels = _kernels()
    files = {f for pattern in patterns for f in PACKAGE.glob(pattern)}
    if operators:
        files |= {f for kind in ("py", "c", "h") for f in kernels.rglob(f"*.{kind}")}
    named = {f"{root.name}/{f.relative_to(root)}": f for root in (PACKAGE, kernels) for f in files if root in f.parents}
    return digest({name: digest_file(f) for name, f in named.items()})


def _kernels() -> Path:
    """The folder of the operators, found without importing them (they import torch)."""
    spec = importlib.util.find_spec("recipelin_kernels")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("recipelin_kernels is not installed; install recipelin as a whole (pip install -e .)")
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Surroundings:
    """What a result depends on beside the plan."""

    digests: Mapping[str, str]
    """teacher (weights or new model), tokenizer, data."""
    device: str
    threads: int
    dtype: str
    versions: Mapping[str, str]


def surroundings(loaded: Loaded, planned: Plan, device: str) -> Surroundings:
    """Everything outside the plan that a result depends on, digested. `device`: cpu, or the name of the GPU."""
    return Surroundings(
        digests=digests(loaded, planned),
        device=device,
        threads=threads(),
        dtype=loaded.recipe.model.dtype,
        versions=versions(),
    )


def run_keys(steps: Sequence[Planned], around: Surroundings) -> tuple[str, ...]:
    """run_key of each step: its `lineage`, the sources that compute it and all before it, and the surroundings."""
    base = {
        "digests": dict(around.digests),
        "device": around.device,
        "threads": around.threads if around.device == "cpu" else None,
        "dtype": around.dtype,
        "versions": dict(around.versions),
        "machine": platform.machine(),
    }
    found = []
    for index in range(len(steps)):
        sources = [source_digest(each.step) for each in _made_from(steps, index)]
        found.append(digest({**base, "plan": lineage(steps, index), "sources": sources})[:20])
    return tuple(found)


def lineage(steps: Sequence[Planned], index: int) -> str:
    """Of a step: what of the plan decides its result. Its plan hash; of a transfer that reads no state, without the Switches
    right before it, so that runs in other states share it."""
    *before, own = _made_from(steps, index)
    if not _reads_no_state(steps, index):
        return own.hash
    return digest({"before": before[-1].hash, "step": hashed(own.step.model_dump(mode="json"))})


def _made_from(steps: Sequence[Planned], index: int) -> Sequence[Planned]:
    """A step and those before it that its result hangs on."""
    before = list(steps[:index])
    while _reads_no_state(steps, index) and isinstance(before[-1].step, Switch):
        before.pop()
    return [*before, steps[index]]


def _reads_no_state(steps: Sequence[Planned], index: int) -> bool:
    """Whether a step is a transfer by objectives that the form computes in no state of its own, and nothing watches it."""
    step = steps[index].step
    if not isinstance(step, Transfer) or step.schedule.validation or step.schedule.curve:
        return False
    form = next((p.step.config for p in reversed(steps[:index]) if isinstance(p.step, Swap)), None)
    return isinstance(form, Form) and set(step.objective) <= set(form.STATELESS)


@dataclass(frozen=True)
class Store:
    """Finished steps under `home()/steps/<run_key>/`, each made in a working folder and renamed when whole."""

    root: Path

    def finished(self, key: str) -> Path | None:
        """The folder of a finished step, or None."""
        folder = self.root / "steps" / key
        return folder if (folder / "report.json").is_file() else None

    def interrupted(self, key: str) -> bool:
        """Whether a step was begun and has a checkpoint."""
        return any((self.root / "steps" / f"{key}.working").glob("checkpoint*"))

    def working(self, key: str) -> Path:
        """The folder in which the step is made, with the checkpoints of an interrupted run."""
        folder = self.root / "steps" / f"{key}.working"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, key: str, report: Mapping[str, Any]) -> Path:
        """Write the report and rename the working folder: from here on the step is finished."""
        working, folder = self.working(key), self.root / "steps" / key
        write_atomically(working / "report.json", json.dumps(report, indent=1).encode())
        if folder.exists():
            shutil.rmtree(folder)
        working.rename(folder)
        return folder

    def forget(self, key: str) -> None:
        """Drop what is known of a step (`--fresh`)."""
        for folder in (self.root / "steps" / key, self.root / "steps" / f"{key}.working"):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """One process at a time makes a step; the next one finds it finished."""
        with locked(self.root / "locks" / key):
            yield

    def list(self) -> list[tuple[str, dict[str, Any]]]:
        """All finished steps with their reports, newest first."""
        folders = sorted((self.root / "steps").glob("*/report.json"), key=lambda f: -f.stat().st_mtime)
        return [
            (f.parent.name, json.loads(f.read_text(encoding="utf-8")))
            for f in folders
            if not f.parent.name.endswith(".working")
        ]
