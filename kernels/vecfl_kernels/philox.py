"""Philox4x32-10 and the normals that are made of its words, in plain torch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A counter of four 32-bit
words goes in, four 32-bit words come out.
"""

from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 of `counter` [..., 4] under the key `seed`: int64 words [..., 4] < 2^32."""
    flat = counter.reshape(-1, 4)
    # The operators below are those of torch and of numpy, which is faster on small tensors.
    lanes: Any = flat.numpy() if flat.is_cpu else flat
    c0, c1, c2, c3 = lanes.T
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; its 64 bits are what we want
        c0, c2 = p1 >> 32, p0 >> 32
        c0 ^= c1
        c2 ^= c3
        c0 ^= k0
        c2 ^= k1
        c0 &= MASK
        c2 &= MASK
        c1, c3 = p1, p0  # with their high words, which the masks cut off
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    out = torch.stack([torch.as_tensor(c) for c in (c0, c1, c2, c3)], -1)
    return out.bitwise_and_(MASK).view(counter.shape)


def uniforms(words: Tensor) -> Tensor:
    """Draws from (0, 1), float64, of words of any shape: (word + 1/2) / 2^32."""
    return (words.double() + 0.5) * 2.0**-32


def normals(words: Tensor) -> Tensor:
    """Standard normals, float64 [..., n], of words [..., n], n even: Box-Muller on each two."""
    radius, angle = uniforms(words).unflatten(-1, (-1, 2)).unbind(-1)
    radius, angle = (-2 * radius.log()).sqrt(), 2 * torch.pi * angle
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(-2)
