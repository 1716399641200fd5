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

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import backend_registration

import vecfl
from vecfl import Batches, InputError, Simulation, Task, arrangement, processes
from vecfl.algorithms.base import Server
from vecfl.arrangement import Arrangement
from vecfl.engine import LocalRule
from vecfl.job import Job
from vecfl.losses import Batch, Pair
from vecfl.schedule import Plan
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

    for number in (2, 1):
        with operator_threads(2):
            algorithm = replace(FEDAVG, server=server)
            kind = {"backend": "loop", "slots": 1, "workers": 2, "processes": number}
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
    (note,) = caught.value.__notes__
    assert note.startswith("in process ") and note.count("Traceback") == 1
    assert f'File "{__file__}", line ' in note and "in fail\n    raise error\n" in note
    armed.unlink()
    again, _ = sim.round(state)
    assert torch.equal(again.server["w"], right.server["w"])


def test_a_process_that_was_killed_is_told_and_the_next_round_works() -> None:
    sim = simulate(backend="loop", slots=1, workers=2, processes=2)
    state = sim.start()
    right, _ = sim.round(state)
    assert sim.trainer.crew is not None
    os.kill(sim.trainer.crew.forks[0].pid, signal.SIGKILL)
    said = r"^process \d+ of a worker has ended by SIGKILL, as .*; give fewer processes$"
    with pytest.raises(processes.WorkerLost, match=said) as caught:
        sim.round(state)
    assert caught.value.__suppress_context__ and not caught.value.__cause__
    again, _ = sim.round(state)
    assert torch.equal(again.server["w"], right.server["w"])


@pytest.mark.parametrize(
    "last, how",
    [
        (lambda: os._exit(3), "with exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), None),  # ignored: a signal of the group
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), "by SIGUSR1"),
    ],
)
def test_how_a_process_has_ended_is_told(last: Callable[[], object], how: str | None) -> None:
    sim = simulate(
        loss=in_a_fork(last), **{"backend": "loop", "slots": 1, "workers": 2, "processes": 2}
    )
    if how is None:
        sim.round(sim.start())
        return
    with pytest.raises(processes.WorkerLost, match=rf"^process \d+ of a worker has ended {how}$"):
        sim.round(sim.start())


class TwoArguments(Exception):
    def __init__(self, client: int, why: str) -> None:
        super().__init__(f"client {client}: {why}")


def test_an_exception_that_cannot_be_read_again_comes_as_its_text() -> None:
    """Pickle would call TwoArguments with one."""

    def fail() -> None:
        raise TwoArguments(3, "no")

    sim = simulate(loss=in_a_fork(fail), backend="loop", slots=1, workers=2, processes=2)
    with pytest.raises(RuntimeError, match="^TwoArguments: client 3: no") as caught:
        sim.round(sim.start())
    assert "in fail\n    raise TwoArguments" in caught.value.__notes__[0]


def test_processes_alone_are_as_many_workers() -> None:
    sim = simulate(backend="loop", slots=1, workers="auto", processes=2)
    assert sim.arrangement == Arrangement("loop", 2, 1, 1, processes=2)


def test_an_evaluation_has_no_more_threads_than_torch() -> None:
    seen: list[int] = []

    def loss(output: Tensor, batch: Batch) -> Pair:
        seen.append(torch.get_num_threads())
        return vecfl.cross_entropy(output, batch)

    sim = simulate(loss=loss, backend="loop", slots=1, workers=2)
    state = sim.start()
    for here, right in ((1, 1), (2, 2), (3, 2)):  # two workers of one thread each
        seen.clear()
        with operator_threads(here):
            sim.evaluate(state, sim.data.columns)
            sim.evaluate_clients(state)
        assert {*seen} == {right}


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


TWO = "processes={} with workers={}: give workers={} or auto, or leave out processes"


@pytest.mark.parametrize(
    "algorithm, kind, said",
    [
        (FEDAVG, {"workers": 2, "processes": 3}, TWO.format(3, 2, 3)),
        (FEDAVG, {"workers": 3, "processes": 2}, TWO.format(2, 3, 2)),
        (FEDAVG, {"processes": 0}, "processes must be an integer of at least 1, not 0"),
        (FEDAVG, {"workers": 1, "processes": True}, "processes must be an integer .* not True"),
        (FEDAVG, {"processes": 2.0}, "processes must be an integer of at least 1, not 2.0"),
        (FEDAVG, {"workers": 60, "processes": 60}, "workers=60: give at most 10, the clients of"),
        (FEDAVG, {"workers": "auto", "processes": 60}, "workers=60: give at most 10, the clien"),
        (vecfl.scaffold(lr=0.1, batches=Batches(4)), {}, "scaffold keeps rows of clients"),
        (replace(FEDAVG, before=FEDAVG), {}, "fedavg keeps rows of clients"),  # without a table
    ],
)
def test_what_cannot_be_is_refused(
    algorithm: vecfl.Algorithm, kind: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        simulate(algorithm, **({"workers": 2, "processes": 2} | kind))


def test_an_arrangement_is_checked_wherever_it_comes_from() -> None:
    """Also from the file of choices, or for a GPU."""
    layout = simulate().task.layout
    for a, device, said in (
        (Arrangement("loop", 2, 1, 1), "cuda", "2 workers on cuda: workers are for the cores"),
        (Arrangement("loop", 2, 1, 1, 3), "cpu", "processes=3 for workers=2: give 1, or as many"),
    ):
        with pytest.raises(InputError, match=said):
            arrangement.check(a, torch.device(device), FEDAVG, layout)
    arrangement.check(Arrangement("loop", 1, 1, 1), torch.device("cuda"), FEDAVG, layout)


# A machine with an accelerator, as far as torch sees: after a backward pass of this process, none
# of its forks may take one.
ACCELERATOR = """
import torch, vecfl
from torch import nn
from torch.utils import backend_registration
backend_registration._setup_privateuseone_for_python_backend("npy")
torch.set_num_threads(2)
columns = {"x": torch.ones(8, 3), "y": torch.zeros(8, dtype=torch.int64)}
data = vecfl.FederatedDataset(columns, torch.arange(0, 9, 2))
task = vecfl.Task(nn.Linear(3, 2), vecfl.cross_entropy, example=data.examples(2))
algorithm = vecfl.fedavg(lr=0.1, batches=vecfl.Batches(1))

def play(**kind):
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **kind)
    sim.round(sim.start())
    return sim.arrangement

play(backend="loop")
try:
    play(backend="loop", workers=2, processes=2)
except vecfl.InputError as error:
    print(error)
print(play(backend="loop", workers="auto").processes, torch.cuda.is_initialized())
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no such accelerator",
)
def test_beside_an_accelerator_workers_are_threads(tmp_path: Path) -> None:
    done = run_apart(ACCELERATOR, tmp_path)
    assert done.returncode == 0, done.stderr
    said, taken = done.stdout.splitlines()
    assert said == (
        "processes=2: torch lets no fork train where it sees an accelerator (npy; "
        "CUDA_VISIBLE_DEVICES= hides NVIDIA's); use threads (processes=1)"
    )
    assert taken == "1 False"


def run_apart(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with no choices kept."""
    env = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_what_changes_between_rounds_reaches_all_workers() -> None:
    """The numbers of the rule; a round asks for them once, so that all its clients have the same.

    A rate that is drawn at each call would else be another one in each worker, and in the metrics.
    """

    def played(number: int) -> tuple[Tensor, list[float]]:
        now, asked = {"lr": 0.1, "mu": 0.0}, []

        def rate(round: int) -> float:
            asked.append(now["lr"] / (1 + len(asked)))
            return asked[-1]

        def local(server: Server, rule: LocalRule) -> LocalRule:
            return replace(rule, mu=now["mu"])

        algorithm = replace(vecfl.fedavg(lr=rate, batches=Batches(4, epochs=2)), local=local)
        kind: dict[str, Any] = {"backend": "loop", "slots": 1, "workers": 3}
        sim, told = simulate(algorithm, processes=number, **kind), []
        state = sim.start()
        for lr, mu in ((0.1, 0.0), (0.4, 0.0), (0.4, 0.5)):
            now |= {"lr": lr, "mu": mu}
            state, metrics = sim.round(state)
            told.append(metrics["train/lr"])
        assert told == asked == [0.1, 0.4 / 2, 0.4 / 3]
        return state.server["w"], told

    (w, _), (right, _) = played(3), played(1)
    assert torch.equal(w, right)


def test_a_process_gets_the_examples_of_its_own_clients_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Job] = []
    dump = processes.dump
    monkeypatch.setattr(processes, "dump", lambda job: sent.append(job) or dump(job))
    sim = simulate(SOME, backend="loop", slots=1, workers=2, processes=2, resident=False)
    rounds(sim, 2)
    first, second = sent
    assert not first.columns  # those of the first round are in the fork
    sizes = sim.data.sizes[second.clients]
    assert 0 < len(second.clients) < 7
    assert {len(column) for column in second.columns.values()} == {int(sizes.sum())}


def test_jobs_are_packed_with_each_client_once() -> None:
    """Clients 5, 2, 5, 3 of one, two, one, no example, which lie at 4, 1, 4, 3 of the columns.

    By position the packed columns are client 2's examples 1 and 2, no one's, and client 5's 4: they
    begin at 2 (client 5), 0 (client 2) and 2 again (client 3 has none, behind client 2's).
    """
    client, first, total = (np.array(x) for x in ([5, 2, 5, 3], [4, 1, 4, 3], [1, 2, 1, 0]))
    fields = dict.fromkeys(("place", "occurrence", "kept", "n", "per_epoch", "steps"), client)
    plan = Plan(client=client, first=first, total=total, delay=client, run=client, **fields)
    job = Job({}, 0, plan, {"x": torch.arange(10, 15), "y": torch.arange(10).view(5, 2)}).packed()
    assert job.columns["x"].tolist() == [11, 12, 14]
    assert job.columns["y"].tolist() == [[2, 3], [4, 5], [8, 9]]
    assert job.plan.first.tolist() == [2, 0, 2, 2]
    assert job.plan.total.tolist() == [1, 2, 1, 0]


def test_where_this_process_fails_the_others_stop_before_their_jobs_are_done(
    tmp_path: Path,
) -> None:
    """Not only once they are ended: who holds the error holds them too."""
    parent, ready, failed = os.getpid(), tmp_path / "ready", tmp_path / "failed"

    def wait_for(path: Path) -> None:
        ends = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < ends
            time.sleep(0.005)

    def loss(output: Tensor, batch: Batch) -> Pair:
        if (tmp_path / "armed").exists():
            if os.getpid() == parent:
                wait_for(ready)
                raise ValueError("what failed")
            ready.touch()
            wait_for(failed)
        return vecfl.cross_entropy(output, batch)

    sim = simulate(loss=loss, backend="loop", slots=1, workers=2, processes=2)
    state, _ = sim.round(sim.start())
    crew = sim.trainer.crew
    assert crew is not None
    (tmp_path / "armed").touch()
    with pytest.raises(ValueError, match="what failed"):
        sim.round(state)
    failed.touch()
    fold = crew.forks[0].result()
    assert fold.ended == 2 < len(fold.room.client) == 6


SIGNALS = """
import os
from tests.test_processes import simulate
from vecfl.signals import NUMBERS, Signals
for number in NUMBERS:
    sim = simulate(backend="loop", slots=1, workers=2, processes=2)
    with Signals() as signals:
        state, _ = sim.round(sim.start())
        os.killpg(0, number)
        sim.round(state)
    assert signals.came == number
    print(sim.trainer.crew.forks[0].pid)
"""


def test_signals_are_for_the_main_process_alone() -> None:
    """A terminal, or what ends a job, sends them to the group: a line, and rounds are finished."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALS], capture_output=True, text=True, start_new_session=True
    )
    told = "finishing this round; again to stop at once"
    assert done.stderr.splitlines() == [f"{s}: {told}" for s in ("SIGINT", "SIGTERM", "SIGHUP")]
    assert done.returncode == 0 and len(done.stdout.split()) == 3
    for pid in done.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_threads_and_systems_that_do_not_survive_a_fork_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = dataset(PROBLEMS["mlp"].clients((8,) * 4))
    task = Task(nn.Linear(5, 4), vecfl.cross_entropy, example=data.examples(4))
    parts = task, data, FEDAVG, vecfl.everyone()
    for backend in ("vmap", "auto"):
        with pytest.raises(InputError, match="each has one operator thread; give threads=1"):
            Simulation(*parts, backend=backend, workers=2, processes=2, threads=2)
    monkeypatch.setattr(arrangement, "possible", lambda: False)
    for backend in ("vmap", "auto"):
        with pytest.raises(InputError, match="threads do not outlive a fork; use threads"):
            Simulation(*parts, backend=backend, workers=2, processes=2, threads=1)
