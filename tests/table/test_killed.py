"""Runs that are killed at every step of journal, write and checkpoint end as if they had not been.

`killed.py` kills; `rows` is a bare table, `rounds` a simulation in two workers.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def deaths(folder: Path, *how: str) -> dict:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else folder  # what syncs at once
    with tempfile.TemporaryDirectory(dir=shared) as where:
        command = [sys.executable, "-W", "error", "-m", "tests.table.killed", where, *how]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Steps of a run: 6 rounds of 2 to 3 clients and 3 checkpoints. In two workers the order of steps
# may vary, so a run may come to its end before its step: most die.
@pytest.mark.parametrize(
    "kind, how, stride",
    [("rows", "killed", 5), ("rows", "unplugged", 5), ("rounds", "killed", 19)]
    + [("scaffold", "killed", 31)],
)
def test_a_run_that_dies_goes_on_as_if_it_had_not(
    tmp_path: Path, kind: str, how: str, stride: int
) -> None:
    told = deaths(tmp_path, kind, how, str(stride))
    assert told["wrong"] == []
    assert told["steps"] > 80 and told["deaths"] > 3 * (told["steps"] // stride)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", ["killed", "unplugged"])
@pytest.mark.parametrize("kind", ["rows", "rounds", "scaffold"])
def test_every_step(tmp_path: Path, kind: str, how: str) -> None:
    told = deaths(tmp_path, kind, how, "1")
    assert told["wrong"] == []
    assert told["deaths"] > 3 * told["steps"]
