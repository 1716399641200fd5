"""Seconds of a round, over workers and ranks."""

import numpy as np
import pytest
import torch

from vecfl.aggregate import empty
from vecfl.cohorts import Cohort
from vecfl.job import Fold
from vecfl.schedule import Batches, make_plan
from vecfl.tally import Tally, seconds

CPU = torch.device("cpu")


def test_seconds_of_a_rank() -> None:
    """Workers that began at 10 and 12 and were busy for 7 and 4 s; all ended by 18."""
    fold = Fold(empty(1, CPU), began=12.0, busy=[4.0])
    fold.merge_(Fold(empty(1, CPU), began=10.0, busy=[7.0]))
    assert seconds(fold, 18.0) == (8.0, 11.0, 7.0)


def test_the_one_worker_of_a_gpu_is_busy_until_its_results_are_there() -> None:
    fold = Fold(empty(1, torch.device("meta")), began=10.0, busy=[0.5])  # it has launched all
    assert seconds(fold, 18.0) == (8.0, 8.0, 8.0)


def test_seconds_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks: the slowest one, 6 s; the busiest worker, 5 s; 3 + 9 worker seconds for three
    clients. On this rank the round began at 100, waited 1 s, had trained at 104 and ends at 110."""
    monkeypatch.setattr("vecfl.tally.time.perf_counter", lambda: 110.0)
    plan = make_plan(
        Batches(2), torch.tensor([0, 2, 6, 6]), torch.tensor([0, 1, 2]), seed=0, round=0
    )
    cohort = Cohort(4, plan, np.arange(3))
    times = torch.tensor([[3.0, 6.0], [3.0, 9.0], [2.0, 5.0]])
    sums, none = empty(1, CPU), torch.zeros(0)
    metrics = Tally(
        sums, [], 0.5, 3, 6, 24, 0, none, times, trained=104.0, left=False, lr=0.1
    ).metrics(cohort, 100.0, 1.0)
    assert {name: v for name, v in metrics.items() if name.startswith("system/")} == {
        "system/clients_per_s": 0.3,
        "system/round_s": 10,
        "system/wait_s": 1,
        "system/train_s": 6,
        "system/aggregate_s": 6,
        "system/worker_max_s": 5,
        "system/client_s": 4,
        "system/slot_efficiency": 0.5,  # 1 + 2 steps of 6 slot-steps
        "system/client_steps": 3,
    }
