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
    size = h.shape[-1]
    out = h.new_empty(clients, length, batch, size)
    cells = h.new_empty(clients, length + 1, batch, size)
    cells[:, 0] = c
    steps = zip(gates.unbind(1), out.unbind(1), cells.unbind(1), cells.unbind(1)[1:], strict=False)
    for gate, y, before, after in steps:
        gate.baddbmm_(h, w.mT)
        gate[..., : 2 * size].sigmoid_()
        gate[..., 2 * size : 3 * size].tanh_()
        gate[..., 3 * size :].sigmoid_()
        i, f, g, o = gate.chunk(4, -1)
        torch.mul(f, before, out=after)
        after.addcmul_(i, g)
        torch.tanh(after, out=y)
        h = y.mul_(o)
    return out, cells[:, -1].clone(), (gates, cells)


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
    dh = grad[:, -1]
    sums = factors.flatten(-2)
    for t in reversed(range(grad.shape[1])):
        dc.addcmul_(dh, of_cell[:, t])
        factors[:, t, :, :3].mul_(dc.unsqueeze(-2))
        factors[:, t, :, 3].mul_(dh)
        dc.mul_(f[:, t])
        if t:
            dh = torch.baddbmm(grad[:, t - 1], sums[:, t], w)
    return sums, sums, torch.bmm(sums[:, 0], w), dc
