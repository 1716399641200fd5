"""Client optimizers on rows [R, P].

A client optimizer moves every row by itself, with the row's own state and step count, as
`torch.optim` would move that client's model; R rows are all slots, or one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vecfl.errors import InputError


@dataclass
class Rows:
    """Views of R rows of the slots; lists run over parameters, tensors are [R, *shape].

    w      the parameters; state: the optimizer's tensors; bias: the correction, or None
    total  the accumulated gradient sum, and `count` [R] its weight; None: nothing accumulates
    steps  optimizer steps that each row has made, float32 [R]; None: the optimizer does not count
    gradients  float64 [R, 3]: number, sum and sum of squares of the entries of all gradients; None:
           nobody asks
    """

    w: list[Tensor]
    state: list[list[Tensor]]
    bias: list[Tensor] | None
    total: list[Tensor] | None
    count: Tensor | None
    steps: Tensor | None
    gradients: Tensor | None = None

    @cached_property
    def apart(self) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
        """w, state and steps as lists over (parameter, row): what fused optimizers take."""
        w = [row for t in self.w for row in t.unbind()]
        state = [[row for t in tensors for row in t.unbind()] for tensors in self.state]
        assert self.steps is not None
        return w, state, list(self.steps.unbind()) * len(self.w)


@dataclass(frozen=True)
class ClientOptimizer:
    """`step_(rows, grads, lr)` moves rows in place by gradients [R, *shape].

    states  tensors [S, trainable] that it keeps; counts: whether it needs `Rows.steps`
    plain   whether all it does is w <- w - lr g
    """

    name: str
    states: int
    step_: Callable[[Rows, list[Tensor], float], None] = field(repr=False)
    counts: bool = False
    plain: bool = False


def sgd() -> ClientOptimizer:
    """w <- w - lr g."""

    def step_(rows: Rows, grads: list[Tensor], lr: float) -> None:
        torch._foreach_add_(rows.w, grads, alpha=-lr)

    return ClientOptimizer("sgd", 0, step_, plain=True)


def momentum(beta: float = 0.9, nesterov: bool = False) -> ClientOptimizer:
    """v <- beta v + g; w <- w - lr v, or with Nesterov's look-ahead w <- w - lr (g + beta v).

    Sutskever et al., ICML 2013, in the form of `torch.optim.SGD` without dampening.
    """
    _check("momentum(beta)", beta)

    def step_(rows: Rows, grads: list[Tensor], lr: float) -> None:
        (velocity,) = rows.state
        torch._foreach_mul_(velocity, beta)
        torch._foreach_add_(velocity, grads)
        ahead = torch._foreach_add(grads, velocity, alpha=beta) if nesterov else velocity
        torch._foreach_add_(rows.w, ahead, alpha=-lr)

    return ClientOptimizer("nesterov" if nesterov else "momentum", 1, step_)


def adam(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> ClientOptimizer:
    """Adam with bias correction (Kingma and Ba, ICLR 2015, Algorithm 1), by the row's own step."""
    return _adam("adam", betas, eps, 0.0, torch._fused_adam_)


def adamw(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
) -> ClientOptimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, Algorithm 2)."""
    return _adam("adamw", betas, eps, weight_decay, torch._fused_adamw_)


def _adam(
    name: str, betas: tuple[float, float], eps: float, weight_decay: float, fused_: Callable
) -> ClientOptimizer:
    for beta in betas:
        _check(f"{name}(betas)", beta)

    def step_(rows: Rows, grads: list[Tensor], lr: float) -> None:
        assert rows.steps is not None
        rows.steps += 1
        w, (mean, square), steps = rows.apart
        # fused_ walks memory: a gradient that is laid out otherwise than w would be misread
        parts = [row for g in grads for row in g.contiguous().unbind()]
        fused_(
            w,
            parts,
            mean,
            square,
            [],
            steps,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return ClientOptimizer(name, 2, step_, counts=True)


def keep_gradient() -> ClientOptimizer:
    """Leaves the model where it is and keeps the last gradient as its state (for FedSGD)."""

    def step_(rows: Rows, grads: list[Tensor], lr: float) -> None:
        torch._foreach_copy_(rows.state[0], grads)

    return ClientOptimizer("keep_gradient", 1, step_)


def _check(what: str, value: float) -> None:
    if not 0 <= value < 1:
        raise InputError(f"{what} must be in [0, 1), not {value}")
