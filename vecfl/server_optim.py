"""Server optimizers: how the model moves by the aggregated pseudo-gradient, in float64.

The pseudo-gradient `update` is the weighted mean of w - w_k, so a server steps against it, as an
optimizer steps against a gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecfl.errors import InputError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ServerOptimizer:
    """`init(w) -> state` and `step(w, update, state) -> (w, state)`, all float64 [trainable]."""

    name: str
    init: Callable[[Tensor], Tensors] = field(repr=False)
    step: Callable[[Tensor, Tensor, Tensors], tuple[Tensor, Tensors]] = field(repr=False)


def server_sgd(lr: float = 1.0) -> ServerOptimizer:
    """w <- w - lr update. With lr = 1 the new model is the weighted mean of the clients' models."""
    _at_least_zero("server_sgd(lr)", lr)
    return ServerOptimizer("sgd", lambda w: {}, lambda w, update, state: (w - lr * update, state))


def server_momentum(lr: float = 1.0, beta: float = 0.9) -> ServerOptimizer:
    """m <- beta m + update; w <- w - lr m: FedAvgM of Hsu et al., arXiv:1909.06335, section 4."""
    _at_least_zero("server_momentum(lr)", lr)
    _fraction("server_momentum(beta)", beta)

    def step(w: Tensor, update: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        m = beta * state["m"] + update
        return w - lr * m, {"m": m}

    return ServerOptimizer("momentum", lambda w: {"m": torch.zeros_like(w)}, step)


def server_adam(
    lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> ServerOptimizer:
    """Adam with bias correction on the pseudo-gradient, as `torch.optim.Adam` steps.

    Kingma and Ba, ICLR 2015, Algorithm 1. FedAdam has no correction: `fedopt_adam`.
    """
    _at_least_zero("server_adam(lr)", lr)
    for beta in betas:
        _fraction("server_adam(betas)", beta)

    def init(w: Tensor) -> Tensors:
        return {"m": torch.zeros_like(w), "v": torch.zeros_like(w), "t": w.new_zeros(())}

    def step(w: Tensor, update: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        m = betas[0] * state["m"] + (1 - betas[0]) * update
        v = betas[1] * state["v"] + (1 - betas[1]) * update**2
        t = state["t"] + 1
        root = (v / (1 - betas[1] ** t)).sqrt() + eps
        return w - lr * m / (1 - betas[0] ** t) / root, {"m": m, "v": v, "t": t}

    return ServerOptimizer("adam", init, step)


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
    _at_least_zero(f"{name}(lr)", lr)
    _fraction(f"{name}(beta1)", beta1)
    if not tau > 0:
        raise InputError(f"{name}(tau) must be positive, not {tau}")
    first = tau**2 if start is None else start
    _at_least_zero(f"{name}(start)", first)

    def init(w: Tensor) -> Tensors:
        return {"m": torch.zeros_like(w), "v": torch.full_like(w, first)}

    def step(w: Tensor, update: Tensor, state: Tensors) -> tuple[Tensor, Tensors]:
        m = beta1 * state["m"] + (1 - beta1) * update
        v = second(state["v"], update**2)
        return w - lr * m / (v.sqrt() + tau), {"m": m, "v": v}

    return ServerOptimizer(name, init, step)


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
    _fraction("fedadam(betas)", beta2)
    return adaptive("fedadam", lambda v, u: beta2 * v + (1 - beta2) * u, lr, beta1, tau, start)


def fedopt_yogi(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
    start: float | None = None,
) -> ServerOptimizer:
    """v <- v - (1 - beta2) update^2 sign(v - update^2); arguments as in `adaptive`."""
    beta1, beta2 = betas
    _fraction("fedyogi(betas)", beta2)
    return adaptive(
        "fedyogi", lambda v, u: v - (1 - beta2) * u * (v - u).sign(), lr, beta1, tau, start
    )


def _at_least_zero(what: str, value: float) -> None:
    if not value >= 0:
        raise InputError(f"{what} must be at least 0, not {value}")


def _fraction(what: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{what} must be in [0, 1), not {value}")
