"""Dynamic gradient aggregation: Dimitriadis et al., 2021, arXiv:2106.07578, section 2.2.

Clients that fit their data well count for more: a_k = exp(-beta x_k), normalised over the cohort,
where x_k says how a client trained.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vecfl.algorithms.base import Algorithm, Finished, Server, Upload
from vecfl.algorithms.fedavg import broadcast, server_init, server_metrics, server_step
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError, positive
from vecfl.optim import ClientOptimizer, sgd
from vecfl.rows import moments
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer, server_sgd

Weighting = Literal[
    "loss",
    "flute_loss",
    "variance",
    "mean",
    "rms",
    "update_variance",
    "update_mean",
    "update_rms",
    "uniform",
]
Measure = Callable[[Finished, Tensor], Tensor]  # (rows, their updates [K, trainable]) -> [K]


def dga(
    *,
    lr: float | Callable[[int], float],
    batches: Batches,
    softmax_beta: float = 1.0,
    max_weight: float = 100.0,
    weighting: Weighting = "loss",
    optimizer: ClientOptimizer | None = None,
    clip: float | None = None,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """FedAvg's clients with weights min(exp(-softmax_beta x_k), max_weight); x_k by `weighting`:

    loss         (sum of losses) / (sum of loss weights) over the examples of all local steps
    flute_loss   (sum over batches of their mean losses) / (sum of loss weights), as in FLUTE: about
                 `loss` / batch size
    variance, mean, rms  of the entries of the gradients of all local steps, after `clip`:
                 s2/n - (s1/n)^2, s1/n and sqrt(s2/n) with n entries, their sum s1, of squares s2
    update_variance, update_mean, update_rms  the same of the parameters in w - w_k
    uniform      x_k = 0

    Clients without a step, or without loss weight, count for nothing. Weights are added up as
    logs, so no `softmax_beta` is too large; under `exact_sums` as they are, where those below 1e-6
    of the number of examples are refused: give a smaller `softmax_beta` there. `max_weight` is 100
    in FLUTE; under `vecfl.private`, where x_k is never negative, 1 is right. Other arguments as
    in `fedavg`. Raises InputError for a `weighting` that is not known and a `softmax_beta` that is
    not at least 0.
    """
    if weighting not in MEASURES:
        raise InputError(f"dga(weighting={weighting!r}): choose from {', '.join(MEASURES)}")
    if not 0 <= softmax_beta < math.inf:
        raise InputError(f"dga(softmax_beta={softmax_beta}): must be at least 0 and finite")
    positive("dga(max_weight)", max_weight)
    measure, server = MEASURES[weighting], server or server_sgd()
    rule = LocalRule(optimizer or sgd(), batches, lr, clip, statistics=weighting in COLLECTED)
    init, step, metrics = server_init(server), server_step(server), server_metrics(server)
    facts = {"server": server.name, "weighting": weighting, "softmax_beta": float(softmax_beta)}
    facts |= {} if max_weight == 100 else {"max_weight": float(max_weight)}
    return Algorithm(
        "dga",
        rule,
        init,
        broadcast,
        weighing(measure, softmax_beta, max_weight),
        step,
        metrics=metrics,
        facts=facts,
        max_weight=max_weight,
    )


def weighing(
    measure: Measure, softmax_beta: float, max_weight: float
) -> Callable[[Server, Finished], Upload]:
    """`Algorithm.upload` of clients that count for min(exp(-softmax_beta x_k), max_weight)."""
    most = math.log(max_weight)

    def upload(state: Server, done: Finished) -> Upload:
        update = state["w"] - done.model
        x = measure(done, update[:, : done.round.layout.trainable])
        usable = (done.weight > 0).double()
        return Upload(update, usable, log_weight=(-softmax_beta * x).clamp(max=most))

    return upload


def loss(done: Finished, update: Tensor) -> Tensor:
    return done.loss / done.weight.where(done.weight > 0, 1)


def flute_loss(done: Finished, update: Tensor) -> Tensor:
    assert done.statistics is not None
    return done.statistics.batch_loss / done.weight.where(done.weight > 0, 1)


def uniform(done: Finished, update: Tensor) -> Tensor:
    return torch.zeros_like(done.loss)


def of_steps(moment: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """A moment, made of s1/n and s2/n, of the gradients of all steps."""

    def measure(done: Finished, update: Tensor) -> Tensor:
        assert done.statistics is not None
        n, s1, s2 = done.statistics.gradients.unbind(1)
        return moment(s1 / n.clamp(min=1), s2 / n.clamp(min=1))

    return measure


def of_update(moment: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """A moment, made of s1/n and s2/n, of the update."""

    def measure(done: Finished, update: Tensor) -> Tensor:
        s1, s2 = moments(update)
        return moment(s1 / update.shape[1], s2 / update.shape[1])

    return measure


MOMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "variance": lambda mean, square: (square - mean.square()).clamp(min=0),
    "mean": lambda mean, square: mean,
    "rms": lambda mean, square: square.sqrt(),
}
MEASURES: dict[str, Measure] = {
    "loss": loss,
    "flute_loss": flute_loss,
    **{name: of_steps(moment) for name, moment in MOMENTS.items()},
    **{f"update_{name}": of_update(moment) for name, moment in MOMENTS.items()},
    "uniform": uniform,
}
COLLECTED = ("flute_loss", *MOMENTS)
