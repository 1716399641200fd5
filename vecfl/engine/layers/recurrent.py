"""`nn.LSTM` and `nn.GRU` of S clients: only what waits for the step before is in the time loop.

Inputs are multiplied for all steps at once, and so are the gradients of all weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vecfl.engine.layers import gru, lstm
from vecfl.engine.layers.base import StackedLayer
from vecfl.errors import InputError


class Recurrence(torch.autograd.Function):
    """One direction of one layer: x [S, T, B, D], h and c [S, B, H] to outputs and the last cell.

    Where the layer has a learning rate when the backward pass runs, that itself moves the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, layer: "StackedRecurrent", *own: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        w_in, w, b_in, b = own
        assert w_in is not None and w is not None
        flat, rows = x.flatten(1, 2), w_in.mT
        if layer.cell is lstm and b_in is not None and b is not None:
            b_in, b = b_in + b, None  # one sum of four
        gates = torch.bmm(flat, rows) if b_in is None else torch.baddbmm(b_in[:, None], flat, rows)
        gates = gates.unflatten(1, x.shape[1:3])
        out, cell, ctx.kept = layer.cell.forward(gates, w, b, h, c)
        ctx.save_for_backward(x, h, out)
        ctx.own, ctx.layer = [None if p is None else p.detach() for p in own], layer
        ctx.set_materialize_grads(False)
        return out, cell

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, h, out), (w_in, w, b_in, b), lr = ctx.saved_tensors, ctx.own, ctx.layer.lr
        grad, last = grads
        grad = torch.zeros_like(out) if grad is None else grad
        of_gates, of_sums, of_h, of_c = ctx.layer.cell.backward(ctx.kept, w, grad, last)
        before = torch.cat((h.unsqueeze(1), out[:, :-1]), 1).flatten(1, 2)
        gates, sums = of_gates.flatten(1, 2), of_sums.flatten(1, 2)
        above = torch.bmm(gates, w_in).view(x.shape) if ctx.needs_input_grad[0] else None
        pairs = [(w_in, gates, x.flatten(1, 2)), (w, sums, before)]
        biases = [] if b is None else [(b_in, gates.sum(1)), (b, sums.sum(1))]
        if lr is None:
            found = [torch.bmm(g.mT, seen) for _, g, seen in pairs] + [g for _, g in biases]
            return above, of_h, of_c, None, *found, *[None] * (4 - len(found))
        for p, g, seen in pairs:
            p.baddbmm_(g.mT, seen, alpha=-lr)
        for p, g in biases:
            p.sub_(g, alpha=lr)
        return above, of_h, of_c, *[None] * 5


class StackedRecurrent(StackedLayer):
    """`nn.LSTM`, `nn.GRU` of S clients: x [S * B, T, D], or [T, S * B, D] without batch_first."""

    kind, least = "a recurrent layer", 3

    def __init__(self, layer: Any, at: Mapping[str, int]) -> None:
        self.names = tuple(name for names in layer._all_weights for name in names)
        super().__init__(layer, at)
        self.cell = lstm if isinstance(layer, nn.LSTM) else gru
        self.size, self.parts = layer.hidden_size, 4 if layer.bias else 2
        self.axis, self.directions = 0 if layer.batch_first else 1, 1 + layer.bidirectional

    @staticmethod
    def takes(layer: Any) -> bool:
        """Not with projections or dropout."""
        return not layer.proj_size and not layer.dropout

    def flatten_parameters(self) -> None:
        """Nothing: modules may call it, as they do for cuDNN."""

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        if not isinstance(x, Tensor):
            raise InputError(f"{self.kind} gets a {type(x).__name__}: it has no stacked form")
        own = self.begin_call(x, self.axis)
        starts, none = range(0, len(own), self.parts), (None,) * (4 - self.parts)
        layers = [(*own[i : i + self.parts], *none) for i in starts]
        x = x.unflatten(self.axis, (len(self.rows[0]), -1))  # [S, B, T, D] or [T, S, B, D]
        x = x.transpose(1, 2) if self.axis == 0 else x.transpose(0, 1)
        states, ends = self.states(x, hx, len(layers)), []
        for first in range(0, len(layers), self.directions):
            both = range(first, first + self.directions)
            found = [self.direction(x, states[i], i > first, *layers[i]) for i in both]
            x = torch.cat([out for out, _, _ in found], -1) if len(found) > 1 else found[0][0]
            ends += [end for _, *end in found]
        h, c = (torch.stack(end).flatten(1, 2) for end in zip(*ends, strict=True))
        x = x.transpose(1, 2).flatten(0, 1) if self.axis == 0 else x.transpose(0, 1).flatten(1, 2)
        return x.contiguous(), (h, c) if self.cell is lstm else h

    def direction(
        self, x: Tensor, state: tuple[Tensor, Tensor], turn: bool, *own: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs [S, T, B, H], and h and c behind the last step, or with `turn` the first."""
        x = x.flip(1) if turn else x.contiguous()
        out, cell = Recurrence.apply(x, *state, self, *own)
        return out.flip(1) if turn else out, out[:, -1], cell

    def states(self, x: Tensor, hx: Any, layers: int) -> list[tuple[Tensor, Tensor]]:
        """h and c [S, B, H] of each layer before the first step; x is [S, T, B, D]."""
        clients, _, batch, _ = x.shape
        if hx is None:
            zero = x.new_zeros(clients, batch, self.size)
            return [(zero, zero)] * layers
        given = []
        for state in hx if self.cell is lstm else (hx, hx):
            if state.shape != (layers, clients * batch, self.size):
                raise InputError(
                    f"{self.kind} gets a state {list(state.shape)}: no row for each example"
                )
            given.append(state.unflatten(1, (clients, batch)).unbind())
        return list(zip(*given, strict=True))
