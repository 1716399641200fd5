"""Add a weighted sum of rows to a float64 vector."""

from torch import Tensor

ROWS = 16  # rows turned to float64 at a time: the temporary stays in cache


def weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """total += weight @ rows, in float64: total [M] float64, rows [K, M], weight [K] float64."""
    for i in range(0, len(rows), ROWS):
        total.addmv_(rows[i : i + ROWS].double().T, weight[i : i + ROWS])
