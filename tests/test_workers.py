"""Workers are no part of a result: threads with slots and a module of their own, sums in order."""

import threading

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, Simulation, Task, fedavg
from vecfl.job import Job
from vecfl.losses import Batch, Pair
from vecfl.trainer import operator_threads

from .oracles.bridge import dataset, run_vecfl
from .oracles.loop import Setting
from .oracles.tasks import PROBLEMS

SETTING = Setting(rounds=2, seed=5, optimizer="momentum", lr=0.05, epochs=2, mu=0.2)
KINDS = [("loop", 1), ("loop", 2), ("vmap", 2), ("vmap", 7)]
DENSE = [("mlp", "stacked", 2), ("linear", "stacked", 3)]


def simulate(problem: str, loss=vecfl.cross_entropy, **kind) -> Simulation:
    p = PROBLEMS[problem]
    data = dataset(p.clients((5, 0, 1, 23, 3, 4, 8, 9, 9, 2)))
    task = Task(p.build().float(), loss, example=data.examples(4))
    return Simulation(
        task, data, fedavg(lr=0.1, batches=Batches(4, epochs=2)), vecfl.everyone(), **kind
    )


@pytest.mark.parametrize(
    "problem, backend, slots", [(p, *kind) for p in PROBLEMS for kind in KINDS] + DENSE
)
def test_one_two_and_four_workers_agree(problem: str, backend: str, slots: int) -> None:
    p = PROBLEMS[problem]
    one, two, four = (
        run_vecfl(
            p.build(), p.loss, p.clients(), SETTING, backend=backend, slots=slots, workers=workers
        )
        for workers in (1, 2, 4)
    )
    for run in (two, four):
        torch.testing.assert_close(run.models, one.models, rtol=1e-9, atol=1e-12)
        for sent, expected in zip(run.updates, one.updates, strict=True):
            assert sent.keys() == expected.keys()
            for k in sent:
                torch.testing.assert_close(sent[k], expected[k], rtol=1e-9, atol=1e-12)
        for metrics, expected in zip(run.metrics, one.metrics, strict=True):
            for name in ("train/loss", "train/clients", "system/client_steps"):
                assert metrics[name] == pytest.approx(expected[name], rel=1e-9)


@pytest.mark.parametrize("backend, slots", [("loop", 1), ("vmap", 2), ("stacked", 2)])
def test_a_round_that_is_repeated_has_the_same_bits(backend: str, slots: int) -> None:
    sim = simulate("mlp", backend=backend, slots=slots, workers=3)
    state = sim.start()
    first, _ = sim.round(state)
    for _ in range(50):
        again, _ = sim.round(state)
        assert torch.equal(again.server["w"], first.server["w"])


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_every_worker_trains_in_a_thread_with_a_module_and_slots_of_its_own(backend: str) -> None:
    ran: dict[str, set] = {"thread": set(), "operators": set()}
    gate = threading.Barrier(2, timeout=60)  # passes only while two threads train at once
    before = torch.get_num_threads()

    def loss(output: Tensor, batch: Batch) -> Pair:
        thread = threading.current_thread()
        if thread.name.startswith("vecfl-worker") and thread.ident not in ran["thread"]:
            ran["thread"].add(thread.ident)
            ran["operators"].add(torch.get_num_threads())
            gate.wait()
        return vecfl.cross_entropy(output, batch)

    sim = simulate("mlp", loss, backend=backend, slots=2, workers=2, threads=3)
    _, metrics = sim.round(sim.start())
    assert (metrics["system/workers"], metrics["system/threads"]) == (2, 3)
    assert len(ran["thread"]) == 2 and threading.get_ident() not in ran["thread"]
    assert ran["operators"] == {3} and torch.get_num_threads() == before
    a, b = sim.trainer.workers
    assert a.slots.flat.data_ptr() != b.slots.flat.data_ptr()
    modules = [worker.backend.task.module for worker in (a, b)]
    left, right = ({m for m in module.modules()} for module in modules)
    assert not left & right


def test_work_is_shared_longest_first() -> None:
    # Two epochs of batches of 4: sizes 5 0 1 23 3 4 8 9 9 2 take steps of
    steps = [4, 0, 2, 12, 2, 2, 4, 6, 6, 2]
    # in order 3 | 7 8 | 0 6 | 2 4 5 9. The loop adds steps: 12 | 6 | 6, then 0 and 6 make 10 | 10,
    # 2 and 4 make 12 | 12, and 5 and 9 go to the first and the second.
    # vmap has six slots, worker i those with number i mod 3: 3 7 8 0 6 2 take one each, 4 follows
    # on the 2, 5 and 9 follow on 0 and 6. The client without steps goes to the last.
    shared = {
        "loop": [{3, 5}, {7, 0, 2, 9}, {8, 6, 4, 1}],
        "vmap": [{3, 0, 5}, {7, 6, 9}, {8, 2, 4, 1}],
    }
    for backend, expected in shared.items():
        sim = simulate("mlp", backend=backend, slots=2, workers=3)
        plan = sim.trainer.plan(sim.cohort(0))
        assert plan.steps.tolist() == steps
        assert [set(mine.tolist()) for mine in sim.trainer.share(plan)] == expected


def test_more_workers_than_clients_leave_some_idle() -> None:
    few = simulate("mlp", backend="loop", slots=1, workers=12)
    one = simulate("mlp", backend="loop", slots=1)
    state, metrics = few.round(few.start())
    expected, _ = one.round(one.start())
    torch.testing.assert_close(state.server["w"], expected.server["w"])
    assert metrics["train/clients"] == 9


class Failing(nn.Linear):
    """Fails in the thread that `where` says, once it is armed."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if Failing.armed and threading.current_thread().name.endswith("_1"):
            raise RuntimeError("worker 1 fails")
        return super().forward(x)


def test_a_failure_in_a_worker_is_raised_and_the_next_round_works() -> None:
    data = dataset(PROBLEMS["mlp"].clients((8,) * 40))
    width = data.columns["x"].shape[1]
    task = Task(Failing(width, 4), vecfl.cross_entropy, example=data.examples(4))
    algorithm = fedavg(lr=0.1, batches=Batches(4))
    sim = Simulation(task, data, algorithm, vecfl.everyone(), backend="loop", slots=1, workers=2)
    state = sim.start()
    expected, _ = sim.round(state)
    Failing.armed = True
    try:
        with pytest.raises(RuntimeError, match="worker 1 fails"):
            for _ in range(100):
                sim.round(state)
    finally:
        Failing.armed = False
    again, metrics = sim.round(state)
    assert torch.equal(again.server["w"], expected.server["w"])
    assert metrics["train/clients"] == 40


def test_the_others_stop_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulate("mlp", backend="loop", slots=1, workers=2)
    first, second = sim.trainer.workers
    stopped = threading.Event()

    def wait_for_the_stop(*args) -> None:
        if args[-1].wait(timeout=60):
            stopped.set()
        raise RuntimeError("too late")

    def fail(*args) -> None:
        raise ValueError("worker 1 fails")

    monkeypatch.setattr(first, "train", wait_for_the_stop)
    monkeypatch.setattr(second, "train", fail)
    with pytest.raises((ValueError, RuntimeError)):
        sim.round(sim.start())
    assert stopped.is_set()


def test_a_worker_stops_between_blocks_when_another_failed() -> None:
    sim = simulate("mlp", backend="loop", slots=1)
    (worker,) = sim.trainer.workers
    stop = threading.Event()
    stop.set()
    job = Job(sim.start().server, 0, sim.trainer.plan(sim.cohort(0)), sim.data.columns)
    fold = worker.train(job, stop)
    assert fold.executed == 0 and len(fold.told.client) == 1  # the one without examples


def test_operator_threads_come_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), operator_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
