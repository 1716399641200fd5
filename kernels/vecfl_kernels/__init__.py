"""Fused operations on the cohort matrix; kernels/README.md tells how one earns its place."""

from vecfl_kernels.choice import by_triton
from vecfl_kernels.moves import adam_, momentum_
from vecfl_kernels.noise import add_noise_
from vecfl_kernels.philox import normals, philox, uniforms
from vecfl_kernels.rounding import (
    Levels,
    Multiples,
    round_to_levels,
    round_to_multiples,
    unit,
    words_of,
)
from vecfl_kernels.rows import (
    exact_weighted_sum_,
    in_blocks,
    row_ends,
    row_largest,
    row_squares,
    scaled_rows,
    scaled_weighted_sum_,
    weighted_sum_,
)

__all__ = [
    "Levels",
    "Multiples",
    "adam_",
    "add_noise_",
    "by_triton",
    "exact_weighted_sum_",
    "in_blocks",
    "momentum_",
    "normals",
    "philox",
    "round_to_levels",
    "round_to_multiples",
    "row_ends",
    "row_largest",
    "row_squares",
    "scaled_rows",
    "scaled_weighted_sum_",
    "uniforms",
    "unit",
    "weighted_sum_",
    "words_of",
]
