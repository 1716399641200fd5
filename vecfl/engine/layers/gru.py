"""The time loop of a GRU of S clients (Cho et al., EMNLP 2014), there and back."""

import torch
from torch import Tensor


def forward(
    gates: Tensor, w: Tensor, b: Tensor | None, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Outputs [S, T, B, H], their last (a GRU has no cell), and what `backward` needs.

    gates  what the input gives to reset, update and new, [S, T, B, 3 H]; they are overwritten
    w, b   of the recurrent step, [S, 3 H, H] and [S, 3 H] or None
    h      the state before the first step, [S, B, H]; c is not read
    """
    clients, length, batch, _ = gates.shape
    size = h.shape[-1]
    hidden = h.new_empty(clients, length + 1, batch, size)
    hidden[:, 0] = h
    again = h.new_empty(clients, length, batch, size)  # what the recurrent step gives to new
    for t in range(length):
        before, gate = hidden[:, t], gates[:, t]
        own = torch.bmm(before, w.mT)
        if b is not None:
            own += b.unsqueeze(1)
        gate[..., : 2 * size].add_(own[..., : 2 * size]).sigmoid_()
        again[:, t] = own[..., 2 * size :]
        r, z, n = gate.chunk(3, -1)
        n.addcmul_(r, again[:, t]).tanh_()
        torch.lerp(n, before, z, out=hidden[:, t + 1])
    return hidden[:, 1:].contiguous(), hidden[:, -1].clone(), (gates, again, hidden)


def backward(
    saved: tuple[Tensor, ...], w: Tensor, grad: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of gates, of the recurrent sums, and of the first h.

    grad [S, T, B, H] of the outputs. All that does not wait for the step behind is computed for
    all steps at once.
    """
    gates, again, hidden = saved
    r, z, n = gates.unflatten(-1, (3, -1)).unbind(-2)
    new = (1 - z) * (1 - n * n)
    reset = new * again * r * (1 - r)
    update = (hidden[:, :-1] - n) * z * (1 - z)
    factors = torch.stack((reset, update, new * r), -2)  # of the gradient of h
    whole, sums = torch.empty_like(grad), factors.flatten(-2)
    dh = grad[:, -1]
    for t in reversed(range(grad.shape[1])):
        whole[:, t] = dh
        factors[:, t].mul_(dh.unsqueeze(-2))
        dh = torch.baddbmm(dh * z[:, t], sums[:, t], w)
        if t:
            dh += grad[:, t - 1]
    size = 2 * grad.shape[-1]
    of_gates = torch.cat((sums[..., :size], whole * new), -1)
    return of_gates, sums, dh, None
