"""Parts that flags name: schedules, the work of clients, servers, what is around an algorithm."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import vecfl.algorithms as algorithms
import vecfl.delays as delays
import vecfl.optim as optim
import vecfl.replay as replays
import vecfl.schedules as schedules
import vecfl.server_optim as server_optim
from vecfl.algorithms import Algorithm, Finished, polynomial
from vecfl.algorithms.weights import Weights, most
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.optim import ClientOptimizer
from vecfl.plugins import around, part, takes
from vecfl.schedule import Batches
from vecfl.schedules import Schedule, scaled
from vecfl.server_optim import ServerOptimizer, scheduled, server_sgd
from vecfl.task import Task
from vecfl.within_round import by_step, within_round
from vecfl.work import random_epochs

Options = dict[str, Any]

NAMES = ("step_decay", "multi_step", "linear_warmup", "cosine", "ramp_hold_decay", "scaled")
SCHEDULES = {name: getattr(schedules, name) for name in NAMES}
SERVERS = SCHEDULES | {
    name.removeprefix("server_"): getattr(server_optim, name)
    for name in server_optim.__all__
    if name.startswith(("server_", "fedopt_", "clipped", "scheduled"))
}
SERVERS |= {n: getattr(server_optim, n) for n in server_optim.__all__ if n.startswith("server_")}
OPTIMIZERS = {
    n: getattr(optim, n) for n in ("sgd", "momentum", "rmsprop", "adagrad", "adam", "adamw")
}
WEIGHTS = {
    name: getattr(algorithms, name)
    for name in ("by_examples", "uniform_weights", "by_tokens", "capped")
}
WORK = {"random_epochs": random_epochs}
AROUND = {
    name: getattr(algorithms, name)
    for name in ("ema", "server_on_plateau", "clients_on_plateau", "delayed", "dp_sgd")
}
DELAYS = {name: getattr(delays, name) for name in ("stale", "drawn_delay", "delay_trace")}
INSIDE = (  # arguments of what stands around
    SCHEDULES | OPTIMIZERS | WORK | DELAYS | {"Batches": Batches, "polynomial": polynomial}
)

# The server optimizers of algorithms that are named after them, by the names of their options.
FEDOPT: dict[str, Callable[..., ServerOptimizer]] = {
    "fedavgm": server_optim.server_momentum,
    "fedadagrad": server_optim.fedopt_adagrad,
    "fedadam": server_optim.fedopt_adam,
    "fedyogi": server_optim.fedopt_yogi,
}


def with_parts(name: str, options: Options, size: int, tokens: Tensor | None) -> Options:
    """The arguments of the builder of `name` that these values of flags stand for.

    size, tokens  examples in a batch, and tokens of each example [n], None where they have none
    """
    options = dict(options)
    if "betas" not in options and "beta2" in options:
        options["betas"] = options.pop("beta1"), options.pop("beta2")
    if (text := options.pop("weights", None)) is not None:
        plain = text in WEIGHTS and text != "capped"
        options["weights"] = WEIGHTS[text] if plain else weighing(text)
    if texts := options.pop("lr_schedule", ()):
        options["lr"] = scaled(options["lr"], *parsed("--lr-schedule", texts))
    if "optimizer" in options:
        options["optimizer"] = client_optimizer(options)
    if name == "fedsgd":
        options["size"] = size
    elif "epochs" in options:
        options["batches"] = batches(options, size, tokens)
    return with_server(name, options)


def weighing(text: str) -> Weights:
    """The weights that `text` names; InputError in a round where they are no number by client."""
    named = takes("--weights", text, part("--weights", text, WEIGHTS), "done")

    def weights(done: Finished) -> Tensor:
        found = named(done)
        if not isinstance(found, Tensor) or found.shape != done.examples.shape:
            given = list(found.shape) if isinstance(found, Tensor) else repr(found)
            clients = f"{len(done.examples)} clients that ended together"
            wanted = f"a tensor [{len(done.examples)}], a number for each"
            raise InputError(f"--weights: {text} gave {given} for {clients}; expected {wanted}")
        return found

    weights.most = most(named)  # type: ignore[attr-defined]
    return weights


def client_optimizer(options: Options) -> ClientOptimizer:
    """The clients' optimizer of these options, which are taken out."""
    decay, text = options.pop("weight_decay", 0.0), options.pop("within_round", None)
    optimizer: ClientOptimizer = OPTIMIZERS[options.pop("optimizer")](weight_decay=decay)
    if text is None:
        return optimizer
    return within_round(optimizer, by_step(*parsed("--within-round", [text])))


def batches(options: Options, size: int, tokens: Tensor | None) -> Batches:
    """The work of a client in a round by these options, which are taken out."""
    epochs, steps = (
        part(f"--{name}", value, WORK) if isinstance(value, str) else value
        for name, value in ((name, options.pop(name)) for name in ("epochs", "steps"))
    )
    caps = {name: options.pop(name) for name in ("max_examples", "max_tokens")}
    if caps["max_tokens"] is None:
        tokens = None
    elif tokens is None:
        raise InputError("--max-tokens: these examples have no tokens; give --max-examples")
    return Batches(size=size, epochs=epochs, steps=steps, tokens=tokens, **caps)


def with_server(name: str, options: Options) -> Options:
    """`options` with the server optimizer of --server and --server-schedule, if they say one."""
    texts = options.pop("server_schedule", ())
    if options.get("server") is not None:
        text = options["server"]
        options["server"] = server = part("--server", text, SERVERS)
        if not isinstance(server, ServerOptimizer):
            raise InputError(f"--server: {text} gives {server!r}; expected a server optimizer")
    if not texts:
        return options
    if name == "fedsgd":
        server = server_sgd(options.pop("lr"))
    elif name in FEDOPT:
        own = {
            n: options.pop(n) for n in ("beta", "beta1", "betas", "tau", "start") if n in options
        }
        server = FEDOPT[name](options.pop("server_lr"), **own)
    else:
        server = options.get("server") or server_sgd()
    found = parsed("--server-schedule", texts)
    return options | {
        "server": scheduled(server, *found if len(found) == 1 else [scaled(1, *found)])
    }


def parsed(flag: str, texts: Sequence[str]) -> list[Schedule]:
    """The schedules that `texts` name; InputError where the first round has no factor by one."""
    found = [part(flag, text, SCHEDULES) for text in texts]
    for text, schedule in zip(texts, found, strict=True):
        first = takes(flag, text, schedule, "round")(0) if callable(schedule) else schedule
        fits = isinstance(first, int | float) and 0 <= first < math.inf
        if not callable(schedule) or not fits:
            what = "expected a number of at least 0 for each round"
            raise InputError(f"{flag}: {text} gives {first!r}; {what}")
    return found


def surrounded(
    algorithm: Algorithm, texts: Sequence[str], task: Task, own: Batch | None
) -> Algorithm:
    """`algorithm` with what --around names around it, in this order.

    own  columns [n, ...] of examples that the server has, for replay; None: it has none
    """
    known = AROUND | {"replay": replaying(task, own)}
    for text in texts:
        algorithm = around("--around", text, known, INSIDE)(algorithm)
        if not isinstance(algorithm, Algorithm):
            raise InputError(f"--around: {text} gives {algorithm!r}; expected a vecfl.Algorithm")
    if texts:  # what cannot begin is told before anything is made
        algorithm.init(task.layout.flatten(task.module), task.layout)
    return algorithm


def plateau_metrics(texts: Sequence[str]) -> list[str]:
    """The metrics that the plateaus among these texts of --around look at."""
    known = {n: lambda _, metric, *args, **kwargs: metric for n in AROUND if n.endswith("_plateau")}
    plateaus = [text for text in texts if text.partition("(")[0].strip() in known]
    return [around("--around", text, known, INSIDE)(None) for text in plateaus]


def replaying(task: Task, own: Batch | None) -> Callable[..., Algorithm]:
    """`vecfl.replay` on the server's own examples."""

    def replay(
        algorithm: Algorithm,
        *,
        lr: float | Schedule,
        batches: Batches,
        optimizer: ClientOptimizer | None = None,
        clip: float | None = None,
    ) -> Algorithm:
        if own is None:
            raise InputError(
                "--around: replay needs examples that the server has: --server-clients, with "
                "mnist_writers"
            )
        how: Options = {"lr": lr, "batches": batches, "optimizer": optimizer, "clip": clip}
        return replays.replay(algorithm, task, own, **how)

    return replay
