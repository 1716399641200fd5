"""Add a weighted sum of rows to a float64 vector."""

from torch import Tensor

ROWS = 16
CELLS = {"cpu": 1 << 16, "cuda": 1 << 24}  # numbers turned to float64 at a time: a CPU caches them


def weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """total += weight @ rows, in float64: total [M] float64, rows [K, M], weight [K] float64."""
    cells = CELLS.get(total.device.type, 1 << 24)
    for part, share in zip(rows.split(ROWS), weight.split(ROWS), strict=True):
        columns = cells // max(1, len(part))
        for sums, tile in zip(total.split(columns), part.split(columns, 1), strict=True):
            sums.addmv_(tile.double().T, share)
