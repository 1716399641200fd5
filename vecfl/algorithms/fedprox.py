"""FedProx: Li et al., MLSys 2020, arXiv:1812.06127, Algorithm 2."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

import torch

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import OBSERVED, Algorithm, Metrics, Round, Server
from vecfl.algorithms.carrying import carrying
from vecfl.algorithms.fedavg import averaging
from vecfl.algorithms.fedopt import Clients
from vecfl.algorithms.weights import Weights, by_examples
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError, is_integer
from vecfl.optim import ClientOptimizer, sgd
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer

PREFIX = f"{OBSERVED}mu/"
MU, FALLS, LOSS = (PREFIX + name for name in ("value", "falls", "loss"))


def fedprox(
    *,
    lr: float | Callable[[int], float],
    mu: float,
    batches: Batches,
    optimizer: ClientOptimizer | None = None,
    clip: float | None = None,
    weights: Weights = by_examples,
    server: ServerOptimizer | None = None,
) -> Algorithm:
    """FedAvg whose clients minimise loss + mu/2 |w_k - w|^2; mu = 0 is FedAvg.

    The pull mu (w_k - w) is added to the gradient after clipping. Other arguments as in `fedavg`.
    """
    return averaging(
        "fedprox", LocalRule(optimizer or sgd(), batches, lr, clip, mu), weights, server
    )


def fedprox_adaptive(
    *,
    start: float = 0.0,
    step: float = 0.1,
    patience: int = 5,
    server: ServerOptimizer | None = None,
    **clients: Unpack[Clients],
) -> Algorithm:
    """FedProx whose mu follows the training loss (Li et al., MLSys 2020, Appendix C.3.3).

    The paper follows the global loss, over all clients, which a server does not see: `train/loss`,
    that of the round's cohort while it trains, stands in for it.

    start     the first mu: in the paper 1 for IID data, 0 for others
    step      added to mu when `train/loss` rises, taken off, down to 0, when it has fallen
              `patience` times in a row, which are then counted anew

    A round without a loss counts for nothing. `train/mu` tells the mu of the round; a loop of one's
    own calls `Simulation.observe` after each round. Other arguments as in `fedprox`.
    """
    if not (0 < step < math.inf and is_integer(patience) and patience >= 1):
        raise InputError(
            f"fedprox_adaptive(step={step}, patience={patience}): step must be positive and "
            "finite, patience an integer of at least 1"
        )
    plain = fedprox(mu=start, server=server, **clients)
    inner = carrying(plain, PREFIX, lambda w, layout: following(start, 0, math.nan))

    def metrics(state: Server, sums: Aggregate, round: Round) -> Metrics:
        return {**inner.metrics(state, sums, round), "train/mu": float(state[MU])}

    return replace(
        inner,
        name="fedprox_adaptive",
        facts={**plain.facts, "step": float(step), "patience": patience},
        local=lambda state, rule: replace(rule, mu=float(state[MU])),
        metrics=metrics,
        observe=lambda state, told: state | followed(state, told, step, patience),
    )


def followed(state: Server, metrics: Metrics, step: float, patience: int) -> Server:
    """What is kept for mu, after a round with these metrics."""
    loss, last = float(metrics["train/loss"]), float(state[LOSS])
    mu, falls = float(state[MU]), int(state[FALLS])
    if math.isnan(loss):
        return {}
    falls = falls + 1 if loss < last else 0
    if loss > last:
        mu += step
    if falls == patience:
        mu, falls = max(0.0, mu - step), 0
    return following(round(mu, 12), falls, loss)  # as many steps down as up lead back to 0


def following(mu: float, falls: int, loss: float) -> Server:
    """What is kept for mu: its value, how often the loss fell in a row, and the last loss."""
    return {
        MU: torch.tensor(mu, dtype=torch.float64),
        FALLS: torch.tensor(falls),
        LOSS: torch.tensor(loss, dtype=torch.float64),
    }
