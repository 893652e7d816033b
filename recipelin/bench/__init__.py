"""`recipelin bench`: every bar of speed and memory of one device of this machine (no torch until one is measured)."""

import argparse
import importlib.util
import sys
from pathlib import Path

from ..finding import CHECKOUT
from ..mistakes import nearest

# Of a checkout; the same numbers beside it as JSON.
RECORDS = {"cpu": Path("kernels/bench/record.md"), "cuda": Path("kernels/bench/record-cuda.md")}


def bench_command(arguments: argparse.Namespace) -> int:
    """Measure the bars, print them, and with `write` keep them as a record. Exit 2 before any work if that cannot be; 130 when
    interrupted: what was measured is printed, and no record written."""
    asked = RECORDS[arguments.device]
    target = CHECKOUT.parent / asked if CHECKOUT.is_dir() else None
    if arguments.write and target is None:
        return _refused(f"--write: the record is {asked} of a checkout, and this is an installed copy; leave it out")
    if arguments.write and (arguments.quick or "/" in (arguments.only or "")):
        return _refused("--write: a record holds every bar of a group, or of all, measured in full; leave out --quick")
    if importlib.util.find_spec("torch") is None:
        return _refused("bench needs torch, which is not installed: pip install 'recipelin[run]'")
    if arguments.write and importlib.util.find_spec("PIL") is None:
        return _refused("--write: the record has a picture, which needs Pillow: pip install 'recipelin[run]'")
    from . import cuda
    from .measure import figures, find_bars, measure
    from .record import Record, as_json, as_markdown, table

    if arguments.device == "cuda" and (reason := cuda.missing()):
        return _refused(f"--device cuda: {reason}")
    bars = [bar for bar in find_bars(arguments.only or "") if bar.device == arguments.device]
    if arguments.only:
        bars = [bar for bar in bars if bar.name == arguments.only or bar.name.startswith(f"{arguments.only}/")]
        if not bars:
            names = [bar.name for bar in find_bars() if bar.device == arguments.device]
            groups = sorted({name.partition("/")[0] for name in names})
            return _refused(
                f"--only: no bar {arguments.only!r} of --device {arguments.device}"
                f"{nearest(arguments.only, names + groups)}; there are {', '.join(names)}"
            )
    begun = Record.begin(quick=arguments.quick, gpu=cuda.name() if arguments.device == "cuda" else "")
    found = []
    try:
        for number, bar in enumerate(bars):
            print(f"\r\x1b[K[{number + 1}/{len(bars)}] {bar.name}", end="", file=sys.stderr, flush=True)
            found.append(measure(bar, quick=arguments.quick))
    except KeyboardInterrupt:
        print("\r\x1b[K", end="", file=sys.stderr)
        print(table(begun.end(found)))
        print(f"recipelin: interrupted after {len(found)} of {len(bars)} bars; no record is written", file=sys.stderr)
        return 130
    print("\r\x1b[K", end="", file=sys.stderr)
    record = begun.end(found)
    print(table(record))
    if arguments.write and target:
        from ..files import write_atomically

        pictures = figures(record.bars)
        name = f"{target.stem}-{arguments.only}" if arguments.only else target.stem
        contents = dict(pictures)
        contents[f"{name}.json"] = as_json(record).encode()
        contents[f"{name}.md"] = as_markdown(record, tuple(pictures), only=arguments.only or "").encode()
        for file, content in contents.items():
            write_atomically(target.parent / file, content)
        for group in {bar.name.partition("/")[0] for bar in bars} if not arguments.only else ():
            for suffix in ("md", "json"):  # an older record of a part, which the whole one replaces
                (target.parent / f"{target.stem}-{group}.{suffix}").unlink(missing_ok=True)
        print(f"\nwritten: {', '.join(contents)} in {target.parent}")
    return 0


def _refused(reason: str) -> int:
    print(f"recipelin: {reason}", file=sys.stderr)
    return 2
