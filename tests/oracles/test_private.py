"""Private algorithms against the plain loop, noise and all: models, messages, clipping norms.

As `test_table.py`: three rounds over ragged clients in float64, to 1e-9, a cover of all pairs.
"""

import math
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch

from .bridge import run_vecfl
from .cover import Row, pairwise
from .loop import Setting, federated_loop
from .private import Private
from .server import ServerSetting
from .test_memory import finite
from .test_table import BACKENDS, DENSE, FROZEN, STACKED, TASKS, by_client, order

UNIFORM = {"weight": "uniform"}
ALGORITHMS: dict[str, tuple[dict[str, Any], float]] = {  # and the largest weight
    "fedavg": (UNIFORM, 1.0),
    "capped": ({"weight": "capped", "weight_cap": 5}, 5.0),
    "fedprox": (UNIFORM | {"mu": 0.3}, 1.0),
    "fedsgd": (UNIFORM | {"algorithm": "fedsgd"}, 1.0),
    "dga": ({"weighting": "loss", "softmax_beta": 2.0}, 100.0),
    "dga by mean": ({"weighting": "update_mean", "softmax_beta": 1000.0}, 100.0),
    "scaffold": ({"algorithm": "scaffold"}, 1.0),
    "scaffold, option 1": ({"algorithm": "scaffold", "option": 1}, 1.0),
    "feddyn": ({"algorithm": "feddyn", "dyn": 0.3}, 1.0),
}
PROMISES: dict[str, dict[str, Any]] = {
    "norm": {"norm": 0.05, "multiplier": 0.4},
    "layer": {"norm": 0.08, "multiplier": 0.4, "per": "layer"},
    "adaptive": {"norm": 0.1, "multiplier": 0.5, "adaptive": (0.4, 0.5, 1.5)},
    "no noise": {"norm": 0.03, "multiplier": 0.0},
}
# Cohorts, and how many clients they are in the mean, or are said to be.
COHORTS: dict[str, tuple[dict[str, Any], float]] = {
    "all": ({}, 7.0),
    "four": ({"cohort": 4, "sample_seed": 9}, 4.0),
    "nobody": ({"cohort": ((5, 3, 1), (), (6, 0, 3))}, 2.5),
}
CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "qsgd": {"codec": ("qsgd", 4, "tensor")},
    "feedback": {"codec": ("top_k", 0.3), "feedback": True},
    "clipped": {"clips": (("norm", 0.07),)},
}
SERVERS: dict[str, dict[str, Any]] = {
    "mean": {},
    "adam": {"server": ServerSetting("adam", lr=0.01)},
    "ema": {"ema": 0.5},
}
PROBLEM_OF = {n: (TASKS | DENSE | FROZEN)[n] for n in ("linear", "mlp", "buffers", "one layer")}
KINDS = {n: BACKENDS[n] for n in ("loop W=3", "vmap S=3")} | {"stacked S=3": STACKED["stacked S=3"]}
COLUMNS: dict[str, dict[str, Any]] = {
    "algorithm": ALGORITHMS,
    "backend": KINDS,
    "promise": PROMISES,
    "task": PROBLEM_OF,
    "cohort": COHORTS,
    "codec": CODECS,
    "server": SERVERS,
}
COVER = [
    row | ({"task": "mlp"} if row["backend"] in STACKED else {})
    for row in pairwise({n: list(of) for n, of in COLUMNS.items()})
]


def setting_of(row: Row) -> Setting:
    algorithm, most = ALGORITHMS[row["algorithm"]]
    cohort, mean = COHORTS[row["cohort"]]
    fields = algorithm | cohort | CODECS[row["codec"]] | SERVERS[row["server"]]
    if row["algorithm"] == "feddyn":
        fields.pop("server", None)
    if row["algorithm"] != "fedsgd":
        fields["epochs"] = 2
    promise = Private(cohort=mean, most=most, **PROMISES[row["promise"]])
    if "weighting" in algorithm:  # weights are far below the largest, and so are messages
        promise = replace(promise, norm=promise.norm / 200)
    problem = PROBLEM_OF[row["task"]]
    return Setting(seed=2**40 + 3, freeze=problem.freeze, private=promise, **fields)


def check(row: Row, s: Setting, clients: Any) -> list[dict[str, Any]]:
    """Hold vecfl to the loop; the metrics of its rounds."""
    problem = PROBLEM_OF[row["task"]]
    truth = federated_loop(problem.build(), problem.loss, clients, s)
    kind = KINDS[row["backend"]]
    ours = run_vecfl(problem.build(), problem.loss, clients, s, **kind)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12, msg=lambda m: f"{row}: {m}")
    for t in range(s.rounds):
        close(ours.models[t], truth.models[t])
        close(ours.metrics[t]["privacy/clipping_norm"], truth.clipping_norms[t])
        sent, right = by_client(finite(ours.updates[t])), sorted(truth.updates[t], key=order)
        right = [one for one in right if one[0] not in truth.dropped[t]]
        assert [k for k, _, _ in sent] == [k for k, _, _ in right]
        for (_, row_k, weight_k), (_, update, weight) in zip(sent, right, strict=True):
            close(row_k, update)
            assert weight_k == weight and float(row_k.norm()) <= truth.clipping_norms[t]
    return ours.metrics


@pytest.mark.parametrize("row", COVER, ids=lambda row: "-".join(row.values()))
def test_pairwise_cover(row: Row) -> None:
    metrics = check(row, setting_of(row), PROBLEM_OF[row["task"]].clients())
    clipped = [m["train/clipped"] for m in metrics]
    assert any(share > 0 for share in clipped if math.isfinite(share))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_client_that_is_not_finite(algorithm: str) -> None:
    """It sends nothing, and the denominator stays as it was."""
    row = {"algorithm": algorithm, "backend": "vmap S=3", "promise": "adaptive", "task": "mlp"}
    row |= {"cohort": "nobody", "codec": "none", "server": "mean"}
    clients = PROBLEM_OF["mlp"].clients()
    clients[3]["x"][7] = math.nan
    metrics = check(row, setting_of(row), clients)
    assert [m["train/dropped_clients"] for m in metrics] == [1, 0, 1]


def test_the_cover_holds_every_pair_of_two_choices() -> None:
    """But of tasks, for `stacked` has no form for most of these."""
    columns = {name: of for name, of in COLUMNS.items() if name != "task"}
    for (a, left), (b, right) in combinations(columns.items(), 2):
        assert {(row[a], row[b]) for row in COVER} == set(product(left, right)), (a, b)
