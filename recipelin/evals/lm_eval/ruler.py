"""RULER (arXiv 2404.06654) through lm-eval: tasks that make their items for a tokenizer and a length (no torch).

lm-eval makes them anew in every call, from random states that go on from task to task. Here lm-eval's own code makes them
once, so that every state sees the same items, and they stand beside the run as local tasks with lm-eval's prompts and scores.
"""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ...files import home, locked, write_atomically
from ...spool import tokenizer_digest
from .. import EvalError
from . import stock
from .config import Task

MAKING = Path(__file__).with_name("making.py")
PATIENCE = 300.0  # seconds without a sign of life; an item of 131,072 tokens takes less than one
_KEPT = ("output_type", "test_split", "doc_to_text", "doc_to_target", "gen_prefix", "target_delimiter", "repeats",
         "generation_kwargs")  # fmt: skip


def is_ruler(leaf: dict[str, Any]) -> bool:
    """Whether a task makes its own items by length: lm-eval names its metrics by the lengths."""
    return "custom_dataset" in leaf and all(m.isdigit() for m in stock.metrics(leaf))


def leaves(task: Task) -> list[dict[str, Any]]:
    """lm-eval's settings of the tasks that a RULER task stands for."""
    from lm_eval.tasks import TaskManager

    folders = [str(f) for f in stock.folders([task.task])]
    return stock.leaves(TaskManager(include_path=folders, include_defaults=False), task.task)


def local_name(name: str, length: int, seed: int) -> str:
    """Of the local task; as for other local tasks draw 0 has the plain name."""
    return f"{name}@{length}" + (f"_seed{seed}" if seed else "")


def write(task: Task, tokenizer: Any, *, folder: Path, seed: int) -> None:
    """The local tasks of a RULER task, and its group where it is one: lm-eval's settings, on items that are here."""
    assert task.max_seq_length is not None
    found = leaves(task)
    for leaf in found:
        _write_leaf(leaf, task.max_seq_length, tokenizer, folder=folder, seed=seed)
    if [leaf["task"] for leaf in found] != [task.task]:
        name = local_name(task.task, task.max_seq_length, seed)
        metric = {"metric": str(task.max_seq_length), "weight_by_size": task.mean == "items"}
        group = {
            "group": name,
            "task": [local_name(leaf["task"], task.max_seq_length, seed) for leaf in found],
            "aggregate_metric_list": [metric],
        }
        write_atomically(folder / f"{name}.yaml", yaml.safe_dump(group, sort_keys=False).encode())


def _write_leaf(leaf: dict[str, Any], length: int, tokenizer: Any, *, folder: Path, seed: int) -> None:
    import lm_eval

    name = local_name(leaf["task"], length, seed)
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items(leaf, length, tokenizer, seed=seed))}},
        **{key: leaf[key] for key in _KEPT if key in leaf},
        "metric_list": [{"metric": str(length), "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": (leaf.get("metadata") or {}).get("version", 1.0)},
    }
    # A function of lm-eval's is named by its module: the path of a file may hold dots, which lm-eval cannot read.
    scores = Path(leaf["process_results"]).resolve()  # as the root: an environment may be behind a symlink
    root = Path(lm_eval.__file__).resolve().parents[1]
    named = ".".join(scores.relative_to(root).parts) if scores.is_relative_to(root) else str(scores)
    text = yaml.safe_dump(settings, sort_keys=False) + f"process_results: !function {named}\n"
    write_atomically(folder / f"{name}.yaml", text.encode())


def place(leaf: dict[str, Any], length: int, tokenizer: Any, *, seed: int) -> Path:
    """Where the items of a task are kept: by length, draw, tokenizer and lm-eval's version."""
    facts = {
        "task": leaf["task"],
        "length": length,
        "seed": seed,
        "tokenizer": [tokenizer_digest(tokenizer), tokenizer("").input_ids],
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return home() / "items" / f"{leaf['task']}@{length}-{key}.jsonl"


def items(leaf: dict[str, Any], length: int, tokenizer: Any, *, seed: int) -> Path:
    """The file of a task's items, made where it is not there yet. Raises EvalError with what is missing."""
    path = place(leaf, length, tokenizer, seed=seed)
    if not path.is_file():
        with locked(path.with_suffix(".lock")):
            if not path.is_file():
                write_atomically(path, _made(leaf, length, tokenizer, seed))
    return path


def _made(leaf: dict[str, Any], length: int, tokenizer: Any, seed: int) -> bytes:
    what = f"task {leaf['task']!r} at {length} tokens"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tokenizer.save_pretrained(folder / "tokenizer")
        asked = {
            "function": leaf["custom_dataset"],
            "length": length,
            "tokenizer": str(folder / "tokenizer"),
            "seed": seed,
            "path": str(folder / "items.jsonl"),
        }
        answer = _child(asked, folder)
        if answer is None:
            raise EvalError(
                f"{what}: lm-eval's generator made no item in {PATIENCE:.0f} s; it tries without end where a prompt does not "
                f"fit, and RULER's are written for tokenizers of about four characters a token"
            )
        if package := answer.get("package"):
            raise EvalError(f"{what} needs {package}: pip install 'recipelin[ruler]'")
        if absent := answer.get("absent"):
            raise EvalError(
                f"{what} makes its items of texts that cannot be had here ({absent}); where there is a network, run the same "
                f"recipe until they are made, and copy that machine's {home().name}/items to {home() / 'items'}"
            )
        if reason := answer.get("reason"):
            raise EvalError(f"{what}: lm-eval cannot make its items ({reason})")
        return (folder / "items.jsonl").read_bytes()


def _child(asked: dict[str, Any], folder: Path) -> dict[str, str] | None:
    """What the process answers; None if it gave no sign of life for too long."""
    said, heard = folder / "stdout", folder / "stderr"
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    with (folder / "asked.json").open() as stdin, said.open("w") as stdout, heard.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", str(MAKING)], stdin=stdin, stdout=stdout, stderr=stderr, cwd=folder
        )
        try:
            size, since = 0, time.monotonic()
            while True:
                try:
                    child.wait(timeout=1.0)
                    break
                except subprocess.TimeoutExpired:
                    if heard.stat().st_size != size:
                        size, since = heard.stat().st_size, time.monotonic()
                    elif time.monotonic() - since > PATIENCE:
                        return None
        finally:
            child.kill()  # after an interrupt too: the generators catch everything
            child.wait()
    try:
        answer: dict[str, str] = json.loads(said.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        last = next(iter(heard.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]), "it said nothing")
        return {"reason": f"the process ended with {child.returncode}: {last}"}
    return answer
