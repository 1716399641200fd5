"""Arithmetic of codecs on rows [K, n]: the bits of one row depend neither on K nor on threads.

Every step that reaches the numbers is one operation that rounds correctly, or exact; sums are added
up in blocks of fixed width.
"""

import numpy as np
import torch
from torch import Tensor

from vecfl_kernels import row_largest, unit

ROWS, WIDTH = 8, 1 << 13


def room(rows: Tensor) -> Tensor:
    """What rows [K, n] are divided by so that float64 holds their squares and sums: [K, 1]."""
    wide = rows.dtype == torch.float64
    return unit(row_largest(rows))[:, None] if wide else rows.new_ones(len(rows), 1)


def total(rows: Tensor, square: bool = False) -> Tensor:
    """[K, 1] float64: the sum of absolute numbers, or of squares."""

    def one(part: Tensor) -> Tensor:
        wide = part.double()
        return (wide.square() if square else wide.abs()).sum(1, keepdim=True)

    if not rows.is_cpu:
        return one(rows)
    some = [
        torch.stack([one(part) for part in block.split(WIDTH, 1)]).sum(0)
        for block in rows.split(ROWS)
    ]
    return torch.cat(some)


def at_rank(rows: Tensor, rank: int) -> Tensor:
    """[K, 1], the number of each row that has `rank` (from 0) smaller ones or equal ones before."""
    if rows.is_cpu:  # its partial sort is ten times as fast
        return torch.from_numpy(np.partition(rows.numpy(), rank, axis=1)[:, rank, None])
    return rows.kthvalue(rank + 1, dim=1, keepdim=True).values


def greatest(rows: Tensor, k: int) -> Tensor:
    """[K, n] bool: the k greatest of each row; of equal ones those that come first."""
    n = rows.shape[1]
    if k == n:
        return torch.ones_like(rows, dtype=torch.bool)
    last = at_rank(rows, n - k)
    kept = rows >= last
    if rows.is_cpu and bool((kept.sum(1) == k).all()):
        return kept
    equal, above = rows == last, rows > last
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
