"""What arrives of rows [K, n] that are rounded to levels at random, each row by itself.

Number e of a part has word `first` + e of the row's stream; streams [K, 3] are words 1 to 3 of
counters. No word, level or symbol is kept.
"""

from torch import Tensor

from vecfl_kernels.choice import chosen
from vecfl_kernels.rounding.levels import Levels, Multiples, unit
from vecfl_kernels.rounding.reference import words_of

__all__ = ["Levels", "Multiples", "round_to_levels", "round_to_multiples", "unit", "words_of"]


def round_to_levels(
    rows: Tensor, levels: Levels, seed: int, streams: Tensor, first: int = 0
) -> Tensor:
    """The rows on equally distant levels between two ends of each row."""
    return chosen(__name__, rows).round_to_levels(rows, levels, seed, streams, first)


def round_to_multiples(
    rows: Tensor, multiples: Multiples, seed: int, streams: Tensor, first: int = 0
) -> Tensor:
    """The rows as multiples of a part of each row's norm (QSGD)."""
    return chosen(__name__, rows).round_to_multiples(rows, multiples, seed, streams, first)
