"""Norms of single clients' gradients in one batch, without the gradients.

Layers tell what came in and what gradient came back; the norm of a product of the two follows from
their Gram matrices (Goodfellow, arXiv:1510.01799; Li et al., ICLR 2022, arXiv:2110.05679, section
4), or, where these are the larger ones, from the product (Bu et al., NeurIPS 2022,
arXiv:2205.10683). Axes: S clients, B their examples, m positions of a client, n = S * B.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vecfl.engine.layers.stack import HOOKS
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.modules import called
from vecfl.task import Task


def of_product(x: Tensor, g: Tensor) -> Tensor:
    """|sum over m of g_m x_m^T|^2 for x [S, m, in] and g [S, m, out]: [S]."""
    if x.shape[1] ** 2 < x.shape[2] * g.shape[2]:
        return (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    return torch.bmm(g.mT, x).square().sum((1, 2))


def of_sum(g: Tensor) -> Tensor:
    """|sum over m of g_m|^2 for g [S, m, out]: [S]."""
    return g.sum(1).square().sum(1)


def linear(m: nn.Linear, x: Tensor, g: Tensor, clients: int) -> Tensor:
    x, g = (t.reshape(clients, -1, t.shape[-1]) for t in (x, g))
    return weighted(m, lambda: of_product(x, g), lambda: of_sum(g))


def conv2d(m: nn.Conv2d, x: Tensor, g: Tensor, clients: int) -> Tensor:
    assert not isinstance(m.padding, str)
    windows = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride)
    windows, g = (t.flatten(2).mT.reshape(clients, -1, t.shape[1]) for t in (windows, g))
    return weighted(m, lambda: of_product(windows, g), lambda: of_sum(g))


def embedding(m: nn.Embedding, x: Tensor, g: Tensor, clients: int) -> Tensor:
    ids, g = x.reshape(clients, -1), g.reshape(clients, -1, g.shape[-1])
    same = ids[:, :, None] == ids[:, None]
    if m.padding_idx is not None:
        same &= (ids != m.padding_idx)[:, None]
    return (torch.bmm(g, g.mT) * same).sum((1, 2))


def layer_norm(m: nn.LayerNorm, x: Tensor, g: Tensor, clients: int) -> Tensor:
    x = F.layer_norm(x, m.normalized_shape, eps=m.eps)
    x, g = (t.reshape(clients, -1, m.weight.numel()) for t in (x, g))
    return weighted(m, lambda: of_sum(g * x), lambda: of_sum(g))


def group_norm(m: nn.GroupNorm, x: Tensor, g: Tensor, clients: int) -> Tensor:
    x = F.group_norm(x, m.num_groups, eps=m.eps)
    x, g = (t.flatten(2).mT.reshape(clients, -1, t.shape[1]) for t in (x, g))
    return weighted(m, lambda: of_sum(g * x), lambda: of_sum(g))


def weighted(m: nn.Module, weight: Callable[[], Tensor], bias: Callable[[], Tensor]) -> Tensor:
    """The squares of the gradients of weight and bias, of those that train."""
    some = ((m.weight, weight), (m.bias, bias))
    parts = [of() for p, of in some if isinstance(p, Tensor) and p.requires_grad]
    return torch.stack(parts).sum(0)


NORMS: dict[type, Callable[..., Tensor]] = {
    nn.Linear: linear,
    nn.Conv2d: conv2d,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
}


class Ghost:
    """Watches the layers of a task's module that train; none of it works in place any more.

    Raises InputError naming the first whose gradient has no norm by these formulas.
    """

    def __init__(self, task: Task) -> None:
        self.task, module = task, task.module
        self.seen: list[tuple[nn.Module, Tensor, Tensor]] = []
        taken: set[int] = set()
        for path, m in module.named_modules():
            own = {id(p) for p in m.parameters(recurse=False) if p.requires_grad}
            if not own:
                continue
            if any(getattr(m, name) for name in HOOKS) or type(m) not in NORMS or unlike(m):
                raise InputError(f"{called(path)} ({type(m).__name__}): no norm without gradients")
            if own & taken:
                raise InputError(f"{called(path)} shares a parameter: no norm without gradients")
            taken |= own
            m.register_forward_hook(self._see)
        for m in module.modules():
            if getattr(m, "inplace", False):
                vars(m)["inplace"] = False  # it would write over the output that a layer gave

    def _see(self, m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.seen.append((m, args[0].detach(), out))

    def output(self, batch: Batch) -> Any:
        """The output of the module that is watched, for a prepared batch."""
        self.seen.clear()
        out = self.task.output(batch)
        if len({id(m) for m, _, _ in self.seen}) < len(self.seen):
            raise InputError("a layer is called twice: no norm without gradients")
        return out

    def norms(self, value: Tensor, outer: Tensor, clients: int) -> Tensor:
        """|gradient of the sum of outer * value over a client's examples|, float64 [S].

        value, outer [n], client after client. The graph is kept.
        """
        outs = [out for _, _, out in self.seen]
        grads = torch.autograd.grad(value, outs, outer, retain_graph=True, materialize_grads=True)
        pairs = zip(self.seen, grads, strict=True)
        squares = [
            NORMS[type(m)](m, x.double() if x.is_floating_point() else x, g.double(), clients)
            for (m, x, _), g in pairs
        ]
        return torch.stack(squares).sum(0).sqrt()


def unlike(m: nn.Module) -> bool:
    """Whether a layer has an option that the formulas do not know."""
    if isinstance(m, nn.Conv2d):
        return m.groups > 1 or m.padding_mode != "zeros" or isinstance(m.padding, str)
    return isinstance(m, nn.Embedding) and bool(m.max_norm or m.scale_grad_by_freq)
