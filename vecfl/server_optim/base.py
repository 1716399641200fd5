"""What a server optimizer is, and what all of them use."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecfl.layout import Layout

Tensors = dict[str, Tensor]
BLOCK = 1 << 14  # numbers that are added up by one thread, so that norms have the bits of any


@dataclass(frozen=True)
class ServerOptimizer:
    """How the model moves by the aggregated pseudo-gradient `update`, against it.

    name  with all numbers that the result depends on, as `called` puts it
    init  w -> state, tensors by name; w is float64 [trainable]
    step  (w, update, state, layout, round) -> (w, state): all float64 [trainable], of which
          `layout.params` tells the tensors; the round counts from 0
    lr    round -> its learning rate, which is told and not used
    """

    name: str
    init: Callable[[Tensor], Tensors] = field(repr=False)
    step: Callable[[Tensor, Tensor, Tensors, Layout, int], tuple[Tensor, Tensors]] = field(
        repr=False
    )
    lr: Callable[[int], float] = field(repr=False)


def constant(lr: float) -> Callable[[int], float]:
    """The same learning rate in every round."""
    return lambda round: float(lr)


def zeros(*names: str) -> Callable[[Tensor], Tensors]:
    """The state of an optimizer that keeps these tensors like w, zero at first."""
    return lambda w: {name: torch.zeros_like(w) for name in names}


def norm(x: Tensor) -> Tensor:
    """|x| of a flat float64 x, the same bits for any number of operator threads."""
    return torch.stack([part.sum() for part in x.square().split(BLOCK)]).sum().sqrt()


def called(name: str, *values: float) -> str:
    """An optimizer's name with the numbers that it was made with: runs are told apart by it."""
    return f"{name}({', '.join(str(float(value)) for value in values)})"
