"""FedNova: Wang et al., NeurIPS 2020, arXiv:2007.07481, section 4."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Finished, Metrics, Round, Server, Upload
from vecfl.algorithms.fedavg import broadcast, known, server_init, server_metrics, server_step
from vecfl.algorithms.weights import Weights, by_examples, most
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError
from vecfl.optim import ClientOptimizer, sgd
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer, server_sgd


def fednova(
    *,
    lr: float | Callable[[int], float],
    batches: Batches,
    mu: float = 0.0,
    optimizer: ClientOptimizer | None = None,
    clip: float | None = None,
    weights: Weights = by_examples,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """FedAvg without the advantage of clients that take more steps.

    A client's update is a sum of its gradients, g_j with coefficient lr a_j. It sends the update
    over |a|, the sum of these a_j; the server moves by tau_eff times the weighted mean of that,
    where tau_eff is the weighted mean of |a|. With tau steps,

        sgd()             |a| = tau
        momentum(beta)    |a| = (tau - beta (1 - beta^tau) / (1 - beta)) / (1 - beta)
        sgd(), mu > 0     |a| = (1 - (1 - lr mu)^tau) / (lr mu)

    mu  pull towards the model of the round, as in `fedprox`

    With mu the authors' code takes tau_eff as the weighted mean of tau; this is the paper's text.

    A client without a step has no direction and counts for nothing; changes of buffers are averaged
    as they are. `train/tau_eff` is told. Other arguments as in `fedavg`. Raises InputError for
    another client optimizer, for momentum with mu, and where lr mu is not below 1, in a round too.
    """
    optimizer, server = optimizer or sgd(), server or server_sgd()
    if optimizer.beta is None or (mu and optimizer.beta):
        raise InputError(
            "fednova: coefficients are known of sgd() and momentum(beta), without weight_decay, "
            f"and of sgd() with mu, not of {optimizer.name}{f' with mu {mu}' if mu else ''}"
        )
    beta, move, told = optimizer.beta, server_step(server), server_metrics(server)

    def upload(state: Server, done: Finished) -> Upload:
        return normalised(state["w"] - done.model, done, length(done, mu, beta), weights(done))

    def step(state: Server, sums: Aggregate, round: Round) -> Server:
        return move(state, stretched(sums, round), round)

    def metrics(state: Server, sums: Aggregate, round: Round) -> Metrics:
        return {**told(state, stretched(sums, round), round), "train/tau_eff": float(tau_eff(sums))}

    rule, init = LocalRule(optimizer, batches, lr, clip, mu), server_init(server)
    facts = known(server, weights)
    made = Algorithm("fednova", rule, init, broadcast, upload, step, metrics=metrics, facts=facts)
    return replace(made, max_weight=most(weights))


def normalised(update: Tensor, done: Finished, size: Tensor, weight: Tensor) -> Upload:
    """The updates [K, P], those of parameters over |a| = size [K]."""
    steps = size > 0
    update[:, : done.round.layout.trainable] /= size.where(steps, 1)[:, None].to(update.dtype)
    weight = weight.double().where(steps, 0)
    return Upload(update, weight, extra={"weight": weight, "length": weight * size})


def length(done: Finished, mu: float, beta: float) -> Tensor:
    """|a| of each client, float64 [K]."""
    tau, pull = done.steps.double(), done.lr * mu
    if pull >= 1:
        raise InputError(f"fednova: lr * mu must be below 1, not {pull:g}")
    if pull:
        return -torch.expm1(tau * math.log1p(-pull)) / pull
    return (tau - beta * (1 - beta**tau) / (1 - beta)) / (1 - beta)


def tau_eff(sums: Aggregate) -> Tensor:
    """The weighted mean of |a|, float64 []; NaN without a client that counts."""
    return sums.extra["length"] / sums.extra["weight"]


def stretched(sums: Aggregate, round: Round) -> Aggregate:
    """The sums with all that is of parameters times tau_eff."""
    n = round.layout.trainable
    return replace(sums, total=torch.cat((sums.total[:n] * tau_eff(sums), sums.total[n:])))
