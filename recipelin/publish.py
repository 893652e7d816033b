"""A finished run -> results/records: the Record and its items, never edited afterwards (no torch)."""

import argparse
import datetime
import secrets
import sys
from pathlib import Path

from .files import write_atomically
from .records import SHRUNK, Record, RecordError, items_path, read_items, read_record, record_path


class PublishError(ValueError):
    """A run that cannot be published; the message says how to mend it."""


def publish(run: Path, results: Path) -> Path:
    """Copy a run's Record and items to `results/records/<recipe>--<plan8>--<time>-<rand4>.json` and return its path.

    The bytes are copied as they are; the items are written first, so that a Record there always has its items.
    Publishing the same run again finds the first copy. Raises PublishError for a run that did not finish, or whose
    source is not known exactly; RecordError for a folder that holds no whole run.
    """
    record = read_record(run)
    _refuse(record, run)
    read_items(run)  # whole, or a RecordError
    content = record_path(run).read_bytes()
    stem = _stem(record)
    folder = results / "records"
    for known in folder.glob(f"{stem}-????.json"):
        if known.read_bytes() == content:
            return known
    path = folder / f"{stem}-{secrets.token_hex(2)}.json"
    write_atomically(items_path(path), items_path(run).read_bytes())
    write_atomically(path, content)
    return path


def _stem(record: Record) -> str:
    time = datetime.datetime.fromisoformat(record.started).astimezone(datetime.UTC)
    return f"{record.name.replace('/', '-')}--{record.plan_hash[:8]}--{time:%Y%m%dT%H%M%SZ}"


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


def publish_command(arguments: argparse.Namespace) -> int:
    """`recipelin publish RUN`: into `results/` of the current folder. Exit 2 with the reason when refused."""
    results = Path("results")
    try:
        if not results.is_dir():
            raise PublishError(f"there is no {results}/ in {Path.cwd()}; go to the root of a clone of recipelin")
        path = publish(Path(arguments.run), results)
    except (PublishError, RecordError) as error:
        print(f"recipelin: {error}", file=sys.stderr)
        return 2
    print(f"{path}\n{items_path(path)}\ncommit both, and `recipelin table results/tables/...` shows them")
    return 0
