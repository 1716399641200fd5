"""Add a weighted sum of rows to a float64 vector."""

from collections.abc import Iterator

from torch import Tensor, float64

ROWS = 16
CELLS = {"cpu": 1 << 16, "cuda": 1 << 24}  # numbers turned to float64 at a time: a CPU caches them


def weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """total += weight @ rows, in float64: total [M] float64, rows [K, M], weight [K] float64."""
    for sums, tile, share in tiles(total, rows, weight):
        sums.addmv_(tile.double().T, share)


def exact_weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor, grid: float) -> None:
    """The same with each product rounded to a grid first, on which sums are exact in any order.

    grid  1.5 * 2^k rounds to multiples of 2^(k - 52). Sums have the same bits in any order and in
          any parts while the absolute values of all products add up to at most 2^(k - 1).
    """
    for sums, tile, share in tiles(total, rows, weight):
        products = tile.to(float64, copy=True).mul_(share[:, None])
        sums += products.add_(grid).sub_(grid).sum(0)


def tiles(total: Tensor, rows: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Parts of `total`, with the tile of `rows` above them and the weights of its rows."""
    cells = CELLS.get(total.device.type, 1 << 24)
    for part, share in zip(rows.split(ROWS), weight.split(ROWS), strict=True):
        columns = cells // max(1, len(part))
        for sums, tile in zip(total.split(columns), part.split(columns, 1), strict=True):
            yield sums, tile, share
