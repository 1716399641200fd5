"""The quantizer of FLUTE: Hipolito Garcia et al. 2022, arXiv:2203.13789; its `quant_bits`,
`quant_thresh` and `quant_anneal`.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vecfl.aggregate import Aggregate
from vecfl.algorithms.base import Metrics, Round, Server
from vecfl.errors import InputError
from vecfl.transforms.base import Transform
from vecfl.transforms.between import restored
from vecfl.transforms.codec import Code, Codec
from vecfl.transforms.compress import compressed
from vecfl.transforms.numbers import at_rank
from vecfl.transforms.parts import check_bits, check_per
from vecfl_kernels import Levels

UNFIT = "is not contractive: a small number may move to a level further away than 0"


def flute_quantizer(
    bits: int | Callable[[int], int] = 10,
    threshold: float | None = None,
    anneal: float = 1.0,
    per: Literal["tensor", "message"] = "tensor",
) -> Transform:
    """The nearest of 2^bits levels from the smallest to the largest number; small ones become 0.

    bits       1 to 16, or a function of the round (from 0)
    threshold  numbers up to this quantile of the absolute ones become 0, by linear interpolation;
               None: none does (FLUTE without a threshold does not quantise at all)
    anneal     the quantile of round r is threshold * anneal^(r + 1), at most 1, as FLUTE has it
    per        levels and quantile of every tensor, or of the message

    Of two levels as near it is the lower one. Both ends are sent, and where there is a threshold
    how many numbers remain and which. Metrics: `comm/bits` and `comm/threshold`. Raises InputError
    for bits, a quantile or a factor out of range.
    """
    check_per("flute_quantizer", per)
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"flute_quantizer(threshold={threshold}): expected a quantile, 0 to 1")
    if not anneal > 0:
        raise InputError(f"flute_quantizer(anneal={anneal}): must be positive")
    width = by_round(bits)

    def quantile(round: int) -> float | None:
        return None if threshold is None else min(1.0, threshold * anneal ** (round + 1))

    def told(own: Server, sums: Aggregate, round: Round) -> Metrics:
        share = quantile(round.number)
        cut = {} if share is None else {"comm/threshold": share}
        return {"comm/bits": width(round.number)} | cut

    def codec(round: int) -> Codec:
        return nearest(width(round), quantile(round), per)

    said = "by round" if callable(bits) else bits
    name = f"flute_quantizer {said} {threshold} {anneal} per {per}"
    return compressed(name, codec, unfit=UNFIT, metrics=told)


def by_round(bits: int | Callable[[int], int]) -> Callable[[int], int]:
    """The width of symbols in a round; InputError where it is none."""
    if not callable(bits):
        check_bits("flute_quantizer", bits)
        return lambda round: bits

    def width(round: int) -> int:
        check_bits(f"flute_quantizer in round {round + 1}", found := bits(round))
        return found

    return width


def nearest(bits: int, share: float | None, per: Literal["tensor", "message"]) -> Codec:
    """The codec of a round."""

    def quantise(x: Tensor, words: Tensor | None) -> Code:
        levels = Levels.of(x, bits)
        index = levels.places(x).sub_(0.5).ceil_().abs_()  # no -0
        kept = None if share is None else x.abs() > quantile_of(x.abs(), share)
        return Code(index, (levels.low, levels.high), kept)

    return Codec(
        quantise,
        lambda code, dtype: restored(code, bits),
        per,
        scales=2,
        width=bits,
        kept=lambda n, words: None if share is None else -1,
    )


def quantile_of(x: Tensor, share: float) -> Tensor:
    """The quantile [K, 1] of each row of x [K, n], at least 0, between its two next numbers."""
    at = share * (x.shape[1] - 1)
    low = at_rank(x, int(at))
    if at == int(at):
        return low
    above = x > low  # the next number is another one, or the same again
    again = (~above).sum(1, keepdim=True) > int(at) + 1
    high = x.where(above, torch.inf).amin(1, keepdim=True).where(~again, low)
    return low + (high - low) * (at - int(at))
