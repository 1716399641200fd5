"""Levels between the ends at random: Suresh et al., ICML 2017, arXiv:1611.00429, section 2.2
(stochastic k-level quantization).
"""

from typing import Literal

from torch import Tensor

from vecfl.transforms.base import Transform
from vecfl.transforms.between import restored
from vecfl.transforms.codec import Code, Codec
from vecfl.transforms.compress import compressed
from vecfl.transforms.parts import check_bits, check_per
from vecfl_kernels import Levels, round_to_levels

UNFIT = "is unbiased, not contractive: its error may be longer than the message; it needs none"


def stochastic_quantizer(bits: int = 8, per: Literal["tensor", "message"] = "tensor") -> Transform:
    """One of the two next of 2^bits levels from the smallest to the largest number, at random, so
    that the mean is the number.

    bits  1 to 16; per: levels of every tensor, or of the message

    Both ends are sent before the symbols. Raises InputError for other `bits` and `per`.
    """
    check_per("stochastic_quantizer", per)
    check_bits("stochastic_quantizer", bits)

    def quantise(x: Tensor, words: Tensor | None) -> Code:
        assert words is not None
        levels = Levels.of(x, bits)
        return Code(levels.rounded(x, words), (levels.low, levels.high))

    def fused(x: Tensor, seed: int, streams: Tensor, first: int) -> Tensor:
        return round_to_levels(x, Levels.of(x, bits), seed, streams, first)

    codec = Codec(
        quantise,
        lambda code, dtype: restored(code, bits),
        per,
        scales=2,
        width=bits,
        draws=True,
        fused=fused,
    )
    return compressed(f"stochastic_quantizer {bits} per {per}", lambda round: codec, unfit=UNFIT)
