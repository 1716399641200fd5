"""Gaussian noise on a float64 vector, keyed by counters."""

from torch import Tensor

from vecfl_kernels.choice import chosen

Stream = tuple[int, int, int]  # words 1 to 3 of a counter


def add_noise_(total: Tensor, std: float, seed: int, stream: Stream) -> None:
    """total += std * normals, where total is float64 [M].

    Element e is made of words 2 (e div 2) and the next one of the stream, word 0 of the counter
    being e div 4: Box-Muller, the cosine where e is even and the sine where it is odd.
    """
    chosen(__name__, total).add_noise_(total, std, seed, stream)
