"""What a student's results hang on in one state: digests of exported folders (no torch)."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .files import digest_file, home, write_atomically
from .plan import digest
from .reuse import digest_folder
from .states import State


def digest_student(folder: Path, state: State | None) -> str:
    """Digest of the weights and the structure that a state reads: students that are equal in these share its results.

    Whose recipe made the student, and the state that it was exported in, are not read. A state without branches reads
    nothing of a swapped layer's attention, which gives zeros in every form (a law that the tests hold), but the bias of
    o_proj: so all students whose training left the rest as it was have the teacher's `none` in common.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layout = config.get("recipelin")
    if layout is None:
        return digest_folder(folder)
    unread = {"origin", "state"}
    files = sorted(folder.glob("*.safetensors"))
    if state is not None and not state.branches:
        unread |= {"form", "config"}
        layers = "|".join(map(str, layout["layers"]))
        attention = re.compile(rf"model\.layers\.({layers})\.self_attn\.(?!o_proj\.bias$)")
        weights = [_without(file, attention) for file in files]
    else:
        weights = [digest_file(file) for file in files]
    config["recipelin"] = {name: value for name, value in layout.items() if name not in unread}
    return digest({"config": config, "weights": weights})


def _without(file: Path, unread: re.Pattern[str]) -> str:
    """Digest of the tensors of a safetensors file whose names do not begin as `unread` says; remembered as `digest_file` is."""
    stat = file.stat()
    which = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{unread.pattern}"
    known = home() / "digests" / hashlib.sha256(which.encode()).hexdigest()
    if known.is_file():
        return known.read_text(encoding="ascii")
    found = digest(dict(_tensors(file, lambda name: not unread.match(name))))
    if stat.st_size > 1 << 24:
        write_atomically(known, found.encode("ascii"))
    return found


def _tensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, list[object]]]:
    """(name, [dtype, shape, sha256 of the bytes]) of the wanted tensors. Layout: 8 bytes length, JSON header, data."""
    with file.open("rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(size))
        for name in sorted(n for n in header if n != "__metadata__" and wanted(n)):
            begin, end = header[name]["data_offsets"]
            source.seek(8 + size + begin)
            total, left = hashlib.sha256(), end - begin
            while left:
                total.update(block := source.read(min(left, 1 << 24)))
                left -= len(block)
            yield name, [header[name]["dtype"], header[name]["shape"], total.hexdigest()]
