"""The operations on rows as Triton kernels. No atomics: every sum has one order.

A sum over rows runs along them one after the other, so its bits do not depend on BLOCK; a sum along
a row is cut every WIDTH columns, whatever stands beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vecfl_kernels.choice import launch

BLOCK = 256  # columns of a program that adds rows up
WIDTH = 4096  # columns of a part of a row's squares
TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def row_squares(rows: Tensor) -> Tensor:
    (k, m), parts = rows.shape, triton.cdiv(rows.shape[1], WIDTH)
    of_parts = rows.new_empty(k, parts, dtype=torch.float64)
    launch(square_parts, k * parts, rows, *rows.stride(), of_parts, parts, m, WIDTH=WIDTH)
    found = rows.new_empty(k, dtype=torch.float64)
    launch(row_sums, k, of_parts, found, parts, WIDTH=128)
    return found


@triton.jit
def square_parts(rows, row_stride, column_stride, of_parts, parts, m, WIDTH: tl.constexpr):
    k = tl.program_id(0) // parts
    columns = (tl.program_id(0) % parts) * WIDTH + tl.arange(0, WIDTH)
    at = rows + k.to(tl.int64) * row_stride + columns.to(tl.int64) * column_stride
    x = tl.load(at, mask=columns < m, other=0.0).to(tl.float64)
    tl.store(of_parts + tl.program_id(0), tl.sum(x * x))


@triton.jit
def row_sums(of_parts, found, parts, WIDTH: tl.constexpr):
    k = tl.program_id(0)
    total = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, parts, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        at = of_parts + k.to(tl.int64) * parts + columns
        total += tl.load(at, mask=columns < parts, other=0.0)
    tl.store(found + k, tl.sum(total))


@triton.jit
def scaled(x, unit, scale, over, TINY: tl.constexpr):
    y = (x / unit if x.dtype == tl.float64 else tl.div_rn(x, unit)) * scale
    return tl.where(over, tl.where((y >= -TINY) & (y <= TINY), 0.0, y), x)


def scaled_rows(rows: Tensor, unit: Tensor, scale: Tensor, over: Tensor) -> Tensor:
    k, m = rows.shape
    found, parts = (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        triton.cdiv(m, 1024),
    )
    arguments = rows, *rows.stride(), found, unit, scale, over, parts, m
    launch(scale_parts, k * parts, *arguments, BLOCK=1024, TINY=TINY[rows.dtype])
    return found


@triton.jit
def scale_parts(
    rows, row_stride, column_stride, found, unit, scale, over, parts, m,
    BLOCK: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    k = (tl.program_id(0) // parts).to(tl.int64)
    columns = (tl.program_id(0) % parts) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < m
    x = tl.load(rows + k * row_stride + columns.to(tl.int64) * column_stride, mask=inside)
    y = scaled(x, tl.load(unit + k), tl.load(scale + k), tl.load(over + k), TINY)
    tl.store(found + k * m + columns, y, mask=inside)


def weighted_sum_(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    k, m = rows.shape
    arguments = total, rows, *rows.stride(), weight, k, m
    launch(add_rows, triton.cdiv(m, BLOCK), *arguments, BLOCK=BLOCK)


@triton.jit
def add_rows(total, rows, row_stride, column_stride, weight, k, m, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < m
    at = rows + columns.to(tl.int64) * column_stride
    sums = tl.load(total + columns, mask=inside)
    for i in range(k):
        x = tl.load(at, mask=inside).to(tl.float64)
        sums += tl.load(weight + i) * x
        at += row_stride
    tl.store(total + columns, sums, mask=inside)


def scaled_weighted_sum_(
    total: Tensor, rows: Tensor, weight: Tensor, unit: Tensor, scale: Tensor, over: Tensor
) -> None:
    k, m = rows.shape
    arguments = total, rows, *rows.stride(), weight, unit, scale, over, k, m
    constants = {"BLOCK": BLOCK, "TINY": TINY[rows.dtype]}
    launch(add_scaled_rows, triton.cdiv(m, BLOCK), *arguments, **constants)


@triton.jit
def add_scaled_rows(
    total, rows, row_stride, column_stride, weight, unit, scale, over, k, m,
    BLOCK: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < m
    at = rows + columns.to(tl.int64) * column_stride
    sums = tl.load(total + columns, mask=inside)
    for i in range(k):
        x = tl.load(at, mask=inside)
        x = scaled(x, tl.load(unit + i), tl.load(scale + i), tl.load(over + i), TINY)
        sums += tl.load(weight + i) * x.to(tl.float64)
        at += row_stride
    tl.store(total + columns, sums, mask=inside)
