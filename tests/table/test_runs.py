"""Rounds of an algorithm whose clients keep rows: in memory and on disk, failed and odd ones."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, InputError, Simulation, Task, everyone
from vecfl.algorithms import Algorithm, Finished, Upload

from ..oracles.bridge import dataset, run_vecfl
from ..oracles.loop import Columns, Setting
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, STEEP, Line, client, squared
from ..oracles.toy import habit

BACKENDS = ["loop", "vmap"]
NAN = client((math.nan, 0.0))


def refused(line: str):
    return pytest.raises(InputError, match=f"^{re.escape(line)}$")


def tiny(clients: list[Columns], algorithm: Algorithm | None = None, **kind) -> Simulation:
    """w from 1, one step of all examples with lr 1/2."""
    data = dataset(clients)
    task = Task(Line(), squared, example=client(FAR, STEEP))
    algorithm = algorithm or habit(lr=0.5, batches=Batches(4))
    kind = {"sampler": everyone(), "dtype": torch.float64} | kind
    return Simulation(task, data, algorithm, kind.pop("sampler"), **kind)


def kept(state: vecfl.State) -> list[list[float]]:
    """[habit, visits] of every client."""
    assert state.table is not None
    rows = state.table.gather(torch.arange(state.table.clients))
    return torch.stack((rows["habit"][:, 0], rows["visits"]), 1).tolist()


# lr = 1/2, all examples in one step; FAR's gradient is w - 2, STEEP's 4w, so they halve the way to
# 2, and send w to -w. Rows are (mean move, visits).
# Round 1, w = 1: FAR 1 -> 1.5, STEEP 1 -> -1; weights 1, mean 0.25. Rows (0.5, 1), (-2, 1).
# Round 2, w = 0.25: FAR starts at 0.25 + 0.25 = 0.5 -> 1.25, move 1; STEEP at 0.25 - 1 = -0.75 ->
#     0.75, move 0.5. Weights 2 and 2, mean 1. Rows (0.75, 2), (-0.75, 2).
# Round 3, w = 1, of FAR and the one without examples: FAR starts at 1.375 -> 1.6875, move 0.6875,
#     weight 3; the other has weight 0, and its first move is 0. w = 1.6875.
#     Rows ((2 * 0.75 + 0.6875) / 3, 3), (-0.75, 2), (0, 1).
COHORTS = [[0, 1], [1, 0], [2, 0]]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize(
    "kind",
    [{"backend": "loop", "slots": 1}, {"backend": "vmap", "slots": 2}]
    + [{"backend": "loop", "slots": 1, "workers": 2}],
    ids=["loop", "vmap", "two workers"],
)
def test_rows_by_hand(kind: dict, where: str, tmp_path: Path) -> None:
    sim = tiny(
        [client(FAR), client(STEEP), client()],
        sampler=lambda eligible, seed, round: torch.tensor(COHORTS[round]),
        table=None if where == "memory" else tmp_path / "t",
        **kind,
    )
    state, models, rows = sim.start(), [], []
    for _ in COHORTS:
        state, _ = sim.round(state)
        models.append(state.server["w"].item())
        rows.append(kept(state))
    assert models == [0.25, 1.0, 1.6875]
    assert rows[:2] == [[[0.5, 1], [-2, 1], [0, 0]], [[0.75, 2], [-0.75, 2], [0, 0]]]
    assert rows[2] == [[pytest.approx(2.1875 / 3), 3], [-0.75, 2], [0, 1]]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_on_disk_has_the_bits_of_memory(backend: str, workers: int, tmp_path: Path) -> None:
    p = PROBLEMS["buffers"]
    setting = Setting(algorithm="habit", rounds=4, cohort=4, optimizer="adam", lr=0.01)
    kind = {"backend": backend, "slots": 2, "workers": workers, "dtype": torch.float32}
    memory = run_vecfl(p.build(), p.loss, p.clients(), setting, **kind)
    disk = run_vecfl(p.build(), p.loss, p.clients(), setting, table=tmp_path / "t", **kind)
    torch.testing.assert_close(disk.models, memory.models, rtol=0, atol=0)
    torch.testing.assert_close(disk.rows, memory.rows, rtol=0, atol=0)
    assert memory.rows[-1]["visits"].sum() == 16 and memory.rows[-1]["habit"].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_client_that_is_not_finite_keeps_its_row(backend: str) -> None:
    sim = tiny([client(FAR), NAN, client(STEEP)], backend=backend)
    state, metrics = sim.round(sim.start())
    assert kept(state) == [[0.5, 1], [0, 0], [-2, 1]]
    assert (state.server["w"].item(), metrics["train/dropped_clients"]) == (0.25, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_drops_its_client(backend: str) -> None:
    """Update and loss are fine: what cannot be kept would spoil the client for good."""
    plain = habit(lr=0.5, batches=Batches(4))

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        sent = plain.upload(server, done)
        visits = sent.table["visits"].where(done.client != 1, math.inf)
        return replace(sent, table=sent.table | {"visits": visits})

    algorithm = replace(plain, upload=upload)
    sim = tiny([client(FAR), client(STEEP), client(STEEP)], algorithm, backend=backend)
    state, metrics = sim.round(sim.start())
    assert kept(state) == [[0.5, 1], [0, 0], [-2, 1]]
    assert (state.server["w"].item(), metrics["train/dropped_clients"]) == (0.25, 1)


def test_a_client_that_comes_twice_is_refused() -> None:
    cohorts = [[2, 0], [0, 2, 0, 2]]
    sim = tiny(
        [client(FAR), client(STEEP), client(STEEP)],
        sampler=lambda eligible, seed, round: torch.tensor(cohorts[round]),
    )
    state, _ = sim.round(sim.start())
    before = kept(state)
    with refused(
        "round 2: client 0 stands more than once in the cohort, and habit keeps one row for each "
        "client; draw without replacement"
    ):
        sim.round(state)
    assert kept(state) == before


def test_an_older_state_is_refused_and_another_start_is_not() -> None:
    sim = tiny([client(FAR), client(STEEP)])
    start = sim.start()
    first, _ = sim.round(start)
    with refused(
        "round 1 cannot be played: the table has one row for each client, and they are those after "
        "round 1; go on from the newest state, or start anew"
    ):
        sim.round(start)
    second, _ = sim.round(first)
    again, _ = sim.round(sim.start())
    assert torch.equal(again.server["w"], first.server["w"])
    assert kept(again) == [[0.5, 1], [-2, 1]] and kept(second) == [[0.75, 2], [-0.75, 2]]


class Failing(Line):
    """Fails in training on any example x of 2 while it is armed; such a client comes last."""

    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if Failing.armed and bool((x == 2).any()):
            raise RuntimeError("no")
        return super().forward(x)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_round_that_fails_can_be_played_again(where: str, tmp_path: Path) -> None:
    data = dataset([client(FAR, FAR), client(STEEP)])
    task = Task(Failing(), squared, example=client(FAR, FAR))
    folder = None if where == "memory" else tmp_path / "t"
    algorithm = habit(lr=0.5, batches=Batches(1))
    sim = Simulation(task, data, algorithm, everyone(), backend="loop", slots=1, table=folder)
    first, _ = sim.round(sim.start())
    rows, written = kept(first), []
    assert first.table is not None
    scatter = first.table.scatter
    first.table.scatter = lambda clients, rows: written.append(clients) or scatter(clients, rows)
    Failing.armed = True
    try:
        with pytest.raises(RuntimeError, match="no"):
            sim.round(first)
    finally:
        Failing.armed = False
    assert torch.cat(written).tolist() == [0] and kept(first) != rows  # one of two was done
    second, _ = sim.round(first)
    other = Simulation(task, data, algorithm, everyone(), backend="loop", slots=1)
    right, _ = other.round(other.round(other.start())[0])
    assert kept(second) == kept(right)
    assert torch.equal(second.server["w"], right.server["w"])


def test_what_is_measured_leaves_no_rows(tmp_path: Path) -> None:
    choice = {"backend": "auto", "workers": "auto", "slots": "auto"}
    sim = tiny([client(FAR), client(STEEP)], table=tmp_path / "t", **choice)
    state = sim.start()
    assert kept(state) == [[0, 0], [0, 0]]
    assert kept(sim.round(state)[0]) == [[0.5, 1], [-2, 1]]


def test_a_table_for_an_algorithm_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    with refused(f"--table {tmp_path}/t: clients of this algorithm keep nothing; leave it away"):
        tiny([client(FAR)], vecfl.fedavg(lr=0.5, batches=Batches(1)), table=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_an_algorithm_forgets_are_missed() -> None:
    plain = habit(lr=0.5, batches=Batches(4))

    def upload(server: dict[str, Tensor], done: Finished) -> Upload:
        sent = plain.upload(server, done)
        return Upload(sent.update, sent.weight)

    sim = tiny([client(FAR)], replace(plain, upload=upload), backend="loop")
    with pytest.raises(InputError, match="^rows for the table: none, expected {'habit'"):
        sim.round(sim.start())
