"""Levels at equal distances between the smallest and the largest number of a part."""

from torch import Tensor

from vecfl.transforms.codec import Code
from vecfl_kernels import Levels


def restored(code: Code, bits: int) -> Tensor:
    """The levels that the symbols say; 0 where there is none."""
    low, high = code.scales
    found = Levels(low, high, 2**bits - 1).values(code.symbols)
    return found if code.kept is None else found.where(code.kept, 0)
