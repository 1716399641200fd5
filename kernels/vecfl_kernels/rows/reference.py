"""Plain torch: what the operations on rows are."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, float64

ROWS = 16
CELLS = {"cpu": 1 << 16, "cuda": 1 << 24}  # numbers turned to float64 at a time: a CPU caches them
BLOCK, WIDTH = 8, 1 << 13  # rows and columns of a block of squares: their order must not change


def row_squares(rows: Tensor) -> Tensor:
    if not rows.is_cpu:
        return torch.linalg.vector_norm(rows, dim=1, dtype=float64).square()
    (found,) = in_blocks(rows, lambda part: (torch.linalg.vector_norm(part, dim=1).square_(),))
    return found


def row_ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of each row, [K] and [K]; NaN where it has a NaN."""
    if rows.is_cpu:  # whose aminmax takes many times as long
        return rows.amin(1), rows.amax(1)
    low, high = torch.aminmax(rows, dim=1)
    return low, high


def row_largest(rows: Tensor) -> Tensor:
    """The largest absolute number of each row, [K]."""
    low, high = row_ends(rows)
    return torch.maximum(high, -low)


def in_blocks(rows: Tensor, of: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sums, for each row, of what `of` makes of its parts: float64 [k, m] to tensors [k]."""
    if rows.shape[1] <= WIDTH and rows.numel() <= BLOCK * WIDTH:
        return of(rows.double().contiguous())
    together = max(BLOCK, BLOCK * WIDTH // max(1, rows.shape[1]))
    found = []
    for some in rows.split(together):
        first, *others = [of(part.double().contiguous()) for part in some.split(WIDTH, dim=1)]
        for other in others:
            for total, more in zip(first, other, strict=True):
                total += more
        found.append(first)
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


def scaled_rows(rows: Tensor, unit: Tensor, scale: Tensor, over: Tensor) -> Tensor:
    found = torch.empty_like(rows, memory_format=torch.contiguous_format)
    tiny, cells = torch.finfo(rows.dtype).tiny, CELLS.get(rows.device.type, 1 << 24)
    together = max(1, cells // max(1, rows.shape[1]))
    groups = (
        t.split(together) for t in (found, rows, unit[:, None], scale[:, None], over[:, None])
    )
    for out, part, by, times, which in zip(*groups, strict=True):
        every = rows.is_cpu and bool(which.all())  # asking a GPU would wait for it
        for sink, tile in zip(out.split(cells, 1), part.split(cells, 1), strict=True):
            if every:
                torch.div(tile, by, out=sink).mul_(times)
                torch.hardshrink(sink, tiny, out=sink)
            else:
                torch.where(which, F.hardshrink(tile.div(by).mul_(times), tiny), tile, out=sink)
    return found


def weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    for sums, tile, share in tiles(total, rows, weight):
        sums.addmv_(tile.double().T, share)


def scaled_weighted_sum_(
    total: Tensor, rows: Tensor, weight: Tensor, unit: Tensor, scale: Tensor, over: Tensor
) -> None:
    some = zip(*(t.split(ROWS) for t in (unit, scale, over)), strict=True)
    for part, share, one in zip(rows.split(ROWS), weight.split(ROWS), some, strict=True):
        for sums, tile, of in tiles(total, part, share):
            sums.addmv_(scaled_rows(tile, *one).double().T, of)


def exact_weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor, grid: float) -> None:
    """`weighted_sum_` with each product rounded to a grid first, on which sums are exact.

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
