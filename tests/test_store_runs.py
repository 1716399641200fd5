"""Runs on a store: the same bits as in memory, and the disk is asked for the next cohort."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl.data import open_dataset, save
from vecfl.errors import InputError

ROUNDS = 3
BACKENDS = ["vmap", "loop"]


def population() -> vecfl.FederatedDataset:
    """40 clients of 0 to 6 examples, uint8 pixels."""
    g = torch.Generator().manual_seed(3)
    client = torch.randint(40, (120,), generator=g)
    x = torch.randint(256, (120, 5), generator=g, dtype=torch.uint8)
    y = torch.randint(3, (120,), generator=g)
    return vecfl.FederatedDataset.from_arrays({"x": x, "y": y}, client, num_clients=40)


def simulation(data: vecfl.FederatedDataset, sampler=None, **settings) -> vecfl.Simulation:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    task = vecfl.Task(module, vecfl.cross_entropy, example=data.examples(2))
    batches = vecfl.Batches(2, epochs=2, max_examples=4)
    algorithm = vecfl.fedavg(lr=0.1, batches=batches)
    return vecfl.Simulation(task, data, algorithm, sampler or vecfl.uniform(12), **settings)


def model(sim: vecfl.Simulation) -> Tensor:
    """The model after ROUNDS rounds, and its evaluation on every client."""
    state = sim.start()
    for _ in range(ROUNDS):
        state, _ = sim.round(state)
    spread = sim.evaluate_clients(state)["client/loss_p90"]
    return torch.cat([state.server["w"].double(), torch.tensor([spread]).double()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_gives_the_bits_of_memory(tmp_path: Path, backend: str, workers: int) -> None:
    data = population()
    save(data, tmp_path / "s")
    settings = {"backend": backend, "workers": workers, "slots": 3}
    expected = model(simulation(data, **settings))
    assert torch.equal(model(simulation(open_dataset(tmp_path / "s"), **settings)), expected)


@pytest.mark.parametrize("resident", [True, False])
def test_the_next_cohort_is_asked_for_while_one_trains(
    resident: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(population(), tmp_path / "s")
    sim = simulation(open_dataset(tmp_path / "s"), seed=5, resident=resident)
    asked = []
    monkeypatch.setattr(
        vecfl.FederatedDataset, "prefetch", lambda _, clients: asked.append(clients.tolist())
    )
    cohorts = [sim.cohort(round).tolist() for round in range(5)]
    first, _ = sim.round(sim.start())
    second, _ = sim.round(first)
    sim.round(second)
    sim.round(first)  # again: what was asked for is of round 4, so the disk is asked anew
    sim.feed.pool.shutdown()
    assert asked == [cohorts[i] for i in (0, 1, 2, 3, 1, 2)]


@pytest.mark.parametrize("resident", [True, False])
def test_a_sampler_may_end_with_the_run(tmp_path: Path, resident: bool) -> None:
    save(population(), tmp_path / "s")
    cohorts = [torch.tensor([0, 3]), torch.tensor([1])]
    data = open_dataset(tmp_path / "s")
    sim = simulation(data, lambda eligible, seed, round: cohorts[round], resident=resident)
    state, _ = sim.round(sim.start())
    state, metrics = sim.round(state)
    assert metrics["round"] == 2
    with pytest.raises(IndexError):
        sim.round(state)


@pytest.mark.parametrize("resident", [True, False])
def test_a_wrong_cohort_is_refused_in_its_round(tmp_path: Path, resident: bool) -> None:
    save(population(), tmp_path / "s")
    wrong, data = {0: [0, 3], 1: [40]}, open_dataset(tmp_path / "s")
    sim = simulation(
        data, lambda eligible, seed, round: torch.tensor(wrong[round]), resident=resident
    )
    state, _ = sim.round(sim.start())
    with pytest.raises(InputError, match="in round 2"):
        sim.round(state)
