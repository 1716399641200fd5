"""Faults from outside: files that shrink or vanish under a run, and a GPU without memory."""

import os
import re
from pathlib import Path

import pytest
import torch

import vecfl
from vecfl import Batches, InputError, Simulation, fedavg
from vecfl.data import open_dataset, save
from vecfl.engine.loop import LoopBackend
from vecfl.probe import Probe

from .oracles.bridge import dataset
from .oracles.tasks import PROBLEMS, SIZES
from .oracles.toy import habit
from .test_simulation import simulate

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


def refused(line: str):
    return pytest.raises(InputError, match=f"^{re.escape(line)}$")


def stored(folder: Path, **kind) -> Simulation:
    """The ragged clients of a problem on disk."""
    p = PROBLEMS["mlp"]
    save(dataset(p.clients()), folder)
    data = open_dataset(folder)
    task = vecfl.Task(p.build(), p.loss, example=data.examples(2))
    return Simulation(task, data, fedavg(lr=0.1, batches=Batches(4)), vecfl.uniform(4), **kind)


@pytest.mark.parametrize("name", ["column_0.npy", "column_1.npy", "offsets.npy"])
@pytest.mark.parametrize("resident", [True, False])
def test_a_file_that_shrinks_ends_the_next_round_in_a_line(
    tmp_path: Path, resident: bool, name: str
) -> None:
    """Not the process, as reading what is no longer there would."""
    sim, path = stored(tmp_path / "s", resident=resident), tmp_path / "s" / name
    state, _ = sim.round(sim.start())
    sim.feed.pool.submit(int).result()  # the examples of the second round are fetched
    whole = path.stat().st_size
    os.truncate(path, 64)
    line = f"{path}: 64 bytes, but {whole} when it was opened"
    with refused(line):
        sim.round(state)
    with refused(line):
        sim.evaluate_clients(state)
    with pytest.raises(InputError, match=re.escape(line)):  # and when it is fetched anew
        sim.round(state)


def test_a_store_that_vanishes_is_read_to_the_end(tmp_path: Path) -> None:
    ours, other = stored(tmp_path / "s"), stored(tmp_path / "t")
    state, right = ours.start(), other.start()
    for path in (tmp_path / "s").iterdir():
        path.unlink()
    for _ in range(3):
        state, _ = ours.round(state)
        right, _ = other.round(right)
    assert torch.equal(state.server["w"], right.server["w"])
    assert ours.evaluate_clients(state) == other.evaluate_clients(right)


def fill(monkeypatch: pytest.MonkeyPatch, times: int, slots: int = 0) -> list[int]:
    """Blocks on more than `slots` slots run out of memory, `times` times; the slots at each."""
    run, seen = LoopBackend.run_, list[int]()

    def run_(self, slots_, *rest):
        if len(seen) < times and slots_.number > slots:
            seen.append(slots_.number)
            raise torch.OutOfMemoryError(FULL)
        return run(self, slots_, *rest)

    monkeypatch.setattr(LoopBackend, "run_", run_)
    return seen


@pytest.mark.parametrize("exact", [False, True])
def test_slots_are_halved_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, exact: bool
) -> None:
    algorithm = habit(lr=0.1, batches=Batches(4))
    kind = {"backend": "loop", "exact_sums": exact, "dtype": torch.float64, "algorithm": algorithm}
    ours, other = simulate(slots=5, **kind), simulate(slots=2, **kind)
    (state, _), (right, _) = ours.round(ours.start()), other.round(other.start())
    fill(monkeypatch, times=1)
    state, metrics = ours.round(state)
    assert caplog.messages == [
        "round 2: loop, 1 worker of 5 slots and 1 operator thread: " + FULL + "; going on with 2 "
        "slots"
    ]
    assert metrics["system/slots"] == ours.arrangement.slots == 2
    assert ours.trainer.workers[0].slots.number == 2
    monkeypatch.undo()
    right, _ = other.round(right)
    close = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(state.server, right.server, **close)
    everyone = torch.arange(len(SIZES))
    rows = [s.table.gather(everyone) for s in (state, right)]
    torch.testing.assert_close(*rows, **close)
    assert rows[0]["visits"].tolist() == [2] * len(SIZES)  # the round counts once


@pytest.mark.parametrize("slots, left", [(5, 2), (1, 1)])
def test_memory_that_runs_out_again_ends_in_a_line(
    monkeypatch: pytest.MonkeyPatch, slots: int, left: int
) -> None:
    sim = simulate(backend="loop", slots=slots)
    seen = fill(monkeypatch, times=99)
    with pytest.raises(InputError) as caught:
        sim.round(sim.start())
    assert seen == ([5, 2] if slots == 5 else [1])
    assert str(caught.value) == (
        f"round 1: loop, 1 worker of {left} slots and 1 operator thread: {FULL}; give fewer slots, "
        "or smaller batches"
    )


def test_slots_are_halved_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = simulate(backend="loop", slots=6)
    with monkeypatch.context() as patch:
        fill(patch, times=1)
        state, _ = sim.round(sim.start())
    assert sim.arrangement.slots == 3
    with monkeypatch.context() as patch, pytest.raises(InputError, match="give fewer slots"):
        fill(patch, times=1)
        sim.round(state)
    assert sim.arrangement.slots == 3


def test_slots_that_do_not_fit_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule says two, more are tried, and none has the memory."""
    seen = fill(monkeypatch, times=99, slots=2)
    monkeypatch.setattr(Probe, "slots", lambda *_: 2)
    sim = simulate(backend="loop", slots="auto", workers=1, threads=1)
    assert seen and min(seen) > 2
    assert sim.arrangement.slots in (1, 2)
    assert sim.round(sim.start())[1]["system/slots"] == sim.arrangement.slots
