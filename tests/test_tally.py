"""Seconds of a round, over workers and ranks."""

import numpy as np
import pytest
import torch

from vecfl.aggregate import empty
from vecfl.cohorts import Cohort
from vecfl.job import Ended, Fold
from vecfl.schedule import Batches, make_plan
from vecfl.tally import Tally, seconds

CPU = torch.device("cpu")


def test_seconds_of_a_rank() -> None:
    """Workers that began at 10 and 12 and were busy for 7 and 4 s; all ended by 18."""
    fold = Fold(empty(1, CPU), Ended.empty(0, CPU), began=12.0, busy=[4.0])
    fold.merge_(Fold(empty(1, CPU), Ended.empty(0, CPU), began=10.0, busy=[7.0]))
    assert seconds(fold, 18.0) == (8.0, 11.0, 7.0)


def test_the_one_worker_of_a_gpu_is_busy_until_its_results_are_there() -> None:
    meta = torch.device("meta")
    fold = Fold(empty(1, meta), Ended.empty(0, meta), began=10.0, busy=[0.5])  # it has launched all
    assert seconds(fold, 18.0) == (8.0, 8.0, 8.0)


def ended(*clients: int) -> Ended:
    """Each loses its number, of twice the weight, and sends ten times as many bytes."""
    client = torch.tensor(clients)
    sums = torch.stack((client, 2 * client), 1).float()
    return Ended(client, client != 4, sums, sums[:, 1], 10 * client)


def test_what_is_told_of_clients_stands_in_the_order_of_workers_and_of_their_ends() -> None:
    """One worker has room for four clients, of which one did not end; the other for one."""
    first, second = (Fold(empty(1, CPU), Ended.empty(room, CPU)) for room in (4, 1))
    for told in (ended(4, 7), ended(1)):
        first.tell(told)
    second.tell(ended(2))
    assert first.told.client.tolist() == [4, 7, 1] and second.told.client.tolist() == [2]
    first.merge_(second)
    assert first.told.client.tolist() == [4, 7, 1, 2]
    assert first.told.ok.tolist() == [False, True, True, True]
    assert first.told.sums.tolist() == [[4, 8], [7, 14], [1, 2], [2, 4]]
    assert first.told.weight.tolist() == [8, 14, 2, 4]
    assert first.told.bytes.tolist() == [40, 70, 10, 20]


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
