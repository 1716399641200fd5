"""Levels for rows [K, n]: where numbers lie between them, and which numbers they are.

Every step that reaches the numbers is one operation that rounds correctly, or exact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vecfl_kernels.rows import row_ends

# The integers of a float's width, and the bits of its exponent.
BITS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def unit(largest: Tensor) -> Tensor:
    """The power of two below `largest`, of any shape, that numbers are divided by, without error.

    Then they are near 1, and neither squares nor differences leave the range.
    """
    dtype, tiny = largest.dtype, torch.finfo(largest.dtype).tiny
    integer, exponent = BITS[dtype]
    return (largest.view(integer) & exponent).view(dtype).clamp(tiny, 1 / tiny)


def draws(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), of the 24 highest bits of each word in float32, of all in float64."""
    if dtype == torch.float32:
        return (words >> 8).to(dtype) * 2.0**-24
    return words.to(dtype) * 2.0**-32


def round_by(x: Tensor, words: Tensor) -> Tensor:
    """x [K, n] at least 0, up or down to an integer at random, so that the mean stays x."""
    low = x.floor()
    return low.add_(draws(words, x.dtype) < x - low)


@dataclass(frozen=True)
class Levels:
    """Level i of `steps` + 1 is low + i (high - low) / steps; low, high [K, 1] are the scales."""

    low: Tensor
    high: Tensor
    steps: int

    @classmethod
    def of(cls, x: Tensor, bits: int) -> "Levels":
        """2^bits levels over each row of x [K, n]."""
        low, high = row_ends(x)
        return cls(low[:, None], high[:, None], 2**bits - 1)

    def of_rows(self, some: slice) -> "Levels":
        """Those of some rows."""
        return Levels(self.low[some], self.high[some], self.steps)

    def scaled(self) -> tuple[Tensor, Tensor, Tensor]:
        """A power of two to divide by, then low and the whole range: [K, 1] each."""
        by = unit(torch.maximum(self.high, -self.low))
        low = self.low / by
        return by, low, self.high / by - low

    def places(self, x: Tensor) -> Tensor:
        """Where x [K, n] lies, from 0 to `steps`, not rounded."""
        by, low, range = self.scaled()
        return (x / by).sub_(low).mul_(self.steps / range.where(range > 0, 1))

    def rounded(self, x: Tensor, words: Tensor) -> Tensor:
        """The index of a level next to each of x [K, n], by words [K, n]."""
        return round_by(self.places(x), words).clamp_(max=self.steps)

    def values(self, index: Tensor) -> Tensor:
        """The levels of `index` [K, n]."""
        by, low, range = self.scaled()
        found = index.to(low.dtype, copy=True).mul_(range / self.steps).add_(low)
        return found.mul_(by).clamp_(max=self.high)


@dataclass(frozen=True)
class Multiples:
    """Level i, from -levels to levels, is i / levels of the norm [K, 1]."""

    norm: Tensor
    levels: int

    def of_rows(self, some: slice) -> "Multiples":
        """Those of some rows."""
        return Multiples(self.norm[some], self.levels)

    def scaled(self) -> tuple[Tensor, Tensor]:
        """A power of two to divide by, then levels for each unit of what is left: [K, 1] each."""
        by = unit(self.norm)
        return by, self.levels / (self.norm / by).where(self.norm > 0, 1)

    def rounded(self, x: Tensor, words: Tensor) -> Tensor:
        """The level next to each of x [K, n], by words [K, n]."""
        by, factor = self.scaled()
        level = (x / by).abs_().mul_(factor).clamp_(max=self.levels)
        return round_by(level, words).copysign(x)

    def values(self, level: Tensor) -> Tensor:
        """The numbers of levels [K, n]."""
        return (level / self.levels).mul_(self.norm)
