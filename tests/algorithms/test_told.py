"""What every algorithm tells of a round."""

import math

import pytest
import torch

import vecfl
from vecfl.algorithm_flags import BUILDERS, AlgorithmArgs, make_algorithm, settle

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS


def nobody_at_last(eligible: torch.Tensor, seed: int, round: int) -> torch.Tensor:
    return torch.arange(len(eligible) if round < 2 else 0)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_server_s_step_is_told(name: str) -> None:
    problem = PROBLEMS["linear"]
    data = dataset(problem.clients())
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    algorithm = make_algorithm(settle(AlgorithmArgs(algorithm=name)))
    how = {"backend": "loop", "dtype": torch.float64}
    sim = vecfl.Simulation(task, data, algorithm, nobody_at_last, **how)
    state, rows = sim.start(), []
    for _ in range(3):
        before = state.server["w"]
        state, row = sim.round(state)
        state = sim.observe(state, row)
        rows.append(row | {"moved": float((state.server["w"] - before).norm())})
    assert all(row["server/lr"] > 0 for row in rows)
    assert all(row["server/update_norm"] > 0 for row in rows[:2])
    assert math.isnan(rows[2]["server/update_norm"]) and rows[2]["moved"] == 0
    if name in ("fedavg", "fedprox", "fedprox_adaptive", "dga", "fednova", "scaffold"):
        assert [row["server/lr"] for row in rows] == [1.0] * 3
        for row in rows[:2]:
            assert row["moved"] == pytest.approx(row["server/update_norm"], rel=1e-12)
    assert ("train/mu" in rows[0]) == (name == "fedprox_adaptive")
