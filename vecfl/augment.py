"""Augmentation keyed by Philox: crop, flip and normalise, on the batch, on the device.

A transform takes x [n, ...], examples one after the other, and words [n, 4], four draws for each
example, int64 in [0, 2^32); what it gives has the shape and the dtype of x. The words depend on
the client, its step and the example's place in the batch (docs/design.md, Draws), so an example
looks the same in every backend, slot and worker.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vecfl.errors import InputError, is_integer
from vecfl.random import LIMITS, Kind, blocks, with_kind, with_layer


@dataclass(frozen=True)
class Crop:
    """See `crop`."""

    padding: int

    def __call__(self, x: Tensor, words: Tensor) -> Tensor:
        p, (c, h, w) = self.padding, image_shape("crop", x)
        if p >= min(h, w):
            raise InputError(f"crop({p}) may leave nothing of an image of {h} x {w}: pad by less")
        top, left = ((words[:, :2] * (2 * p + 1)) >> 32).unbind(1)
        image, row = c * (h + 2 * p) * (w + 2 * p), w + 2 * p  # numbers in one, padded
        first = torch.arange(len(x), device=x.device) * image + top * row + left
        last = (len(x) - 1) * image + 2 * p * row + 2 * p
        # What a crop would hold that begins at each number: views, no copies.
        strides = (1, image // c, row, 1)
        crops = F.pad(x, (p, p, p, p)).contiguous().as_strided((last + 1, c, h, w), strides)
        return crops.index_select(0, first)


@dataclass(frozen=True)
class Flip:
    """See `flip`."""

    def __call__(self, x: Tensor, words: Tensor) -> Tensor:
        image_shape("flip", x)
        return torch.where((words[:, 0] < 1 << 31).view(-1, 1, 1, 1), x.flip(3), x)


@dataclass(frozen=True)
class Normalise:
    """See `normalise`. Nothing in it is random: it acts in evaluation too."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() < 4:
            raise no_images("normalise", x)
        if x.shape[-3] != len(self.mean):
            n, have = len(self.mean), x.shape[-3]
            raise InputError(
                f"normalise: mean and std have {n} number{'s' * (n > 1)} each, but images "
                f"{list(x.shape[-3:])} [C, H, W] have {have} channel{'s' * (have > 1)}"
            )
        if not x.is_floating_point():
            raise InputError(f"normalise takes uint8 or floats, not {x.dtype}")
        mean, std = (channels(values, x.dtype, x.device) for values in (self.mean, self.std))
        return (x - mean).div_(std)


Transform = Normalise | Callable[[Tensor, Tensor], Tensor]


def crop(padding: int) -> Crop:
    """Pad with zeros on all four sides, then crop the original size at a random offset.

    padding  pixels, at least 1 and less than the image's height and width

    The (2 padding + 1)^2 offsets are equally likely. The zeros are in the units of its place in
    the list: before `normalise` they are black, behind it they are the mean. As for CIFAR in He
    et al., CVPR 2016, arXiv:1512.03385, section 4.2.
    """
    if not is_integer(padding) or padding < 1:
        raise InputError(f"crop takes a padding of at least 1 pixel, not {padding!r}")
    return Crop(int(padding))


def flip() -> Flip:
    """Mirror each image left to right with probability 1/2."""
    return Flip()


def normalise(mean: Sequence[float], std: Sequence[float]) -> Normalise:
    """(x - mean) / std of each channel, in training and in evaluation.

    mean, std  [C] each, in the units of x after scaling: uint8 images are in 0..1

    Raises InputError where they have other lengths, are not finite, or a std is not positive.
    """
    try:
        means, stds = tuple(map(float, mean)), tuple(map(float, std))
    except TypeError:
        raise InputError("normalise takes mean and std as one number per channel: [0.5]") from None
    if len(means) != len(stds) or not means:
        raise InputError(
            f"normalise takes mean and std of every channel, not {len(means)} and {len(stds)}"
        )
    if not all(map(math.isfinite, means)) or not all(0 < s < math.inf for s in stds):
        raise InputError(
            f"normalise takes finite means and positive stds, not {list(means)} and {list(stds)}"
        )
    return Normalise(means, stds)


def image_shape(name: str, x: Tensor) -> torch.Size:
    """[C, H, W] of x [n, C, H, W]; InputError if it holds no images."""
    if x.dim() != 4:
        raise no_images(name, x)
    return x.shape[1:]


def no_images(name: str, x: Tensor) -> InputError:
    """What the transform `name` says to examples x [n, ...]."""
    return InputError(
        f"{name} takes images [C, H, W], but an example of the first input is {list(x.shape[1:])}"
    )


@cache  # a copy from the host would wait for a GPU
def channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One value per channel, [C, 1, 1]."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def checked(transforms: Sequence[Transform]) -> tuple[Transform, ...]:
    """The transforms as a tuple; InputError if they are none, or more than have draws."""
    if not isinstance(transforms, Sequence) or not all(map(callable, transforms)):
        raise InputError(
            f"augment takes a tuple of transforms, such as (crop(4), flip()), not {transforms!r}"
        )
    if len(transforms) > 1 << LIMITS["layer"]:
        raise InputError(f"augment takes {1 << LIMITS['layer']} transforms at most")
    return tuple(transforms)


def random_places(transforms: Sequence[Transform]) -> list[int]:
    """The places in the list whose transforms draw; they act in training steps only."""
    return [i for i, t in enumerate(transforms) if not isinstance(t, Normalise)]


def augmented(
    x: Tensor, transforms: Sequence[Transform], streams: Tensor | None, seed: int
) -> Tensor:
    """x after all transforms of a training step, or of evaluation where `streams` is None.

    x [..., B, *shape] and streams [..., 3] have the same leading axes.
    """
    if streams is None:
        for transform in transforms:
            x = transform(x) if isinstance(transform, Normalise) else x
        return x
    axes = streams.dim()
    places, shape = random_places(transforms), x.shape
    words = dict(zip(places, draw(seed, streams, places, shape[axes - 1]), strict=True))
    x = x.flatten(0, axes - 1)
    for i, transform in enumerate(transforms):
        y = transform(x) if isinstance(transform, Normalise) else transform(x, words[i])
        if y.shape != x.shape or y.dtype != x.dtype:
            raise InputError(
                f"augment[{i}] must keep shape and dtype, but makes {list(y.shape[1:])} "
                f"{y.dtype} of {list(x.shape[1:])} {x.dtype}"
            )
        x = y
    return x.view(shape)


def draw(seed: int, streams: Tensor, places: Sequence[int], n: int) -> Sequence[Tensor]:
    """For each place in the list the words of n examples of each of the streams [..., 3].

    Each [streams * n, 4]: block b of the stream belongs to the example at position b.
    """
    if not places:
        return []
    keyed = with_kind(streams, Kind.AUGMENT)
    layers = torch.stack([with_layer(keyed, place) for place in places])
    positions = torch.arange(n, device=streams.device)
    return blocks(seed, layers.unsqueeze(-2), positions).flatten(1, -2).unbind()
