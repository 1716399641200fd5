"""Layers that hold the parameters of S clients; their input is one batch, client after client."""

from typing import Any

import torch
from torch import Tensor, nn

from vecfl.errors import InputError
from vecfl.layout import Layout
from vecfl.modules import called

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


class StackedLinear(nn.Module):
    """`nn.Linear` of S clients: x [S * B, ..., in] to [S * B, ..., out].

    w     positions of weight and bias (None without) among the task's parameters
    rows  those tensors, [S, out, in] and [S, out]; examples: S * B of this pass
    lr    of the step that the backward pass takes; calls: in this pass
    """

    def __init__(self, weight: int, bias: int | None) -> None:
        super().__init__()
        self.at = (weight, bias)
        self.rows: list[Tensor] = []
        self.lr: float | None = None
        self.examples = self.calls = 0

    def begin(self, rows: list[Tensor], examples: int, lr: float | None) -> None:
        """Start a pass over so many examples of all slots."""
        self.rows, self.examples, self.lr, self.calls = rows, examples, lr, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.dim() < 2 or len(x) % self.examples:
            raise InputError(
                f"a linear layer gets {list(x.shape)} for a batch of {self.examples}: a module "
                "that cuts or reorders the batch has no stacked form"
            )
        weight, bias = (None if i is None else self.rows[i] for i in self.at)
        assert weight is not None
        out = Affine.apply(x.reshape(len(weight), -1, x.shape[-1]), weight, bias, self)
        return out.view(*x.shape[:-1], out.shape[-1])


def stack_layers(module: nn.Module, layout: Layout) -> tuple[nn.Module, list[StackedLinear]]:
    """`module` with its layers that train replaced, in place, by stacked ones, and these.

    Raises InputError naming the first layer of which there is no stacked form.
    """
    at = {id(module.get_parameter(e.name)): i for i, e in enumerate(layout.params)}
    if layout.buffers:
        raise InputError(f"buffer '{layout.buffers[0].name}' changes in training: not stacked yet")
    made: dict[nn.Module, StackedLinear] = {}
    taken: set[int] = set()
    for path, m in list(module.named_modules(remove_duplicate=False)):
        own = [p for p in m.parameters(recurse=False) if id(p) in at]
        if m not in made and own:
            if type(m) is not nn.Linear or any(getattr(m, name) for name in HOOKS):
                raise InputError(
                    f"{called(path)} ({type(m).__name__}) has no stacked form: use vmap or loop"
                )
            if len(own) < len(list(m.parameters(recurse=False))):
                raise InputError(f"{called(path)} is frozen in part: it has no stacked form")
            if any(id(p) in taken for p in own):
                raise InputError(f"{called(path)} shares a parameter: it has no stacked form")
            taken |= {id(p) for p in own}
            bias = None if m.bias is None else at[id(m.bias)]
            made[m] = StackedLinear(at[id(m.weight)], bias)
        if m in made and path:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, made[m])
    return made.get(module, module), list(made.values())
