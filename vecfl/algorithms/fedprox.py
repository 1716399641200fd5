"""FedProx: Li et al., MLSys 2020, arXiv:1812.06127, Algorithm 2."""

from collections.abc import Callable

from vecfl.algorithms.base import Algorithm
from vecfl.algorithms.fedavg import averaging
from vecfl.algorithms.weights import Weights, by_examples
from vecfl.engine.rule import LocalRule
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
