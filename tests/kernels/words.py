"""A kernel that gives the words of one counter."""

import triton
import triton.language as tl

from vecfl_kernels.noise.triton import words_of


@triton.jit
def words(out, seed, block, word1, word2, word3):
    at = tl.arange(0, 1)
    w0, w1, w2, w3 = words_of(tl.load(seed), tl.load(block + at), word1, word2, word3)
    tl.store(out + at, w0.to(tl.int64))
    tl.store(out + 1 + at, w1.to(tl.int64))
    tl.store(out + 2 + at, w2.to(tl.int64))
    tl.store(out + 3 + at, w3.to(tl.int64))
