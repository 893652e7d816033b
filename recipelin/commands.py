"""What the commands do, from arguments to what is printed (torch only inside `run_command`)."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import catalogue, lookup, reads, reuse
from .claimcheck import check_claims
from .evals import EvalError
from .files import write_atomically
from .finding import CHECKOUT, kind_of
from .load import Loaded, expand, load_base
from .mistakes import PlanError
from .naming import default_folder, file_name
from .plan import Plan, cached_config, hub_teacher, plan, refusal
from .points import points
from .shipped import POCKET
from .show import show
from .shrink import ShrinkError, shrink, tiny_folder, tiny_of
from .sources import LocalFile, SourceError, refuse_absent
from .steps import Calibrate, Transfer, Tune
from .strict_yaml import RecipeError, Where, read_yaml
from .suites import read_suite
from .tablespec import read_spec


def plan_command(arguments: argparse.Namespace) -> int:
    """Print the plan of every point of a recipe's grid. Exit 2 on a recipe that cannot be carried out."""
    found = points(arguments.recipe, allow_code=tuple(arguments.allow_code))
    for number, point in enumerate(found):
        planned = plan(point, allow_code=arguments.allow_code)
        if number:
            print()
        header = [f"recipe    {planned.name}   ({point.path}, {point.origin})"]
        print(show(planned, header=header, reused=known(point, planned, arguments.device)))
    if len(found) > 1:
        print(f"\n{len(found)} runs")
    return 0


def known(loaded: Loaded, planned: Plan, device: str) -> list[str]:
    """For each step, in words, whether a finished or an interrupted result would be taken up again."""
    place = device if device != "auto" else ("cuda" if Path("/dev/nvidia0").exists() else "cpu")
    if place != "cpu":
        # The name of the GPU is part of a run's key, and only torch knows it.
        return ["" for _ in planned.steps]
    around = reuse.surroundings(loaded, planned, "cpu")
    store = reuse.Store(reuse.home())
    words = []
    for step, key in zip(planned.steps, reuse.run_keys(planned.steps, around), strict=True):
        if not isinstance(step.step, (Calibrate, Transfer, Tune)):
            words.append("")
        elif folder := store.finished(key):
            words.append(f"finished, would be reused: {folder}")
        elif store.interrupted(key):
            words.append("interrupted, would go on from its last checkpoint")
        else:
            words.append("to be made")
    return words


def run_command(arguments: argparse.Namespace) -> int:
    """Run every point of each recipe's grid and print its table. Exit 130 when interrupted; the same command resumes.

    Exit 2 for a recipe that is wrong, before the first one costs anything; 1 at the first run that fails.
    """
    if arguments.out and len(arguments.recipes) > 1:
        print(
            f"recipelin: --out is the folder of one recipe's run; found {len(arguments.recipes)} recipes",
            file=sys.stderr,
        )
        return 2
    named = [p for name in arguments.recipes for p in points(name, allow_code=tuple(arguments.allow_code))]
    for point in named:
        _config_is_there(point)
    planned = [plan(point, allow_code=arguments.allow_code) for point in named]
    todo = {default_folder(each.name, each.hash): (point, each) for point, each in zip(named, planned, strict=True)}
    if not arguments.shrink:
        for point, each in todo.values():  # refused before the first one costs anything
            _sources_are_there(point, each)
    try:
        from .checkpoint import OtherCheckpoint
        from .hf import TeacherError
        from .kernelcheck import refuse_kernel
        from .lolcats_checkpoint import PublishedError
        from .run import RunError, choose_device, run
        from .stages import StageError
    except ModuleNotFoundError as error:
        print(
            f"recipelin: run needs {error.name or error}, which is not installed: pip install 'recipelin[run,eval]'",
            file=sys.stderr,
        )
        return 2
    from .records import read_items, read_record
    from .tables import render, run_table

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        place = choose_device(arguments.device)
        chosen = list(todo.values())
        if arguments.shrink:
            small = shrunk([point for point, _ in chosen])
            chosen = [(point, plan(point, allow_code=arguments.allow_code)) for point in small]
        for point, each in chosen:  # refused before the first one costs anything
            refuse_kernel(point, each, place)
        for point, _ in chosen:
            out = Path(arguments.out) if arguments.out else None
            if out and len(chosen) > 1:
                out = out / file_name(point.recipe.name)
            folder = run(
                point, out=out, device=arguments.device, fresh=arguments.fresh, allow_code=arguments.allow_code
            )
            table = render(run_table(read_record(folder), read_items(folder), place=folder / "record.json"), "markdown")
            write_atomically(folder / "table.md", table.encode())
            print(table)
            print(f"record, items, table, model, logs: {folder}")
    except KeyboardInterrupt:
        print("\nrecipelin: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (
        RunError,
        TeacherError,
        StageError,
        EvalError,
        OtherCheckpoint,
        PublishedError,
        ShrinkError,
    ) as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"recipelin: {where}{error.strerror or error}; what was finished is kept, and the same command goes on from "
            "there (RECIPELIN_HOME names another disk)",
            file=sys.stderr,
        )
        return 1
    return 0


def shrunk(chosen: Sequence[Loaded]) -> tuple[Loaded, ...]:
    """The points at tiny size, each on a tiny teacher of its family; what plans the same is there once. Raises ShrinkError."""
    small = [(point, shrink(point, str(tiny_folder(reuse.home(), tiny_of(point))))) for point in chosen]
    from transformers.utils import logging

    from .hf import tiny_teacher

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    found: dict[str, Loaded] = {}
    for point, tiny in small:
        if point.recipe.model.scratch is None:
            numbers = tiny_of(point)
            tiny_teacher(numbers, tiny_folder(reuse.home(), numbers), POCKET)
        found.setdefault(plan(tiny).hash, tiny)
    counted = (
        f"{len(found)} of {len(chosen)} runs, the others are the same at this size" if len(found) < len(chosen) else ""
    )
    print(f"shrunk: a dry run on a tiny random model{': ' if counted else ''}{counted}", file=sys.stderr)
    return tuple(found.values())


def _config_is_there(point: Loaded) -> None:
    """The config of a hub teacher whose numbers the recipe leaves out, into the cache: the plan needs it. Raises PlanError."""
    model = point.recipe.model
    if model.architecture or not hub_teacher(point) or cached_config(point):
        return
    try:
        from .hf import TeacherError, teacher_architecture
    except ModuleNotFoundError:
        return  # the plan says what it lacks
    try:
        teacher_architecture(str(model.teacher), revision=model.revision)
    except TeacherError as error:
        raise refusal(point, ("model", "teacher"), str(error)) from error


def _sources_are_there(point: Loaded, planned: Plan) -> None:
    """Raises PlanError at the line that names a local file or dataset which is not there."""
    for source in reads.texts((p.step for p in planned.steps), point.path):
        try:
            refuse_absent(source, point.path.parent)
        except SourceError as error:
            field = "path" if isinstance(source, LocalFile) else "dataset"
            given = getattr(source, field)
            named = (p for p in point.places if p[-1:] == (field,) and _at(point.raw, p) == given)
            raise refusal(point, next(named, ("eval", "suites")), str(error)) from error


def _at(values: Any, where: Where) -> Any:
    for part in where:
        values = values[part]
    return values


def check_command(arguments: argparse.Namespace) -> int:
    """One line for each file that is right, every mistake of the others. Exit 2 if there is one."""
    wrong = unread = 0
    files: list[Path] = []
    for given in map(Path, arguments.paths):
        if os.path.isdir(given):
            below = sorted(given.rglob("*.yaml"))
            files += below
            problems = [f"{p}: is named .yml; expected .yaml" for p in sorted(given.rglob("*.yml"))]
            if not below and not problems:
                problems = [f"{given}: no YAML files in this folder"]
            for problem in problems:
                print(problem, file=sys.stderr)
            unread += len(problems)
        else:
            files.append(given)
    for path in files:
        try:
            print(f"ok  {checked(path, arguments.allow_code)}")
        except (RecipeError, PlanError) as error:
            whole = isinstance(error, PlanError) and not error.located
            print(f"{path}: {error}" if whole else error, file=sys.stderr)
            wrong += 1
    if len(files) > 1:
        print(f"{len(files) - wrong} of {len(files)} files are right")
    return 2 if wrong or unread else 0


def checked(path: Path, allow_code: Sequence[str] = ()) -> str:
    """What a right recipe, suite, table or claims spec is, in words. Raises RecipeError, PlanError."""
    if os.path.isfile(path):
        kind = kind_of(read_yaml(path)[0])
        if kind == "suite":
            return f"suite {read_suite(path).name}"
        if kind == "table spec":
            return f"table {read_spec(path).name}"
        if kind == "claims spec":
            claims = check_claims(path)
            return f"claims {claims.name} ({len(claims.claims)} about {len(claims.recipes)} recipes)"
    found = expand(load_base(path, allow_code=allow_code), allow_code=allow_code)
    for point in found:
        plan(point, allow_code=allow_code)
    name = found[0].recipe.name if len(found) == 1 else found[0].recipe.name.rpartition("/")[0]
    return f"{name} ({len(found)} run{'s' if len(found) > 1 else ''})"


def list_command(arguments: argparse.Namespace) -> int:
    """Everything that a recipe can name, each with its first sentence; as Markdown the catalogue; or the finished steps."""
    if arguments.runs:
        return runs_command()
    if arguments.check:
        return catalogue.compare(Path(arguments.check))
    if arguments.format == "markdown":
        print(catalogue.catalogue(), end="")
        return 0
    print(f"recipes ({'checkout' if catalogue.root() == CHECKOUT else 'installed'})")
    for name, path in catalogue.names().items():
        print(f"  {name:<30} {_first_comment(path)}")
    print("suites")
    for name, path in catalogue.names(suites=True).items():
        print(f"  {name.removeprefix('suites/'):<30} {read_suite(path).about or ''}")
    folders: tuple[tuple[lookup.Folder, str], ...] = (
        ("methods", "methods"),
        ("attention", "attention forms"),
        ("evals", "evaluations"),
    )
    for folder, title in folders:
        print(title)
        for name in lookup.names(folder):
            print(f"  {name:<30} {_first_sentence(lookup.lookup(folder, name).Config.__doc__ or '')}")
    return 0


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return _first_sentence(" ".join(line.lstrip("# ") for line in itertools.takewhile(lambda x: x[:1] == "#", lines)))


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?!])\s", " ".join(text.split()), maxsplit=1)[0]


def runs_command() -> int:
    """Finished steps under `runs/steps` (or $RECIPELIN_HOME), newest first."""
    store = reuse.Store(reuse.home())
    found = store.list()
    for key, report in found:
        print(f"{key}  {report['seconds']:8.1f} s  {report['recipe']:<32} {report['what']}")
    print(f"{len(found)} finished steps under {store.root / 'steps'}")
    return 0
