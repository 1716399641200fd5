"""The noise as a Triton kernel: words, logarithms and angles in registers, in float64."""

import math

import triton
import triton.language as tl
from torch import Tensor

from vecfl_kernels.choice import launch

BLOCK = 128  # counters of a program, four numbers each


def add_noise_(total: Tensor, std: float, seed: int, stream: tuple[int, int, int]) -> None:
    m = len(total)
    programs = triton.cdiv(m, 4 * BLOCK)
    launch(add_normals, programs, total, std, seed, *stream, m, BLOCK=BLOCK, TURN=2 * math.pi)


@triton.jit
def words_of(seed, block, word1, word2, word3):
    word1, word2, word3 = word1.to(tl.uint32), word2.to(tl.uint32), word3.to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), word1, word2, word3)


@triton.jit
def two_normals(first, second, TURN: tl.constexpr):
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
    angle = TURN * ((second.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["seed", "word1", "word2", "word3"])
def add_normals(
    total, std: tl.float64, seed, word1, word2, word3, m, BLOCK: tl.constexpr, TURN: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = words_of(seed, block, word1, word2, word3)
    n0, n1 = two_normals(w0, w1, TURN)
    n2, n3 = two_normals(w2, w3, TURN)
    normal = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    at = tl.program_id(0).to(tl.int64) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    sums = tl.load(total + at, mask=at < m)
    tl.store(total + at, sums + normal * tl.full((1,), std, tl.float64), mask=at < m)
