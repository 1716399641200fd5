"""A recipe of a few milliseconds a round, with all that a checkpoint must hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import vecfl
from tests.oracles.toy import habit
from vecfl.data import FederatedDataset
from vecfl.flags import RunArgs, check_run, simulation
from vecfl.privacy_flags import fair_weights
from vecfl.record import record_run
from vecfl.resume import resume

X = torch.linspace(-1, 1, 120).mul(7).sin().view(40, 3)
Y = (X.sum(1).mul(37).sin() > 0).long()  # hard to learn: the loss rises now and then
CLIENT = [i * i % 7 for i in range(40)]  # of 0, 1, 2 and 4; the others have no examples


@dataclass
class TinyArgs(RunArgs):
    """Clients with dropout, and a server with moments."""

    rows: Literal["none", "memory", "disk"] = "none"
    """what clients keep between rounds; on disk in OUT-rows"""
    algorithm: Literal["habit", "scaffold"] = "habit"
    """of clients that keep rows"""


def make_simulation(args: TinyArgs) -> vecfl.Simulation:
    data = FederatedDataset.from_arrays({"x": X, "y": Y}, CLIENT, num_clients=7)
    torch.manual_seed(args.seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)  # no checkpoint has it; it changes nothing
    frozen.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    module.append(frozen)
    metrics = {"accuracy": vecfl.accuracy}
    task = vecfl.Task(module, vecfl.cross_entropy, metrics, example=data.examples(2))
    batches = vecfl.Batches(size=args.batch, epochs=2)
    if args.rows == "none":
        weights = fair_weights(args)
        adam = vecfl.fedadam(lr=0.3, server_lr=0.1, batches=batches, weights=weights)
        return simulation(args, task, data, adam)
    server = vecfl.server_adam(lr=0.1)
    if args.algorithm == "scaffold":
        algorithm = vecfl.scaffold(lr=0.3, batches=batches, option=1, server=server)
    else:
        algorithm = habit(lr=0.3, batches=batches, server=server)
    return simulation(args, task, data, algorithm, rows_of(args) if args.rows == "disk" else None)


def rows_of(args: TinyArgs) -> Path:
    """The folder of the rows."""
    out = Path(args.out or args.resume)
    return out.with_name(f"{out.name}-rows")


def run(args: TinyArgs) -> None:
    check_run(args)
    args, before = resume(args, "tiny")
    sim = make_simulation(args)
    record_run(
        sim,
        lambda state: sim.evaluate(state, {"x": X, "y": Y}) | sim.evaluate_clients(state),
        args,
        recipe="tiny",
        before=before,
    )


def arguments(out: str, **changed: object) -> TinyArgs:
    """Eight rounds with an arrangement, so that nothing is measured."""
    how = {"backend": "loop", "workers": 2, "threads": 1, "slots": 2}
    values = {"rounds": 8, "cohort": 4, "batch": 3, "track": "none", "out": out, **how}
    values |= {"initial_evaluation": False, **changed}
    return TinyArgs(**values)  # type: ignore[arg-type]
