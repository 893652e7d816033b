"""`recipelin plan` and `recipelin run`: from arguments to what is printed (torch only inside `run_command`)."""

import argparse
import os
import sys
from pathlib import Path

from . import reuse
from .files import write_atomically
from .load import Loaded, expand, load
from .plan import Plan, PlanError, plan, show
from .steps import Calibrate, Transfer, Tune


def plan_command(arguments: argparse.Namespace) -> int:
    """Print the plan of every point of a recipe's grid. Exit 2 on a recipe that cannot be carried out."""
    points = expand(
        load(arguments.recipe, allow_code=tuple(arguments.allow_code)), allow_code=tuple(arguments.allow_code)
    )
    for number, point in enumerate(points):
        planned = plan(point, allow_code=arguments.allow_code)
        if number:
            print()
        header = [f"recipe    {planned.name}   ({point.path}, {point.origin})"]
        print(show(planned, header=header, reused=known(point, planned, arguments.device)))
    if len(points) > 1:
        print(f"\n{len(points)} runs")
    return 0


def known(loaded: Loaded, planned: Plan, device: str) -> list[str]:
    """For each step, in words, whether a finished or an interrupted result would be taken up again."""
    place = device if device != "auto" else ("cuda" if Path("/dev/nvidia0").exists() else "cpu")
    if place != "cpu":
        # The name of the GPU is part of a run's key, and only torch knows it.
        return ["" for _ in planned.steps]
    around = reuse.Surroundings(
        digests=reuse.digests(loaded, planned),
        device="cpu",
        threads=reuse.threads(),
        dtype=loaded.recipe.model.dtype,
        versions=reuse.versions(),
    )
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
    """Run every point of a recipe's grid and print its table. Exit 130 when interrupted; the same command resumes."""
    points = expand(
        load(arguments.recipe, allow_code=tuple(arguments.allow_code)), allow_code=tuple(arguments.allow_code)
    )
    for point in points:
        plan(point, allow_code=arguments.allow_code)  # all points are refused before the first one costs anything
    try:
        from .run import RunError, run
        from .stages import StageError
    except ModuleNotFoundError as error:
        print(
            f"recipelin: run needs {error.name}, which is not installed: pip install 'recipelin[run,eval]'",
            file=sys.stderr,
        )
        return 2
    from .records import read_items, read_record
    from .tables import render, run_table

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        for point in points:
            out = Path(arguments.out) if arguments.out else None
            if out and len(points) > 1:
                out = out / point.recipe.name.replace("/", "-")
            folder = run(
                point, out=out, device=arguments.device, fresh=arguments.fresh, allow_code=arguments.allow_code
            )
            table = render(run_table(read_record(folder), read_items(folder)), "markdown")
            write_atomically(folder / "table.md", table.encode())
            print(table)
            print(f"record, items, table, model, logs: {folder}")
    except KeyboardInterrupt:
        print("\nrecipelin: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (RunError, StageError, PlanError) as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 1
    return 0


def runs_command() -> int:
    """Finished steps under `runs/steps` (or $RECIPELIN_HOME), newest first."""
    store = reuse.Store(reuse.home())
    found = store.list()
    for key, report in found:
        print(f"{key}  {report['seconds']:8.1f} s  {report['recipe']:<32} {report['what']}")
    print(f"{len(found)} finished steps under {store.root / 'steps'}")
    return 0
