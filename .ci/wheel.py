#!/usr/bin/env python3
"""The wheel as a stranger gets it: build it, hold its contents against git, install it in an empty environment, run a recipe.

`make wheel`, or `python .ci/wheel.py [--keep]`: needs git, pip and the standard library. About four minutes, most of them
pip's. The wheel stays in dist/; the environment and the run are thrown away unless --keep.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where a folder of the repository lies in the wheel; nothing else is in it.
SHIPPED = {
    "recipelin/": "recipelin/",
    "kernels/recipelin_kernels/": "recipelin_kernels/",
    "recipes/": "recipelin/_recipes/",
    "results/tables/": "recipelin/_tables/",
}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
RECIPE = "pocket/lolcats"


def main() -> int:
    """0 if the wheel holds what it should and runs; what is wrong goes to stderr."""
    wheel = build()
    if wrong := contents(wheel):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="recipelin-wheel-"))
    try:
        return run(wheel, folder)
    finally:
        if "--keep" in sys.argv[1:]:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder)


def build() -> Path:
    """The one wheel of dist/."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", ROOT / "dist", ROOT, at=ROOT)
    (wheel,) = (ROOT / "dist").glob("recipelin-*.whl")
    return wheel


def contents(wheel: Path) -> list[str]:
    """What is in the wheel and should not be, or should and is not: git's files of the shipped folders, and the metadata."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [f for f in listed.split("\0") if f]
    expected = {new + f.removeprefix(old) for f in files for old, new in SHIPPED.items() if f.startswith(old)}
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        info = next(n for n in found if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        licence = archive.read(info.replace("METADATA", "licenses/LICENSE")).decode()
    expected |= {info.replace("METADATA", name) for name in METADATA}
    wrong = [f"in the wheel, but not to be shipped: {n}" for n in sorted(found - expected)]
    wrong += [f"not in the wheel: {n}" for n in sorted(expected - found)]
    if licence != (ROOT / "LICENSE").read_text(encoding="utf-8"):
        wrong.append("the wheel's LICENSE is not the repository's")
    if (ROOT / "README.md").read_text(encoding="utf-8").strip() not in metadata:
        wrong.append("the wheel's description is not README.md")
    if not wrong:
        print(f"{wheel.relative_to(ROOT)}: {len(found)} files, {wheel.stat().st_size:,} bytes, as git has them")
    return wrong


def run(wheel: Path, folder: Path) -> int:
    """Install in an empty environment and run the first recipe from a folder that knows nothing of this repository."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    wanted = f"{wheel}[run,eval]"
    call(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wanted, at=folder)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for words in (
        ["list"],
        ["new", "mine", "--from", RECIPE],
        ["check", "mine.yaml"],
        ["plan", "mine.yaml"],
        ["run", RECIPE, "--device", "cpu"],
    ):
        call(python, "-m", "recipelin", *words, at=elsewhere)
    tables = list(shown(elsewhere))
    if len(tables) != 1 or "hybrid" not in tables[0]:
        print(f"expected one table with a row hybrid under {elsewhere}/runs, found {len(tables)}", file=sys.stderr)
        return 1
    return 0


def shown(elsewhere: Path) -> Iterator[str]:
    """The tables that runs left."""
    for path in (elsewhere / "runs").glob("*/table.md"):
        yield path.read_text(encoding="utf-8")


def call(*words: object, at: Path) -> None:
    """Run a command that must end well, in a folder, with no hint of where this repository is."""
    line = [str(word) for word in words]
    print("$", " ".join(line), flush=True)
    hidden = ("PYTHONPATH", "RECIPELIN_HOME", "VIRTUAL_ENV", "PYTHONHOME")
    subprocess.run(line, cwd=at, check=True, env={k: v for k, v in os.environ.items() if k not in hidden})


if __name__ == "__main__":
    sys.exit(main())
