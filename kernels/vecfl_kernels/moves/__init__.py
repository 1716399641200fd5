"""Optimizer steps on R rows, each with its own state and step count."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from vecfl_kernels.choice import chosen


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


def momentum_(rows: Rows, grads: list[Tensor], lr: float, beta: float, nesterov: bool) -> None:
    """v <- beta v + g; w <- w - lr v, or with Nesterov's look-ahead w <- w - lr (g + beta v)."""
    chosen(__name__, rows.w[0]).momentum_(rows, grads, lr, beta, nesterov)


def adam_(rows: Rows, grads: list[Tensor], lr: float, rule: Callable, **numbers: Any) -> None:
    """Count a step of each row, and make it by `rule`: torch._fused_adam_ or torch._fused_adamw_.

    numbers  beta1, beta2, eps, weight_decay
    """
    chosen(__name__, rows.w[0]).adam_(rows, grads, lr, rule, **numbers)
