"""Clients do not see each other: not through slots, not through padding, not through a NaN.

And what becomes of clients that have nothing to send: without examples, too short, not finite.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, Simulation, Task, fedavg
from vecfl.algorithms import Algorithm

from .oracles.bridge import dataset, recorded, run_vecfl
from .oracles.loop import Columns, Setting
from .oracles.tasks import PROBLEMS, SIZES, Cnn, Problem, classes, floats, integers
from .oracles.tiny import FAR, PLAIN, STEEP, Line, client, squared

Values = dict[str, Tensor]
C, VICTIM = len(SIZES), 3
INPUTS = {
    "mlp": PROBLEMS["mlp"],
    "cnn": Problem(Cnn, classes, floats(1, 6, 6), integers(3)),
    "buffers": PROBLEMS["buffers"],
}
SEATS = [("loop", 1), ("loop", 3), ("vmap", 1), ("vmap", 2), ("vmap", C), ("vmap", C + 2)]
NAN = client((math.nan, 0.0))


def other_values(columns: Columns) -> Columns:
    return {"x": columns["x"] * -3 + 1, "y": (columns["y"] + 1) % 3}


def one_value(value: float) -> Any:
    def changed(columns: Columns) -> Columns:
        x = columns["x"].clone()
        x.view(-1)[-1] = value
        return columns | {"x": x}

    return changed


def shorter(columns: Columns) -> Columns:
    return {name: column[:2] for name, column in columns.items()}


def longer(columns: Columns) -> Columns:
    return {name: column.repeat(2, *[1] * (column.dim() - 1)) for name, column in columns.items()}


CHANGES = {
    "other values": other_values,
    "nan": one_value(math.nan),
    "inf": one_value(math.inf),
    "shorter": shorter,
    "longer": longer,
}


def run_one(
    problem: str, backend: str, slots: int, change: str | None, victim: int = VICTIM
) -> tuple[dict[int, Tensor], dict]:
    """Rows and metrics of one round, with the data of `victim` changed."""
    p = INPUTS[problem]
    clients = p.clients()
    if change is not None:
        clients[victim] = CHANGES[change](clients[victim])
    setting = Setting(rounds=1, seed=9, epochs=2, optimizer="momentum", lr=0.05)
    run = run_vecfl(p.build(), p.loss, clients, setting, backend=backend, slots=slots)
    return {k: row for k, (row, _) in run.updates[0].items()}, run.metrics[0]


@pytest.mark.parametrize("backend, slots", SEATS)
@pytest.mark.parametrize("problem", INPUTS)
def test_other_clients_keep_their_bits(problem: str, backend: str, slots: int) -> None:
    # The victim has most examples: it is the one whom idle slots copy, and the first in a slot.
    before, _ = run_one(problem, backend, slots, None)
    for change in CHANGES:
        after, metrics = run_one(problem, backend, slots, change)
        assert not torch.equal(before.pop(VICTIM, after[0]), after.pop(VICTIM)), change
        assert before.keys() == after.keys() == set(range(C)) - {VICTIM}
        assert all(torch.equal(before[k], after[k]) for k in before), change
        assert metrics["train/dropped_clients"] == (change in ("nan", "inf"))
        assert math.isfinite(metrics["train/loss"])


@pytest.mark.parametrize("backend, slots", SEATS)
@pytest.mark.parametrize("problem", INPUTS)
def test_a_nan_in_the_first_example_does_not_leak(problem: str, backend: str, slots: int) -> None:
    # Client 0 has 5 examples of the pool's start; padding or an idle slot that pointed there ...
    before, _ = run_one(problem, backend, slots, None)
    after, metrics = run_one(problem, backend, slots, "nan", victim=0)
    assert after[0].isnan().any() and metrics["train/dropped_clients"] == 1
    assert all(torch.equal(before[k], after[k]) for k in range(1, C))
    # ... would show even if client 0 were not in the cohort.


def run_some(
    clients: list[Columns] | FederatedDataset,
    cohort: Sequence[int],
    algorithm: Algorithm,
    *,
    backend: str,
    slots: int,
    problem: str | None = None,
) -> tuple[Values, dict, Values]:
    """One round of the clients `cohort`: the model after it, metrics, the model before it."""
    module, loss = Line(), squared
    data = clients if isinstance(clients, FederatedDataset) else dataset(clients)
    if problem is not None:
        module, loss = INPUTS[problem].build(), INPUTS[problem].loss
    sim = Simulation(
        Task(module, loss, example=data.examples(2)),
        data,
        algorithm,
        lambda population, seed, round: torch.tensor(cohort),
        backend=backend,
        slots=slots,
        dtype=torch.float64,
    )
    state, metrics = sim.round(sim.start())
    assert (metrics["system/backend"], metrics["system/slots"]) == (backend, slots)
    return sim.state_dict(state), metrics, sim.state_dict(sim.start())
