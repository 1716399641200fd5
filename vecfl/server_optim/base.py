"""What a server optimizer is, and what all of them use."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.layout import Layout

Tensors = dict[str, Tensor]
BLOCK = 1 << 14  # numbers that are added up by one thread, so that norms have the bits of any


@dataclass(frozen=True)
class ServerOptimizer:
    """How the model moves by the aggregated pseudo-gradient `update`, against it.

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


def at_least_zero(what: str, value: float) -> None:
    """InputError for a value below 0, and for NaN."""
    if not value >= 0:
        raise InputError(f"{what} must be at least 0, not {value}")


def positive(what: str, value: float) -> None:
    """InputError for a value of 0 or below, and for NaN."""
    if not value > 0:
        raise InputError(f"{what} must be positive, not {value}")


def fraction(what: str, value: float) -> None:
    """InputError for a value outside of [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f"{what} must be in [0, 1), not {value}")
