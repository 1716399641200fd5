"""Plain torch: what the noise is."""

import torch
from torch import Tensor

from vecfl_kernels.philox import normals, philox

CHUNK = {"cpu": 1 << 14, "cuda": 1 << 22}  # counters at a time: a CPU caches their words


def add_noise_(total: Tensor, std: float, seed: int, stream: tuple[int, int, int]) -> None:
    words = torch.tensor((0, *stream), device=total.device)
    chunk = CHUNK.get(total.device.type, 1 << 22)
    for first, part in enumerate(total.split(4 * chunk)):
        counter = words.repeat(-(-len(part) // 4), 1)
        counter[:, 0] = torch.arange(len(counter), device=total.device) + first * chunk
        part.add_(normals(philox(counter, seed).flatten())[: len(part)], alpha=std)
