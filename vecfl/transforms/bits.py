"""Numbers as bits, most significant first, one after the other without gaps."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.uint8]  # one bit each
AS_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def to_bits(values: Tensor, width: int) -> Bits:
    """`width` bits, at most 64, of each of the integers [n] (of a negative one its lowest)."""
    numbers = values.cpu().to(torch.int64).numpy().astype(">i8")
    return np.unpackbits(numbers.view(np.uint8).reshape(-1, 8), axis=1)[:, 64 - width :].ravel()


def float_bits(values: Tensor) -> Bits:
    """All bits of the floating-point numbers [n]."""
    return to_bits(values.view(AS_INTEGER[values.dtype]), 8 * values.element_size())


class Reader:
    """Takes bits from the beginning of `data`."""

    def __init__(self, data: bytes) -> None:
        self.bits, self.at = np.unpackbits(np.frombuffer(data, np.uint8)), 0

    def integers(self, count: int, width: int) -> Tensor:
        """The next `count` integers of `width` bits: int64 [count]."""
        taken = self.bits[self.at : self.at + count * width].reshape(count, width)
        self.at += count * width
        wide = np.zeros((count, 64), np.uint8)
        wide[:, 64 - width :] = taken
        return torch.from_numpy(np.packbits(wide).view(">i8").astype(np.int64))

    def floats(self, count: int, dtype: torch.dtype) -> Tensor:
        """The next `count` floating-point numbers."""
        kind = AS_INTEGER[dtype]
        return self.integers(count, 8 * dtype.itemsize).to(kind).view(dtype)
