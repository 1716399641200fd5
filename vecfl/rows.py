"""Sums over rows [K, n] in float64, each with the same bits alone as beside any others."""

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, WIDTH = 8, 1 << 13  # of a block, which stays in a CPU's cache as float64


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the sum of squares of each row, [K] and [K]."""
    if not rows.is_cpu:
        return rows.sum(1, dtype=torch.float64), squares(rows)
    first, second = in_blocks(rows, lambda part: (part.sum(1), square_sum(part)))
    return first, second


def squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row, [K]."""
    if not rows.is_cpu:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
    (found,) = in_blocks(rows, lambda part: (square_sum(part),))
    return found


def lengths(rows: Tensor) -> Tensor:
    """The norm of each row, [K]; squares that float64 cannot hold are no matter."""
    if rows.dtype == torch.float32:
        return squares(rows).sqrt()
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    unit = torch.maximum(high, -low)
    unit = unit.where(unit != 0, 1)
    return unit[:, 0] * squares(rows / unit).sqrt()


def square_sum(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part, dim=1).square_()


def in_blocks(rows: Tensor, of: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The sums, for each row, of what `of` makes of its parts: float64 [k, m] to tensors [k]."""
    if rows.shape[1] <= WIDTH and rows.numel() <= ROWS * WIDTH:
        return of(rows.double().contiguous())
    together = max(ROWS, ROWS * WIDTH // max(1, rows.shape[1]))
    found = []
    for some in rows.split(together):
        first, *others = [of(part.double().contiguous()) for part in some.split(WIDTH, dim=1)]
        for other in others:
            for total, more in zip(first, other, strict=True):
                total += more
        found.append(first)
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))
