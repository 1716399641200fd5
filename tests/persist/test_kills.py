"""SIGKILL at any moment: what is gone on with ends as if nothing had happened, and repeats nothing.

The rounds of a run are compared bit for bit, times aside; a resumed process may train only those
that no checkpoint has.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.times import without_times

ROOT = Path(__file__).resolve().parents[2]
KILLED = -9

# Checkpoints at rounds 0, 3, 6, 8 and at the best ones; the loss falls back now and then.
PLAN = {"checkpoint_every": 3, "eval_every": 2, "watch": "eval/loss:min", "fall_back": True}
PLAN |= {"initial_evaluation": True, "client_results": True, "statistics": 2}


class Server:
    """Answers cases, see `server.py`."""

    def __init__(self, folder: Path) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.persist.server"],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, out: str, kill_at: str | None = None, after: float | None = None, **args: Any
    ) -> dict[str, Any]:
        case = {"args": {"out": str(self.folder / out), "resume": "auto", **PLAN, **args}}
        assert self.process.stdin and self.process.stdout
        print(
            json.dumps({**case, "kill_at": kill_at, "after": after}),
            file=self.process.stdin,
            flush=True,
        )
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def said(self, out: str) -> str:
        return (self.folder / f"{out}.log").read_text()

    def result(self, out: str) -> tuple[list[dict[str, Any]], dict[str, list[str]], list[bytes]]:
        """Rows of metrics without times, the bits of the model, what clients keep and came to."""
        run_dir = self.folder / out
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        rows = [without_times(json.loads(line)) for line in lines]
        model = torch.load(run_dir / "model.pt", weights_only=True)
        files = sorted(self.folder.glob(f"{out}-rows/column_*")) + sorted(run_dir.glob("clients/*"))
        kept = [path.read_bytes() for path in files]
        return rows, {k: [x.hex() for x in t.flatten().tolist()] for k, t in model.items()}, kept

    def saved(self, out: str) -> int:
        """Rounds that need not be run again: those of the last checkpoint that has its name."""
        names = [path.name for path in (self.folder / out).glob("checkpoints/round-*.ckpt")]
        return max((int(re.findall(r"\d+", name)[0]) for name in names), default=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kills"))
    yield server
    assert server.process.stdin and server.process.stdout
    server.process.stdin.close()
    assert server.process.wait(timeout=60) == 0
    server.process.stdout.close()


def points(steps: dict[str, int], every: bool) -> list[str]:
    """Each step, the first and the last time that it comes, or every time."""
    times = {step: range(1, n + 1) if every else {1, n} for step, n in steps.items()}
    return [f"{step}:{n}" for step in times for n in times[step]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_at_every_step_of_a_run(server: Server, every: bool) -> None:
    whole = server.run(f"whole-{every}")
    assert (whole["code"], whole["rounds"]) == (0, 8), server.said(f"whole-{every}")
    assert "back to the model of round" in server.said(f"whole-{every}")
    expected = server.result(f"whole-{every}")
    assert [row["round"] for row in expected[0]] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert len(expected[2]) == 5 and all(row["update/sampled"] > 0 for row in expected[0][1:])
    kinds = {
        "csv written",
        "csv synced",
        "csv renamed",
        "ckpt written",
        "ckpt renamed",
        "checkpoint pruned",
        "pt renamed",
    }
    assert kinds | {"round trained", "round evaluated", "round logged"} <= set(whole["steps"])
    for point in points(whole["steps"], every):
        out = f"{point}-{every}".replace(" ", "-")
        assert server.run(out, kill_at=point)["code"] == KILLED, point
        saved, finished = server.saved(out), (server.folder / out / "model.pt").exists()
        assert finished == (point == "pt renamed:2")  # the first is first.pt
        again = server.run(out)
        assert (again["code"], again["rounds"]) == (0, 8 - saved), (point, server.said(out))
        assert server.result(out) == expected, point
        assert list((server.folder / out / "checkpoints").glob(".*")) == []


@pytest.mark.parametrize(("algorithm", "columns"), [("habit", 2), ("scaffold", 1)])
@pytest.mark.slow  # rows of clients outlive kills in table/test_killed.py every day
def test_a_kill_at_every_step_with_rows_of_clients(
    server: Server, algorithm: str, columns: int
) -> None:
    """In a process of its own each time: `tests/table` kills between the steps of the table."""
    plan = {"rows": "disk", "fall_back": False, "keep": 1, "algorithm": algorithm}
    whole = server.run(algorithm, **plan)
    expected = server.result(algorithm)
    assert (whole["code"], whole["rounds"]) == (0, 8), server.said(algorithm)
    kept = expected[2][:columns]
    assert len(expected[2]) == columns + 5 and all(any(column[128:]) for column in kept)
    for point in points(whole["steps"], every=False):
        out = f"{algorithm}-{point}".replace(" ", "-")
        assert server.run(out, kill_at=point, **plan)["code"] == KILLED, point
        saved = server.saved(out)
        again = server.run(out, **plan)
        assert (again["code"], again["rounds"]) == (0, 8 - saved), (point, server.said(out))
        assert server.result(out) == expected, point


def test_a_kill_at_every_step_of_going_on(server: Server) -> None:
    server.run("calm")
    expected = server.result("calm")
    server.run("first", kill_at="round logged:8")
    steps = server.run("first")["steps"]
    assert {"jsonl renamed", "yaml renamed"} <= set(steps)
    for step in steps:
        out = f"on-{step}".replace(" ", "-")
        assert server.run(out, kill_at="round logged:8")["code"] == KILLED
        assert server.run(out, kill_at=f"{step}:1")["code"] == KILLED, step
        saved = server.saved(out)
        again = server.run(out)
        assert (again["code"], again["rounds"]) == (0, 8 - saved), (step, server.said(out))
        assert server.result(out) == expected, step


@pytest.mark.timeout(600)  # twenty processes, on a busy machine
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            {"backend": "stacked", "workers": 2, "slots": 3, "rows": "disk", "fall_back": False},
            marks=pytest.mark.slow,
        ),
        pytest.param({"backend": "vmap", "workers": 1, "slots": 2}, marks=pytest.mark.slow),
        pytest.param({"backend": "loop", "workers": 1, "slots": 1}, marks=pytest.mark.slow),
    ],
    ids=["stacked, 2 workers, rows", "vmap", "loop"],
)
def test_kills_at_random_moments(server: Server, how: dict[str, Any]) -> None:
    name, how = f"random-{how['backend']}", {**how, "rounds": 24, "checkpoint_every": 4}
    whole = server.run(name, **how)
    assert (whole["code"], whole["rounds"]) == (0, 24), server.said(name)
    expected, draw, killed = server.result(name), random.Random(0), 0
    while killed < 10:
        out, kills = f"{name}-{killed}", 0
        moment = draw.uniform(0.1, 0.9)
        while kills < 3 and server.run(out, after=moment * whole["seconds"], **how)["code"]:
            moment, kills = draw.uniform(0.1, 0.9), kills + 1
        saved = server.saved(out)
        again = server.run(out, **how)
        assert (again["code"], again["rounds"]) == (0, 24 - saved), server.said(out)
        assert server.result(out) == expected
        killed += kills
