"""Kernels compile for an A100 and an H100, without one, to arithmetic that rounds as torch's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow  # half a minute
def test_every_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="kernels are not tested: pip install triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert all(len(line) == 2 for line in lines), lines  # nothing of `ROUGH`
    kernels = {"square_parts", "row_sums", "scale_parts", "add_rows", "add_scaled_rows"}
    kernels |= {"add_normals", "to_levels", "to_multiples", "momentum_step", "adam_step"}
    assert {name for name, _ in lines} == kernels and {arch for _, arch in lines} == {"80", "90"}
