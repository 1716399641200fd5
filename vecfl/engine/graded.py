"""Losses of a long batch, and their gradients at the output of the module."""

from collections.abc import Callable

import torch
from torch import Tensor

from vecfl.engine.memory import Memory
from vecfl.losses import IGNORED, Batch, Score, cross_entropy, labels

Graded = tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]


def by_graph(loss: Score, x: Tensor, batch: Batch) -> Graded:
    """Loss sums and weights [n] of the output x, and their gradient at x, weighted by [n]."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        value, weight = loss(x, batch)

    def backward(outer: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(value, x, outer)
        return grad.contiguous()

    return value.detach(), weight, backward


class CrossEntropy:
    """`vecfl.cross_entropy` of one label an example, and its gradient."""

    def __init__(self) -> None:
        self.memory = Memory()

    def __call__(self, x: Tensor, batch: Batch) -> Graded:
        y = labels(x, batch)
        if y.dim() > 1:
            return by_graph(cross_entropy, x, batch)
        counted = None
        if not y.is_cpu or int(y.min()) < 0:  # asking a GPU would wait for it
            counted, y = y != IGNORED, y.clamp(min=0)
        target = y.unsqueeze(1)
        powers = torch.sub(x, x.amax(1, keepdim=True), out=self.memory.like("powers", x))
        chosen = powers.gather(1, target)
        total = powers.exp_().sum(1, keepdim=True)
        value = total.log().sub_(chosen).squeeze(1)
        if counted is not None:
            value = value.where(counted, 0)

        def backward(outer: Tensor) -> Tensor:
            outer = (outer if counted is None else outer * counted).unsqueeze(1)
            return powers.mul_(outer / total).scatter_add_(1, target, -outer)

        return value, None, backward
