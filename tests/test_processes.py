"""Workers in processes of their own: the bits of threads, failures, and how they end."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, InputError, Simulation, Task, arrangement
from vecfl.losses import Batch, Pair
from vecfl.trainer import operator_threads

from .oracles.bridge import dataset
from .oracles.tasks import PROBLEMS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks need Linux")

FEDAVG = vecfl.fedavg(lr=0.1, batches=Batches(4, epochs=2))
SOME = vecfl.fedavg(lr=0.2, batches=Batches(4))  # others in each round
RUNS: dict[str, tuple[vecfl.Algorithm, dict[str, Any]]] = {
    "loop": (FEDAVG, {"backend": "loop", "slots": 1}),
    "vmap": (vecfl.dga(lr=0.1, batches=Batches(4)), {"backend": "vmap", "slots": 2}),
    "stacked": (FEDAVG, {"backend": "stacked", "slots": 2, "statistics": 3}),
    "clipped": (vecfl.chain(FEDAVG, vecfl.clip_by_norm(0.1)), {"backend": "stacked", "slots": 2}),
    "one step": (vecfl.fedsgd(lr=0.1, size=4), {"backend": "stacked", "slots": 2}),
    "late": (vecfl.delayed(FEDAVG, vecfl.drawn_delay([0.5, 0.5])), {"backend": "loop"}),
    "median": (vecfl.aggregated_by(FEDAVG, vecfl.coordinate_median()), {"backend": "loop"}),
    "exact": (FEDAVG, {"backend": "loop", "exact_sums": True}),
    "streamed": (SOME, {"backend": "loop", "resident": False}),
}


def simulate(
    algorithm: vecfl.Algorithm = FEDAVG,
    loss: vecfl.losses.Score = vecfl.cross_entropy,
    **kind: Any,
) -> Simulation:
    p = PROBLEMS["mlp"]
    data = dataset(p.clients((5, 0, 1, 23, 3, 4, 8, 9, 9, 2)))
    task = Task(p.build().float(), loss, example=data.examples(4))
    sampler = vecfl.uniform(7) if algorithm is SOME else vecfl.everyone()
    return Simulation(task, data, algorithm, sampler, threads=1, **kind)


def rounds(sim: Simulation, number: int = 3) -> tuple[Tensor, list[dict[str, Any]]]:
    state, told = sim.start(), []
    for _ in range(number):
        state, metrics = sim.round(state)
        told.append({k: v for k, v in metrics.items() if not k.endswith("_s")})
    return state.server["w"], told


@pytest.mark.parametrize("algorithm, kind", RUNS.values(), ids=RUNS)
def test_processes_give_the_bits_of_threads(
    algorithm: vecfl.Algorithm, kind: dict[str, Any]
) -> None:
    w, told = rounds(simulate(algorithm, workers=3, processes=3, **kind))
    right, said = rounds(simulate(algorithm, workers=3, **kind))
    assert torch.equal(w, right)
    for ours, theirs in zip(told, said, strict=True):
        assert (ours.pop("system/processes"), theirs.pop("system/processes")) == (3, 1)
        assert repr(ours) == repr(theirs)  # NaN is NaN


def in_a_fork(happens: Callable[[], object]) -> vecfl.losses.Score:
    """A loss in which something happens in all processes but this one."""
    parent = os.getpid()

    def loss(output: Tensor, batch: Batch) -> Pair:
        if os.getpid() != parent:
            happens()
        return vecfl.cross_entropy(output, batch)

    return loss


def test_each_worker_is_a_process_that_ends_with_the_simulation(tmp_path: Path) -> None:
    sim = simulate(
        loss=in_a_fork(lambda: (tmp_path / str(os.getpid())).touch()),
        **{"backend": "loop", "slots": 1, "workers": 3, "processes": 3},
    )
    rounds(sim)
    pids = {int(path.name) for path in tmp_path.iterdir()}
    assert len(pids) == 2 and sim.trainer.crew is not None
    assert pids == {fork.pid for fork in sim.trainer.crew.forks}
    del sim
    gc.collect()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_this_process_leaves_the_other_cores_alone() -> None:
    """In a round; between two of them, and with threads, it has what it had."""
    seen: list[int] = []

    def server(state, sums, round):
        seen.append(torch.get_num_threads())
        return FEDAVG.server(state, sums, round)

    for processes in (2, 1):
        with operator_threads(2):
            algorithm = replace(FEDAVG, server=server)
            kind = {"backend": "loop", "slots": 1, "workers": 2, "processes": processes}
            rounds(simulate(algorithm, **kind), 1)
            assert torch.get_num_threads() == 2
    assert seen == [1, 2]


class Unwritable(Exception):
    def __init__(self) -> None:
        super().__init__("what failed")
        self.args = (lambda: 0,)


@pytest.mark.parametrize("error", [ValueError("what failed"), Unwritable(), InputError("no")])
def test_what_fails_in_a_process_is_raised_here_and_the_next_round_works(
    error: Exception, tmp_path: Path
) -> None:
    armed = tmp_path / "armed"

    def fail() -> None:
        if armed.exists():
            raise error

    sim = simulate(loss=in_a_fork(fail), backend="loop", slots=1, workers=2, processes=2)
    state = sim.start()
    right, _ = sim.round(state)
    armed.touch()
    kind = RuntimeError if isinstance(error, Unwritable) else type(error)
    with pytest.raises(kind) as caught:
        sim.round(state)
    assert str(caught.value).startswith("Unwritable: " if kind is RuntimeError else str(error))
    armed.unlink()
    again, _ = sim.round(state)
    assert torch.equal(again.server["w"], right.server["w"])


def test_a_process_that_was_killed_is_told_and_the_next_round_works() -> None:
    sim = simulate(backend="loop", slots=1, workers=2, processes=2)
    state = sim.start()
    right, _ = sim.round(state)
    assert sim.trainer.crew is not None
    os.kill(sim.trainer.crew.forks[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"process \d+ of a worker has ended"):
        sim.round(state)
    again, _ = sim.round(state)
    assert torch.equal(again.server["w"], right.server["w"])


def test_what_was_interrupted_is_not_taken_for_the_next_round() -> None:
    parent, armed = os.getpid(), [False]

    def loss(output: Tensor, batch: Batch) -> Pair:
        if armed[0] and os.getpid() == parent:
            raise KeyboardInterrupt
        return vecfl.cross_entropy(output, batch)

    sim = simulate(loss=loss, backend="loop", slots=1, workers=2, processes=2)
    first, _ = sim.round(sim.start())
    right, _ = sim.round(first)
    armed[0] = True
    with pytest.raises(KeyboardInterrupt):
        sim.round(sim.start())
    armed[0] = False
    again, _ = sim.round(first)
    assert torch.equal(again.server["w"], right.server["w"])


ORPHAN = """
import os, signal
from tests.test_processes import rounds, simulate
sim = simulate(backend="loop", slots=1, workers=2, processes=2)
rounds(sim, 1)
print(sim.trainer.crew.forks[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_where_their_parent_was_killed() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, ends = int(done.stdout), time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < ends:
        if (Path(f"/proc/{pid}/stat").read_text().split()[2]) == "Z":
            return  # ended, and nobody asked
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "algorithm, kind, said",
    [
        (FEDAVG, {"workers": 2, "processes": 3}, "processes=3: must be 1, or the number of work"),
        (FEDAVG, {"workers": "auto", "processes": 2}, "processes=2: must be 1, or the number of"),
        (vecfl.scaffold(lr=0.1, batches=Batches(4)), {}, "scaffold keeps rows of clients"),
    ],
)
def test_what_cannot_be_is_refused(
    algorithm: vecfl.Algorithm, kind: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        simulate(algorithm, **({"workers": 2, "processes": 2} | kind))


def test_threads_and_systems_that_do_not_survive_a_fork_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = dataset(PROBLEMS["mlp"].clients((8,) * 4))
    task = Task(nn.Linear(5, 4), vecfl.cross_entropy, example=data.examples(4))
    parts = task, data, FEDAVG, vecfl.everyone()
    with pytest.raises(InputError, match="each has one operator thread; give threads=1"):
        Simulation(*parts, workers=2, processes=2, threads=2)
    monkeypatch.setattr(arrangement, "possible", lambda: False)
    with pytest.raises(InputError, match="threads do not outlive a fork; use threads"):
        Simulation(*parts, workers=2, processes=2, threads=1)
