"""Flags that recipes share: dataclasses to inherit from, and what their values mean.

A recipe that lets the user choose the algorithm inherits `AlgorithmArgs`, any other `RunArgs`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

import vecfl.algorithms as algorithms
import vecfl.optim as optim
from vecfl.algorithms import Algorithm
from vecfl.algorithms.dga import Weighting
from vecfl.cli import check, flag, has_device
from vecfl.data import FederatedDataset
from vecfl.errors import InputError
from vecfl.evaluations import EvaluationArgs
from vecfl.model_file import check_safetensors, warm_start
from vecfl.report import check_matplotlib
from vecfl.sampling import uniform
from vecfl.schedule import Batches
from vecfl.simulation import Simulation
from vecfl.stop import Stop
from vecfl.task import Task
from vecfl.track import check_out, check_wandb
from vecfl.watch import Watch

Settled = TypeVar("Settled", bound="AlgorithmArgs")


@dataclass
class RunArgs(EvaluationArgs):
    """A run: where it goes, how long it is, its seeds, and what it runs on."""

    out: str | None = None
    """run directory, new or empty; runs/<recipe>-<time> if not given"""
    track: Literal["auto", "wandb", "none"] = "auto"
    """Weights & Biases, online if logged in, else offline; auto goes on where it is missing"""
    rounds: int = 100
    """communication rounds"""
    cohort: int = 20
    """clients that train in a round"""
    batch: int = 10
    """examples in a batch"""
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
    exact_sums: bool = False
    """add up clients on a grid: the same bits for any slots, workers and ranks"""
    init: str | None = None
    """first model: a state dict, .safetensors or of torch.save"""
    resume: str = "none"
    """the run to go on with: its directory, or a checkpoint in it; auto: that of --out, started
    if there is none; none: a new run"""
    resume_changed: bool = False
    """go on although settings that change the result are others"""
    checkpoint_every: int = 10
    """rounds from one checkpoint to the next; the last round has one, and the round of a signal"""
    keep: int = 2
    """checkpoints that are kept, the last ones; with --watch the best one, too"""
    watch: str | None = None
    """metric of the best round, and which values are better: eval/loss:min, eval/accuracy:max"""
    fall_back: bool = False
    """after a value that is worse than the best, go on from the best model (with --watch)"""
    stop_at: str | None = None
    """end after an evaluation that reaches a target: eval/accuracy>=0.97, eval/loss<=0.1"""
    patience: int | None = None
    """end after so many evaluations without a better value of --watch"""
    safetensors: bool = False
    """write the final model as model.safetensors, too"""


@dataclass
class AlgorithmArgs(RunArgs):
    """A run by one of the algorithms, with their options."""

    batch: int = 10
    """examples in a batch; for fedsgd, of a micro-batch, which bounds memory alone"""
    algorithm: Literal[
        "fedavg", "fedsgd", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "dga"
    ] = "fedavg"
    """the options below that say 'by algorithm' are an error where it does not take them"""
    lr: float | None = None
    """learning rate: the clients', for fedsgd the server's; by algorithm and optimizer"""
    epochs: int | None = None
    """passes over a client's examples in a round; by algorithm"""
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "rmsprop"] | None = None
    """the clients' optimizer; by algorithm"""
    weight_decay: float | None = None
    """of the clients' optimizer, L2 or for adamw decoupled; by algorithm and optimizer"""
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
    softmax_beta: float | None = None
    """how much clients that train well count for more; by algorithm (dga)"""
    weighting: Weighting | None = None
    """what tells how well a client trained; by algorithm (dga)"""
    start: float | None = None
    """first value of the squared updates, tau^2 if not given; by algorithm"""
    eval_every: int = 5
    """rounds from one evaluation to the next; the last round is always evaluated"""


# What each algorithm takes by a flag of its own, with the values where none is given.
CLIENTS = {"epochs": 1, "optimizer": "sgd", "weight_decay": None, "clip": None, "lr": None}
ADAPTIVE = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "start": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": CLIENTS,
    "fedsgd": {"lr": 0.5},
    "fedprox": CLIENTS | {"mu": 0.01},
    "fedavgm": CLIENTS | {"server_lr": 1.0, "beta": 0.9},
    "fedadagrad": CLIENTS | {"server_lr": 0.1, "beta1": 0.0, "tau": 1e-3, "start": None},
    "fedadam": CLIENTS | ADAPTIVE,
    "fedyogi": CLIENTS | ADAPTIVE,
    "dga": CLIENTS | {"softmax_beta": 1.0, "weighting": "loss"},
}
EVERY_OPTION = tuple(dict.fromkeys(name for options in OPTIONS.values() for name in options))

# By the clients' optimizer.
LR = {"sgd": 0.1, "momentum": 0.01, "adam": 0.001, "adamw": 0.001, "rmsprop": 0.001}
DECAY = {"adamw": 0.01}  # 0 for the others


def settle(args: Settled, lr: dict[str, float] = LR) -> Settled:
    """`args` with the values that its algorithm and optimizer fill in; `lr` by client optimizer.

    Raises InputError for a value that the algorithm does not take.
    """
    taken = OPTIONS[args.algorithm]
    for name in EVERY_OPTION:
        if name not in taken and (value := getattr(args, name)) is not None:
            raise InputError(
                f"{flag(name)}: {args.algorithm} does not take it (got {value}); "
                f"it takes {', '.join(map(flag, taken))}"
            )
    filled = {name: default for name, default in taken.items() if getattr(args, name) is None}
    if filled.get("lr", 0) is None:
        filled["lr"] = lr[args.optimizer or "sgd"]
    if "weight_decay" in filled:
        filled["weight_decay"] = DECAY.get(args.optimizer or "sgd", 0.0)
    seed = args.seed if args.sample_seed is None else args.sample_seed
    return replace(args, sample_seed=seed, **filled)


def check_run(args: RunArgs) -> None:
    """Raise InputError, with the name of the flag, before anything is made."""
    numbers = ("rounds", "cohort", "batch", "threads", "patience", "eval_every", "test_every")
    check(args, (*numbers, "checkpoint_every", "keep"), lambda n: n >= 1, "at least 1")
    check(args, ("seed", "sample_seed"), lambda n: 0 <= n < 2**63, "0 to 2^63 - 1")
    check(args, ("statistics", "validation"), lambda x: x >= 0, "a number of at least 0")
    check(args, ("validation",), lambda x: x < 1, "a share below 1")
    some = ("workers", "slots")
    check(args, some, lambda n: n == "auto" or n >= 1, "auto or a number of at least 1")
    right = f"auto or at most --cohort ({args.cohort})"
    check(args, some, lambda n: n == "auto" or n <= args.cohort, right)
    check(args, ("device",), has_device, "a device of this machine, such as cpu")
    check_matplotlib()
    check_saving(args)
    check_wandb(args.track)


def check_saving(args: RunArgs) -> None:
    """Raise InputError, with the name of the flag, where the run cannot go where it should."""
    if args.resume == "none":
        check_out(args.out)
    if args.resume == "auto" and args.out is None:
        raise InputError("--resume auto: needs --out, the directory of the run")
    if args.watch is not None:
        Watch(args.watch)
    check(args, ("fall_back",), lambda on: not on or args.watch is not None, "--watch beside it")
    check(args, ("patience",), lambda n: args.watch is not None, "--watch beside it")
    Stop(args.stop_at, args.patience, args.watch)
    if args.safetensors:
        check_safetensors("--safetensors")


def check_algorithm(args: AlgorithmArgs) -> None:
    """Raise InputError, with the name of the flag, for a value that no algorithm could take."""
    check(args, ("epochs",), lambda n: n >= 1, "at least 1")
    positive = ("lr", "server_lr", "clip", "tau")
    check(args, positive, lambda x: 0 < x < math.inf, "a positive number")
    at_least_zero = ("mu", "start", "weight_decay", "softmax_beta")
    check(args, at_least_zero, lambda x: 0 <= x < math.inf, "a number of at least 0")
    check(args, ("beta", "beta1", "beta2"), lambda x: 0 <= x < 1, "a number in [0, 1)")


def make_algorithm(args: AlgorithmArgs) -> Algorithm:
    """The algorithm with the options that it takes; `args` are settled."""
    options = {name: getattr(args, name) for name in OPTIONS[args.algorithm]}
    if args.algorithm == "fedsgd":
        return algorithms.fedsgd(size=args.batch, **options)
    options["batches"] = Batches(size=args.batch, epochs=options.pop("epochs"))
    decay = options.pop("weight_decay")
    options["optimizer"] = getattr(optim, options["optimizer"])(weight_decay=decay)
    if "beta2" in options:
        options["betas"] = options.pop("beta1"), options.pop("beta2")
    builder = getattr(algorithms, args.algorithm)
    algorithm: Algorithm = builder(**options)
    return algorithm


def simulation(
    args: RunArgs,
    task: Task,
    data: FederatedDataset,
    algorithm: Algorithm,
    table: str | Path | None = None,
) -> Simulation:
    """The simulation of these parts, with uniform cohorts; `table` as in `Simulation`.

    Raises InputError as `Simulation` does, and for a cohort that is larger than the population.
    """
    n = data.num_clients
    check(args, ("cohort",), lambda size: size <= n, f"at most {n} (training clients)")
    if args.init is not None:
        task = task.to("cpu", getattr(torch, args.dtype))
        warm_start(task.module, args.init)
    return Simulation(
        task,
        data,
        algorithm,
        uniform(args.cohort),
        seed=args.seed,
        sample_seed=args.sample_seed,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        backend=args.backend,
        workers=args.workers,
        threads=args.threads,
        slots=args.slots,
        exact_sums=args.exact_sums,
        table=table,
        statistics=args.statistics,
    )
