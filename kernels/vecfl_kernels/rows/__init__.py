"""Rows [K, M]: sums of squares, scaling, and weighted sums into a float64 vector."""

from torch import Tensor

from vecfl_kernels.choice import chosen
from vecfl_kernels.rows.reference import (
    exact_weighted_sum_,
    in_blocks,
    row_ends,
    row_largest,
)

__all__ = [
    "exact_weighted_sum_",
    "in_blocks",
    "row_ends",
    "row_largest",
    "row_squares",
    "scaled_rows",
    "scaled_weighted_sum_",
    "weighted_sum_",
]


def row_squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row [K, M], float64 [K], with bits that depend on no other row."""
    return chosen(__name__, rows).row_squares(rows)


def scaled_rows(rows: Tensor, unit: Tensor, scale: Tensor, over: Tensor) -> Tensor:
    """Rows [K, M] times scale / unit where `over` [K], the others as they are.

    unit   [K], what a row is divided by before; scale [K]; both in the dtype of the rows

    What of a scaled row would be denormal becomes 0.
    """
    return chosen(__name__, rows).scaled_rows(rows, unit, scale, over)


def weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """total += weight @ rows, in float64: total [M] float64, rows [K, M], weight [K] float64."""
    chosen(__name__, rows).weighted_sum_(total, rows, weight)


def scaled_weighted_sum_(
    total: Tensor, rows: Tensor, weight: Tensor, unit: Tensor, scale: Tensor, over: Tensor
) -> None:
    """`weighted_sum_` of `scaled_rows`, which are nowhere kept."""
    chosen(__name__, rows).scaled_weighted_sum_(total, rows, weight, unit, scale, over)
