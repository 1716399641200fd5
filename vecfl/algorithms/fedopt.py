"""FedAvg under a server optimizer that remembers.

FedAvgM: Hsu et al., arXiv:1909.06335. FedAdagrad, FedAdam, FedYogi: Reddi et al., ICLR 2021,
arXiv:2003.00295, Algorithm 2 as printed. Clients train as in `fedavg`, and any keyword argument of
`fedavg` but `server` goes to it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Required, TypedDict, Unpack

from vecfl.algorithms.base import Algorithm
from vecfl.algorithms.fedavg import fedavg
from vecfl.algorithms.weights import Weights
from vecfl.optim import ClientOptimizer
from vecfl.schedule import Batches
from vecfl.server_optim import (
    ServerOptimizer,
    fedopt_adagrad,
    fedopt_adam,
    fedopt_yogi,
    server_momentum,
)


class Clients(TypedDict, total=False):
    """The keyword arguments of `fedavg` that say how clients train and count."""

    lr: Required[float | Callable[[int], float]]
    batches: Required[Batches]
    optimizer: ClientOptimizer | None
    clip: float | None
    weights: Weights


def fedopt(name: str, server: ServerOptimizer, **clients: Unpack[Clients]) -> Algorithm:
    """FedAvg's clients under `server`, any server optimizer, called `name`."""
    return replace(fedavg(server=server, **clients), name=name)


def fedavgm(*, server_lr: float = 1.0, beta: float = 0.9, **clients: Unpack[Clients]) -> Algorithm:
    """Momentum on the server: m <- beta m + update; w <- w - server_lr m."""
    return fedopt("fedavgm", server_momentum(server_lr, beta), **clients)


def fedadagrad(
    *,
    server_lr: float,
    beta1: float = 0.0,
    tau: float = 1e-3,
    start: float | None = None,
    **clients: Unpack[Clients],
) -> Algorithm:
    """v <- v + update^2; w <- w - server_lr m / (sqrt(v) + tau).

    start  the first value of v, tau^2 where it is not given
    """
    return fedopt("fedadagrad", fedopt_adagrad(server_lr, beta1, tau, start), **clients)


def fedadam(
    *,
    server_lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    start: float | None = None,
    **clients: Unpack[Clients],
) -> Algorithm:
    """As `fedadagrad` with v <- beta2 v + (1 - beta2) update^2; no bias correction."""
    return fedopt("fedadam", fedopt_adam(server_lr, betas, tau, start), **clients)


def fedyogi(
    *,
    server_lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    start: float | None = None,
    **clients: Unpack[Clients],
) -> Algorithm:
    """As `fedadagrad` with v <- v - (1 - beta2) update^2 sign(v - update^2)."""
    return fedopt("fedyogi", fedopt_yogi(server_lr, betas, tau, start), **clients)
