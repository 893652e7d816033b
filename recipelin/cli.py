"""The command line. Nothing of an experiment is a flag: a recipe holds it (no torch)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 the input is wrong, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    from .lookup import LookupFailed
    from .plan import PlanError
    from .sources import SourceError
    from .strict_yaml import RecipeError

    try:
        code: int = arguments.command(arguments)
        return code
    except RecipeError as error:
        print(error, file=sys.stderr)
    except (PlanError, LookupFailed, SourceError) as error:
        print(f"recipelin: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recipelin",
        description="Converts pretrained Transformers to hybrid linear attention, from a recipe, and measures what works.",
        epilog="Begin with `recipelin run pocket/lolcats`: two minutes on a laptop, no download.",
    )
    parser.add_argument("--version", action="version", version=f"recipelin {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        made.set_defaults(command=function)
        return made

    def recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument("recipe", metavar="RECIPE", help="a path, or a name such as pocket/lolcats")
        made.add_argument(
            "--allow-code",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="let the recipe name methods of this Python package (may be given more than once)",
        )

    run = command("run", _run, "convert, evaluate, write a Record and a table; resumes where it was stopped")
    recipe(run)
    run.add_argument("--out", metavar="DIR", help="the run's folder (default: a folder under runs/)")
    run.add_argument("--device", default="auto", help="cpu, cuda, or auto: the GPU where there is one (default)")
    run.add_argument("--fresh", action="store_true", help="make every step anew; finished ones are not reused")
    plan = command(
        "plan", _plan, "show the steps of a recipe, what each reads, trains and costs, and what would be reused"
    )
    recipe(plan)
    plan.add_argument(
        "--device", default="auto", help="the device that finished steps are looked up for (default: auto)"
    )
    check = command("check", _check, "check recipes and suites, all mistakes at once; exit code 2 if there is one")
    check.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders with YAML files")
    check.add_argument("--allow-code", action="append", default=[], metavar="PACKAGE", help="as in run")
    listing = command("list", _list, "list recipes, methods, attention forms, evaluations and suites")
    listing.add_argument("--runs", action="store_true", help="list the finished steps that runs would reuse")
    command("schema", _schema, "print the JSON Schema of a recipe, for editors")
    table = command("table", _table, "show a paper's table beside what was measured, or the table of a run")
    table.add_argument("path", type=Path, help="a table spec, a folder of specs, a run's folder, or a record.json")
    table.add_argument("--format", choices=("markdown", "latex", "html", "csv"), default="markdown")
    table.add_argument(
        "--check", action="store_true", help="compare with the committed table; exit code 1 if it differs"
    )
    publish = command("publish", _publish, "copy a run's Record and items into results/")
    publish.add_argument("run", type=Path, help="the run's folder")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from .commands import run_command

    return run_command(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from .commands import plan_command

    return plan_command(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from .commands import check_command

    return check_command(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from .commands import list_command, runs_command

    return runs_command() if arguments.runs else list_command()


def _schema(arguments: argparse.Namespace) -> int:
    from .schema import schema_command

    return schema_command()


def _table(arguments: argparse.Namespace) -> int:
    from .tables import table_command

    return table_command(arguments)


def _publish(arguments: argparse.Namespace) -> int:
    from .publish import publish_command

    return publish_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
