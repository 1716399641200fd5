"""Plain torch: what the noise is."""

import torch
from torch import Tensor

from vecfl_kernels.philox import normals, philox

CHUNK = 1 << 14  # counters at a time, which stay in a CPU's cache


def add_noise_(total: Tensor, std: float, seed: int, stream: tuple[int, int, int]) -> None:
    words = torch.tensor((0, *stream), device=total.device)
    for first, part in enumerate(total.split(4 * CHUNK)):
        counter = words.repeat(-(-len(part) // 4), 1)
        counter[:, 0] = torch.arange(len(counter), device=total.device) + first * CHUNK
        part.add_(normals(philox(counter, seed).flatten())[: len(part)], alpha=std)
