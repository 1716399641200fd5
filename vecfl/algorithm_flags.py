"""Flags of recipes that let the user choose the algorithm."""

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import vecfl.algorithms as algorithms
import vecfl.optim as optim
import vecfl.server_optim as server_optim
from vecfl.algorithms import Algorithm
from vecfl.algorithms.dga import Weighting
from vecfl.cli import check, flag
from vecfl.errors import InputError
from vecfl.flags import RunArgs
from vecfl.plugins import function, part
from vecfl.schedule import Batches

Settled = TypeVar("Settled", bound="AlgorithmArgs")


@dataclass
class AlgorithmArgs(RunArgs):
    """A run by one of the algorithms, with their options."""

    batch: int = 10
    """examples in a batch; for fedsgd, of a micro-batch, which bounds memory alone"""
    algorithm: str = "fedavg"
    """fedavg, fedsgd, fedprox, fedprox_adaptive, fedavgm, fedadagrad, fedadam, fedyogi, dga,
    scaffold, feddyn, fednova, or file.py:name of your own; 'by algorithm' below: an error where it
    does not take it"""
    server: str | None = None
    """server optimizer: adamw(lr=0.01), lamb(0.01), momentum(1.0, beta=0.9), ...; by algorithm"""
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
    option: int | None = None
    """how clients renew their variates: 1, by a gradient at the server's model, or 2; by algorithm
    (scaffold)"""
    alpha: float | None = None
    """strength of the dynamic regularisation; by algorithm (feddyn)"""
    eval_every: int = 5
    """rounds from one evaluation to the next; the last round is always evaluated"""


# What each algorithm takes by a flag of its own, with the values where none is given.
CLIENTS = {"epochs": 1, "optimizer": "sgd", "weight_decay": None, "clip": None, "lr": None}
AVERAGING = CLIENTS | {"server": None}
ADAPTIVE = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "start": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": AVERAGING,
    "fedsgd": {"lr": 0.5},
    "fedprox": AVERAGING | {"mu": 0.01},
    "fedprox_adaptive": AVERAGING,
    "fedavgm": CLIENTS | {"server_lr": 1.0, "beta": 0.9},
    "fedadagrad": CLIENTS | {"server_lr": 0.1, "beta1": 0.0, "tau": 1e-3, "start": None},
    "fedadam": CLIENTS | ADAPTIVE,
    "fedyogi": CLIENTS | ADAPTIVE,
    "dga": AVERAGING | {"softmax_beta": 1.0, "weighting": "loss"},
    "scaffold": {"epochs": 1, "lr": None, "option": 2, "server": None},
    "feddyn": CLIENTS | {"alpha": 0.1},
    "fednova": {k: v for k, v in AVERAGING.items() if k != "weight_decay"} | {"mu": 0.0},
}
SERVERS = {
    name.removeprefix("server_"): getattr(server_optim, name)
    for name in server_optim.__all__
    if name.startswith("server_")
} | {"clipped": server_optim.clipped}
BUILDERS = {name: getattr(algorithms, name) for name in OPTIONS}
EVERY_OPTION = tuple(dict.fromkeys(name for options in OPTIONS.values() for name in options))

# By the clients' optimizer.
LR = {"sgd": 0.1, "momentum": 0.01, "adam": 0.001, "adamw": 0.001, "rmsprop": 0.001}
DECAY = {"adamw": 0.01}  # 0 for the others


def settle(args: Settled, lr: dict[str, float] = LR) -> Settled:
    """`args` with the values that its algorithm and optimizer fill in; `lr` by client optimizer.

    Raises InputError for a value that the algorithm does not take.
    """
    taken, called = options_of(args.algorithm)
    for name in EVERY_OPTION:
        if name not in taken and (value := getattr(args, name)) is not None:
            raise InputError(
                f"{flag(name)}: {called} does not take it (got {value}); "
                f"it takes {', '.join(map(flag, taken))}"
            )
    filled = {name: default for name, default in taken.items() if getattr(args, name) is None}
    if filled.get("lr", 0) is None:
        filled["lr"] = lr[args.optimizer or "sgd"]
    if "weight_decay" in filled:
        filled["weight_decay"] = DECAY.get(args.optimizer or "sgd", 0.0)
    seed = args.seed if args.sample_seed is None else args.sample_seed
    return replace(args, sample_seed=seed, **filled)


def check_algorithm(args: AlgorithmArgs) -> None:
    """Raise InputError, with the name of the flag, for a value that no algorithm could take."""
    check(args, ("epochs",), lambda n: n >= 1, "at least 1")
    positive = ("lr", "server_lr", "clip", "tau", "alpha")
    check(args, positive, lambda x: 0 < x < math.inf, "a positive number")
    at_least_zero = ("mu", "start", "weight_decay", "softmax_beta")
    check(args, at_least_zero, lambda x: 0 <= x < math.inf, "a number of at least 0")
    check(args, ("beta", "beta1", "beta2"), lambda x: 0 <= x < 1, "a number in [0, 1)")


def options_of(algorithm: str) -> tuple[dict[str, Any], str]:
    """The options that an algorithm takes by flags, with what they are where not given; its name.

    Of a function of one's own these are the parameters that have the name of a flag.
    """
    if algorithm in OPTIONS:
        return OPTIONS[algorithm], algorithm
    builder, given = function("--algorithm", algorithm, BUILDERS)
    if builder in BUILDERS.values():
        raise InputError(f"--algorithm: {algorithm}: give its options by flags, {builder.__name__}")
    names = inspect.signature(builder).parameters.keys() - given.keys()
    taken = {n: v for n, v in AVERAGING.items() if n in names} | (
        {"epochs": 1} if "batches" in names else {}
    )
    if "optimizer" in taken:
        taken["weight_decay"] = None
    return taken, builder.__name__


def make_algorithm(args: AlgorithmArgs) -> Algorithm:
    """The algorithm with the options that it takes; `args` are settled."""
    builder, given = function("--algorithm", args.algorithm, BUILDERS)
    options = {name: getattr(args, name) for name in options_of(args.algorithm)[0]}
    if args.algorithm == "fedsgd":
        return algorithms.fedsgd(size=args.batch, **options)
    if "epochs" in options:
        options["batches"] = Batches(size=args.batch, epochs=options.pop("epochs"))
    if "optimizer" in options:
        decay = options.pop("weight_decay", 0.0)
        options["optimizer"] = getattr(optim, options["optimizer"])(weight_decay=decay)
    if options.get("server") is not None:
        options["server"] = part("--server", options["server"], SERVERS)
    if "beta2" in options:
        options["betas"] = options.pop("beta1"), options.pop("beta2")
    try:
        made = builder(**options, **given)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise  # inside of it
        raise InputError(f"--algorithm: {args.algorithm}: {error}") from error
    if not isinstance(made, Algorithm):
        raise InputError(
            f"--algorithm: {args.algorithm} gives {made!r}; expected a vecfl.Algorithm"
        )
    return made
