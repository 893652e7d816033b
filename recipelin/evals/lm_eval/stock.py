"""lm-eval's own tasks: which folder defines a name, and whether its data can be had (no torch)."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...mistakes import nearest
from .. import EvalError

_NAME = re.compile(r"^(?:task|group):[ \t]*([\"']?)([^\s\"'\[{#]+)\1[ \t]*(?:#.*)?$", re.MULTILINE)


def folders(names: Iterable[str]) -> list[Path]:
    """The folders of lm-eval's tasks that define the names and, for a group, its members.

    The index of all 14,000 tasks takes lm-eval 16 s; finding the files by their text takes less than one.
    Raises EvalError for a name that no file has, with the nearest one.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    known = _files()
    asked = list(names)
    for name in asked:
        if name not in known:
            hint = nearest(name, known)
            raise EvalError(f"lm-eval has no task {name!r}{hint} (a task of ours needs its `next_line` settings)")
    found: dict[Path, None] = {}
    seen: set[str] = set()
    while asked:
        name = asked.pop(0)
        # What is not known here is a tag: its tasks lie in the folder of the group that names it.
        if name in known and name not in seen:
            seen.add(name)
            found[known[name].parent] = None
            asked += _members(load_yaml(known[name], resolve_func=False, recursive=True))
    return list(found)


def _members(settings: dict[str, Any]) -> list[str]:
    """Names of a group's members: tasks, groups, tags."""
    given = settings.get("task")
    return (
        [m if isinstance(m, str) else str(m.get("task", m.get("group"))) for m in given]
        if isinstance(given, list)
        else []
    )


@cache
def _files() -> dict[str, Path]:
    """Name of a task or group -> its file; of two the first by path, as in lm-eval's own index."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    found: dict[str, Path] = {}
    for path in sorted(root.glob("**/*.yaml"), key=lambda p: p.as_posix()):
        for match in _NAME.finditer(path.read_text(encoding="utf-8")):
            found.setdefault(match[2], path)
    return found


def leaves(manager: Any, name: str) -> list[dict[str, Any]]:
    """Settings of the tasks that a name stands for, without their data. Raises EvalError for a member that is not found."""
    if name not in manager.task_index:
        raise EvalError(f"lm-eval has no task or tag {name!r}")
    entry = manager.task_index[name]
    settings: dict[str, Any] = entry.cfg or {}
    members = _members(settings) or sorted(entry.tags if entry.cfg is None else ())
    return [leaf for m in members for leaf in leaves(manager, m)] if members else [settings]


def metrics(settings: dict[str, Any]) -> Sequence[str]:
    """The metrics that a task declares."""
    return [str(m["metric"]) for m in settings.get("metric_list") or ()]


def filters(settings: dict[str, Any]) -> Sequence[str]:
    """The ways to read an answer off that a task has; `none` where it has no list of them."""
    return [str(f["name"]) for f in settings.get("filter_list") or ()] or ["none"]


def fetch(settings: dict[str, Any]) -> None:
    """Make sure that a task's dataset is here. Raises EvalError with its name and what to do where there is no network."""
    import datasets

    if "custom_dataset" in settings:
        raise EvalError(
            f"task {settings['task']!r} makes its items by code of its own; of such tasks only RULER's are known here"
        )
    path, name = settings["dataset_path"], settings.get("dataset_name")
    try:
        datasets.load_dataset(path=path, name=name, **(settings.get("dataset_kwargs") or {}))
    except (OSError, ValueError) as error:
        named = f"{path!r}" + (f", name {name!r}" if name else "")
        given = f"{path!r}" + (f", {name!r}" if name else "")
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvalError(
            f"task {settings['task']!r} needs the dataset {named}, which cannot be had here ({reason}); "
            f"where there is a network, run datasets.load_dataset({given}), copy that machine's ~/.cache/huggingface here, "
            "and set HF_HOME to the copy (or HF_DATASETS_CACHE to its datasets/) and HF_HUB_OFFLINE=1"
        ) from error
