"""Gradients of single examples: clipped one by one, added up, and noised.

DP-SGD: Abadi et al., CCS 2016, arXiv:1607.00133, Algorithm 1. Axes: R rows, B examples.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vecfl.engine.rule import ExampleNoise
from vecfl.layout import Layout
from vecfl.random import Kind, normal, with_kind, with_layer
from vecfl.rows import LEFT
from vecfl_kernels import row_squares

LAYER = 255  # of noise streams: those below are places of transforms, which draw, too
LARGEST = 1e30  # of a loss, as it is told
AHEAD = 1 << 18  # numbers of noise that are drawn at a time, of one client's next steps


def clipped_sum(grads: list[Tensor], counts: Tensor | None, clip: float) -> list[Tensor]:
    """The sums [R, *shape] of gradients [R, B, *shape] of norm at most `clip`, over all parameters.

    counts [R, B] is 0 where an example does not count (None: all do). An example without a finite
    norm adds zero.
    """
    flat = [g.reshape(*g.shape[:2], -1) for g in grads]
    squares = [row_squares(g.flatten(0, 1)) for g in flat]
    norm = torch.stack(squares).sum(0).sqrt_().view(flat[0].shape[:2])
    finite = norm.isfinite()
    factor = (clip * LEFT[grads[0].dtype] / norm).clamp(max=1).where(finite, 0)
    if counts is not None:
        factor = factor * counts
    if not (finite.is_cpu and finite.all()):  # asking a GPU would wait for it
        flat = [g.where(finite.unsqueeze(2), 0) for g in flat]  # 0 * nan is nan
    factor = factor.unsqueeze(1).to(flat[0].dtype)
    sums = [torch.bmm(factor, g).squeeze(1) for g in flat]
    return [s.view(len(s), *g.shape[2:]) for s, g in zip(sums, grads, strict=True)]


def noise_of(noise: ExampleNoise, seed: int, streams: Tensor, numbers: int) -> Tensor | None:
    """What is added to the sums of steps, float64 [..., numbers]; streams [..., 3] of the steps."""
    if not noise.multiplier:
        return None
    at = with_layer(with_kind(streams, Kind.NOISE), LAYER)
    return normal(seed, at, numbers).mul_(noise.multiplier * noise.clip)


def ahead(noise: ExampleNoise, seed: int, streams: Tensor, numbers: int) -> Iterator[Tensor | None]:
    """`noise_of` one row's steps, streams [L, 3], one after the other: [1, numbers] each."""
    for some in streams.split(max(1, AHEAD // numbers)):
        drawn = noise_of(noise, seed, some, numbers)
        yield from [None] * len(some) if drawn is None else drawn.unsqueeze(1)


def noised(sums: list[Tensor], drawn: Tensor | None, layout: Layout, size: int) -> list[Tensor]:
    """(sums [R, *shape] + what is drawn [R, T]) / size."""
    if drawn is not None:
        parts = layout.param_views(drawn)
        sums = [s + part.to(s.dtype) for s, part in zip(sums, parts, strict=True)]
    return list(torch._foreach_div(sums, size))


def told(value: Tensor, weight: Tensor | None, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss sums and weights [R], float64, of examples [R, B]: those that are not finite add zero.

    So a client is finite whatever its examples are: that it is dropped would tell of them.
    """
    value, weight = value.double(), torch.ones_like(value) if weight is None else weight
    usable = value.isfinite() & weight.isfinite()
    usable = usable if counts is None else usable & (counts > 0)
    value = value.clamp(-LARGEST, LARGEST).where(usable, 0)
    return value.sum(1), weight.double().where(usable, 0).sum(1)
