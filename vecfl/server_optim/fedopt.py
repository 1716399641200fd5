"""The adaptive server optimizers of Reddi et al., ICLR 2021, arXiv:2003.00295."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vecfl.errors import at_least_zero, fraction, positive
from vecfl.layout import Layout
from vecfl.server_optim.base import (
    ServerOptimizer,
    Tensors,
    called,
    constant,
)


def adaptive(
    name: str,
    second: Callable[[Tensor, Tensor], Tensor],
    lr: float,
    beta1: float,
    tau: float,
    start: float | None,
) -> ServerOptimizer:
    """Algorithm 2 of Reddi et al., ICLR 2021, arXiv:2003.00295, as printed.

    m <- beta1 m + (1 - beta1) update; v <- second(v, update^2); w <- w - lr m / (sqrt(v) + tau),
    without bias correction. `start` is the first value of v, tau^2 where it is not given.
    """
    at_least_zero(f"{name}(lr)", lr)
    fraction(f"{name}(beta1)", beta1)
    positive(f"{name}(tau)", tau)
    first = tau**2 if start is None else start
    at_least_zero(f"{name}(start)", first)

    def init(w: Tensor) -> Tensors:
        return {"m": torch.zeros_like(w), "v": torch.full_like(w, first)}

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        m = beta1 * state["m"] + (1 - beta1) * update
        v = second(state["v"], update**2)
        return w - lr * m / (v.sqrt() + tau), {"m": m, "v": v}

    return ServerOptimizer(called(name, lr, beta1, tau, first), init, step, constant(lr))


def fedopt_adagrad(
    lr: float, beta1: float = 0.0, tau: float = 1e-3, start: float | None = None
) -> ServerOptimizer:
    """v <- v + update^2; arguments as in `adaptive`."""
    return adaptive("fedadagrad", torch.add, lr, beta1, tau, start)


def fedopt_adam(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    start: float | None = None,
) -> ServerOptimizer:
    """v <- beta2 v + (1 - beta2) update^2; arguments as in `adaptive`."""
    beta1, beta2 = betas
    fraction("fedadam(betas)", beta2)
    made = adaptive("fedadam", lambda v, u: beta2 * v + (1 - beta2) * u, lr, beta1, tau, start)
    return replace(made, name=f"{made.name}, {called('beta2', beta2)}")


def fedopt_yogi(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    start: float | None = None,
) -> ServerOptimizer:
    """v <- v - (1 - beta2) update^2 sign(v - update^2); arguments as in `adaptive`."""
    beta1, beta2 = betas
    fraction("fedyogi(betas)", beta2)
    second = lambda v, u: v - (1 - beta2) * u * (v - u).sign()  # noqa: E731
    made = adaptive("fedyogi", second, lr, beta1, tau, start)
    return replace(made, name=f"{made.name}, {called('beta2', beta2)}")
