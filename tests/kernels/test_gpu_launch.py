"""What is launched past Triton's own launch, without a GPU: launch_alone.py, where Triton's interpreter is off."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' tests need Triton: pip install 'recipelin[dev]'")
ROOT = Path(__file__).resolve().parents[2]
ALONE = Path(__file__).with_name("launch_alone.py")


def test_launches_are_those_of_triton(tmp_path):
    paths = os.pathsep.join([*sys.path[1:], str(ROOT), str(ROOT / "kernels")])
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=paths, TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, str(ALONE)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == re.findall(r"^def (test_\w+)", ALONE.read_text(), re.M)


HASHED = """
import sys
from recipelin_kernels.hybrid import gpu_forward
from recipelin_kernels.hybrid.gpu_launch import hashed
from recipelin_kernels.weight_transfer.gpu_rows import row_masses
for name in sys.argv[1:]:
    hashed(getattr(gpu_forward, name))
hashed(row_masses)
print(row_masses.cache_key)
"""


def test_a_kernel_has_one_hash_whatever_was_hashed_before():
    """Else a process would not find in Triton's cache what another has compiled."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "kernels"), TRITON_INTERPRET="0")
    found = [
        subprocess.run(
            [sys.executable, "-c", HASHED, *first], capture_output=True, text=True, env=environment, check=True
        )
        for first in ([], ["output"])
    ]
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) > 60
