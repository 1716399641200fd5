"""Norms of S clients: examples are normalised by torch, only gain and shift are a client's own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecfl.engine.layers.base import StackedLayer


class Scale(torch.autograd.Function):
    """x w + b for x [S, ...] and w, b of as many axes, with 1 where they are the same for all.

    Where the layer has a learning rate when the backward pass runs, that itself moves w and b.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: StackedLayer
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.layer = weight.detach(), bias, layer
        return x * weight if bias is None else torch.addcmul(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,), weight, lr = ctx.saved_tensors, grads, ctx.weight, ctx.layer.lr
        above = grad * weight if ctx.needs_input_grad[0] else None
        of_weight = (grad * x).sum_to_size(weight.shape)
        of_bias = None if ctx.bias is None else grad.sum_to_size(weight.shape)
        if lr is None:
            return above, of_weight, of_bias, None
        weight.sub_(of_weight, alpha=lr)
        if of_bias is not None:
            ctx.bias.detach().sub_(of_bias, alpha=lr)
        return above, None, None, None


class StackedNorm(StackedLayer):
    """A norm of S clients: x [S * B, ...] to the same shape."""

    kind, least = "a norm", 2

    def __init__(self, layer: Any, at: Mapping[str, int]) -> None:
        super().__init__(layer, at)
        self.normalise, self.last = plain(layer), isinstance(layer, LAST)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.begin_call(x)
        assert weight is not None
        apart = self.normalise(x).unflatten(0, (len(weight), -1))
        bias = None if bias is None else self.beside(apart, bias)
        return Scale.apply(apart, self.beside(apart, weight), bias, self).flatten(0, 1)

    def beside(self, x: Tensor, p: Tensor) -> Tensor:
        """p [S, *shape] as it is multiplied with x [S, B, ...]: its last axes, or its channels."""
        ones = (1,) * (x.dim() - p.dim())
        shape = (*ones, *p.shape[1:]) if self.last else (1, *p.shape[1:], *ones[1:])
        return p.view(len(p), *shape)


LAST = (nn.LayerNorm, nn.RMSNorm)


def plain(m: Any) -> Callable[[Tensor], Tensor]:
    """What a norm does before gain and shift."""
    if isinstance(m, nn.LayerNorm):
        return partial(F.layer_norm, normalized_shape=m.normalized_shape, eps=m.eps)
    if isinstance(m, nn.RMSNorm):
        return partial(F.rms_norm, normalized_shape=m.normalized_shape, eps=m.eps)
    if isinstance(m, nn.GroupNorm):
        return partial(F.group_norm, num_groups=m.num_groups, eps=m.eps)
    return partial(F.instance_norm, eps=m.eps)
