"""The loop is the judge of clients that take one plain step: folded in one batch, without rows.

Ragged clients, models and losses after each of three rounds, to 1e-9; a cover of all pairs. What
single clients send is not there to compare.
"""

from functools import partial
from typing import Any

import pytest
import torch

import vecfl
from vecfl.one_batch import OneBatch

from . import bridge
from .cover import Row, pairwise
from .loop import Setting, federated_loop
from .tasks import LAYERED, SIZES
from .test_table import CLIPS, COHORTS, DENSE, WEIGHTS

COLUMNS: dict[str, dict[str, Any]] = {
    "algorithm": {
        "fedsgd": {"algorithm": "fedsgd", "server_lr": 0.5},
        "fedavg": {"epochs": None, "steps": 1},
        "fedprox": {"epochs": None, "steps": 1, "mu": 0.3},
        "wrap": {"epochs": None, "steps": 1, "last": "wrap"},
        "some": {},  # one pass: large clients take more steps, with rows
    },
    "task": DENSE | {name: LAYERED[name] for name in ("lstm", "gru")},
    "weights": WEIGHTS,
    "clips": {name: CLIPS[name] for name in ("none", "norm")}
    | {"twice": {"clips": (("norm", 0.06), ("norm", 0.05))}},
    "cohort": COHORTS,
    "backend": {
        "stacked S=1": {"backend": "stacked", "slots": 1},
        "unfold S=3": {"backend": "stacked-unfold", "slots": 3},
        "stacked S=C": {"backend": "stacked", "slots": len(SIZES)},
    },
}
NO_NORMS = (
    "mixed",
    "lstm",
    "gru",
    "positions",
)  # layers whose ghost norms are not known: rows, where clipped
COVER = pairwise({name: list(values) for name, values in COLUMNS.items()})


@pytest.mark.parametrize("row", COVER, ids=lambda row: "-".join(row.values()))
def test_one_step_clients(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, fields = COLUMNS["task"][row["task"]], dict[str, Any]()
    for column in ("weights", "clips", "cohort", "algorithm"):
        fields |= COLUMNS[column][row[column]]
    s = Setting(seed=2**40 + 3, augment=problem.augment, **fields)
    truth = federated_loop(problem.build(), problem.loss, problem.clients(), s)

    folded, fold = list[bool](), OneBatch._fold
    monkeypatch.setattr(OneBatch, "_fold", lambda *a: folded.append(fold(*a)) or folded[-1])
    data = bridge.dataset(problem.clients())
    sim = vecfl.Simulation(
        vecfl.Task(
            problem.build(),
            bridge.OURS.get(problem.loss, problem.loss),
            example=data.examples(2),
            augment=bridge.transforms(problem.augment),
        ),
        data,
        vecfl.chain(bridge.algorithm(s, data.columns), *bridge.clips(s)),
        bridge.sampler(s),
        **COLUMNS["backend"][row["backend"]],
        seed=s.seed,
        sample_seed=s.sample_seed,
        dtype=torch.float64,
    )
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12, msg=lambda m: f"{row}: {m}")
    state = sim.start()
    for t in range(s.rounds):
        state, metrics = sim.round(state)
        close(sim.state_dict(state), truth.models[t])
        close(metrics["train/loss"], truth.loss[t], equal_nan=True)
    with_rows = row["task"] in NO_NORMS and row["clips"] != "none"
    assert all(folded) and bool(folded) != with_rows, row
