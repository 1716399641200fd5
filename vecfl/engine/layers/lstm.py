"""The time loop of an LSTM of S clients (Hochreiter and Schmidhuber, 1997), there and back."""

import torch
from torch import Tensor


def forward(
    gates: Tensor, w: Tensor, b: Tensor | None, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Outputs [S, T, B, H], the last cell [S, B, H], and what `backward` needs.

    gates  what the input gives to input, forget, cell and output, [S, T, B, 4 H]; overwritten
    w, b   of the recurrent step, [S, 4 H, H] and [S, 4 H]; b is None for LSTMs: it stands in gates
    h, c   the state before the first step, [S, B, H]
    """
    clients, length, batch, _ = gates.shape
    size, turned = h.shape[-1], w.mT.contiguous()  # aligned, and read along its rows: twice as fast
    out = h.new_empty(clients, length, batch, size)
    cells = h.new_empty(clients, length + 1, batch, size)
    cells[:, 0] = c
    i, f, g, o = (gate.unbind(1) for gate in gates.chunk(4, -1))
    both, (before, *after) = gates[..., : 2 * size].unbind(1), cells.unbind(1)
    for t, (sums, y) in enumerate(zip(gates.unbind(1), out.unbind(1), strict=True)):
        sums.baddbmm_(h, turned)
        both[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        torch.mul(f[t], before, out=after[t])
        before = after[t].addcmul_(i[t], g[t])
        torch.tanh(before, out=y)
        h = y.mul_(o[t])
    return out, before.clone(), (gates, cells)


def backward(
    saved: tuple[Tensor, ...], w: Tensor, grad: Tensor, last: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, of the recurrent sums (the same), and of the first h and c.

    grad [S, T, B, H] of the outputs, last [S, B, H] of the last cell. All that does not wait for
    the step behind is computed for all steps at once.
    """
    gates, cells = saved
    i, f, g, o = gates.unflatten(-1, (4, -1)).unbind(-2)
    squashed = cells[:, 1:].tanh()
    of_cell = o * (1 - squashed * squashed)  # what h hands on to c
    factors = torch.stack(
        (
            g * i * (1 - i),
            cells[:, :-1] * f * (1 - f),
            i * (1 - g * g),
            squashed * o * (1 - o),
        ),
        -2,
    )  # of the gradient of c, the last of that of h
    dc = torch.zeros_like(cells[:, 0]) if last is None else last.clone()
    dh, w = grad.clone().unbind(1), w.clone(memory_format=torch.contiguous_format)
    sums, keep, hand_on = factors.flatten(-2), f.unbind(1), of_cell.unbind(1)
    of_gates, by_cell = sums.unbind(1), factors[..., :3, :].unbind(1)
    by_output = factors[..., 3, :].unbind(1)
    for t in reversed(range(len(dh))):
        dc.addcmul_(dh[t], hand_on[t])
        by_cell[t].mul_(dc.unsqueeze(-2))
        by_output[t].mul_(dh[t])
        dc.mul_(keep[t])
        if t:
            dh[t - 1].baddbmm_(of_gates[t], w)
    return sums, sums, torch.bmm(of_gates[0], w), dc
