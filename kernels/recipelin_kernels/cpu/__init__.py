"""The C kernels of the CPU: compiled by the machine's own compiler for the machine's own processor, once, and kept.

They are plain C with vector extensions (gcc from 12, clang), without Python's or torch's headers. The library lies in
`$XDG_CACHE_HOME/recipelin` (else ~/.cache/recipelin) under a name made of the sources, the compiler and the processor.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

MACHINE = "-march=native"
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
HERE = Path(__file__).parent


def compiler() -> str | None:
    """The C compiler: what CC names, else cc, gcc or clang."""
    named = os.environ.get("CC")
    return next(
        (found for name in ([named] if named else ["cc", "gcc", "clang"]) if (found := shutil.which(name))), None
    )


@cache
def why_not() -> str | None:
    """Why there are no C kernels here; None: there are. Compiles them when first asked (some seconds)."""
    cc = compiler()
    if cc is None:
        return f"no C compiler {os.environ['CC']!r} (CC)" if "CC" in os.environ else "no C compiler (cc, gcc, clang)"
    try:
        library()
    except subprocess.CalledProcessError as error:
        wrong = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip())
        return f"{cc} does not compile the kernels: {wrong}"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return f"the compiled kernels cannot be kept or loaded: {error}"
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises CalledProcessError of the compiler, and OSError."""
    cc = compiler()
    if cc is None:
        raise OSError("no C compiler")
    sources = sorted(HERE.glob("*.[ch]"))
    machine = _said(cc, "--version") + _said(cc, MACHINE, "-dM", "-E", "-x", "c", os.devnull)
    name = hashlib.sha256(b"\0".join([*(s.read_bytes() for s in sources), machine.encode(), " ".join(FLAGS).encode()]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recipelin"
    path = folder / f"cpu-{name.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be compiling the same: each writes a file of its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=folder) as made:
            new = Path(made) / path.name
            units = [str(s) for s in sources if s.suffix == ".c"]
            subprocess.run(
                [cc, MACHINE, *FLAGS, *units, "-lm", "-o", str(new)], check=True, capture_output=True, text=True
            )
            new.replace(path)
    return ctypes.CDLL(str(path))


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


__all__ = ["compiler", "library", "why_not"]
