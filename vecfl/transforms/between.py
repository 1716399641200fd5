"""Levels at equal distances between the smallest and the largest number of a part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vecfl.transforms.codec import Code
from vecfl.transforms.numbers import unit


@dataclass(frozen=True)
class Levels:
    """Level i of `steps` + 1 is low + i (high - low) / steps; low, high [K, 1] are the scales."""

    low: Tensor
    high: Tensor
    steps: int

    @classmethod
    def of(cls, x: Tensor, bits: int) -> "Levels":
        """2^bits levels over each row of x [K, n]."""
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        return cls(low, high, 2**bits - 1)

    def _scaled(self) -> tuple[Tensor, Tensor, Tensor]:
        """A power of two to divide by, then low and the whole range."""
        by = unit(torch.maximum(self.high, -self.low))
        low = self.low / by
        return by, low, self.high / by - low

    def places(self, x: Tensor) -> Tensor:
        """Where x [K, n] lies, from 0 to `steps`, not rounded."""
        by, low, range = self._scaled()
        return (x / by).sub_(low).mul_(self.steps / range.where(range > 0, 1))

    def values(self, index: Tensor) -> Tensor:
        """The levels of `index` [K, n]."""
        by, low, range = self._scaled()
        found = index.to(low.dtype, copy=True).mul_(range / self.steps).add_(low)
        return found.mul_(by).clamp_(max=self.high)


def restored(code: Code, bits: int) -> Tensor:
    """The levels that the symbols say; 0 where there is none."""
    low, high = code.scales
    found = Levels(low, high, 2**bits - 1).values(code.symbols)
    return found if code.kept is None else found.where(code.kept, 0)
