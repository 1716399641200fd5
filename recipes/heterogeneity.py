"""Algorithms on clients that differ: MNIST writers of whom each has few of the digits.

    python recipes/heterogeneity.py
    python recipes/heterogeneity.py --algorithms fedavg dga --labels 1 --seeds 5
    python recipes/heterogeneity.py --out runs/few --resume auto    # again: goes on where it stood

Every writer keeps the images of `--labels` digits, drawn for it; writers whom nobody has seen test,
with all digits. Each algorithm runs with the same seeds, first models and cohorts; a picture shows
their accuracies, the mean over the seeds in a band from the worst to the best. Papers: McMahan et
al. 2017, arXiv:1602.05629 (fedavg); Li et al. 2020, arXiv:1812.06127 (fedprox); Reddi et al. 2021,
arXiv:2003.00295 (fedadam); Dimitriadis et al. 2021, arXiv:2106.07578 (dga); Karimireddy et al.
2020, arXiv:1910.06378 (scaffold); Acar et al. 2021, arXiv:2111.04263 (feddyn).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import vecfl
from vecfl import Batches
from vecfl.algorithms import Algorithm
from vecfl.cli import check, main
from vecfl.compare import CompareArgs, check_compared, draw, run_all, seeds_of, series, spread
from vecfl.data import FederatedDataset, mnist_writers
from vecfl.data.mnist_writers import default_folder
from vecfl.evaluations import held_out, validated
from vecfl.flags import simulation
from vecfl.mesh import join
from vecfl.record import record_run
from vecfl.resume import resume

# The best of a grid for two labels on seed 100, which no picture shows: mean accuracy of rounds 40,
# 50 and 60 for lr 0.03, 0.1, 0.3 with mu 0.01, 0.1, 1 or softmax_beta 0.3, 1, 3 or server_lr 0.003,
# 0.01, 0.03 or alpha 0.01, 0.1, 1. Beyond its edge lr 1 does not learn (fedavg, feddyn), server_lr
# 0.1 is worse, alpha 0.003 a little better and 0.001 as good. SCAFFOLD is better by option 2.
ALGORITHMS: dict[str, Callable[[Batches], Algorithm]] = {
    "fedavg": lambda batches: vecfl.fedavg(lr=0.3, batches=batches),
    "fedprox": lambda batches: vecfl.fedprox(lr=0.3, mu=0.01, batches=batches),
    "fedadam": lambda batches: vecfl.fedadam(lr=0.3, server_lr=0.03, batches=batches),
    "dga": lambda batches: vecfl.dga(lr=0.3, softmax_beta=0.3, batches=batches),
    "scaffold": lambda batches: vecfl.scaffold(lr=0.1, batches=batches),
    "feddyn": lambda batches: vecfl.feddyn(lr=0.3, alpha=0.003, batches=batches),
}


@dataclass
class Args(CompareArgs):
    """FedAvg and others, such as SCAFFOLD, on MNIST writers with few labels each."""

    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    """which of them run, in this order"""
    labels: int = 2
    """digits that a writer keeps"""
    epochs: int = 5
    """passes over a writer's images in a round"""


def run(args: Args) -> None:
    check(args, ("epochs",), lambda n: n >= 1, "at least 1")
    check(args, ("labels",), lambda n: 1 <= n <= 10, "1 to 10")
    alone = "none: these are compared without privacy; see recipes/dp_mnist_writers.py"
    check(args, ("private_clip",), lambda _: False, alone)
    check_compared(args, "algorithms", ALGORITHMS)
    train, test = mnist_writers(args.data or default_folder())
    now = time.strftime("%Y%m%d-%H%M%S")
    out = Path(join().from_first(lambda: args.out or f"runs/heterogeneity-{now}")).expanduser()

    def one(args: Args, name: str) -> None:
        run_one(args, name, few_labels(train, args.labels, args.seed), test)

    run_all(args, args.algorithms, out, one)
    if join().rank == 0:
        found = {n: series(out, n, args, "round", "eval/accuracy") for n in args.algorithms}
        for name, (_, accuracy) in found.items():
            print(f"{name:<10}{spread(accuracy[:, -1])}")
        curves = {name: (rounds[0], accuracy) for name, (rounds, accuracy) in found.items()}
        title = f"MNIST writers with {args.labels} of 10 digits each"
        title += f": {seeds_of(args)}"
        print(draw(out / "heterogeneity.png", curves, title, "communication round"))


def few_labels(data: FederatedDataset, labels: int, seed: int) -> FederatedDataset:
    """The examples of each client whose label is among `labels` ones, drawn for the client."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(data.num_clients, 10, generator=generator).argsort(1)[:, :labels]
    client = torch.repeat_interleave(data.sizes)
    mine = (kept[client] == data.columns["y"][:, None]).any(1)
    columns = {name: column[mine] for name, column in data.columns.items()}
    return FederatedDataset.from_arrays(columns, client[mine], num_clients=data.num_clients)


def run_one(args: Args, name: str, data: FederatedDataset, test: FederatedDataset) -> None:
    """One algorithm with one seed, in a directory of its own."""
    data, validation = held_out(args, data, args.seed, clients=True)
    args, before = resume(args, f"heterogeneity, {name}")
    torch.manual_seed(args.seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    task = vecfl.Task(
        module, vecfl.cross_entropy, {"accuracy": vecfl.accuracy}, example=data.examples(2)
    )
    algorithm = ALGORITHMS[name](Batches(args.batch, epochs=args.epochs))
    sim = simulation(args, task, data, algorithm)

    def evaluate(state: vecfl.State) -> dict[str, float | int | str]:
        return sim.evaluate(state, test.columns) | sim.evaluate_clients(state, test)

    record_run(
        sim,
        validated(sim, args, validation, evaluate),
        args,
        recipe=f"heterogeneity, {name}",
        before=before,
    )


if __name__ == "__main__":
    main(run, Args)
