"""Models, losses and examples that are small enough to work with on paper.

With y = w x and loss (w x - y)^2 / 2 the gradient of an example is (w x - y) x.

FAR has gradient w - 2 and loss (w - 2)^2 / 2: at w = 1 they are -1 and 1/2.
STEEP has gradient 4 w and loss 2 w^2: at w = 1 they are 4 and 2.
PLAIN has gradient w and loss w^2 / 2: at w = 1 they are 1 and 1/2.
SETTLED has gradient w - 1 and loss (w - 1)^2 / 2: at w = 1 both are 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .loop import Columns, Loss, Setting

Example = tuple[float, ...]
FAR: Example = (1.0, 2.0)
STEEP: Example = (2.0, 0.0)
PLAIN: Example = (1.0, 0.0)
SETTLED: Example = (1.0, 1.0)


class Line(nn.Module):
    """y = w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


class Offset(nn.Module):
    """y = w x + 1: a parameter without dimensions, a frozen one, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.w = nn.Parameter(torch.tensor(1.0))
        self.idle = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x + self.b


class Tied(nn.Module):
    """y = w^2 x, one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))
        self.again = self.w

    def forward(self, x: Tensor) -> Tensor:
        return self.again * (self.w * x)


class Tracked(Line):
    """y = w x, with a count of the calls, a trace of w and a buffer that stays."""

    calls: Tensor
    trace: Tensor
    constant: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.tensor(7.0))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("trace", torch.tensor([0.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.trace.mul_(0.5).add_(0.5 * self.w.detach())
        return super().forward(x)


def squared(output: Tensor, batch: Columns) -> tuple[Tensor, Tensor]:
    """Half the squared error, weight 1."""
    return 0.5 * (output - batch["y"]) ** 2, torch.ones_like(output)


def masked(output: Tensor, batch: Columns) -> tuple[Tensor, Tensor]:
    """Half the squared error times m, weight m: m stands for the tokens of an example."""
    return batch["m"] * 0.5 * (output - batch["y"]) ** 2, batch["m"]


def client(*examples: Example) -> Columns:
    """Examples (x, y) or (x, y, m) as columns."""
    table = torch.tensor(examples) if examples else torch.empty(0, 2)
    return {name: table[:, i].clone() for i, name in enumerate("xym"[: table.shape[1]])}


@dataclass(frozen=True)
class Case:
    """A run worked out on paper; `expected` and `loss` have one entry a round."""

    name: str
    clients: list[Columns]
    setting: Setting
    expected: list[dict[str, float]]  # the state after the round
    loss: list[float]
    module: Callable[[], nn.Module] = Line
    loss_function: Loss = squared
    dropped: tuple[int, ...] = ()  # clients without a finite update, in every round
