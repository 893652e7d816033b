"""A finished run -> results/records: the Record, its items and bands, never edited afterwards (no torch)."""

import argparse
import datetime
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomically
from .naming import default_folder
from .records import (
    SHRUNK,
    Record,
    RecordError,
    bands_path,
    items_path,
    read_bands,
    read_items,
    read_record,
    record_path,
)


class PublishError(ValueError):
    """A run that cannot be published; the message says how to mend it."""


def publish(run: Path, results: Path) -> Path:
    """Copy a run's Record and items to `results/records/<recipe>--<plan8>--<time>-<rand4>.json` and return its path.

    Its `usage.json.gz` too, where it has one. The bytes are copied as they are; the Record is written last, so that one
    there always has the others beside it.
    Publishing the same run again finds the first copy. Raises PublishError for a run that did not finish, or whose
    source is not known exactly; RecordError for a folder that holds no whole run.
    """
    record = read_record(run)
    _refuse(record, run)
    read_items(run)  # whole, or a RecordError
    beside = [items_path]
    if bands_path(run).exists():
        read_bands(run)
        beside.append(bands_path)
    content = record_path(run).read_bytes()
    stem = _stem(record)
    folder = results / "records"
    for known in folder.glob(f"{stem}-????.json"):
        if known.read_bytes() == content:
            return known
    path = folder / f"{stem}-{secrets.token_hex(2)}.json"
    for place in beside:
        write_atomically(place(path), place(run).read_bytes())
    write_atomically(path, content)
    return path


def _stem(record: Record) -> str:
    time = datetime.datetime.fromisoformat(record.started).astimezone(datetime.UTC)
    return f"{default_folder(record.name, record.plan_hash)}--{time:%Y%m%dT%H%M%SZ}"


def _refuse(record: Record, run: Path) -> None:
    again = f"then run it again (finished steps are reused): recipelin run {record.name}"
    if record.status != "finished":
        raise PublishError(f"{run}: this run is {record.status}; run it to its end: recipelin run {record.name}")
    if record.name.startswith(SHRUNK):
        raise PublishError(f"{run}: a shrunk run: its numbers mean nothing; run the recipe itself")
    if record.commit is None:
        raise PublishError(
            f"{run}: the commit of the source that ran is unknown (not a git checkout?), so nobody could repeat it; "
            f"install recipelin from a clone (pip install -e .), {again}"
        )
    if record.dirty is not False:
        raise PublishError(
            f"{run}: the source that ran differed from commit {record.commit[:10]}, so nobody could repeat it; "
            f"commit the changes (git status names them), {again}"
        )


def runs_in(given: Sequence[Path]) -> tuple[Path, ...]:
    """The runs' folders: each as given, or those right below a folder of runs, by name. Raises PublishError for an empty one."""
    found: list[Path] = []
    for path in given:
        if not path.is_dir() or record_path(path).is_file():
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.is_dir() and record_path(p).is_file())
        if not inside:
            raise PublishError(
                f"{path}: no record.json in it, nor in a folder below it; expected a run, or a folder of runs"
            )
        found += inside
    return tuple(dict.fromkeys(found))


def publish_command(arguments: argparse.Namespace) -> int:
    """`recipelin publish RUN...`: into `results/` of the current folder; each run whole or not at all.

    Exit 2 with the reason of every run that was refused; the others are published all the same.
    """
    results = Path("results")
    refused = 0
    try:
        if not results.is_dir():
            raise PublishError(f"there is no {results}/ in {Path.cwd()}; go to the root of a clone of recipelin")
        runs = runs_in(arguments.runs)
    except PublishError as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 2
    for run in runs:
        try:
            path = publish(run, results)
            print(*(p for p in (path, items_path(path), bands_path(path)) if p.exists()), sep="\n")
        except (PublishError, RecordError) as error:
            print(f"recipelin: {error}", file=sys.stderr)
            refused += 1
    if refused < len(runs):
        print("commit them, and `recipelin table results/tables/...` shows them")
    if len(runs) > 1:
        print(f"{len(runs) - refused} of {len(runs)} runs are published")
    return 2 if refused else 0
