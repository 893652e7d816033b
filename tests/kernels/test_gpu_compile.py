"""The Triton kernels compile for a GPU that is not here: Triton's interpreter takes what its compiler refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipelin_kernels.hybrid.gpu_call import LAUNCHES

pytest.importorskip("triton", reason="the kernels' tests need Triton: pip install 'recipelin[dev]'")
ROOT = Path(__file__).resolve().parents[2]
DECODING = ["batch 1", "batch 32", "d 256, F 512"]
CASES = ["features made", "replace, sinks", "transfer, F 128", *(f"decode, features made, {case}" for case in DECODING)]


def test_every_kernel_compiles_and_fits(tmp_path):
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    command = [sys.executable, str(ROOT / ".ci" / "gpu_compile.py"), *(a for name in CASES for a in ("--only", name))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall(r"^  (\w+) +\d+ warps", done.stdout, re.M)) == set(LAUNCHES)
