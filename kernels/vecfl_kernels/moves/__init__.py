"""Optimizer steps on R rows, each with its own state and step count."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from vecfl_kernels.choice import chosen
from vecfl_kernels.moves import reference


class Rows(Protocol):
    """Lists run over parameters, tensors are [R, *shape]; the numbers of a row lie side by side.

    w  the parameters; state: the optimizer's tensors; steps: made by each row, float32 [R]
    apart  w, state and steps as lists over (parameter, row)
    """

    w: list[Tensor]
    state: list[list[Tensor]]
    steps: Tensor | None

    @property
    def apart(self) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]: ...


Rate = float | Tensor  # a tensor [] goes by the reference: the kernels take numbers


def momentum_(rows: Rows, grads: list[Tensor], lr: Rate, beta: float, nesterov: bool) -> None:
    """v <- beta v + g; w <- w - lr v, or with Nesterov's look-ahead w <- w - lr (g + beta v)."""
    by(rows, lr).momentum_(rows, grads, lr, beta, nesterov)


def adam_(rows: Rows, grads: list[Tensor], lr: Rate, rule: Callable, **numbers: Any) -> None:
    """Count a step of each row, and make it by `rule`: torch._fused_adam_ or torch._fused_adamw_.

    numbers  beta1, beta2, eps, weight_decay
    """
    by(rows, lr).adam_(rows, grads, lr, rule, **numbers)


def by(rows: Rows, lr: Rate) -> Any:
    """The module that has the operations for these rows."""
    return reference if isinstance(lr, Tensor) else chosen(__name__, rows.w[0])
