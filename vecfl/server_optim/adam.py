"""Adam and its relatives on the server, with bias correction, as `torch.optim` steps."""

import torch
from torch import Tensor

from vecfl.errors import at_least_zero, fraction
from vecfl.layout import Layout
from vecfl.server_optim.base import (
    ServerOptimizer,
    Tensors,
    called,
    constant,
)

Betas = tuple[float, float]


def server_adam(
    lr: float = 0.01, betas: Betas = (0.9, 0.999), eps: float = 1e-8
) -> ServerOptimizer:
    """Adam with bias correction on the pseudo-gradient.

    Kingma and Ba, ICLR 2015, arXiv:1412.6980, Algorithm 1. FedAdam has no correction:
    `fedopt_adam`.
    """
    check("server_adam", lr, betas, eps)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        state = moments(update, state, betas)
        return w - lr * corrected(state, betas, eps), state

    return ServerOptimizer(called("adam", lr, *betas, eps), counted, step, constant(lr))


def server_adamw(
    lr: float = 0.01,
    betas: Betas = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> ServerOptimizer:
    """Adam's step after w <- w - lr weight_decay w.

    Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101, Algorithm 2, with the decay times lr.
    """
    check("server_adamw", lr, betas, eps)
    at_least_zero("server_adamw(weight_decay)", weight_decay)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        state = moments(update, state, betas)
        return w - lr * (weight_decay * w + corrected(state, betas, eps)), state

    name = called("adamw", lr, *betas, eps, weight_decay)
    return ServerOptimizer(name, counted, step, constant(lr))


def server_adamax(
    lr: float = 0.01, betas: Betas = (0.9, 0.999), eps: float = 1e-8
) -> ServerOptimizer:
    """m <- beta1 m + (1 - beta1) update; v <- max(beta2 v, |update| + eps);
    w <- w - lr / (1 - beta1^t) m / v.

    Kingma and Ba, ICLR 2015, arXiv:1412.6980, section 7.1 and Algorithm 2, where eps is 0.
    """
    check("server_adamax", lr, betas, eps)

    def step(
        w: Tensor, update: Tensor, state: Tensors, layout: Layout, round: int
    ) -> tuple[Tensor, Tensors]:
        m = betas[0] * state["m"] + (1 - betas[0]) * update
        v = torch.maximum(betas[1] * state["v"], update.abs() + eps)
        t = state["t"] + 1
        return w - lr * divided(m / (1 - betas[0] ** t), v), {"m": m, "v": v, "t": t}

    return ServerOptimizer(called("adamax", lr, *betas, eps), counted, step, constant(lr))


def counted(w: Tensor) -> Tensors:
    """Two moments, and how many steps were taken."""
    return {"m": torch.zeros_like(w), "v": torch.zeros_like(w), "t": w.new_zeros(())}


def moments(update: Tensor, state: Tensors, betas: Betas) -> Tensors:
    """The next state: decaying means of the update and of its square."""
    m = betas[0] * state["m"] + (1 - betas[0]) * update
    v = betas[1] * state["v"] + (1 - betas[1]) * update**2
    return {"m": m, "v": v, "t": state["t"] + 1}


def corrected(state: Tensors, betas: Betas, eps: float) -> Tensor:
    """m / (sqrt(v) + eps), both without the bias of their start at zero."""
    m, v, t = state["m"], state["v"], state["t"]
    return divided(m / (1 - betas[0] ** t), (v / (1 - betas[1] ** t)).sqrt() + eps)


def divided(m: Tensor, scale: Tensor) -> Tensor:
    """m / scale, 0 where the scale is 0: a number whose updates were all 0 stays where it is."""
    return m / scale.where(scale > 0, torch.inf)


def check(name: str, lr: float, betas: Betas, eps: float) -> None:
    """InputError for a learning rate or an eps below 0, or a beta outside of [0, 1)."""
    at_least_zero(f"{name}(lr)", lr)
    at_least_zero(f"{name}(eps)", eps)
    for beta in betas:
        fraction(f"{name}(betas)", beta)
