"""`nn.Embedding` of S clients."""

from typing import Any

import torch
from torch import Tensor

from vecfl.engine.layers.base import StackedLayer
from vecfl.errors import InputError


class Lookup(torch.autograd.Function):
    """Rows `index` [S, n] of W [S, V, D], each client's of its own: [S, n, D].

    Where the layer has a learning rate when the backward pass runs, that itself moves these rows.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, layer: "StackedEmbedding") -> Tensor:
        clients = torch.arange(len(weight), device=index.device).unsqueeze(1)
        ctx.save_for_backward(clients, index)
        ctx.weight, ctx.layer = weight.detach(), layer
        return weight[clients, index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (clients, index), (grad,), layer = ctx.saved_tensors, grads, ctx.layer
        if layer.padding_idx is not None:
            grad = grad * (index != layer.padding_idx).unsqueeze(-1)
        # Unlike index_add_, it adds up what meets in a row in a fixed order on a GPU, too.
        if layer.lr is None:
            into = torch.zeros_like(ctx.weight, memory_format=torch.contiguous_format)
            return None, into.index_put_((clients, index), grad, accumulate=True), None
        ctx.weight.index_put_((clients, index), grad * -layer.lr, accumulate=True)
        return None, None, None


class StackedEmbedding(StackedLayer):
    """`nn.Embedding` of S clients: indices [S * B, ...] to [S * B, ..., D]."""

    kind = "an embedding"
    names = ("weight",)

    padding_idx: int | None

    @staticmethod
    def takes(layer: Any) -> bool:
        """InputError for options under which a row is no function of its own client's batch."""
        for name in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(layer, name):
                raise InputError(f"an embedding with {name} has no stacked form: use loop")
        return True

    def forward(self, index: Tensor) -> Tensor:
        (weight,) = self.begin_call(index)
        assert weight is not None
        out = Lookup.apply(index.reshape(len(weight), -1), weight, self)
        return out.view(*index.shape, weight.shape[-1])
