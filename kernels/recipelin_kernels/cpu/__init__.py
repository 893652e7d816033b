"""The C kernels of the CPU: compiled by the machine's own compiler for the machine's own processor, once, and kept.

They are plain C with vector extensions (gcc from 12, clang from 14), without Python's or torch's headers. The library
lies in `$XDG_CACHE_HOME/recipelin` (else ~/.cache/recipelin) under a name made of the sources, the compiler and the
processor.

Their tests were run with gcc 12, clang 14 and 16 on x86-64, and in part, with gcc 12 and clang 14, on an aarch64 that
qemu emulates: no speed was measured there. For macOS (clang 22) they were only compiled. On Windows, where `long` is
too short, they do not compile.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# Clang up to 14, Apple's too, refuses -march=native on ARM, where -mcpu is what x86 has as -march.
MACHINE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
HERE = Path(__file__).parent


def compiler() -> list[str] | None:
    """The C compiler's command: what CC says (`ccache gcc`, say), else cc, gcc or clang."""
    named = os.environ.get("CC", "")
    try:
        words = shlex.split(named)
    except ValueError:  # quotes that do not end
        words = [named]
    for first, *others in [words] if words else [["cc"], ["gcc"], ["clang"]]:
        if found := shutil.which(first):
            return [found, *others]
    return None


@cache
def why_not() -> str | None:
    """Why there are no C kernels here; None: there are. Compiles them when first asked (some seconds)."""
    cc = compiler()
    if cc is None:
        return f"no C compiler {os.environ['CC']!r} (CC)" if os.environ.get("CC") else "no C compiler (cc, gcc, clang)"
    try:
        library()
    except subprocess.CalledProcessError as error:
        wrong = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip())
        return f"{' '.join(cc)} does not compile the kernels: {wrong}"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return f"the compiled kernels cannot be kept or loaded: {error}"
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises CalledProcessError of the compiler, and OSError."""
    return built("cpu", sorted(HERE.glob("*.[ch]")), FLAGS, "the C kernels")


def built(name: str, sources: list[Path], flags: tuple[str, ...], what: str) -> ctypes.CDLL:
    """The library of these sources, compiled where it is not yet; a header beside them is one. Raises as `library`."""
    cc = compiler()
    if cc is None:
        raise OSError("no C compiler")
    machine = _said(*cc, "--version") + _said(*cc, MACHINE, "-dM", "-E", "-x", "c", os.devnull)
    digest = hashlib.sha256(
        b"\0".join([*(s.read_bytes() for s in sources), machine.encode(), " ".join(flags).encode()])
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recipelin"
    path = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"compiling {what} into {path} (some seconds, once)", file=sys.stderr)
        # Another process may be compiling the same: each writes a file of its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=folder) as made:
            new = Path(made) / path.name
            _said(*cc, MACHINE, *flags, *(str(s) for s in sources if s.suffix == ".c"), "-lm", "-o", str(new))
            with new.open("rb") as file:
                os.fsync(file.fileno())  # a library cut short would end the process that loads it
            new.replace(path)
    return ctypes.CDLL(str(path))


def _said(*command: str) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    return done.stdout


__all__ = ["compiler", "library", "why_not"]
