"""Rounding to levels as Triton kernels: a number is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vecfl_kernels.choice import launch
from vecfl_kernels.rounding.levels import Levels, Multiples

BLOCK = 256  # counters of a program, four numbers each


def round_to_levels(rows: Tensor, levels: Levels, seed: int, streams: Tensor, first: int) -> Tensor:
    by, low, range = levels.scaled()
    factor, step = levels.steps / range.where(range > 0, 1), range / levels.steps
    numbers = torch.cat((by, low, factor, step, levels.high), 1)
    return rounded(to_levels, rows, numbers, levels.steps, seed, streams, first)


def round_to_multiples(
    rows: Tensor, multiples: Multiples, seed: int, streams: Tensor, first: int
) -> Tensor:
    numbers = torch.cat((*multiples.scaled(), multiples.norm), 1)
    return rounded(to_multiples, rows, numbers, multiples.levels, seed, streams, first)


def rounded(
    kernel: object, rows: Tensor, numbers: Tensor, most: int, seed: int, streams: Tensor, first: int
) -> Tensor:
    (k, n), found = rows.shape, torch.empty_like(rows, memory_format=torch.contiguous_format)
    programs = triton.cdiv(first % 4 + n, 4 * BLOCK)  # for a row
    arguments = rows, *rows.stride(), found, numbers, most, seed, streams, first, programs, n
    launch(kernel, k * programs, *arguments, BLOCK=BLOCK)
    return found


@triton.jit
def divided(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def place(first, programs, n, BLOCK: tl.constexpr):
    """The row of a program, its counters, and the columns of their words."""
    k = (tl.program_id(0) // programs).to(tl.int64)
    block = first // 4 + (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    start = (first // 4 + (tl.program_id(0) % programs) * BLOCK) * 4 - first
    columns = start + tl.arange(0, 4 * BLOCK)
    return k, block, columns, (columns >= 0) & (columns < n)


@triton.jit
def round_by(x, seed, streams, k, block):
    """x up or down by the words of `block` in row k's stream."""
    word1 = tl.load(streams + 3 * k).to(tl.uint32)
    word2 = tl.load(streams + 3 * k + 1).to(tl.uint32)
    word3 = tl.load(streams + 3 * k + 2).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), word1, word2, word3)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    if x.dtype == tl.float64:
        draw = word.to(tl.float64) * 2.3283064365386963e-10
    else:
        draw = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
    low = tl.floor(x)
    return tl.where(draw < x - low, low + 1.0, low)


@triton.jit(do_not_specialize=["most", "seed", "first"])
def to_levels(
    rows, row_stride, column_stride, found, numbers, most, seed, streams, first, programs, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k, block, columns, inside = place(first, programs, n, BLOCK)
    by, low = tl.load(numbers + 5 * k), tl.load(numbers + 5 * k + 1)
    factor, step = tl.load(numbers + 5 * k + 2), tl.load(numbers + 5 * k + 3)
    high = tl.load(numbers + 5 * k + 4)
    at = rows + k * row_stride + columns.to(tl.int64) * column_stride
    x = (divided(tl.load(at, mask=inside), by) - low) * factor
    index = tl.minimum(round_by(x, seed, streams, k, block), most.to(x.dtype))
    value = tl.minimum((index * step + low) * by, high)
    tl.store(found + k * n + columns, value, mask=inside)


@triton.jit(do_not_specialize=["most", "seed", "first"])
def to_multiples(
    rows, row_stride, column_stride, found, numbers, most, seed, streams, first, programs, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k, block, columns, inside = place(first, programs, n, BLOCK)
    by, factor = tl.load(numbers + 3 * k), tl.load(numbers + 3 * k + 1)
    norm = tl.load(numbers + 3 * k + 2)
    at = rows + k * row_stride + columns.to(tl.int64) * column_stride
    x = tl.load(at, mask=inside)
    levels = most.to(x.dtype)
    level = tl.minimum(tl.abs(divided(x, by)) * factor, levels)
    level = round_by(level, seed, streams, k, block)
    level = tl.where((x < 0) & (level > 0), -level, level)
    tl.store(found + k * n + columns, divided(level, levels + 0 * level) * norm, mask=inside)
