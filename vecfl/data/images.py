"""Pictures in files of data: decoded by Pillow, channel first."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfl.data.files import needs, understood
from vecfl.errors import InputError

# Formats that Pillow decodes by itself: some of the others start a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
NAMES = {"image": "x", "img": "x", "label": "y"}  # in data sets of Hugging Face


def decoded(files: list[Any], where: str) -> NDArray[np.uint8]:
    """Image files {bytes, path} or bytes, or images of Pillow, as [n, C, H, W].

    Grey images have one channel, all others three. Raises InputError, naming the example, for what
    is no image and for sizes that differ; a path alone is not opened.
    """
    pil = needs("PIL.Image", "decoding images")
    images: list[NDArray[np.uint8]] = []
    for row, file in enumerate(files):
        at = f"{where}, example {row}"
        data: Any = file.get("bytes") if isinstance(file, dict) else file
        with understood(at, f"an image, one of {FORMATS}"):
            image = pil.open(io.BytesIO(data), formats=FORMATS) if _is_bytes(data, at) else data
            image = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
            pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if images and pixels.shape != images[0].shape:
            raise InputError(
                f"{at}: an image {list(pixels.shape)}, but example 0 is {list(images[0].shape)}; "
                "images must be of one size: resize them in encode="
            )
        images.append(pixels)
    return np.stack(images) if images else np.zeros((0, 1, 1, 1), np.uint8)


def is_image(value: Any) -> bool:
    """Whether this is an image of Pillow or an image file {bytes, path}."""
    return hasattr(value, "getbands") or isinstance(value, dict) and set(value) == {"bytes", "path"}


def _is_bytes(data: Any, where: str) -> bool:
    if not isinstance(data, bytes) and not hasattr(data, "getbands"):
        raise InputError(f"{where}: no bytes of an image; expected {{bytes, path}} with bytes")
    return isinstance(data, bytes)
