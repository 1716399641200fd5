"""LSTM and GRU layers that many clients can train at the same time.

They are `nn.LSTM` and `nn.GRU`, with the same arguments, parameters and results to rounding, whose
kernels torch.func takes one client at a time, with a warning on a CPU and not at all on a GPU.
Under torch.func, time is a loop of products with the recurrent weights of all clients; what belongs
to no single step, the product with the inputs and the gradients of all weights, is one product over
all steps. On a CPU clients train a GRU that way in the loop backend, too: torch has no fused kernel
of it there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
once_differentiable = torch.autograd.function.once_differentiable


class LSTMSteps(torch.autograd.Function):
    """The steps of an LSTM layer: Hochreiter and Schmidhuber 1997, with forget gates.

    gates [T, B, 4H] are what inputs and biases give (input, forget, cell, output), h and c [B, H],
    weight [4H, H]; the results are outputs [T, B, H] and the last c. The two behind them, the gates
    and the c of all steps, are for the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        w, out, full, cells = weight.t().contiguous(), [], [], [c]
        for step in gates.unbind():
            full.append(torch.addmm(step, h, w))
            i, f, g, o = full[-1].chunk(4, -1)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = o.sigmoid() * c.tanh()
            out.append(h)
            cells.append(c)
        return torch.stack(out), c, torch.stack(full), torch.stack(cells)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        (_, h, _, weight), (out, _, full, cells) = inputs, output
        ctx.mark_non_differentiable(full, cells)
        ctx.save_for_backward(h, weight, out, full, cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, dc: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        h, weight, out, full, cells = ctx.saved_tensors
        i, f, g, o = full.chunk(4, -1)
        i, f, g, o, s = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), cells[1:].tanh()
        # What the gradients by c (three gates) and by h (one) are multiplied by, [T, B, 4, H].
        by = (g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g), s * o * (1 - o))
        factor, to_c = torch.stack(by, 2).unbind(), (o * (1 - s * s)).unbind()
        forget, grads, dh = f.unbind(), [], torch.zeros_like(h)
        for t, step in reversed(list(enumerate(above.unbind()))):
            dh = step + dh
            dc = torch.addcmul(dc, dh, to_c[t])
            grads.append((torch.stack((dc, dc, dc, dh), 1) * factor[t]).flatten(1))
            dh, dc = grads[-1] @ weight, dc * forget[t]
        d_gates = torch.stack(grads[::-1])
        return d_gates, dh, dc, recurrent_weight(d_gates, h, out)


class GRUSteps(torch.autograd.Function):
    """The steps of a GRU layer: Cho et al. 2014, with the reset behind the product as in cuDNN.

    gates [T, B, 3H] are what inputs and their biases give (reset, update, new), h [B, H],
    weight [3H, H], bias [3H]; the result is outputs [T, B, H]. The three behind it are for the
    backward pass: reset and update, new, and what h gives to new.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        w, size = weight.t().contiguous(), h.shape[-1]
        out, switches, news, pulls = [], [], [], []
        for one, two in zip(*(g.unbind() for g in gates.split((2 * size, size), -1)), strict=True):
            first, second = torch.addmm(bias, h, w).split((2 * size, size), -1)
            switches.append((one + first).sigmoid())
            r, z = switches[-1].chunk(2, -1)
            n = torch.addcmul(two, r, second).tanh()
            h = n + z * (h - n)
            out.append(h)
            news.append(n)
            pulls.append(second)
        return torch.stack(out), torch.stack(switches), torch.stack(news), torch.stack(pulls)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        (_, h, weight, _), (out, *rest) = inputs, output
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(h, weight, out, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        h, weight, out, switches, n, pull = ctx.saved_tensors
        r, z = switches.chunk(2, -1)
        before, to_new = torch.cat((h.unsqueeze(0), out[:-1])), (1 - z) * (1 - n * n)
        # What the gradient by h is multiplied by on its way to the gates, [T, B, 3, H].
        by = (to_new * pull * r * (1 - r), (before - n) * z * (1 - z), to_new * r)
        factor, keep = torch.stack(by, 2).unbind(), z.unbind()
        grads, of_h, dh = [], [], torch.zeros_like(h)
        for t, step in reversed(list(enumerate(above.unbind()))):
            dh = step + dh
            of_h.append(dh)
            grads.append((factor[t] * dh.unsqueeze(1)).flatten(1))
            dh = torch.addmm(dh * keep[t], grads[-1], weight)
        d_gates = torch.stack(grads[::-1])  # those of the products with h
        d_inputs = torch.cat((d_gates[..., : -h.shape[-1]], torch.stack(of_h[::-1]) * to_new), -1)
        return d_inputs, dh, recurrent_weight(d_gates, h, out), d_gates.sum((0, 1))


def recurrent_weight(grads: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """Gradient of the recurrent weight, by those of the gates [T, B, G] and the h before them."""
    before = torch.cat((h.unsqueeze(0), out[:-1]))
    return grads.flatten(0, 1).t() @ before.flatten(0, 1)


def vectorised(module: nn.RNNBase, x: Tensor) -> bool:
    """Whether torch.func calls the module now, for many inputs or weights."""
    weight: Any = module.weight_hh_l0
    return is_wrapped(x) or is_wrapped(weight)


def known(module: nn.RNNBase, x: Any) -> bool:
    """Whether the steps here can do it: batches, one direction, no dropout, first derivatives."""
    other = module.bidirectional or module.proj_size or (module.dropout and module.training)
    transforms = torch._C._functorch.get_interpreter_stack() or []
    first = sum(one.key() == torch._C._functorch.TransformType.Grad for one in transforms) < 2
    return isinstance(x, Tensor) and x.dim() == 3 and first and not other


def layers(module: nn.RNNBase, x: Tensor, starts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs of the last layer, and the last state of all layers; starts [L, B, H] of each kind.

    x and the outputs have the module's layout.
    """
    x = x.transpose(0, 1) if module.batch_first else x
    ends: list[list[Tensor]] = []
    for k in range(module.num_layers):
        weights: list[Any] = [getattr(module, f"{name}_l{k}", None) for name in WEIGHTS]
        x, *end = layer(x, [start[k] for start in starts], *weights)
        ends.append(end)
    last = [torch.stack(end) for end in zip(*ends, strict=True)]
    return x.transpose(0, 1) if module.batch_first else x, *last


def layer(
    x: Tensor, start: list[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any
) -> tuple[Tensor, ...]:
    """Outputs [T, B, H] of inputs x [T, B, I], and the last state; a GRU has one tensor in it."""
    is_lstm = len(start) == 2
    bias = b_ih + b_hh if is_lstm and b_ih is not None else b_ih
    gates = F.linear(x.flatten(0, 1), w_ih, bias).unflatten(0, x.shape[:2])
    if is_lstm:
        out, c, *_ = LSTMSteps.apply(gates, *start, w_hh)
        return out, out[-1], c
    none = w_hh.new_zeros(len(w_hh)) if b_hh is None else b_hh
    out, *_ = GRUSteps.apply(gates, *start, w_hh, none)
    return out, out[-1]


def zeros(module: nn.RNNBase, x: Tensor) -> Tensor:
    """The first state [L, B, H]."""
    examples = x.shape[0 if module.batch_first else 1]
    return x.new_zeros(module.num_layers, examples, module.hidden_size)


class LSTM(nn.LSTM):
    """`nn.LSTM` that torch.func vectorises. Bidirectional, projected, packed or unbatched ones and
    second derivatives by torch.func go to torch's kernel in any case."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not known(self, input) or not vectorised(self, input):
            return super().forward(input, hx)
        h, c = (zeros(self, input),) * 2 if hx is None else hx
        out, h, c = layers(self, input, (h, c))
        return out, (h, c)


class GRU(nn.GRU):
    """`nn.GRU` that torch.func vectorises, and that trains faster on a CPU: on one thread in half
    the time in batches of 4, by a fifth in those of 32. What `LSTM` leaves to torch's kernel, this
    does."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if known(self, input):
            trained = input.is_cpu and torch.is_grad_enabled()
            if trained or vectorised(self, input):
                return layers(self, input, (zeros(self, input) if hx is None else hx,))
        return super().forward(input, hx)
