"""Sums over rows [K, n] in float64, each with the same bits alone as beside any others."""

import torch
from torch import Tensor

from vecfl_kernels import in_blocks, row_largest, row_squares

# What is left of a bound when entries, scale and norm have been rounded, in any order of their sum.
LEFT = {torch.float32: 1 - 2.0**-22, torch.float64: 1 - 2.0**-36}


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the sum of squares of each row, [K] and [K]."""
    if not rows.is_cpu:
        return rows.sum(1, dtype=torch.float64), row_squares(rows)
    first, second = in_blocks(
        rows, lambda part: (part.sum(1), torch.linalg.vector_norm(part, dim=1).square_())
    )
    return first, second


def lengths(rows: Tensor) -> Tensor:
    """The norm of each row, [K]; squares that float64 cannot hold are no matter."""
    if rows.dtype == torch.float32:
        return row_squares(rows).sqrt()
    largest = row_largest(rows)
    unit = largest.where(largest != 0, 1)
    return unit * row_squares(rows / unit[:, None]).sqrt()
