"""`nn.Linear` of S clients: one batched product forward, two backward."""

from typing import Any

import torch
from torch import Tensor

from vecfl.engine.layers.base import StackedLayer


class Affine(torch.autograd.Function):
    """x W^T + b for rows x [S, n, in], W [S, out, in], b [S, out] or None.

    Where the layer has a learning rate when the backward pass runs, that itself moves W and b, and
    their gradients are None: W is read and written once, and no gradient of its size is made.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "StackedLinear"
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.layer = weight.detach(), bias, layer
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,), weight = ctx.saved_tensors, grads, ctx.weight
        above = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        lr = ctx.layer.lr
        if lr is None:
            bias = None if ctx.bias is None else grad.sum(1)
            return above, torch.bmm(grad.mT, x), bias, None
        weight.baddbmm_(grad.mT, x, alpha=-lr)
        if ctx.bias is not None:
            ctx.bias.detach().sub_(grad.sum(1), alpha=lr)
        return above, None, None, None


class StackedLinear(StackedLayer):
    """`nn.Linear` of S clients: x [S * B, ..., in] to [S * B, ..., out]."""

    kind = "a linear layer"
    least = 2

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.begin_call(x)
        assert weight is not None
        out = Affine.apply(x.reshape(len(weight), -1, x.shape[-1]), weight, bias, self)
        return out.view(*x.shape[:-1], out.shape[-1])
