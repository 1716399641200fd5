"""SGD on the server, with and without momentum."""

from torch import Tensor

from vecfl.errors import at_least_zero, fraction
from vecfl.layout import Layout
from vecfl.server_optim.base import (
    ServerOptimizer,
    Tensors,
    called,
    constant,
    zeros,
)


def server_sgd(lr: float = 1.0) -> ServerOptimizer:
    """w <- w - lr update. With lr = 1 the new model is the weighted mean of the clients' models."""
    at_least_zero("server_sgd(lr)", lr)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        return w - lr * update, state

    return ServerOptimizer(called("sgd", lr), zeros(), step, constant(lr))


def server_momentum(lr: float = 1.0, beta: float = 0.9) -> ServerOptimizer:
    """m <- beta m + update; w <- w - lr m: FedAvgM of Hsu et al., arXiv:1909.06335, section 4."""
    at_least_zero("server_momentum(lr)", lr)
    fraction("server_momentum(beta)", beta)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        m = beta * state["m"] + update
        return w - lr * m, {"m": m}

    return ServerOptimizer(called("momentum", lr, beta), zeros("m"), step, constant(lr))
