"""The command line. Nothing of an experiment is a flag: a recipe holds it (no torch)."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 the input is wrong, 130 interrupted."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    from .lookup import LookupFailed
    from .mistakes import PlanError
    from .records import RecordError
    from .sources import SourceError
    from .strict_yaml import RecipeError

    try:
        code: int = arguments.command(arguments)
        return code
    except RecipeError as error:
        print(error, file=sys.stderr)
    except PlanError as error:
        print(error if error.located else f"recipelin: {error}", file=sys.stderr)
    except (LookupFailed, RecordError, SourceError) as error:
        print(f"recipelin: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nrecipelin: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"recipelin: {where}{error.strerror or error}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Wrong usage in two lines: what was found and expected, and where to read more."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}\n{self.format_usage().strip()}\n`{self.prog} -h` explains", file=sys.stderr)
        raise SystemExit(2)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line. Exits with code 2 and the nearest name for a command or an option that is not there."""
    parser, commands = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    given = argv[0]
    if given not in commands and given not in ("-h", "--help", "--version"):
        known = [*commands, "--help", "--version"]
        hint = _nearest(given, known)
        parser.error(f"no command {given!r}{f'{hint} There' if hint else '; there'} are {', '.join(commands)}")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        options = re.findall(r"--[a-z-]+", commands[given].format_usage())
        kind = "option" if unknown[0].startswith("-") else "argument"
        commands[given].error(f"unexpected {kind} {unknown[0]!r}{_nearest(unknown[0], options)}")
    return arguments


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name.lower(), known, 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected auto, cpu, cuda or cuda:0")
    return text


def _width(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a window in tokens, 1 or more")
    return int(text)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by name: the help of each ends in examples."""
    parser = _Parser(
        prog="recipelin",
        description="Converts pretrained Transformers to hybrid linear attention, from a recipe, and measures what works.",
        epilog="Begin with `recipelin run pocket/lolcats`: two minutes on a laptop, no download.\n"
        "`recipelin COMMAND -h` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"recipelin {__version__}")
    added = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(name: str, function: Command, text: str, *examples: str) -> argparse.ArgumentParser:
        made = added.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog="\n  ".join(["examples:", *(f"recipelin {name} {example}".rstrip() for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(command=function)
        commands[name] = made
        return made

    def allow_code(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--allow-code",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="let recipes name methods of this Python package, which runs its code (may be given more than once)",
        )

    def recipe(made: argparse.ArgumentParser, *, several: bool = False) -> None:
        text = "a path, or a name such as pocket/lolcats (recipelin list); pocket/windows/window=8 is a point of a grid"
        made.add_argument(
            "recipes" if several else "recipe", nargs="+" if several else None, metavar="RECIPE", help=text
        )
        allow_code(made)

    run = command(
        "run",
        _run,
        "convert, evaluate, write a Record and a table; resumes where it was stopped",
        "pocket/lolcats",
        "my-recipe.yaml --out runs/mine --device cpu",
        "pocket/lolcats pocket/absolute",
    )
    recipe(run, several=True)
    run.add_argument(
        "--out", metavar="DIR", help="the folder of a single recipe's run (default: a folder under runs/ for each run)"
    )
    run.add_argument(
        "--device",
        type=_device,
        default="auto",
        help="cpu, cuda, cuda:0, or auto: the GPU where there is one (default)",
    )
    run.add_argument("--fresh", action="store_true", help="make every step anew; finished ones are not reused")
    run.add_argument(
        "--shrink",
        action="store_true",
        help="a dry run: the same recipe on a tiny random model of its family, three steps a stage; its numbers mean nothing",
    )

    diagnose = command(
        "diagnose",
        _diagnose,
        "measure what each branch of an exported student does, or of a published LoLCATs checkpoint; needs no recipe",
        "runs/pocket-lolcats--b7b167c9/model",
        "runs/pocket-lolcats--b7b167c9/model --window 8 --window 16 --window 64",
        "my-student --teacher Qwen/Qwen3-8B --suite recall-4k --suite untangling",
        "lolcats-llama-3.1-8b-distill/model.pt --finetune lolcats-llama-3.1-8b-ft-lora/model.pt "
        "--teacher ./llama-3.1-8b --suite untangling-unpadded",
    )
    diagnose.add_argument(
        "path", metavar="PATH", help="the folder of an exported student, or LoLCATs' stage-1 .pt file"
    )
    diagnose.add_argument(
        "--teacher",
        metavar="MODEL",
        help="pocket, a folder, or a hub id (ID@COMMIT); default: the one that the student's folder names",
    )
    diagnose.add_argument(
        "--suite", action="append", default=[], metavar="SUITE", help="what is asked (may be given more than once)"
    )
    diagnose.add_argument(
        "--window",
        type=_width,
        action="append",
        default=[],
        metavar="TOKENS",
        help="sweep: hybrid and window alone at this width too, untrained (may be given more than once)",
    )
    diagnose.add_argument("--finetune", metavar="FILE", help="LoLCATs' stage-2 .pt file")
    diagnose.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: that of the weights")
    diagnose.add_argument(
        "--beyond-context", action="store_true", help="ask rows longer than the positions that the teacher has seen"
    )
    diagnose.add_argument("--out", metavar="DIR", help="the run's folder (default: a folder under runs/)")
    diagnose.add_argument("--device", type=_device, default="auto", help="as in run")
    diagnose.add_argument("--fresh", action="store_true", help="measure everything anew")

    plan = command(
        "plan",
        _plan,
        "show the steps of a recipe, what each reads, trains and costs, and what would be reused",
        "pocket/lolcats",
        "untangling/llama3-8b-lolcats",
    )
    recipe(plan)
    plan.add_argument(
        "--device",
        type=_device,
        default="auto",
        help="the device that finished steps are looked up for (default: auto)",
    )

    check = command(
        "check",
        _check,
        "check recipes, suites, table and claims specs, all mistakes at once; exit code 2 if there is one",
        "my-recipe.yaml",
        "recipes results/tables",
    )
    check.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders with YAML files")
    allow_code(check)

    new = command(
        "new",
        _new,
        "write a recipe that extends another, with the fields that one usually changes as comments",
        "my-lolcats --from pocket/lolcats",
        "experiments/wide.yaml --from untangling/llama3-8b-lolcats",
    )
    new.add_argument("name", metavar="NAME", help="the new recipe's name, or its path; the file must not be there yet")
    new.add_argument("--from", dest="parent", metavar="RECIPE", required=True, help="the recipe it extends")
    allow_code(new)

    listing = command(
        "list",
        _list,
        "list recipes, methods, attention forms, evaluations and suites",
        "",
        "--runs",
        "--format markdown > recipes/README.md",
    )
    one = listing.add_mutually_exclusive_group()
    one.add_argument("--runs", action="store_true", help="list the finished steps that runs would reuse")
    one.add_argument(
        "--format", choices=("text", "markdown"), default="text", help="markdown: recipes and suites with their costs"
    )
    one.add_argument("--check", metavar="FILE", help="compare FILE with the Markdown list; exit code 1 if it differs")

    command("schema", _schema, "print the JSON Schema of a recipe, for editors", "> recipe.schema.json")

    table = command(
        "table",
        _table,
        "show a paper's table beside what was measured, the table of claims, or that of a run",
        "results/tables/pocket-first.yaml",
        "runs/pocket-lolcats--b7b167c9 --format latex",
        "results/tables --check",
    )
    table.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a table or claims spec, a folder of specs, a run's folder, or a record.json",
    )
    table.add_argument(
        "--format", choices=("markdown", "latex", "html", "csv"), default="markdown", help="default: markdown"
    )
    instead = table.add_mutually_exclusive_group()
    instead.add_argument(
        "--check", action="store_true", help="compare with the committed table and figure; exit code 1 if one differs"
    )
    instead.add_argument("--figure", action="store_true", help="draw the figure of a table spec, a .png beside it")

    publish = command(
        "publish",
        _publish,
        "copy Records and their items into results/ of the current folder; refuses what nobody could repeat",
        "runs/pocket-lolcats--b7b167c9",
        "runs/pocket-claims-*",
    )
    publish.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder, which `run` names at its end, or a folder of them",
    )

    bench = command(
        "bench",
        _bench,
        "measure the operators' speed and memory against every bar, and the whole job's, on one thread of a CPU or on a GPU",
        "--quick",
        "--device cuda",
        "--only hybrid/sdpa-forward",
        "--only long_context --write",
        "--write",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose bars (default: cpu)")
    bench.add_argument("--quick", action="store_true", help="three rounds a bar")
    bench.add_argument("--only", metavar="NAME", help="one bar, or all that begin with NAME/ (hybrid, decode, ...)")
    bench.add_argument(
        "--write",
        action="store_true",
        help="keep the result as kernels/bench/record.md and .json (cuda: record-cuda); with --only a group: record-GROUP",
    )
    return parser, commands


def _run(arguments: argparse.Namespace) -> int:
    from .commands import run_command

    return run_command(arguments)


def _diagnose(arguments: argparse.Namespace) -> int:
    from .diagnose import diagnose_command

    return diagnose_command(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from .commands import plan_command

    return plan_command(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from .commands import check_command

    return check_command(arguments)


def _new(arguments: argparse.Namespace) -> int:
    from .new import new_command

    return new_command(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from .commands import list_command

    return list_command(arguments)


def _schema(arguments: argparse.Namespace) -> int:
    from .schema import schema_command

    return schema_command()


def _table(arguments: argparse.Namespace) -> int:
    from .tables import table_command

    return table_command(arguments)


def _publish(arguments: argparse.Namespace) -> int:
    from .publish import publish_command

    return publish_command(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import bench_command

    return bench_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
