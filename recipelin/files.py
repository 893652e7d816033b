"""Writing files so that no reader ever meets half of one, and digests of what is on disk (no torch)."""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def home() -> Path:
    """Where finished steps and caches live: $RECIPELIN_HOME, or `runs` in the current folder."""
    return Path(os.environ.get("RECIPELIN_HOME") or "runs").resolve()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_atomically(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; whole, it takes its place, and after an error it is gone."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`: one process at a time; the next one waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest_file(path: Path) -> str:
    """sha256 of a file, remembered by (path, size, modification time) so that large files are read once."""
    stat = path.stat()
    known = (
        home() / "digests" / hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    )
    if known.is_file():
        return known.read_text(encoding="ascii")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > 1 << 24:
        write_atomically(known, found.encode("ascii"))
    return found
