"""Arithmetic of codecs on rows [K, n]: the bits of one row depend neither on K nor on threads.

Every step that reaches the numbers is one operation that rounds correctly, or exact; sums are added
up in blocks of fixed width.
"""

import numpy as np
import torch
from torch import Tensor

from vecfl.transforms.bits import AS_INTEGER

ROWS, WIDTH = 8, 1 << 13
EXPONENT = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}  # its bits


def unit(largest: Tensor) -> Tensor:
    """The power of two below `largest`, of any shape, that numbers are divided by, without error.

    Then they are near 1, and neither squares nor differences leave the range.
    """
    dtype, tiny = largest.dtype, torch.finfo(largest.dtype).tiny
    power = (largest.view(AS_INTEGER[dtype]) & EXPONENT[dtype]).view(dtype)
    return power.clamp(tiny, 1 / tiny)


def largest(rows: Tensor) -> Tensor:
    """[K, 1], the largest absolute number of each row."""
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    return torch.maximum(high, -low)


def room(rows: Tensor) -> Tensor:
    """What rows [K, n] are divided by so that float64 holds their squares and sums: [K, 1]."""
    return unit(largest(rows)) if rows.dtype == torch.float64 else rows.new_ones(len(rows), 1)


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


def draws(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), of the 24 highest bits of each word in float32, of all in float64."""
    if dtype == torch.float32:
        return (words >> 8).to(dtype) * 2.0**-24
    return words.to(dtype) * 2.0**-32


def round_by(x: Tensor, words: Tensor) -> Tensor:
    """x [K, n] at least 0, up or down to an integer at random, so that the mean stays x."""
    low = x.floor()
    return low.add_(draws(words, x.dtype) < x - low)
