"""What is freed in a step is there for the next one."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.test_floors import ROOT
from vecfl.engine import make_backend
from vecfl.engine.memory import keep_freed_memory
from vecfl.losses import cross_entropy
from vecfl.task import Task

# Steps of 40 temporaries of 1 MiB, 256 pages each, and the page faults of each of the last ten.
STEPS = """
import resource, torch
from vecfl.engine.memory import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if {keep} else None

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for step in range(13):
    if step == 3:
        before = faults()
    temporaries = [torch.ones(1 << 18) for _ in range(40)]
    del temporaries
print(kept, (faults() - before) // 10)
"""


def steps(keep: bool) -> tuple[str, int]:
    """What `keep_freed_memory` says, and page faults of a step."""
    told = ("MALLOC_", "GLIBC_TUNABLES")
    bare = {name: value for name, value in os.environ.items() if not name.startswith(told)}
    env = bare | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    command = [sys.executable, "-c", STEPS.format(keep=keep)]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc")
def test_pages_are_not_given_back() -> None:
    said, kept = steps(keep=True)
    assert said == "True" and kept < 500
    _, anew = steps(keep=False)
    assert anew > 5_000  # of 10,240 pages


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert keep_freed_memory.__wrapped__() is False


def test_backends_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("vecfl.engine.keep_freed_memory", lambda: asked.append(True))
    example = {"x": torch.randn(2, 3), "y": torch.tensor([0, 1])}
    make_backend("loop", Task(nn.Linear(3, 2), cross_entropy, example=example), example)
    assert asked
