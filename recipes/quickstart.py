"""FedAvg on scikit-learn's digits, split over 100 clients by label skew: a whole run in one file.

    python recipes/quickstart.py --rounds 100 --cohort 20

McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data,
arXiv:1602.05629, Algorithm 1.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

import vecfl
from vecfl.cli import check, main
from vecfl.data import DIGITS_SCALE, FederatedDataset, digits, dirichlet
from vecfl.evaluations import held_out, validated
from vecfl.flags import RunArgs, check_run, simulation
from vecfl.privacy_flags import fair_weights
from vecfl.record import record_run
from vecfl.resume import resume


@dataclass
class Args(RunArgs):
    """FedAvg on scikit-learn's 8x8 digits, split over clients by Dirichlet label skew."""

    clients: int = 100
    """clients in the population"""
    alpha: float = 0.3
    """label skew: small gives a client few classes, large gives all clients the same mix"""
    lr: float = 0.5
    """learning rate of the clients' SGD"""
    epochs: int = 5
    """passes over a client's examples in a round"""
    data_seed: int | None = None
    """seed of the test split and of the split over clients; --seed if not given"""


def run(args: Args) -> None:
    check_args(args)
    data_seed = args.seed if args.data_seed is None else args.data_seed
    sample_seed = args.seed if args.sample_seed is None else args.sample_seed
    args = replace(args, data_seed=data_seed, sample_seed=sample_seed)
    data, test = split_digits(args, data_seed)
    data, validation = held_out(args, data, data_seed)
    args, before = resume(args, "quickstart")
    sim = make_simulation(args, data, sample_seed)

    def evaluate(state: vecfl.State) -> dict[str, float | int | str]:
        return sim.evaluate(state, test) | sim.evaluate_clients(state)

    record_run(
        sim,
        validated(sim, args, validation, evaluate),
        args,
        recipe="quickstart",
        before=before,
    )


def check_args(args: Args) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    check(args, ("clients", "epochs"), lambda n: n >= 1, "at least 1")
    check(args, ("data_seed",), lambda n: 0 <= n < 2**63, "0 to 2^63 - 1")
    check(args, ("alpha", "lr"), lambda x: 0 < x < math.inf, "a positive number")
    check(args, ("cohort",), lambda n: n <= args.clients, f"at most --clients ({args.clients})")
    check_run(args)


def split_digits(args: Args, seed: int) -> tuple[FederatedDataset, dict[str, torch.Tensor]]:
    """The training digits, split over the clients, and the test digits."""
    train, test = digits(seed)
    size = len(train["y"])
    check(args, ("clients", "batch"), lambda n: n <= size, f"at most {size} (training examples)")
    client = dirichlet(train["y"], args.clients, args.alpha, seed)
    return FederatedDataset.from_arrays(train, client, num_clients=args.clients), test


def make_simulation(args: Args, data: FederatedDataset, sample_seed: int) -> vecfl.Simulation:
    torch.manual_seed(args.seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    metrics, example = {"accuracy": vecfl.accuracy}, data.examples(2)
    task = vecfl.Task(module, vecfl.cross_entropy, metrics, example=example, scale=DIGITS_SCALE)
    batches = vecfl.Batches(size=args.batch, epochs=args.epochs)
    algorithm = vecfl.fedavg(lr=args.lr, batches=batches, weights=fair_weights(args))
    return simulation(replace(args, sample_seed=sample_seed), task, data, algorithm)


if __name__ == "__main__":
    main(run, Args)
