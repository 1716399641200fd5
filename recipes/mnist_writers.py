"""MNIST by its true writers: 539 clients train, and 297 writers whom nobody has seen test.

    python recipes/mnist_writers.py --data FOLDER --algorithm fedadam --model cnn

Papers: McMahan et al. 2017, arXiv:1602.05629 (fedavg, fedsgd); Li et al. 2020, arXiv:1812.06127
(fedprox); Hsu et al. 2019, arXiv:1909.06335 (fedavgm); Reddi et al. 2021, arXiv:2003.00295.
"""

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import vecfl
from vecfl.cli import check, flag, has_device, main
from vecfl.data import FederatedDataset, mnist_writers
from vecfl.data.mnist_writers import DOWNLOAD
from vecfl.models import emnist_cnn, logistic
from vecfl.record import record_run
from vecfl.report import check_matplotlib
from vecfl.track import check_out, check_wandb


@dataclass
class Args:
    """MNIST by its true writers: training writers are the clients, unseen writers the test."""

    out: str | None = None
    """run directory, new or empty; runs/mnist_writers-<time> if not given"""
    track: Literal["auto", "wandb", "none"] = "auto"
    """Weights & Biases, online if logged in, else offline; auto goes on where it is missing"""
    data: str | None = None
    """folder of MNIST's and QMNIST's files; $VECFL_DATA/mnist_writers if not given"""
    model: Literal["logistic", "cnn"] = "logistic"
    """logistic regression, or the CNN of Reddi et al. for EMNIST"""
    algorithm: Literal[
        "fedavg", "fedsgd", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"
    ] = "fedavg"
    """the options below that say 'by algorithm' are an error where it does not take them"""
    rounds: int = 100
    """communication rounds"""
    cohort: int = 20
    """clients that train in a round"""
    batch: int = 10
    """examples in a batch; for fedsgd, of a micro-batch, which does not change the result"""
    lr: float | None = None
    """learning rate: the clients', for fedsgd the server's; by algorithm and optimizer"""
    epochs: int | None = None
    """passes over a client's examples in a round; by algorithm"""
    optimizer: Literal["sgd", "momentum", "adam", "adamw"] | None = None
    """the clients' optimizer; by algorithm"""
    clip: float | None = None
    """greatest norm of the gradient of a client's step, no limit if not given; by algorithm"""
    mu: float | None = None
    """strength of the pull to the model of the round; by algorithm (fedprox)"""
    server_lr: float | None = None
    """learning rate of the server; by algorithm"""
    beta: float | None = None
    """momentum of the server; by algorithm (fedavgm)"""
    beta1: float | None = None
    """decay of the server's mean of updates; by algorithm"""
    beta2: float | None = None
    """decay of the server's mean of squared updates; by algorithm"""
    tau: float | None = None
    """added to the root of the squared updates, which it bounds below; by algorithm"""
    start: float | None = None
    """first value of the squared updates, tau^2 if not given; by algorithm"""
    eval_every: int = 5
    """rounds from one evaluation to the next; the last round is always evaluated"""
    seed: int = 0
    """seed of the run: first model, shuffles, dropout"""
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


# What each algorithm takes by a flag of its own, with the values where none is given.
CLIENTS = {"epochs": 1, "optimizer": "sgd", "clip": None, "lr": None}
ADAPTIVE = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "start": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": CLIENTS,
    "fedsgd": {"lr": 0.5},
    "fedprox": CLIENTS | {"mu": 0.01},
    "fedavgm": CLIENTS | {"server_lr": 1.0, "beta": 0.9},
    "fedadagrad": CLIENTS | {"server_lr": 0.1, "beta1": 0.0, "tau": 1e-3, "start": None},
    "fedadam": CLIENTS | ADAPTIVE,
    "fedyogi": CLIENTS | ADAPTIVE,
}
EVERY_OPTION = tuple(dict.fromkeys(name for options in OPTIONS.values() for name in options))

LR = {"sgd": 0.1, "momentum": 0.01, "adam": 0.001, "adamw": 0.001}  # of the clients' optimizer


def run(args: Args) -> None:
    args = settle(args)
    check_args(args)
    train, test = mnist_writers(data_folder(args))
    check(
        args,
        ("cohort",),
        lambda n: n <= train.num_clients,
        f"at most {train.num_clients} (training writers)",
    )
    sim = make_simulation(args, train)
    record_run(
        sim,
        args.rounds,
        lambda state: sim.evaluate(state, test.columns) | sim.evaluate_clients(state, test),
        out=args.out,
        recipe="mnist_writers",
        track=args.track,
        config=asdict(args),
        eval_every=args.eval_every,
    )


def settle(args: Args) -> Args:
    """`args` with the values that its algorithm and optimizer fill in.

    Raises InputError for a value that the algorithm does not take.
    """
    taken = OPTIONS[args.algorithm]
    for name in EVERY_OPTION:
        if name not in taken and (value := getattr(args, name)) is not None:
            raise vecfl.InputError(
                f"{flag(name)}: {args.algorithm} does not take it (got {value}); "
                f"it takes {', '.join(map(flag, taken))}"
            )
    filled = {name: default for name, default in taken.items() if getattr(args, name) is None}
    if filled.get("lr", 0) is None:
        filled["lr"] = LR[args.optimizer or "sgd"]
    seed = args.seed if args.sample_seed is None else args.sample_seed
    return replace(args, sample_seed=seed, **filled)


def check_args(args: Args) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    counts = ("rounds", "cohort", "batch", "epochs", "eval_every", "threads")
    check(args, counts, lambda n: n >= 1, "at least 1")
    check(args, ("seed", "sample_seed"), lambda n: 0 <= n < 2**63, "0 to 2^63 - 1")
    positive = ("lr", "server_lr", "clip", "tau")
    check(args, positive, lambda x: 0 < x < math.inf, "a positive number")
    check(args, ("mu", "start"), lambda x: 0 <= x < math.inf, "a number of at least 0")
    check(args, ("beta", "beta1", "beta2"), lambda x: 0 <= x < 1, "a number in [0, 1)")
    some = ("workers", "slots")
    check(args, some, lambda n: n == "auto" or n >= 1, "auto or a number of at least 1")
    right = f"auto or at most --cohort ({args.cohort})"
    check(args, some, lambda n: n == "auto" or n <= args.cohort, right)
    check(args, ("device",), has_device, "a device of this machine, such as cpu")
    check_matplotlib()
    check_out(args.out)
    check_wandb(args.track)


def data_folder(args: Args) -> Path:
    """--data, or mnist_writers in the folder that VECFL_DATA names, or here."""
    default = Path(os.environ.get("VECFL_DATA", "."), "mnist_writers")
    folder = default if args.data is None else Path(args.data).expanduser()
    if not folder.is_dir():
        raise vecfl.InputError(f"--data: no folder {folder}; it should hold {DOWNLOAD}")
    return folder


def make_algorithm(args: Args) -> vecfl.Algorithm:
    """The algorithm with the options that it takes; `args` are settled."""
    options = {name: getattr(args, name) for name in OPTIONS[args.algorithm]}
    if args.algorithm == "fedsgd":
        return vecfl.fedsgd(size=args.batch, **options)
    options["batches"] = vecfl.Batches(size=args.batch, epochs=options.pop("epochs"))
    options["optimizer"] = getattr(vecfl, options["optimizer"])()
    if "beta2" in options:
        options["betas"] = options.pop("beta1"), options.pop("beta2")
    builder = getattr(vecfl, args.algorithm)
    algorithm: vecfl.Algorithm = builder(**options)
    return algorithm


def make_simulation(args: Args, data: FederatedDataset) -> vecfl.Simulation:
    torch.manual_seed(args.seed)
    module = emnist_cnn() if args.model == "cnn" else logistic()
    metrics = {"accuracy": vecfl.accuracy}
    task = vecfl.Task(module, vecfl.cross_entropy, metrics, example=data.examples(2))
    return vecfl.Simulation(
        task,
        data,
        make_algorithm(args),
        vecfl.uniform(args.cohort),
        seed=args.seed,
        sample_seed=args.sample_seed,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        backend=args.backend,
        workers=args.workers,
        threads=args.threads,
        slots=args.slots,
    )


if __name__ == "__main__":
    main(run, Args)
