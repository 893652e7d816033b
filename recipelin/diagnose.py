"""`recipelin diagnose PATH`: an exported student or a published checkpoint in all its states, without a recipe of one's own.

It writes the recipe that it runs, so that the numbers have the same provenance as any others (no torch but to find out
the numbers of a teacher on the hub).
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import reads
from .attention.form import Form
from .files import write_atomically
from .load import read_student
from .mistakes import nearest
from .records import SHRUNK
from .reuse import digest_folder, home
from .shipped import POCKET, SHIPPED
from .sources import SourceError, refuse_absent, text_of
from .states import resolve
from .suites import load_suite

STATES = ("softmax", "hybrid", "window", "linear", "linear_outside", "sinks", "none")


class DiagnoseError(ValueError):
    """A path that cannot be diagnosed, or an option that does not fit it; the message says what to give."""


def diagnose_command(arguments: argparse.Namespace) -> int:
    """Write the recipe of a diagnosis under the home of runs, and run it. Exit 2 with the reason when refused."""
    from .commands import run_command

    try:
        recipe = diagnosis(
            Path(arguments.path),
            teacher=arguments.teacher,
            suites=tuple(arguments.suite),
            finetune=arguments.finetune,
            dtype=arguments.dtype,
            windows=tuple(dict.fromkeys(arguments.window)),
        )
        if arguments.beyond_context:
            recipe["model"]["beyond_context"] = True
    except DiagnoseError as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 2
    folder = home() / "diagnoses"
    path = folder / f"{recipe['name'].rpartition('/')[2]}.yaml"
    text = "# Written by recipelin diagnose; run it again with: recipelin run <this file>\n"
    write_atomically(path, (text + yaml.safe_dump(recipe, sort_keys=False, width=120)).encode())
    print(f"recipe: {path}", file=sys.stderr)
    return run_command(
        argparse.Namespace(
            recipes=[str(path)],
            out=arguments.out,
            device=arguments.device,
            fresh=arguments.fresh,
            shrink=False,
            allow_code=[],
        )
    )


def diagnosis(
    path: Path,
    *,
    teacher: str | None,
    suites: Sequence[str],
    finetune: str | None,
    dtype: str | None,
    windows: Sequence[int] = (),
) -> dict[str, Any]:
    """The recipe of a diagnosis; `windows`: hybrid and window alone at these widths too. Raises DiagnoseError."""
    found = _diagnosis(path, teacher=teacher, suites=suites, finetune=finetune, dtype=dtype)
    found["eval"]["states"] += [
        {"name": f"{state}-{width}", "of": state, "window": width}
        for width in windows
        for state in ("hybrid", "window")
    ]
    return found


def _diagnosis(
    path: Path, *, teacher: str | None, suites: Sequence[str], finetune: str | None, dtype: str | None
) -> dict[str, Any]:
    # The recipe lies elsewhere: suites by path are named from the root. A wrong one is refused before anything is written.
    suites = [str(Path(s).resolve()) if s.endswith(".yaml") else s for s in suites]
    for suite in suites:
        for source in map(text_of, reads.of_suite(load_suite(suite, Path(suite)))):
            try:
                refuse_absent(source, Path(suite).parent)
            except SourceError as error:
                raise DiagnoseError(f"suite {suite}: {error}") from error
    if path.is_dir() and (path / "config.json").is_file():
        if finetune:
            raise DiagnoseError("--finetune belongs to LoLCATs' .pt files; an exported student holds all its weights")
        return _of_student(path, teacher=teacher, suites=suites, dtype=dtype)
    if (path.suffix == ".pt" and path.is_file()) or (path / "model.pt").is_file():
        return _of_lolcats(path, teacher=teacher, suites=suites, finetune=finetune, dtype=dtype)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DiagnoseError(
        f"{path}: expected the folder of an exported student (with config.json) or a .pt file of LoLCATs"
        f"{nearest(path.name, beside) if not path.exists() else ''}"
    )


def _of_student(path: Path, *, teacher: str | None, suites: Sequence[str], dtype: str | None) -> dict[str, Any]:
    try:
        student, architecture = read_student(path)
    except ValueError as error:
        raise DiagnoseError(str(error)) from error
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model: dict[str, Any] = {"student": str(path.resolve())}
    origin = config["recipelin"].get("origin") or {}
    model |= _teacher(teacher) if teacher else _its_own_teacher(origin.get("teacher"), path)
    model["dtype"] = dtype or ("bfloat16" if "bfloat16" in str(config.get("dtype")) else "float32")
    kept = [s for s in STATES if s != "sinks" or "sinks" in student.state.branches]
    if isinstance(form := student.config, Form):
        resolved = ((s, resolve(s, student.state).state) for s in kept)
        kept = [s for s, state in resolved if state is None or not form.refuses(s, state, architecture)]
    return {
        "name": (SHRUNK if str(origin.get("recipe")).startswith(SHRUNK) else "") + _name(_folder(path)),
        "about": {"claim": f"what each branch of {_folder(path)} does"},
        "model": model,
        "method": {"name": "exported"},
        "eval": {
            "suites": list(suites or _suites(path)),
            "states": [*(["teacher"] if "teacher" in model else []), *kept],
        },
    }


def _of_lolcats(
    path: Path, *, teacher: str | None, suites: Sequence[str], finetune: str | None, dtype: str | None
) -> dict[str, Any]:
    """LoLCATs' stage-1 file, and its stage-2 file; a folder stands for its model.pt."""
    if teacher is None:
        raise DiagnoseError(f"{path}: LoLCATs' files do not say their teacher: give --teacher, a folder or a hub id")

    def file(given: Path) -> str:
        return str((given / "model.pt" if given.is_dir() else given).resolve())

    converted = {"format": "lolcats", "distill": file(path)}
    if finetune:
        if not Path(finetune).exists():
            raise DiagnoseError(f"--finetune {finetune}: no such file")
        converted["finetune"] = file(Path(finetune))
    if not suites:
        raise DiagnoseError("give --suite NAME: which tasks this model is to be asked (recipelin list names them)")
    return {
        "name": _name(_folder(path)),
        "about": {"claim": f"what each branch of {_folder(path)} does"},
        "model": {**_teacher(teacher), "dtype": dtype or "bfloat16", "converted": converted},
        "method": {"name": "converted"},
        "eval": {"suites": list(suites), "states": ["teacher", *(s for s in STATES if s != "sinks")]},
    }


def _teacher(given: str) -> dict[str, Any]:
    """`model.teacher` of a recipe that lies elsewhere: folders by their whole path, the numbers of a hub id beside it."""
    name, _, revision = given.partition("@")
    if name in SHIPPED:
        return {"teacher": name}
    if Path(name).is_dir():
        return {"teacher": str(Path(name).resolve())}
    try:
        from .hf import TeacherError, teacher_architecture
    except ModuleNotFoundError as error:
        raise DiagnoseError(f"diagnose needs {error.name}: pip install 'recipelin[run,eval]'") from error
    try:
        numbers = teacher_architecture(name, revision=revision or None)
    except TeacherError as error:
        raise DiagnoseError(str(error).replace("model.teacher", "--teacher")) from error
    found: dict[str, Any] = {"teacher": name, "architecture": numbers.model_dump(mode="json", exclude_none=True)}
    return found | ({"revision": revision} if revision else {})


def _its_own_teacher(known: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    """The teacher that the student's folder names, where it is here and unchanged; else none, and it is said."""
    if not known:
        print(f"{path} does not say its teacher: diagnosed without (give --teacher)", file=sys.stderr)
        return {}
    source = str(known["source"])
    folder = SHIPPED.get(source, Path(source))
    if folder.is_dir():
        if digest_folder(folder) == known["digest"]:
            return _teacher(source)
        print(
            f"the teacher {source} is no longer the one of {path}: diagnosed without (give --teacher)", file=sys.stderr
        )
        return {}
    try:
        return _teacher(source + (f"@{known['revision']}" if known.get("revision") else ""))
    except DiagnoseError as error:
        print(f"{path}: diagnosed without its teacher (give --teacher): {error}", file=sys.stderr)
        return {}


def _suites(path: Path) -> tuple[str, ...]:
    """The pocket's suite for a student that speaks the pocket's tokens; others are asked for."""
    if digest_folder(path, ("tokenizer.json",)) == digest_folder(POCKET, ("tokenizer.json",)):
        return ("pocket",)
    raise DiagnoseError("give --suite NAME: which tasks this model is to be asked (recipelin list names them)")


def _folder(path: Path) -> str:
    """What a person calls it: a run's `model` by the run."""
    whole = path.resolve()
    return (
        whole.parent.name
        if whole.name in ("model", "model.pt")
        else whole.stem
        if whole.suffix == ".pt"
        else whole.name
    )


def _name(text: str) -> str:
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in text.lower()).strip("-._")
    return f"diagnose/{kept or 'student'}"
