"""Flags of recipes that let the user choose the algorithm."""

import inspect
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

import vecfl.algorithms as algorithms
from vecfl.algorithms import Algorithm
from vecfl.algorithms.dga import Weighting
from vecfl.cli import check, flag
from vecfl.errors import InputError
from vecfl.flags import RunArgs
from vecfl.parts import FEDOPT, with_parts
from vecfl.plugins import function

Settled = TypeVar("Settled", bound="AlgorithmArgs")


@dataclass
class AlgorithmArgs(RunArgs):
    """A run by one of the algorithms, with their options."""

    batch: int = 10
    """examples in a batch; for fedsgd, of a micro-batch, which bounds memory alone"""
    algorithm: str = "fedavg"
    """fedavg, fedsgd, fedprox, fedprox_adaptive, fedavgm, fedadagrad, fedadam, fedyogi, dga,
    scaffold, feddyn, fednova, or file.py:name of your own; 'by algorithm' below: an error where it
    does not take it. What has no flag stands behind the name:
    fedprox_adaptive(start=1.0, step=0.1, patience=5)"""
    server: str | None = None
    """server optimizer: lamb(0.01), clipped(fedopt_adam(0.03), 1.0), ...; by algorithm"""
    server_schedule: tuple[str, ...] = ()
    """the server's learning rate by round, times that: cosine(100), file.py:name; by algorithm"""
    lr: float | None = None
    """learning rate: the clients', for fedsgd the server's; by algorithm and optimizer"""
    lr_schedule: tuple[str, ...] = ()
    """the clients' learning rate by round, --lr times these: linear_warmup(5), cosine(100),
    step_decay(30, 0.5), multi_step([50, 80], 0.1), ramp_hold_decay(5, 20, 100); by algorithm"""
    within_round: str | None = None
    """the clients' learning rate by their steps in a round, times that: cosine(50); by algorithm"""
    epochs: int | str | None = None
    """passes over a client's examples in a round, or random_epochs(1, 5, 0.9); by algorithm"""
    steps: int | str | None = None
    """instead of epochs: optimizer steps of a client in a round; by algorithm"""
    max_examples: int | None = None
    """most examples of a client in a round, drawn anew each time; by algorithm"""
    max_tokens: int | None = None
    """likewise in tokens, where the examples are text; by algorithm"""
    weights: str | None = None
    """how clients count: by_examples, uniform_weights, by_tokens, capped(50), file.py:name; by
    algorithm"""
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"] | None = None
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


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options but those of these names."""
    return {name: value for name, value in options.items() if name not in names}


# What each algorithm takes by a flag of its own, with the values where none is given.
WORK = {"epochs": 1, "steps": None, "max_examples": None, "max_tokens": None}
OPTIMIZER = {"optimizer": "sgd", "weight_decay": None, "within_round": None}
LOCAL = WORK | OPTIMIZER | {"clip": None, "lr": None, "lr_schedule": (), "server_schedule": ()}
CLIENTS = LOCAL | {"weights": None}
AVERAGING = CLIENTS | {"server": None}
ADAPTIVE = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "start": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedavg": AVERAGING,
    "fedsgd": {"lr": 0.5, "max_examples": None, "weights": None, "server_schedule": ()},
    "fedprox": AVERAGING | {"mu": 0.01},
    "fedprox_adaptive": AVERAGING,
    "fedavgm": CLIENTS | {"server_lr": 1.0, "beta": 0.9},
    "fedadagrad": CLIENTS | {"server_lr": 0.1, "beta1": 0.0, "tau": 1e-3, "start": None},
    "fedadam": CLIENTS | ADAPTIVE,
    "fedyogi": CLIENTS | ADAPTIVE,
    "dga": LOCAL | {"server": None, "softmax_beta": 1.0, "weighting": "loss"},
    "scaffold": WORK
    | {"lr": None, "lr_schedule": (), "option": 2, "server": None, "server_schedule": ()},
    "feddyn": without(LOCAL, "server_schedule") | {"alpha": 0.1},
    "fednova": without(AVERAGING, "weight_decay", "within_round") | {"mu": 0.0},
}
# What stands behind the name, for flags of these names are something else.
BEHIND = {"fedprox_adaptive": {"start", "step", "patience"}, "dga": {"max_weight"}}
BUILDERS = {name: getattr(algorithms, name) for name in OPTIONS}
# The flags of an algorithm of the user's own by its parameters, beside those of the same name.
BY_PARAMETER: dict[str, dict[str, Any]] = {
    "batches": WORK,
    "optimizer": OPTIMIZER,
    "lr": {"lr_schedule": ()},
    "server": {"server_schedule": ()},
}
EVERY_OPTION = tuple(dict.fromkeys(name for options in OPTIONS.values() for name in options))

# By the clients' optimizer.
LR = {"sgd": 0.1, "momentum": 0.01, "adam": 0.001, "adamw": 0.001, "rmsprop": 0.001}
LR |= {"adagrad": 0.01}
DECAY = {"adamw": 0.01}  # 0 for the others


def settle(args: Settled, lr: dict[str, float] = LR) -> Settled:
    """`args` with the values that its algorithm and optimizer fill in; `lr` by client optimizer.

    Raises InputError for a value that the algorithm does not take.
    """
    taken, called = options_of(args.algorithm)
    for name in EVERY_OPTION:
        if name not in taken and (value := getattr(args, name)) not in (None, ()):
            there = f"it takes {', '.join(map(flag, taken)) or 'no such flags'}"
            if name in BEHIND.get(called, ()):
                there = f"write --algorithm '{called}({name}={value})'"
            what = f"{flag(name)}: {called} does not take it (got {value}); {there}"
            raise InputError(what)
    filled = {name: default for name, default in taken.items() if getattr(args, name) is None}
    if args.private_clip is not None and "weights" in filled:
        filled["weights"] = "uniform_weights"
    if "epochs" in taken and args.steps is not None:
        check(args, ("epochs",), lambda _: False, "none beside --steps, which is instead of it")
        del filled["epochs"]
    if filled.get("lr", 0) is None:
        filled["lr"] = lr[args.optimizer or "sgd"]
    if "weight_decay" in filled:
        filled["weight_decay"] = DECAY.get(args.optimizer or "sgd", 0.0)
    seed = args.seed if args.sample_seed is None else args.sample_seed
    return replace(args, sample_seed=seed, **filled)


def check_algorithm(args: AlgorithmArgs) -> None:
    """Raise InputError, with the name of the flag, for a value that no algorithm could take."""
    check(args, ("max_examples", "max_tokens"), lambda n: n >= 1, "at least 1")
    numbers = tuple(n for n in ("epochs", "steps") if not isinstance(getattr(args, n), str))
    check(args, numbers, lambda n: n >= 1, "at least 1")
    positive = ("lr", "server_lr", "clip", "tau", "alpha")
    check(args, positive, lambda x: 0 < x < math.inf, "a positive number")
    at_least_zero = ("mu", "start", "weight_decay", "softmax_beta")
    check(args, at_least_zero, lambda x: 0 <= x < math.inf, "a number of at least 0")
    check(args, ("beta", "beta1", "beta2"), lambda x: 0 <= x < 1, "a number in [0, 1)")


def options_of(algorithm: str) -> tuple[dict[str, Any], str]:
    """The options that an algorithm takes by flags, with what they are where not given; its name.

    Of a function of one's own these are the parameters that have the name of a flag.
    """
    builder, given = function("--algorithm", algorithm, BUILDERS)
    name = getattr(builder, "__name__", algorithm)
    if builder in BUILDERS.values():
        if wrong := sorted(given.keys() - BEHIND.get(name, set())):
            flags = " ".join(f"{flag(n)} {given[n]}" for n in wrong if n in OPTIONS[name])
            right = f"write {name} {flags}" if flags else f"give its options by flags, {name}"
            raise InputError(f"--algorithm: {algorithm}: {right}")
        return OPTIONS[name], name
    names = inspect.signature(builder).parameters.keys() - given.keys()
    taken = {n: v for n, v in AVERAGING.items() if n in names}
    for parameter, more in BY_PARAMETER.items():
        taken |= more if parameter in names else {}
    return taken, name


def make_algorithm(args: AlgorithmArgs, tokens: Tensor | None = None) -> Algorithm:
    """The algorithm with the options that it takes; `args` are settled.

    tokens  of each training example [n], for --max-tokens; None: they have none
    """
    builder, given = function("--algorithm", args.algorithm, BUILDERS)
    taken, name = options_of(args.algorithm)
    values = {option: getattr(args, option) for option in taken}
    options = with_parts(name, values, args.batch, tokens)
    if args.private_clip is not None and builder is algorithms.dga:
        given = {"max_weight": 1.0} | given  # exp(-beta x) is no more where x is a loss
    if name in FEDOPT and "server" in options:
        builder = partial(algorithms.fedopt, name)
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
