"""Augmentation as docs/design.md has it, in numpy, one pixel after the other."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import philox
from .dropout import Place

Image = NDArray[np.float64]
Transforms = tuple[tuple[Any, ...], ...]  # ("crop", p), ("flip",), ("normalise", mean, std)


def augment(x: Image, transforms: Transforms, at: Place) -> Image:
    """The images [b, C, H, W] of a client's batch after all transforms."""
    images = list(x)
    for layer, (name, *args) in enumerate(transforms):
        step = {"client": at.client, "occurrence": at.occurrence, "t": at.t, "step": at.step}
        step |= {"layer": layer}
        words = philox.words(at.seed, philox.AUGMENT, 4 * len(x), **step).reshape(-1, 4)
        act = {"crop": crop, "flip": flip, "normalise": normalise}[name]
        images = [
            act(image, list(map(int, w)), *args) for image, w in zip(images, words, strict=True)
        ]
    return np.stack(images)


def crop(image: Image, words: list[int], p: int) -> Image:
    """Zeros where the window, `top` and `left` of its padded place, leaves the image."""
    top, left = (word * (2 * p + 1) // 2**32 for word in words[:2])
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                y, x = i + top - p, j + left - p
                if 0 <= y < height and 0 <= x < width:
                    result[c, i, j] = image[c, y, x]
    return result


def flip(image: Image, words: list[int]) -> Image:
    """Left becomes right where the first word has no highest bit."""
    return image[:, :, ::-1] if words[0] < 2**31 else image


def normalise(image: Image, words: list[int], mean: list[float], std: list[float]) -> Image:
    return np.stack([(c - m) / s for c, m, s in zip(image, mean, std, strict=True)])
