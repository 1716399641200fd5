"""SCAFFOLD, FedDyn and FedNova against the plain loop: models, messages, and what is remembered.

As `test_table.py`: three rounds over ragged clients in float64, to 1e-9, a cover of all pairs.
"""

import math
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch

from .bridge import run_vecfl
from .cover import Row, pairwise
from .hand_memory import MEMORIES
from .loop import AGGREGATORS, Columns, Result, Setting, federated_loop
from .server import ServerSetting
from .test_table import (
    BACKENDS,
    BATCHES,
    CLIPS,
    COHORTS,
    DENSE,
    FROZEN,
    STACKED,
    TASKS,
    WEIGHTS,
    by_client,
    check_geometry,
    order,
)

ALGORITHMS: dict[str, dict[str, Any]] = {
    "scaffold": {"algorithm": "scaffold"},
    "scaffold, option 1": {"algorithm": "scaffold", "option": 1},
    "feddyn": {"algorithm": "feddyn", "dyn": 0.3},
    "fednova": {"algorithm": "fednova"},
    "fednova, mu": {"algorithm": "fednova", "mu": 0.4},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "falling": {"lr": lambda t: 0.2 / (1 + t)},
    "momentum": {"optimizer": "momentum"},
    "clipped": {"clip": 0.3},
    "adam": {"optimizer": "adam", "lr": 0.01},
}
SERVERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "half": {"server_lr": 0.5},
    "adam": {"server": ServerSetting("adam", lr=0.01)},
}
SOME = {"three": {"cohort": ((5, 3, 1), (2, 3, 6), (0, 5, 3))}}
# Of what stands above, what an algorithm takes.
TAKEN = {"scaffold": {"lr", "server", "server_lr"}, "feddyn": {"optimizer", "lr", "clip"}}
COLUMNS: dict[str, dict[str, dict[str, Any]]] = {
    "algorithm": ALGORITHMS,
    "backend": {n: BACKENDS[n] for n in ("loop S=1", "loop W=3", "vmap S=3", "vmap W=2")},
    "task": {n: {} for n in ("linear", "tokens", "buffers", "one layer", "tied and a gain")},
    "batches": {n: of for n, of in BATCHES.items() if n not in ("steps", "full steps")},
    "optimizer": OPTIMIZERS,
    "weights": {n: WEIGHTS[n] for n in ("examples", "uniform")},
    "cohort": COHORTS | SOME,
    "server": SERVERS,
    "clips": {n: CLIPS[n] for n in ("none", "norm", "both")},
}
STACKED_COLUMNS = COLUMNS | {
    "backend": {n: STACKED[n] for n in ("stacked S=3", "stacked W=2")},
    "task": {n: {} for n in ("mlp", "one layer", "positions")},
    "batches": {n: BATCHES[n] for n in ("two epochs", "drop", "full", "random epochs")},
}
PROBLEM_OF = TASKS | DENSE | FROZEN
COVERS = [pairwise({n: list(of) for n, of in t.items()}) for t in (COLUMNS, STACKED_COLUMNS)]


def setting_of(row: Row) -> Setting:
    algorithm = ALGORITHMS[row["algorithm"]]
    kind, problem = algorithm["algorithm"], PROBLEM_OF[row["task"]]
    parts = (n for n in row if n not in ("algorithm", "backend", "task", "batches"))
    fields = {k: v for name in parts for k, v in COLUMNS[name][row[name]].items()}
    if kind in TAKEN:  # a client has one row, and counts once
        left = TAKEN[kind] | {"cohort", "sample_seed", "clips"}
        fields = {k: v for k, v in fields.items() if k in left}
        if isinstance(fields.get("cohort"), tuple):
            fields["cohort"] = tuple(tuple(dict.fromkeys(c)) for c in fields["cohort"])
    elif row["optimizer"] == "adam" or (algorithm.get("mu") and row["optimizer"] == "momentum"):
        del fields["optimizer"]
    fields |= BATCHES[row["batches"]] | algorithm
    return Setting(seed=2**40 + 3, augment=problem.augment, freeze=problem.freeze, **fields)


@pytest.mark.parametrize("row", sum(COVERS, []), ids=lambda row: "-".join(row.values()))
def test_pairwise_cover(row: Row) -> None:
    problem, s = PROBLEM_OF[row["task"]], setting_of(row)
    kind = (BACKENDS | STACKED)[row["backend"]]
    compare(problem.build, problem.loss, problem.clients(), s, kind, str(row))


def compare(
    build: Any,
    loss: Any,
    clients: list[Columns],
    s: Setting,
    kind: dict[str, Any],
    row: str,
    table: Path | None = None,
) -> Result:
    """Hold vecfl to the loop; what the loop found."""
    truth = federated_loop(build(), loss, clients, s)
    ours = run_vecfl(build(), loss, clients, s, **kind, table=table)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12, msg=lambda m: f"{row}: {m}")
    for t in range(s.rounds):
        close(ours.models[t], truth.models[t])
        close(ours.metrics[t]["train/loss"], truth.loss[t], equal_nan=True)
        assert ours.metrics[t]["train/dropped_clients"] == len(truth.dropped[t])
        sent, right = by_client(finite(ours.updates[t])), sorted(truth.updates[t], key=order)
        right = [one for one in right if one[0] not in truth.dropped[t]]
        assert [k for k, _, _ in sent] == [k for k, _, _ in right]
        for (_, row_k, weight_k), (_, update, weight) in zip(sent, right, strict=True):
            close(row_k, update)
            assert weight_k == pytest.approx(weight, rel=1e-12), row
        size = len(right[0][1]) // (2 if s.algorithm == "scaffold" else 1) if right else 0
        check_geometry(
            ours.metrics[t],
            [(u[:size], w) for _, u, w in right],
            AGGREGATORS[s.aggregator],
            close,
        )
        if s.algorithm != "fednova":
            own, server = {"scaffold": ("variate", "variate"), "feddyn": ("gradient", "h")}[
                s.algorithm
            ]
            close(ours.rows[t][own], truth.own[t])
            close(ours.server[t][server], truth.server[t])
            assert truth.own[t].abs().max() > 1e-3 and truth.server[t].abs().max() > 1e-5
    return truth


def finite(sent: dict[int, Any]) -> dict[int, Any]:
    """What came of the clients that were not dropped."""
    return {
        k: [(u, w) for u, w in several if u.isfinite().all()]
        for k, several in sent.items()
        if any(u.isfinite().all() for u, _ in several)
    }


def test_the_cover_holds_every_pair() -> None:
    for table, cover in zip((COLUMNS, STACKED_COLUMNS), COVERS, strict=True):
        for (a, left), (b, right) in combinations(table.items(), 2):
            assert {(row[a], row[b]) for row in cover} == set(product(left, right)), (a, b)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "kind",
    [BACKENDS["loop S=1"], BACKENDS["vmap S=3"], STACKED["stacked S=3"]],
    ids=["loop", "vmap", "stacked"],
)
def test_a_client_that_is_not_finite(algorithm: str, kind: dict, tmp_path: Path) -> None:
    """It keeps its row and does not count, where others stand still or come for the first time."""
    problem = PROBLEM_OF["mlp"]
    clients = problem.clients()
    clients[3]["x"][7] = math.nan
    s = Setting(
        seed=3,
        cohort=((3, 0, 1), (5, 3, 6, 1), (0, 3), (6, 5, 2)),
        rounds=4,
        epochs=2,
        **ALGORITHMS[algorithm],
    )
    keeps = not algorithm.startswith("fednova")
    table = tmp_path / "rows" if keeps else None
    truth = compare(problem.build, problem.loss, clients, s, kind, algorithm, table)
    assert truth.dropped == [[3], [3], [3], []]
    if keeps:
        assert not truth.own[-1][[1, 3, 4]].any() and truth.own[-1][[0, 2, 5, 6]].any(1).all()


def test_the_server_remembers_the_mean_of_what_clients_do() -> None:
    """Where all messages come as they were sent: sum over the population / N."""
    problem = PROBLEM_OF["linear"]
    for name in ("scaffold", "scaffold, option 1", "feddyn"):
        s = Setting(rounds=4, cohort=3, **ALGORITHMS[name])
        run = run_vecfl(problem.build(), problem.loss, problem.clients(), s, **BACKENDS["loop S=1"])
        own, server = run.rows[-1], run.server[-1]
        mean = own["gradient" if name == "feddyn" else "variate"].mean(0)
        torch.testing.assert_close(
            server["h" if name == "feddyn" else "variate"], mean, rtol=1e-12, atol=1e-15
        )
        assert mean.abs().max() > 1e-2


@pytest.mark.parametrize("kind", (BACKENDS | {"loop S=C": BACKENDS["loop S=3"]}).values())
@pytest.mark.parametrize("case", MEMORIES, ids=lambda case: case.name)
def test_hand_derived_values(case: Any, kind: dict[str, Any]) -> None:
    run = run_vecfl(case.module(), case.loss_function, case.clients, case.setting, **kind)
    loop = federated_loop(case.module().double(), case.loss_function, case.clients, case.setting)
    for t, remembered in enumerate(case.remembered):
        expected = pytest.approx(case.expected[t]["w"], rel=1e-12)
        assert run.models[t]["w"].item() == loop.models[t]["w"].item() == expected
        assert run.metrics[t]["train/loss"] == pytest.approx(case.loss[t], rel=1e-12)
        if remembered:
            *own, server = remembered
            name = {"scaffold": "variate", "feddyn": "gradient"}[case.setting.algorithm]
            found = run.rows[t][name][:, 0].tolist(), loop.own[t][:, 0].tolist()
            assert found == (pytest.approx(own, rel=1e-12), pytest.approx(own, rel=1e-12))
            name = "h" if name == "gradient" else name
            found = run.server[t][name].item(), loop.server[t].item()
            assert found == (pytest.approx(server, rel=1e-12),) * 2
