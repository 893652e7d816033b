"""A file that is made of others, held against what they give now (no torch)."""

import difflib
import errno
import sys
from collections.abc import Callable
from pathlib import Path


def is_current(path: Path, make: Callable[[], str], *, source: str, command: str) -> bool:
    """Whether `path` holds what `make` gives; if not, the difference is printed, and the command that makes it anew.

    `source`: what it is made of. A file that is not there differs in everything. Raises OSError for one that is no text.
    """
    try:
        known = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"not UTF-8; expected the Markdown that {command} prints", str(path)) from error
    made = make()
    if made == known:
        print(f"{path}: as made from {source}")
        return True
    lines = difflib.unified_diff(
        known.splitlines(keepends=True), made.splitlines(keepends=True), str(path), f"made from {source}"
    )
    print("".join(lines), end="")
    print(f"{path} is not what {source} give; to make it anew: {command} > {path}", file=sys.stderr)
    return False
