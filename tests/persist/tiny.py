"""A recipe of a few milliseconds a round, with all that a checkpoint must hold."""

import torch
from torch import nn

import vecfl
from vecfl.data import FederatedDataset
from vecfl.flags import RunArgs, check_run, simulation
from vecfl.record import record_run
from vecfl.resume import resume

X = torch.linspace(-1, 1, 120).mul(7).sin().view(40, 3)
Y = (X.sum(1).mul(37).sin() > 0).long()  # hard to learn: the loss rises now and then
CLIENT = [i * i % 7 for i in range(40)]  # of 0, 1, 2 and 4; the others have no examples


def make_simulation(args: RunArgs) -> vecfl.Simulation:
    """Clients with dropout, and a server with moments."""
    data = FederatedDataset.from_arrays({"x": X, "y": Y}, CLIENT, num_clients=7)
    torch.manual_seed(args.seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2))
    metrics = {"accuracy": vecfl.accuracy}
    task = vecfl.Task(module, vecfl.cross_entropy, metrics, example=data.examples(2))
    batches = vecfl.Batches(size=args.batch, epochs=2)
    return simulation(args, task, data, vecfl.fedadam(lr=0.3, server_lr=0.1, batches=batches))


def run(args: RunArgs) -> None:
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


def arguments(out: str, **changed: object) -> RunArgs:
    """Eight rounds with an arrangement, so that nothing is measured."""
    how = {"backend": "loop", "workers": 2, "threads": 1, "slots": 2}
    values = {"rounds": 8, "cohort": 4, "batch": 3, "track": "none", "out": out, **how, **changed}
    return RunArgs(**values)  # type: ignore[arg-type]
