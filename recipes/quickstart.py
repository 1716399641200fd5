"""FedAvg on scikit-learn's digits, split over 100 clients by label skew: a whole run in one file.

    python recipes/quickstart.py --rounds 100 --cohort 20

McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data,
arXiv:1602.05629, Algorithm 1.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

import vecfl
from vecfl.cli import check, has_device, main
from vecfl.data import DIGITS_SCALE, FederatedDataset, digits, dirichlet
from vecfl.record import record_run
from vecfl.report import check_matplotlib
from vecfl.track import check_out, check_wandb


@dataclass
class Args:
    """FedAvg on scikit-learn's 8x8 digits, split over clients by Dirichlet label skew."""

    out: str | None = None
    """run directory, new or empty; runs/quickstart-<time> if not given"""
    track: Literal["auto", "wandb", "none"] = "auto"
    """Weights & Biases, online if logged in, else offline; auto goes on where it is missing"""
    rounds: int = 100
    """communication rounds"""
    cohort: int = 20
    """clients that train in a round"""
    clients: int = 100
    """clients in the population"""
    alpha: float = 0.3
    """label skew: small gives a client few classes, large gives all clients the same mix"""
    lr: float = 0.5
    """learning rate of the clients' SGD"""
    batch: int = 10
    """examples in a batch"""
    epochs: int = 5
    """passes over a client's examples in a round"""
    seed: int = 0
    """seed of the run: first model, shuffles"""
    data_seed: int | None = None
    """seed of the test split and of the split over clients; --seed if not given"""
    sample_seed: int | None = None
    """seed of the cohorts; --seed if not given"""
    device: str = "cpu"
    """where to train: cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "float64"] = "float32"
    """floating-point type of the model"""
    backend: Literal["auto", "loop", "vmap", "stacked"] = "auto"
    """train clients one after the other, or many at a time (two ways); auto: the fastest here"""
    workers: int | Literal["auto"] = "auto"
    """threads that train clients, on a CPU"""
    threads: int | None = None
    """operator threads of each worker; measured with --workers auto, else torch's shared out"""
    slots: int | Literal["auto"] = "auto"
    """clients that train at the same time on each worker"""


def run(args: Args) -> None:
    check_args(args)
    data_seed = args.seed if args.data_seed is None else args.data_seed
    sample_seed = args.seed if args.sample_seed is None else args.sample_seed
    data, test = split_digits(args, data_seed)
    sim = make_simulation(args, data, sample_seed)
    record_run(
        sim,
        args.rounds,
        lambda state: sim.evaluate(state, test) | sim.evaluate_clients(state),
        out=args.out,
        recipe="quickstart",
        track=args.track,
        config=asdict(args) | {"data_seed": data_seed, "sample_seed": sample_seed},
    )


def check_args(args: Args) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    counts = ("rounds", "cohort", "clients", "batch", "epochs", "threads")
    check(args, counts, lambda n: n >= 1, "at least 1")
    check(args, ("seed", "data_seed", "sample_seed"), lambda n: 0 <= n < 2**63, "0 to 2^63 - 1")
    check(args, ("alpha", "lr"), lambda x: 0 < x < math.inf, "a positive number")
    check(args, ("cohort",), lambda n: n <= args.clients, f"at most --clients ({args.clients})")
    some = ("workers", "slots")
    check(args, some, lambda n: n == "auto" or n >= 1, "auto or a number of at least 1")
    right = f"auto or at most --cohort ({args.cohort})"
    check(args, some, lambda n: n == "auto" or n <= args.cohort, right)
    check(args, ("device",), has_device, "a device of this machine, such as cpu")
    check_matplotlib()
    check_out(args.out)
    check_wandb(args.track)


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
    return vecfl.Simulation(
        task,
        data,
        vecfl.fedavg(lr=args.lr, batches=batches),
        vecfl.uniform(args.cohort),
        seed=args.seed,
        sample_seed=sample_seed,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        backend=args.backend,
        workers=args.workers,
        threads=args.threads,
        slots=args.slots,
    )


if __name__ == "__main__":
    main(run, Args)
