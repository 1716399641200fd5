"""The server held to the loop: optimizers x schedules x what stands around them, in float64.

A table of its own beside that of `test_table.py`: five rounds of ragged clients, a cover of all
pairs that there are. Schedules of the loop are formulas, and those of vecfl its own.
"""

import math
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch

import vecfl

from .bridge import run_vecfl
from .cover import Row, pairwise
from .loop import Setting, federated_loop
from .server import ServerSetting
from .tasks import Problem
from .test_table import AUGMENTED, BACKENDS, PROBLEMS, TASKS

SERVERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.8},
    "momentum": {"lr": 0.5},
    "adam": {"lr": 0.1},
    "adamw": {"lr": 0.1},
    "adamax": {"lr": 0.1},
    "adagrad": {"lr": 0.1},
    "yogi": {"lr": 0.1},
    "fedadam": {"lr": 0.1},
    "lars": {"lr": 0.7},
    "lamb": {"lr": 0.1},
}
RATES: dict[str, dict[str, Any]] = {
    "constant": {},
    "step": {"schedule": lambda r: 0.5 ** (r // 2)},
    "cosine": {"schedule": lambda r: (1 + math.cos(math.pi * min(r, 5) / 5)) / 2},
    "ramp": {"schedule": lambda r: (0.5, 1.0, 1.0, 1.0, 0.1, 0.01)[min(r, 5)]},
    "clipped": {"clip": 0.02},
}
# The same of vecfl: the loop has the formulas.
OURS = {
    "step": vecfl.step_decay(2, 0.5),
    "cosine": vecfl.cosine(5),
    "ramp": vecfl.ramp_hold_decay(2, 3, 5),
}
WARM = vecfl.scaled(0.2, vecfl.linear_warmup(3))  # of fedprox
REPLAYS: dict[str, Setting | None] = {
    "none": None,
    "steps": Setting(lr=0.05, epochs=None, steps=5, batch=4),
    "epochs": Setting(lr=lambda t: 0.1 / (1 + t), epochs=2, batch=4, last="wrap", clip=0.3),
    "momentum": Setting(lr=0.05, optimizer="momentum", batch=4, last="drop"),
    "adam": Setting(lr=0.01, optimizer="adam", epochs=None, steps=2, batch=3, cap=5),
    "full": Setting(lr=0.1, optimizer="adamw", epochs=2, batch=4, full=True),
}
AROUND: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ema": {"ema": 0.7},
    "server plateau": {"server_plateau": (0.5, 0)},
    "clients' plateau": {"client_plateau": (0.5, 1)},
    "all": {"ema": 0.5, "server_plateau": (0.25, 1), "client_plateau": (0.5, 0)},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "fedavg": {"epochs": 2},
    "fedprox": {"mu": 0.3, "lr": lambda r: 0.2 * min(1, (r + 1) / 3)},
    "fedsgd": {"algorithm": "fedsgd"},
    "somebody": {"cohort": ((5, 3, 5), (), (1, 1), (6, 3, 0, 3), (2, 4)), "optimizer": "adam"},
}
PROBLEM_OF: dict[str, Problem] = {
    **{name: PROBLEMS[name] for name in ("linear", "mlp", "tokens")},
    **{name: TASKS[name] for name in ("tied", "buffers")},
    "images": AUGMENTED["images"],
}
KINDS = {name: BACKENDS[name] for name in ("loop S=1", "loop W=3", "vmap S=3")}
COLUMNS = {
    "server": SERVERS,
    "rate": RATES,
    "replay": REPLAYS,
    "around": AROUND,
    "algorithm": ALGORITHMS,
    "task": PROBLEM_OF,
}


def possible(row: Row) -> list[Row]:
    """The row, or where FedSGD's clients would need a learning rate two others with its pairs."""
    if row["algorithm"] == "fedsgd" and "client_plateau" in AROUND[row["around"]]:
        return [row | {"algorithm": "fedavg"}, row | {"around": "server plateau"}]
    return [row]


ROWS = [
    row
    for each in pairwise({name: list(values) for name, values in COLUMNS.items()})
    for row in possible(each)
]
CASES = [(row, list(KINDS)[i % 3]) for i, row in enumerate(ROWS)]


def setting_of(row: Row) -> Setting:
    """A row for the loop; `by_vecfl` has the same with the schedules of vecfl."""
    problem, fields = PROBLEM_OF[row["task"]], dict(ALGORITHMS[row["algorithm"]])
    server = ServerSetting(row["server"], **SERVERS[row["server"]], **RATES[row["rate"]])
    extra: dict[str, Any] = dict(AROUND[row["around"]])
    if (r := REPLAYS[row["replay"]]) is not None:
        (extra["replay_data"],) = problem.clients((11,))
        extra["replay"] = Setting(**{**vars(r), "seed": 2**33 + 1, "augment": problem.augment})
    how = {"rounds": 5, "seed": 2**33 + 1, "augment": problem.augment, "server": server}
    return Setting(**(how | fields | extra))


def by_vecfl(row: Row) -> Setting:
    s = setting_of(row)
    assert s.server is not None
    if row["rate"] in OURS:
        s = replace(s, server=replace(s.server, schedule=OURS[row["rate"]]))
    return replace(s, lr=WARM) if row["algorithm"] == "fedprox" else s


@pytest.mark.parametrize(
    ("row", "kind"), CASES, ids=["-".join([*row.values(), kind]) for row, kind in CASES]
)
def test_pairwise_cover(row: Row, kind: str) -> None:
    problem, s = PROBLEM_OF[row["task"]], setting_of(row)
    parts = problem.build(), problem.loss, problem.clients()
    truth = federated_loop(*parts, s)
    ours = run_vecfl(*parts, by_vecfl(row), **KINDS[kind])
    for t in range(s.rounds):
        torch.testing.assert_close(ours.models[t], truth.models[t], rtol=1e-9, atol=1e-12)
        loss = ours.metrics[t]["train/loss"]
        assert loss == pytest.approx(truth.loss[t], rel=1e-9, nan_ok=True)


def test_the_cover_holds_every_pair_that_there_is() -> None:
    """All but FedSGD with a plateau of its clients, which have no learning rate."""
    for a, b in combinations(COLUMNS, 2):
        seen = {(row[a], row[b]) for row in ROWS}
        left = set(product(COLUMNS[a], COLUMNS[b])) - seen
        none = {("clients' plateau", "fedsgd"), ("all", "fedsgd")}
        assert left == (none if (a, b) == ("around", "algorithm") else set()), (a, b)


def test_plateaus_are_met() -> None:
    """Rates do fall in these runs: one that stays would prove nothing."""
    fell = []
    for row in [row for row in ROWS if row["around"] == "all"][:5]:
        problem = PROBLEM_OF[row["task"]]
        parts = problem.build(), problem.loss, problem.clients()
        last = run_vecfl(*parts, by_vecfl(row), **KINDS["loop S=1"]).metrics[-1]
        fell += [last["server/lr_factor"] < 1, last["train/lr_factor"] < 1]
    assert any(fell[::2]) and any(fell[1::2])
