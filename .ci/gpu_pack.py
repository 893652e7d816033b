#!/usr/bin/env python3
"""What a lent GPU's machine, which reaches no registry, lacks for `.ci/gpu_session.sh`, as one archive (`make gpu-pack`).

The machine brings Python 3.12, torch with CUDA, Triton, and most of what they need; `CARRIED` are the others, in the versions
of constraints.txt. Written to .gpu/site.tar.xz, which git ignores and a device call carries.

With the folder of another Triton than the machine's as its argument: that Triton, stripped of its symbols, to
.gpu/triton.tar.xz (five minutes). It is carried by a call of its own, as with the rest it is too large.
"""

import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
CARRIED = (
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection",
    "transformers", "tokenizers", "huggingface_hub", "httpx2", "httpcore2", "truststore", "peft",
    "datasets", "dill", "multiprocess",
    "lm_eval", "evaluate", "rouge_score", "sqlitedict", "word2number", "more-itertools", "pytablewriter", "DataProperty",
    "mbstrdecoder", "pathvalidate", "tabledata", "tcolorpy", "typepy", "chardet", "nltk",
)  # fmt: skip
AS_SOURCE = ("rouge_score", "sqlitedict", "word2number")  # published so alone: built here, for any machine
UNPINNED = ("flash-linear-attention", "fla-core", "einops")  # a peer of the bench, and its own tests

LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "*.pyi", "libproton.so", "cuobjdump", "nvdisasm", "FileCheck", "cupti", "plugins", "instrumentation"
)
CODE = [  # compiled code, and far back: a fifth less than by preset alone
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27, "nice_len": 273},
]


def pack_triton(package: Path) -> None:
    target = ROOT / ".gpu" / "triton.tar.xz"
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "triton"
        shutil.copytree(package, made, ignore=LEFT_OUT)
        subprocess.run(["strip", made / "_C" / "libtriton.so"], check=True)
        # What Triton calls its own version is a hash of that file too.
        known = [sys.executable, "-c", "import triton.runtime.cache as cache; print(cache.triton_key())"]
        key = subprocess.run(
            known, check=True, capture_output=True, text=True, env={"PYTHONPATH": str(package.parent)}
        ).stdout
        with (made / "runtime" / "cache.py").open("a") as file:
            file.write(f"\n\ndef triton_key():\n    return {key.strip()!r}\n")
        with lzma.open(target, "wb", filters=CODE) as file, tarfile.open(fileobj=file, mode="w") as archive:
            for place in (made, *package.parent.glob("triton-*.dist-info")):
                archive.add(place, place.name)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 2**20:.1f} MiB")


def main() -> None:
    if sys.argv[1:]:
        pack_triton(Path(sys.argv[1]))
        return
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    unknown = [name for name in CARRIED if name not in pins]
    if unknown:
        sys.exit(f"not in constraints.txt: {', '.join(unknown)}")
    wanted = [f"{name}=={pins[name]}" for name in CARRIED] + list(UNPINNED)
    target = ROOT / ".gpu" / "site.tar.xz"
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        site, wheels = Path(folder) / "site", Path(folder) / "wheels"
        platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
        there = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *platforms]
        pure = [w for w in wanted if w.split("==")[0] in AS_SOURCE]
        pip = [sys.executable, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, *pure], check=True)
        subprocess.run([*pip, "download", *there, "-d", wheels, *(w for w in wanted if w not in pure)], check=True)
        found = sorted(wheels.glob("*.whl"))
        subprocess.run([*pip, "install", *there, "--no-compile", "--target", site, *found], check=True)
        with tarfile.open(target, "w:xz") as archive:
            archive.add(site, "site")
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 2**20:.1f} MiB, {len(wanted)} packages")


if __name__ == "__main__":
    main()
