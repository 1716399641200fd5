"""Plain torch: one operator for all parameters and rows."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vecfl_kernels.moves import Rows


def momentum_(
    rows: "Rows", grads: list[Tensor], lr: float | Tensor, beta: float, nesterov: bool
) -> None:
    (velocity,) = rows.state
    torch._foreach_mul_(velocity, beta)
    torch._foreach_add_(velocity, grads)
    ahead = torch._foreach_add(grads, velocity, alpha=beta) if nesterov else velocity
    if isinstance(lr, Tensor):
        torch._foreach_sub_(rows.w, torch._foreach_mul(ahead, lr))
    else:
        torch._foreach_add_(rows.w, ahead, alpha=-lr)


def adam_(
    rows: "Rows", grads: list[Tensor], lr: float | Tensor, rule: Callable, **numbers: float
) -> None:
    assert rows.steps is not None
    rows.steps += 1
    w, (mean, square), steps = rows.apart
    # The rule walks memory: a gradient that is laid out otherwise than w would be misread.
    parts = [row for g in grads for row in g.contiguous().unbind()]
    lr = lr.float() if isinstance(lr, Tensor) else lr  # all that it takes on a GPU
    rule(w, parts, mean, square, [], steps, lr=lr, **numbers, amsgrad=False, maximize=False)
