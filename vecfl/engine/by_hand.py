"""Simple layers of S clients, forward and backward by hand, in memory of their own."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from vecfl.engine.memory import Memory
from vecfl.modules import KeyedDropout

aten = torch.ops.aten
SIMPLE: dict[type, tuple[Callable, Callable]] = {  # out = f(x), and the gradient from that and out
    nn.ReLU: (
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda g, y: aten.threshold_backward.grad_input(g, y, 0, grad_input=g),
    ),
    nn.Tanh: (
        lambda x, out: torch.tanh(x, out=out),
        lambda g, y: aten.tanh_backward.grad_input(g, y, grad_input=g),
    ),
    nn.Sigmoid: (
        lambda x, out: torch.sigmoid(x, out=out),
        lambda g, y: aten.sigmoid_backward.grad_input(g, y, grad_input=g),
    ),
}


class Layer(Protocol):
    """A layer of S clients on one batch [S * B, ...], client after client.

    `backward` takes the gradient of the last `forward`, which it may overwrite, to that of x.
    """

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor) -> Tensor: ...


class Flatten:
    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return x.flatten(1)

    def backward(self, grad: Tensor) -> Tensor:
        return grad.view(self.shape)


class Elementwise:
    """A function whose derivative follows from its value."""

    def __init__(self, function: Callable, derivative: Callable) -> None:
        self.function, self.derivative, self.memory = function, derivative, Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.value = self.function(x, self.memory.like("value", x))
        return self.value

    def backward(self, grad: Tensor) -> Tensor:
        return self.derivative(grad, self.value)


class Dropout:
    def __init__(self, module: KeyedDropout) -> None:
        self.module, self.memory = module, Memory()

    def forward(self, x: Tensor) -> Tensor:
        self.mask = self.module.mask(x)
        return torch.mul(x, self.mask, out=self.memory.like("value", x))

    def backward(self, grad: Tensor) -> Tensor:
        return grad.mul_(self.mask)


class Linear:
    """x W^T + b for x [S * B, ..., in], and its gradients, or with `lr` a step of W and b.

    at     positions of weight and bias (None without) among the parameters
    rows   all parameters [S, *shape]; grads: where their gradients go
    first  whether nobody asks for the gradient of x
    """

    def __init__(self, weight: int, bias: int | None, first: bool) -> None:
        self.at, self.first, self.memory = (weight, bias), first, Memory()
        self.rows: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.lr: float | None = None

    def begin(self, rows: list[Tensor], grads: list[Tensor], lr: float | None) -> None:
        """Start a step at `rows`, of size `lr` or, if None, into `grads`."""
        self.grads, self.lr = grads, lr
        if rows is not self.rows:  # views cost as much as a small product
            self.rows, (weight, bias) = rows, self.at
            self.weight, self.across = rows[weight], rows[weight].mT
            self.bias = None if bias is None else rows[bias]
            self.above = None if bias is None else rows[bias].unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        self.shape, self.x = x.shape, x.reshape(len(self.weight), -1, x.shape[-1])
        out = self.memory.empty("out", (*self.x.shape[:2], self.weight.shape[1]), x)
        if self.above is None:
            torch.bmm(self.x, self.across, out=out)
        else:
            torch.baddbmm(self.above, self.x, self.across, out=out)
        return out.view(*x.shape[:-1], -1)

    def backward(self, grad: Tensor) -> Tensor:
        grad, below = grad.view(*self.x.shape[:2], -1), self.x  # a first layer's is not asked for
        if not self.first:
            below = self.memory.like("below", self.x)
            torch.bmm(grad, self.weight, out=below)
        if self.lr is not None:
            self.weight.baddbmm_(grad.mT, self.x, alpha=-self.lr)
            if self.bias is not None:
                self.bias.sub_(grad.sum(1), alpha=self.lr)
            return below.view(self.shape)
        weight, bias = self.at
        torch.bmm(grad.mT, self.x, out=self.grads[weight])
        if bias is not None:
            torch.sum(grad, 1, out=self.grads[bias])
        return below.view(self.shape)
