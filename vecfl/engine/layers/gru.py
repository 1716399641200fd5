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
    turned = w.mT.contiguous()  # aligned, and read along its rows: twice as fast
    hidden = h.new_empty(clients, length + 1, batch, size)
    hidden[:, 0] = h
    sums = h.new_empty(clients, length, batch, 3 * size)
    if b is None:
        sums.zero_()
    else:
        sums.copy_(b[:, None, None])
    r, z, n = (gate.unbind(1) for gate in gates.chunk(3, -1))
    both, own = gates[..., : 2 * size].unbind(1), sums[..., : 2 * size].unbind(1)
    again, (before, *after) = sums[..., 2 * size :], hidden.unbind(1)
    for t, (total, new) in enumerate(zip(sums.unbind(1), again.unbind(1), strict=True)):
        total.baddbmm_(before, turned)
        both[t].add_(own[t]).sigmoid_()
        n[t].addcmul_(r[t], new).tanh_()
        before = torch.lerp(n[t], before, z[t], out=after[t])
    return hidden[:, 1:].contiguous(), before.clone(), (gates, again, hidden)


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
    sums, w = factors.flatten(-2), w.clone(memory_format=torch.contiguous_format)
    whole = grad.clone()  # the gradients of h, once those of later steps are added
    dh, keep, of_gates, totals = (x.unbind(1) for x in (whole, z, factors, sums))
    for t in reversed(range(len(dh))):
        of_gates[t].mul_(dh[t].unsqueeze(-2))
        if t:
            dh[t - 1].addcmul_(dh[t], keep[t]).baddbmm_(totals[t], w)
    first = torch.baddbmm(dh[0] * keep[0], totals[0], w)
    size = 2 * grad.shape[-1]
    return torch.cat((sums[..., :size], whole * new), -1), sums, first, None
