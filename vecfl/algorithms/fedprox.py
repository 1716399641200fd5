"""FedProx: Li et al., MLSys 2020, arXiv:1812.06127, Algorithm 2."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Unpack

import torch

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Algorithm, Metrics, Round, Server
from vecfl.algorithms.fedavg import averaging
from vecfl.algorithms.fedopt import Clients
from vecfl.algorithms.weights import Weights, by_examples
from vecfl.engine.rule import LocalRule
from vecfl.errors import InputError, is_integer
from vecfl.optim import ClientOptimizer, sgd
from vecfl.schedule import Batches
from vecfl.server_optim import ServerOptimizer


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
    fresh = following(start, 0, math.nan)

    def server_side(state: Server, sums: Aggregate, round: Round) -> Server:
        own = {name: state[name] for name in fresh}
        rest = {name: t for name, t in state.items() if name not in own}
        return plain.server(rest, sums, round) | own

    return replace(
        plain,
        name="fedprox_adaptive",
        facts={**plain.facts, "step": float(step), "patience": patience},
        init=lambda w, layout: plain.init(w, layout) | fresh,
        server=server_side,
        local=lambda state, rule: replace(rule, mu=float(state["mu"])),
        metrics=lambda state, sums, round: {"train/mu": float(state["mu"])},
        observe=lambda state, metrics: state | followed(state, metrics, step, patience),
    )


def followed(state: Server, metrics: Metrics, step: float, patience: int) -> Server:
    """What is kept for mu, after a round with these metrics."""
    loss, last = float(metrics["train/loss"]), float(state["mu_loss"])
    mu, falls = float(state["mu"]), int(state["mu_falls"])
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
        "mu": torch.tensor(mu, dtype=torch.float64),
        "mu_falls": torch.tensor(falls),
        "mu_loss": torch.tensor(loss, dtype=torch.float64),
    }
