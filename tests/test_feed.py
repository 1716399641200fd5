"""Where examples come from is no part of a result: columns on the device, or those of a cohort."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vecfl
from vecfl import Batches, FederatedDataset, InputError, Simulation, State, Task, fedavg, feed
from vecfl.data import open_dataset, save
from vecfl.feed import Resident, Streamed, place
from vecfl.job import Job
from vecfl.trainer import operator_threads

from .oracles.bridge import dataset
from .oracles.tasks import PROBLEMS

CPU, ROUNDS = torch.device("cpu"), 3
SIZES = (5, 0, 1, 23, 3, 4, 8, 9, 9, 2)
SOURCES = [Resident, Streamed]


def simulate(problem: str = "mlp", folder: Path | None = None, **kind) -> Simulation:
    """Ragged clients, five a round, of which the largest takes part with 10 examples."""
    p = PROBLEMS[problem]
    data = dataset(p.clients(SIZES))
    if folder is not None:
        save(data, folder)
        data = open_dataset(folder)
    task = Task(p.build().float(), p.loss, example=data.examples(4))
    batches = Batches(4, epochs=2, max_examples=10)
    algorithm = kind.pop("algorithm", None) or fedavg(
        lr=0.1, batches=batches, optimizer=vecfl.momentum()
    )
    return Simulation(task, data, algorithm, kind.pop("sampler", vecfl.uniform(5)), seed=2, **kind)


def results(sim: Simulation) -> list[Tensor]:
    """Models of all rounds, what each round reports of training, and evaluations of the last."""
    state, found = sim.start(), []
    for _ in range(ROUNDS):
        state, metrics = sim.round(state)
        trained = [metrics[f"train/{name}"] for name in ("loss", "clients", "dropped_clients")]
        found += [state.server["w"], torch.tensor(trained)]
    evaluated = sim.evaluate(state, sim.data.columns) | sim.evaluate_clients(state)
    return [*found, torch.tensor(list(evaluated.values()))]


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "store"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "backend, problem",
    [(b, p) for b in ("loop", "vmap") for p in PROBLEMS] + [("stacked", "linear")],
)
def test_streamed_data_give_the_bits_of_resident_data(
    backend: str, problem: str, workers: int, stored: bool, tmp_path: Path
) -> None:
    kind = {"backend": backend, "workers": workers, "slots": 2}
    expected = results(simulate(problem, **kind))
    sim = simulate(problem, tmp_path / "store" if stored else None, resident=False, **kind)
    torch.testing.assert_close(results(sim), expected, rtol=0, atol=0)
    sizes = []
    run_ = sim.trainer.workers[0].backend.run_
    sim.trainer.workers[0].backend.run_ = lambda slots, block, columns, update: (
        sizes.append(len(columns["x"])) or run_(slots, block, columns, update)
    )
    _, metrics = sim.round(sim.start())
    assert metrics["system/data"] == "streamed" and metrics["system/wait_s"] > 0
    assert set(sizes) == {sum(SIZES[k] for k in sim.cohort(0).tolist())}  # and no other example


def test_a_client_that_comes_twice_trains_twice() -> None:
    sim, clients = simulate(slots=2), torch.tensor([3, 0, 1, 3, 6])
    server, totals = sim.start().server, []
    for source in SOURCES:
        examples = source(sim.data, CPU).fetch(clients)
        plan = replace(sim.trainer.plan(clients), first=examples.first)
        with torch.no_grad():
            fold = sim.trainer.train(Job(server, 0, plan, examples.columns))
        assert sorted(fold.told.client.tolist()) == [0, 1, 3, 3, 6]
        totals.append(fold.aggregate.total)
    assert torch.equal(*totals) and totals[0].any()


def test_repeats_losses_and_empty_rounds_have_the_same_bits() -> None:
    drawn = [[6, 0, 6, 3, 6], [], [9, 1, 7, 9, 2]]  # of which 3, 1 and 7 are lost
    kind = {"sampler": lambda eligible, seed, round: torch.tensor(drawn[round], dtype=torch.int64)}
    kind |= {"client_dropout": 0.3, "slots": 2}
    expected, found = (results(simulate(resident=resident, **kind)) for resident in (True, False))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    first, second, third = expected[0:6:2]
    assert torch.equal(first, second) and not torch.equal(second, third)


# What is fetched

X = torch.arange(12, dtype=torch.uint8).reshape(6, 2)


def small() -> FederatedDataset:
    """Clients of 2, 0, 3 and 1 examples."""
    return FederatedDataset({"x": X, "y": torch.arange(6)}, torch.tensor([0, 2, 2, 5, 6]))


def test_a_cohort_by_hand() -> None:
    """Of clients 3, 1, 3, 0 the distinct ones are 0, 1, 3 with examples 0, 1 | none | 5."""
    found = Streamed(small(), CPU).fetch(clients := torch.tensor([3, 1, 3, 0]))
    assert found.clients is clients
    assert found.columns["y"].tolist() == [0, 1, 5]
    assert torch.equal(found.columns["x"], X[[0, 1, 5]]) and found.columns["x"].dtype == X.dtype
    assert found.first.tolist() == [2, 2, 2, 0]
    everything = Resident(small(), CPU).fetch(clients)
    assert everything.columns["x"].data_ptr() == X.data_ptr()  # no copy
    assert everything.first.tolist() == [5, 2, 5, 0]


@pytest.mark.parametrize("clients", [[], [1]], ids=["nobody", "without examples"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_cohort_without_examples(source: type, clients: list[int]) -> None:
    found = source(small(), CPU).fetch(torch.tensor(clients, dtype=torch.int64))
    assert len(found.first) == len(clients) and found.first.dtype == np.int64
    assert found.columns["x"].shape[1:] == (2,) and found.columns["x"].dtype == torch.uint8
    assert len(found.columns["x"]) == (6 if source is Resident else 0)


@settings(max_examples=100, deadline=None)
@given(draw=st.data(), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any))
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_every_client_has_its_examples(chunk: int, sizes: list[int], draw: st.DataObject) -> None:
    n = sum(sizes)
    columns = {"x": torch.arange(6 * n).view(n, 2, 3), "none": torch.empty(n, 0)}
    data = FederatedDataset(columns | {"y": torch.arange(n)}, torch.tensor([0, *sizes]).cumsum(0))
    clients = draw.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "CHUNK", chunk)
        found = Streamed(data, CPU).fetch(torch.tensor(clients, dtype=torch.int64))
    assert len(found.columns["y"]) == sum(sizes[k] for k in set(clients))
    for k, first in zip(clients, found.first.tolist(), strict=True):
        for name, column in data.client(k).items():
            assert torch.equal(found.columns[name][first : first + sizes[k]], column)


def test_examples_go_to_the_device() -> None:
    found = Streamed(small(), torch.device("meta")).fetch(torch.tensor([2, 0]))
    assert [(c.device.type, len(c)) for c in found.columns.values()] == [("meta", 5)] * 2


# Which of the two


@pytest.mark.parametrize("free, where", [(120, "resident"), (119, "streamed")])
def test_data_lie_on_a_gpu_up_to_half_of_its_free_memory(
    free: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x takes 6 * 2 bytes, y 6 * 8: 60 in all."""
    monkeypatch.setattr(feed, "free_memory", lambda device: free)
    for source in SOURCES:
        monkeypatch.setattr(feed, source.__name__, lambda data, device, to=source: to.name)
    gpu = torch.device("cuda")
    assert place(small(), gpu, None) == where
    assert [place(small(), gpu, given) for given in (True, False)] == ["resident", "streamed"]
    assert place(small(), CPU, None) == "resident"


# Ahead of the round


def watch(sim: Simulation, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], str]]:
    """The clients that are fetched, and the threads that do it."""
    seen, fetch = [], sim.source.fetch

    def noted(clients: Tensor, stop: threading.Event):
        seen.append((clients.tolist(), threading.current_thread().name))
        return fetch(clients, stop)

    monkeypatch.setattr(sim.source, "fetch", noted)
    return seen


def test_the_next_cohort_is_gathered_while_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Semaphore(0)
    plain = fedavg(lr=0.1, batches=Batches(4))

    def upload(state, done):
        assert begun.acquire(timeout=60)  # goes on when the next cohort is asked for
        begun.release()
        return plain.upload(state, done)

    sim = simulate(algorithm=replace(plain, upload=upload), resident=False)
    seen = watch(sim, monkeypatch)
    gather = feed.gather

    def signalling(*args, **kind):
        if len(seen) > 1:
            begun.release()
        return gather(*args, **kind)

    monkeypatch.setattr(feed, "gather", signalling)
    cohorts = [sim.cohort(round).tolist() for round in range(5)]
    first, _ = sim.round(sim.start())
    second, _ = sim.round(first)
    sim.round(second)
    sim.round(first)  # again: what was asked for is of round 4
    sim.feed.pool.shutdown()
    assert [clients for clients, _ in seen] == [cohorts[i] for i in (0, 1, 2, 3, 1, 2)]
    assert {name for _, name in seen} == {"vecfl-feed_0"}


def test_data_in_memory_need_no_thread_and_no_cohort_before_its_round() -> None:
    drawn = []
    sim = simulate(
        sampler=lambda eligible, seed, round: drawn.append(round) or torch.tensor([round])
    )
    drawn.clear()
    state, metrics = sim.round(sim.start())
    sim.round(state)
    assert drawn == [0, 1] and metrics["system/data"] == "resident"


def test_what_fails_in_the_thread_is_said_by_the_round_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = results(simulate())
    sim = simulate(resident=False)
    second, gather = sim.cohort(1), feed.gather
    examples = sum(SIZES[k] for k in second.tolist())
    assert examples != sum(SIZES[k] for k in sim.cohort(0).tolist())

    def failing(column: Tensor, index: Tensor, *args, **kind):
        if len(index) == examples:
            raise RuntimeError("no memory for it\nand a long story")
        return gather(column, index, *args, **kind)

    monkeypatch.setattr(feed, "gather", failing)
    state, _ = sim.round(sim.start())
    for _ in range(2):  # asked for ahead, and when it is needed
        with pytest.raises(InputError) as error:
            sim.round(state)
        assert str(error.value) == (
            "round 2: the examples of its clients cannot be fetched: no memory for it"
        )
    monkeypatch.undo()
    again, _ = sim.round(state)
    assert torch.equal(again.server["w"], expected[2])


def until_stopped(monkeypatch: pytest.MonkeyPatch, clients: int) -> tuple[Callable, list]:
    """Let gathering of a second cohort last until it is stopped: (wait for its begin, its end)."""
    begun, ended, gather = threading.Event(), [], feed.gather

    def slow(column: Tensor, index: Tensor, stop: threading.Event, *, pinned: bool):
        if len(index) == clients:
            begun.set()
            ended.append(stop.wait(timeout=60))
        return gather(column, index, stop, pinned=pinned)

    monkeypatch.setattr(feed, "gather", slow)
    return lambda: begun.wait(timeout=60), ended


def test_ctrl_c_in_training_stops_the_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, armed = fedavg(lr=0.1, batches=Batches(4)), [True]
    wait, ended = until_stopped(monkeypatch, SIZES[7])

    def upload(state, done):
        if armed:
            assert wait()
            raise KeyboardInterrupt
        return plain.upload(state, done)

    sim = simulate(
        algorithm=replace(plain, upload=upload),
        sampler=lambda eligible, seed, round: torch.tensor([[0], [7], [3]][round]),
        resident=False,
    )
    with pytest.raises(KeyboardInterrupt):
        sim.round(sim.start())
    assert sim.feed.coming.exception(timeout=60).__class__ is CancelledError and ended == [True]
    armed.clear()
    monkeypatch.undo()
    sim.round(State(1, sim.start().server))  # a notebook goes on, with what was to come or anew
    state, _ = sim.round(sim.start())
    sim.round(state)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows has no such signal")
def test_ctrl_c_ends_the_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    wait, ended = until_stopped(monkeypatch, SIZES[7])
    sim = simulate(sampler=lambda eligible, seed, round: torch.tensor([7]), resident=False)
    main = threading.main_thread().ident
    over = threading.Event()

    def press() -> None:
        assert wait()
        while not over.is_set():  # one that comes while Python collects garbage is lost
            signal.pthread_kill(main, signal.SIGINT)
            over.wait(5)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sim.round(State(0, sim.start().server))
    over.set()
    sim.feed.pool.shutdown()
    assert ended == [True]


def test_gathering_stops_between_two_chunks() -> None:
    (stop := threading.Event()).set()
    with pytest.raises(CancelledError):
        feed.gather(X, torch.tensor([0, 1]), stop, pinned=False)


def test_gathering_takes_one_operator_thread() -> None:
    with operator_threads(2):
        sim = simulate(resident=False)
        assert sim.feed.pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2


def test_what_is_auto_is_measured_on_streamed_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sim = simulate("linear", backend="auto", workers="auto", slots="auto", resident=False)
    _, metrics = sim.round(sim.start())
    assert metrics["system/data"] == "streamed"
