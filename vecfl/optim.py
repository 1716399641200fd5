"""Client optimizers on rows [R, P].

A client optimizer moves every row by itself, with the row's own state and step count, as
`torch.optim` would move that client's model; R rows are all slots, or one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vecfl.errors import at_least_zero, fraction
from vecfl_kernels import adam_, momentum_


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
    numbers  that it was made with: runs are told apart by them
    beta    where all it does is v <- beta v + g; w <- w - lr v; None: it does something else
    """

    name: str
    states: int
    step_: Callable[[Rows, list[Tensor], "Rate"], None] = field(repr=False)
    counts: bool = False
    beta: float | None = None
    numbers: tuple[float, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether all it does is w <- w - lr g."""
        return self.beta == 0


Tensors = list[Tensor] | tuple[Tensor, ...]
Rate = float | Tensor  # a tensor [] on the rows' device, where a captured step is replayed


def move_(w: list[Tensor], by: Tensors, lr: Rate) -> None:
    """w <- w - lr by."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(w, torch._foreach_mul(by, lr))
    else:
        torch._foreach_add_(w, by, alpha=-lr)


def sgd(weight_decay: float = 0.0) -> ClientOptimizer:
    """w <- w - lr g; here and below g has weight_decay * w added, the gradient of an L2 penalty."""
    at_least_zero("sgd(weight_decay)", weight_decay)

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        move_(rows.w, decayed(rows, grads, weight_decay), lr)

    return ClientOptimizer(
        "sgd", 0, step_, beta=None if weight_decay else 0.0, numbers=(weight_decay,)
    )


def momentum(
    beta: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> ClientOptimizer:
    """v <- beta v + g; w <- w - lr v, or with Nesterov's look-ahead w <- w - lr (g + beta v).

    Sutskever et al., ICML 2013, in the form of `torch.optim.SGD` without dampening.
    """
    fraction("momentum(beta)", beta)
    at_least_zero("momentum(weight_decay)", weight_decay)

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        momentum_(rows, decayed(rows, grads, weight_decay), lr, beta, nesterov)

    numbers = beta, weight_decay
    if nesterov:
        return ClientOptimizer("nesterov", 1, step_, numbers=numbers)
    return ClientOptimizer(
        "momentum", 1, step_, beta=None if weight_decay else beta, numbers=numbers
    )


def rmsprop(
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
) -> ClientOptimizer:
    """v <- alpha v + (1 - alpha) g^2; w <- w - lr g / (sqrt(v) + eps), as `torch.optim.RMSprop`.

    centered  v less the square of the mean of g, which decays by alpha, too (Graves,
              arXiv:1308.0850, section 4.2); momentum: b <- momentum b + g / (...), w <- w - lr b

    Tieleman and Hinton, Neural networks for machine learning, lecture 6.5, 2012.
    """
    fraction("rmsprop(alpha)", alpha)
    fraction("rmsprop(momentum)", momentum)
    at_least_zero("rmsprop(eps)", eps)
    at_least_zero("rmsprop(weight_decay)", weight_decay)

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        square, *more = rows.state
        grads = decayed(rows, grads, weight_decay)
        torch._foreach_mul_(square, alpha)
        torch._foreach_addcmul_(square, grads, grads, value=1 - alpha)
        scale = square
        if centered:
            torch._foreach_lerp_(more[0], grads, 1 - alpha)
            scale = list(torch._foreach_addcmul(square, more[0], more[0], value=-1))
            torch._foreach_clamp_min_(scale, 0)  # rounding may bring it below
        scale = list(torch._foreach_sqrt(scale))
        torch._foreach_add_(scale, eps)
        if momentum:
            torch._foreach_mul_(more[-1], momentum)
            torch._foreach_addcdiv_(more[-1], grads, scale)
            move_(rows.w, more[-1], lr)
        else:
            move_by_ratio_(rows.w, grads, scale, lr)

    numbers = alpha, eps, momentum, centered, weight_decay
    return ClientOptimizer("rmsprop", 1 + centered + (momentum > 0), step_, numbers=numbers)


def adagrad(eps: float = 1e-10, weight_decay: float = 0.0) -> ClientOptimizer:
    """v <- v + g^2; w <- w - lr g / (sqrt(v) + eps), as `torch.optim.Adagrad` from v = 0.

    Duchi et al., JMLR 2011, Figure 1 with a diagonal matrix.
    """
    at_least_zero("adagrad(eps)", eps)
    at_least_zero("adagrad(weight_decay)", weight_decay)

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        (total,), grads = rows.state, decayed(rows, grads, weight_decay)
        torch._foreach_addcmul_(total, grads, grads)
        scale = torch._foreach_sqrt(total)
        torch._foreach_add_(scale, eps)
        move_by_ratio_(rows.w, grads, scale, lr)

    return ClientOptimizer("adagrad", 1, step_, numbers=(eps, weight_decay))


def adam(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> ClientOptimizer:
    """Adam with bias correction (Kingma and Ba, ICLR 2015, Algorithm 1), by the row's own step."""
    return _adam("adam", betas, eps, weight_decay, torch._fused_adam_)


def adamw(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
) -> ClientOptimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, Algorithm 2)."""
    return _adam("adamw", betas, eps, weight_decay, torch._fused_adamw_)


def _adam(
    name: str, betas: tuple[float, float], eps: float, weight_decay: float, fused_: Callable
) -> ClientOptimizer:
    for beta in betas:
        fraction(f"{name}(betas)", beta)
    at_least_zero(f"{name}(eps)", eps)
    at_least_zero(f"{name}(weight_decay)", weight_decay)
    numbers = dict(beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        adam_(rows, grads, lr, fused_, **numbers)

    return ClientOptimizer(name, 2, step_, counts=True, numbers=tuple(numbers.values()))


def keep_gradient() -> ClientOptimizer:
    """Leaves the model where it is and keeps the last gradient as its state (for FedSGD)."""

    def step_(rows: Rows, grads: list[Tensor], lr: Rate) -> None:
        torch._foreach_copy_(rows.state[0], grads)

    return ClientOptimizer("keep_gradient", 1, step_)


def move_by_ratio_(w: list[Tensor], over: list[Tensor], under: Tensors, lr: Rate) -> None:
    """w <- w - lr over / under."""
    if isinstance(lr, Tensor):
        move_(w, torch._foreach_div(over, under), lr)
    else:
        torch._foreach_addcdiv_(w, over, under, value=-lr)


def decayed(rows: Rows, grads: list[Tensor], weight_decay: float) -> list[Tensor]:
    """The gradients of loss + weight_decay / 2 |w|^2."""
    if not weight_decay:
        return grads
    return list(torch._foreach_add(grads, rows.w, alpha=weight_decay))
