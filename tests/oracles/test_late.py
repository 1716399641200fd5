"""Late messages and waiting servers against the loop: algorithms x delays x backends."""

from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch

from .bridge import run_vecfl
from .cover import Row, pairwise
from .loop import AGGREGATORS, Result, Setting, federated_loop
from .server import ServerSetting
from .tasks import PROBLEMS
from .test_memory import finite
from .test_table import BACKENDS, CLIPS, STACKED, TASKS, by_client, check_geometry, order

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"epochs": 2},
    "fedprox": {"mu": 0.3, "optimizer": "momentum"},
    "fedsgd": {"algorithm": "fedsgd", "server_lr": 0.5},
    "dga": {"weighting": "loss", "softmax_beta": 20.0},
    "dga rms": {"weighting": "rms", "softmax_beta": 5.0, "epochs": 2},
    "habit": {"algorithm": "habit"},
    "scaffold": {"algorithm": "scaffold"},
    "scaffold, option 1": {"algorithm": "scaffold", "option": 1},
    "feddyn": {"algorithm": "feddyn", "dyn": 0.3},
    "fednova": {"algorithm": "fednova", "random_epochs": (0, 3, 0.8)},
}
KEEPS = {"habit", "scaffold", "feddyn"}  # rows of clients: no discount
DELAYS: dict[str, dict[str, Any]] = {
    "in time": {},
    "stale": {"delays": (0.6, 0.4)},
    "three": {"delays": (0.3, 0.3, 0.2, 0.2)},
    "all late": {"delays": (0.0, 0.0, 1.0)},
}
BUFFERS = {f"buffer {size}": {"buffer": size} for size in (1, 4, 9)}
DISCOUNTS: dict[str, dict[str, Any]] = {"full": {}, "half": {"discount": 0.5}}
SERVERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "adam, ema": {"server": ServerSetting("adam", lr=0.05), "ema": 0.5},
}
COHORTS: dict[str, dict[str, Any]] = {
    "four": {"cohort": 4, "sample_seed": 9},
    "repeats": {"cohort": ((5, 3, 5, 1, 5), (), (6, 3, 0, 3), (2,), (4, 4), (6, 5))},
}
COLUMNS: dict[str, dict[str, dict[str, Any]]] = {
    "algorithm": ALGORITHMS,
    "delays": DELAYS,
    "backend": {n: BACKENDS[n] for n in ("loop S=1", "loop W=3", "vmap S=3", "vmap W=2")}
    | {"stacked W=2": STACKED["stacked W=2"]},
    "buffer": BUFFERS,
    "discount": DISCOUNTS,
    "cohort": COHORTS,
    "clips": {n: CLIPS[n] for n in ("none", "both")},
    "server": SERVERS,
}
COVER = pairwise({name: list(values) for name, values in COLUMNS.items()})


def setting_of(row: Row) -> Setting:
    algorithm = ALGORITHMS[row["algorithm"]]
    parts = {n: COLUMNS[n][row[n]] for n in COLUMNS if n not in ("algorithm", "backend")}
    if algorithm.get("algorithm") in KEEPS:
        parts["discount"] = {}
        cohort = parts["cohort"]["cohort"]
        if not isinstance(cohort, int):  # a client has one row
            parts["cohort"] = {"cohort": tuple(tuple(dict.fromkeys(c)) for c in cohort)}
    if algorithm.get("algorithm") == "feddyn":
        parts["server"] = {}
    fields = {k: v for part in parts.values() for k, v in part.items()}
    return Setting(seed=2**40 + 3, rounds=6, **{**fields, **algorithm})


def compare(build: Any, loss: Any, clients: Any, s: Setting, kind: Any, row: str) -> Result:
    """Hold vecfl to the loop, round by round; what the loop found."""
    truth = federated_loop(build(), loss, clients, s)
    ours = run_vecfl(build(), loss, clients, s, **kind)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12, msg=lambda m: f"{row}: {m}")
    for t in range(s.rounds):
        close(ours.models[t], truth.models[t])
        close(ours.metrics[t]["train/loss"], truth.loss[t], equal_nan=True)
        sent, right = by_client(finite(ours.updates[t])), sorted(truth.updates[t], key=order)
        right = [one for one in right if one[0] not in truth.dropped[t]]
        for (k, row_k, weight_k), (other, update, weight) in zip(sent, right, strict=True):
            assert k == other and weight_k == pytest.approx(weight, rel=1e-12)
            close(row_k, update)
        size = len(right[0][1]) // (2 if s.algorithm == "scaffold" else 1) if right else 0
        updates = [(u[:size], w) for _, u, w in right]
        if not any(0 < u.norm() < 1e-9 for u, _ in updates):  # of rounding alone: no direction
            check_geometry(ours.metrics[t], updates, AGGREGATORS[""], close)
        if s.delays or s.buffer > 1:
            check_counts(ours.metrics[t], *truth.late[t])
        for name in {"scaffold": ("variate",), "feddyn": ("h",)}.get(s.algorithm, ()):
            close(ours.server[t][name], truth.server[t])
    return truth


def check_counts(found: dict, ages: list[int], flight: int, waiting: int, steps: int) -> None:
    """What is told of delays."""
    told = [found[f"late/{name}"] for name in ("arrived", "waiting", "buffered", "steps")]
    assert told == [len(ages), flight, waiting, steps]
    mean = np.mean(ages) if ages else np.nan
    assert found["late/age"] == pytest.approx(mean, nan_ok=True)


@pytest.mark.parametrize("row", COVER, ids=lambda row: "-".join(row.values()))
def test_pairwise_cover(row: Row) -> None:
    s, problem = setting_of(row), (PROBLEMS["mlp"], TASKS["buffers"])[row["cohort"] == "four"]
    if row["backend"].startswith("stacked"):
        problem = PROBLEMS["linear"]
    kind = (BACKENDS | STACKED)[row["backend"]]
    compare(problem.build, problem.loss, problem.clients(), s, kind, str(row))


def test_the_cover_holds_every_pair() -> None:
    for (a, left), (b, right) in combinations(COLUMNS.items(), 2):
        assert {(row[a], row[b]) for row in COVER} == set(product(left, right)), (a, b)


@pytest.mark.parametrize("name", ["fedavg", "dga", "fednova", "scaffold", "feddyn"])
def test_clients_that_are_not_finite_do_not_arrive(name: str) -> None:
    problem = PROBLEMS["mlp"]
    clients = problem.clients()
    for k in (3, 6):
        clients[k]["x"][0] = torch.nan
    s = Setting(rounds=4, cohort=5, delays=(0.4, 0.3, 0.3), buffer=3, **ALGORITHMS[name])
    kind = {"backend": "vmap", "slots": 3}
    truth = compare(problem.build, problem.loss, clients, s, kind, name)
    assert sum(map(len, truth.dropped)) >= 3 and truth.late[-1][-1] >= 2
