"""QSGD: Alistarh et al., NeurIPS 2017, arXiv:1610.02132, section 3.1."""

from typing import Literal

import torch
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.transforms.base import Transform
from vecfl.transforms.codec import Code, Codec
from vecfl.transforms.compress import compressed
from vecfl.transforms.numbers import room, total
from vecfl.transforms.parts import check_per
from vecfl_kernels import Multiples, round_to_multiples

UNFIT = "is unbiased, not contractive: its error may be longer than the message; it needs none"


def qsgd(levels: int = 127, per: Literal["tensor", "message"] = "tensor") -> Transform:
    """Numbers as multiples of |x| / levels, up or down at random, so that the mean is the number.

    |x| is the norm of every tensor, or of the message. A symbol is the level from -levels to
    levels, in as few bits as all of them need (127: 8 bits); Elias codes, which the paper has for
    few levels, are not used. Raises InputError for `levels` that is no integer from 1 to 32767.
    """
    check_per("qsgd", per)
    if not is_integer(levels) or not 1 <= levels < 1 << 15:
        raise InputError(f"qsgd({levels!r}): expected a number of levels, 1 to 32767")
    levels = int(levels)

    def multiples(x: Tensor) -> Multiples:
        by, most = room(x), torch.finfo(x.dtype).max
        norm = (total(x / by, square=True).sqrt() * by.double()).clamp(max=most).to(x.dtype)
        return Multiples(norm, levels)

    def quantise(x: Tensor, words: Tensor | None) -> Code:
        assert words is not None
        found = multiples(x)
        return Code(found.rounded(x, words) + levels, (found.norm,))

    def restore(code: Code, dtype: torch.dtype) -> Tensor:
        return Multiples(code.scales[0], levels).values(code.symbols.to(dtype) - levels)

    def fused(x: Tensor, seed: int, streams: Tensor, first: int) -> Tensor:
        return round_to_multiples(x, multiples(x), seed, streams, first)

    width = (2 * levels).bit_length()
    codec = Codec(quantise, restore, per, scales=1, width=width, draws=True, fused=fused)
    return compressed(f"qsgd {levels} per {per}", lambda round: codec, unfit=UNFIT)
