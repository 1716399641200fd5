"""`nn.Conv1d` and `nn.Conv2d` of S clients, by one of three formulations."""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecfl.engine.layers.base import StackedLayer

backward_of = torch.ops.aten.convolution_backward


class Form(NamedTuple):
    """Numbers of a convolution, one for each axis of space; it pads with zeros."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def out(self, space: torch.Size, kernel: torch.Size) -> list[int]:
        """The sizes of the output."""
        sizes = zip(space, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]


class Formulation(NamedTuple):
    """A convolution x [S, B, C, *space] with w [S, O, C / groups, *kernel], and its gradients.

    forward(x, w, b [S, O] or None, form) gives the output [S, B, O, *out]. backward(grad, x, w,
    form, into, alpha, above) adds alpha times the gradient of w to `into`, which may be w itself,
    and returns the gradient of x if `above`, else None.
    """

    forward: Callable[[Tensor, Tensor, Tensor | None, Form], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Form, Tensor, float, bool], Tensor | None]


def convolve(x: Tensor, w: Tensor, b: Tensor | None, form: Form, groups: int) -> Tensor:
    stride, padding, dilation, _ = form
    none = [0] * len(stride)
    return torch.convolution(x, w, b, stride, padding, dilation, False, none, groups)


def gradients(
    grad: Tensor, x: Tensor, w: Tensor, form: Form, groups: int, above: bool
) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, _ = form
    rest = stride, padding, dilation, False, [0] * len(stride), groups, (above, True, False)
    of_x, of_w, _ = backward_of(grad, x, w, None, *rest)
    return of_x, of_w


def each_forward(x: Tensor, w: Tensor, b: Tensor | None, form: Form) -> Tensor:
    biases = [None] * len(w) if b is None else b.unbind()
    parts = zip(x.unbind(), w.unbind(), biases, strict=True)
    return torch.stack([convolve(*part, form, form.groups) for part in parts])


def each_backward(
    grad: Tensor, x: Tensor, w: Tensor, form: Form, into: Tensor, alpha: float, above: bool
) -> Tensor | None:
    found = []
    for g, one, kernel, target in zip(grad, x, w, into, strict=True):
        of_x, of_w = gradients(g, one, kernel, form, form.groups, above)
        target.add_(of_w, alpha=alpha)
        found.append(of_x)
    return torch.stack(found) if above else None


def side_by_side(x: Tensor) -> Tensor:
    """[S, B, C, ...] as [B, S * C, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def client_by_client(x: Tensor, clients: int) -> Tensor:
    """[B, S * C, ...] as [S, B, C, ...], in this order in memory."""
    return x.unflatten(1, (clients, -1)).transpose(0, 1).contiguous()


def grouped_forward(x: Tensor, w: Tensor, b: Tensor | None, form: Form) -> Tensor:
    bias = None if b is None else b.flatten()
    out = convolve(side_by_side(x), w.flatten(0, 1), bias, form, len(w) * form.groups)
    return client_by_client(out, len(w))


def grouped_backward(
    grad: Tensor, x: Tensor, w: Tensor, form: Form, into: Tensor, alpha: float, above: bool
) -> Tensor | None:
    g, wide, kernels = side_by_side(grad), side_by_side(x), w.flatten(0, 1)
    of_x, of_w = gradients(g, wide, kernels, form, len(w) * form.groups, above)
    into.add_(of_w.view(w.shape), alpha=alpha)
    return client_by_client(of_x, len(w)) if above else None


def pads(form: Form) -> list[int]:
    """The padding in the order of `F.pad`."""
    return [p for p in reversed(form.padding) for _ in range(2)]


def columns(x: Tensor, w: Tensor, form: Form) -> Tensor:
    """What each output sees: [S * groups, C / groups * kernel, B * out]."""
    kernel, groups = w.shape[3:], form.groups
    out = form.out(x.shape[3:], kernel)
    x = F.pad(x, pads(form))
    (s, b, c, *space), each = x.stride(), x.shape[2] // groups
    steps = [n * d for n, d in zip(space, form.dilation, strict=True)]
    jumps = [n * d for n, d in zip(space, form.stride, strict=True)]
    size = (len(x), groups, each, *kernel, x.shape[1], *out)
    seen = x.as_strided(size, (s, each * c, c, *steps, b, *jumps), x.storage_offset())
    return seen.reshape(len(x) * groups, each * kernel.numel(), -1)


def unfold_forward(x: Tensor, w: Tensor, b: Tensor | None, form: Form) -> Tensor:
    seen, out = columns(x, w, form), form.out(x.shape[3:], w.shape[3:])
    kernels = w.reshape(len(seen), -1, seen.shape[1])
    if b is None:
        y = torch.bmm(kernels, seen)
    else:
        y = torch.baddbmm(b.reshape(len(seen), -1, 1), kernels, seen)
    return y.view(len(w), w.shape[1], x.shape[1], *out).transpose(1, 2).contiguous()


def unfold_backward(
    grad: Tensor, x: Tensor, w: Tensor, form: Form, into: Tensor, alpha: float, above: bool
) -> Tensor | None:
    seen = columns(x, w, form)
    g = grad.transpose(1, 2).reshape(len(seen), w.shape[1] // form.groups, -1)
    of_x = None
    if above:
        of_seen = torch.bmm(w.reshape(len(seen), -1, seen.shape[1]).mT, g)
        of_x = folded(of_seen, x, w.shape[3:], grad.shape[3:], form)
    into.add_(torch.bmm(g, seen.mT).view(w.shape), alpha=alpha)
    return of_x


def folded(seen: Tensor, x: Tensor, kernel: torch.Size, out: torch.Size, form: Form) -> Tensor:
    """The sum of all `columns` that saw a number of x, for each of them: [S, B, C, *space]."""
    seen = seen.view(len(x), x.shape[2], *kernel, x.shape[1], *out)
    widths = [n + 2 * p for n, p in zip(x.shape[3:], form.padding, strict=True)]
    total, every = x.new_zeros(*x.shape[:3], *widths), slice(None)
    for place in product(*map(range, kernel)):
        first = [k * d for k, d in zip(place, form.dilation, strict=True)]
        ends = zip(first, out, form.stride, strict=True)
        window: Any = (..., *(slice(f, f + (n - 1) * s + 1, s) for f, n, s in ends))
        taps: Any = (every, every, *place)
        total[window] += seen[taps].transpose(1, 2)
    inner: Any = (
        ...,
        *(slice(p, p + n) for n, p in zip(x.shape[3:], form.padding, strict=True)),
    )
    return total[inner].contiguous()


FORMULATIONS = {
    "each": Formulation(each_forward, each_backward),  # a convolution for each client
    "grouped": Formulation(grouped_forward, grouped_backward),  # clients are groups of channels
    "unfold": Formulation(unfold_forward, unfold_backward),  # columns, and batched products
}


def usual_formulation(device: torch.device) -> str:
    """What is taken where nothing was measured."""
    return "each" if device.type == "cpu" else "grouped"


class Convolution(torch.autograd.Function):
    """x [S, B, C, *space] convolved with w [S, O, C / groups, *kernel], plus b [S, O] or None.

    Where the layer has a learning rate when the backward pass runs, that itself moves w and b.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "StackedConvolution"
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.layer = weight.detach(), bias, layer
        ctx.how = FORMULATIONS[layer.by or usual_formulation(x.device)]
        return ctx.how.forward(x, weight, bias, layer.form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), weight, layer = ctx.saved_tensors, ctx.weight, ctx.layer
        grad, above, lr = grads[0].contiguous(), ctx.needs_input_grad[0], layer.lr
        of_bias = None if ctx.bias is None else grad.flatten(3).sum((1, 3))
        if lr is None:
            of_w = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            of_x = ctx.how.backward(grad, x, weight, layer.form, of_w, 1.0, above)
            return of_x, of_w, of_bias, None
        of_x = ctx.how.backward(grad, x, weight, layer.form, weight, -lr, above)
        if of_bias is not None:
            ctx.bias.detach().sub_(of_bias, alpha=lr)
        return of_x, None, None, None


class StackedConvolution(StackedLayer):
    """`nn.Conv1d`, `nn.Conv2d` of S clients: x [S * B, C, *space] to [S * B, O, *out].

    by  the name of a formulation, or "": the usual one
    """

    kind = "a convolution"

    def __init__(self, layer: Any, at: Mapping[str, int], by: str = "") -> None:
        super().__init__(layer, at)
        self.by, self.least = by, len(layer.kernel_size) + 2
        both = layer._reversed_padding_repeated_twice
        uneven = both[::2] != both[1::2]  # "same" with an even kernel
        self.before: list[int] | None = None
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padding = tuple(both[::2][::-1])
        if uneven or self.mode != "constant":
            self.before, padding = list(both), (0,) * len(padding)
        self.form = Form(layer.stride, padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.begin_call(x)
        assert weight is not None
        if self.before is not None:
            x = F.pad(x, self.before, self.mode)
        out = Convolution.apply(x.unflatten(0, (len(weight), -1)), weight, bias, self)
        return out.flatten(0, 1)


def has_convolutions(module: nn.Module) -> bool:
    """Whether the choice of a formulation can matter for it."""
    return any(type(m) in (nn.Conv1d, nn.Conv2d) for m in module.modules())
