"""Feature shift: clients that see the world rotated, or through another gain and offset.

What a client has is drawn by one function and applied by another, so that training and test data of
the same clients can be shifted alike.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from vecfl.data.dataset import FederatedDataset
from vecfl.data.partition import AFFINE, ANGLES, generator, integer
from vecfl.errors import InputError

BLOCK = 4096  # examples that are shifted at a time


def draw_angles(
    clients: int, seed: int, angles: Sequence[float] = (0, 90, 180, 270)
) -> NDArray[np.float64]:
    """An angle for each client, [clients], in degrees: each of `angles` equally often, up to one.

    Raises InputError for clients < 1 and where no angle is given. Source: Ghosh et al. 2020,
    arXiv:2006.04088, section 6 (rotated MNIST: four groups of clients).
    """
    clients = integer(clients, "clients", 1)
    if len(angles) == 0:
        raise InputError("angles: expected at least one angle in degrees, got none")
    group = generator(seed, ANGLES).permutation(np.arange(clients) % len(angles))
    return np.asarray(angles, dtype=np.float64)[group]


def draw_affine(
    clients: int, seed: int, gain: float = 0.2, offset: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gains ~ U(1 - gain, 1 + gain) and offsets ~ U(-offset, offset), each [clients].

    Offsets have the unit of the column that they are for: levels of 0..255 where it is uint8.
    Raises InputError for clients < 1, a gain outside [0, 1) and an offset that is negative or not
    finite. Source: Reisizadeh et al. 2020, arXiv:2006.08907 (a bounded affine shift per client).
    """
    clients = integer(clients, "clients", 1)
    if not 0 <= gain < 1:
        raise InputError(f"gain: expected a number in [0, 1), got {gain}")
    if not 0 <= offset < math.inf:
        raise InputError(f"offset: expected a finite number of at least 0, got {offset}")
    gains, offsets = generator(seed, AFFINE).uniform(-1, 1, (2, clients))
    return 1 + gain * gains, offset * offsets


def rotate(data: FederatedDataset, angles: Any, column: str = "x") -> FederatedDataset:
    """The data with the images of client k turned counterclockwise by angles[k] degrees.

    The column is [n, ..., H, H]. Multiples of 90 move pixels and change none; other angles
    interpolate bilinearly, with 0 from outside the image. uint8 is rounded. Raises InputError for
    a column that has no square images, uint8 or floating, and for angles that are not N finite
    numbers.
    """
    images = _column(data, column)
    if images.dim() < 3 or images.shape[-1] != images.shape[-2]:
        raise InputError(
            f"column {column!r}: expected square images [n, ..., H, H], got {list(images.shape)}"
        )
    turns, rest = np.divmod(_of_examples(data, angles, "angles"), 90)
    turned = images.clone()
    for k in (1, 2, 3):
        for rows in _blocks((rest == 0) & (turns % 4 == k), images):
            turned[rows] = images[rows].rot90(k, (-2, -1))
    radians = torch.from_numpy(np.deg2rad(90 * turns + rest)).to(images.device)
    for rows in _blocks(rest != 0, images):
        turned[rows] = _cast(_turn(images[rows], radians[rows]), images)
    return replace(data, columns={**data.columns, column: turned})


def affine(data: FederatedDataset, gains: Any, offsets: Any, column: str = "x") -> FederatedDataset:
    """The data with the column of client k, [n, ...], times gains[k] plus offsets[k].

    uint8 is rounded and kept in 0..255. Raises InputError for a column that is neither uint8 nor
    floating, and for gains and offsets that are not N finite numbers each.
    """
    values = _column(data, column)
    gain, offset = (
        torch.from_numpy(_of_examples(data, of_clients, name)).to(values.device)
        for of_clients, name in ((gains, "gains"), (offsets, "offsets"))
    )
    shifted = values.clone()
    ones = (1,) * (values.dim() - 1)
    for rows in _blocks(np.ones(data.num_examples, dtype=bool), values):
        part = values[rows] * gain[rows].view(-1, *ones) + offset[rows].view(-1, *ones)
        shifted[rows] = _cast(part, values)
    return replace(data, columns={**data.columns, column: shifted})


def _turn(images: Tensor, radians: Tensor) -> Tensor:
    """Images [b, ..., H, H], each turned counterclockwise by its angle [b]: floating, bilinear."""
    flat = images.reshape(len(images), -1, *images.shape[-2:]).to(torch.float64)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # Where each pixel comes from: the turn backwards, with y pointing down.
    source = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grid = affine_grid(source, list(flat.shape), align_corners=False)
    return grid_sample(flat, grid, align_corners=False).view(images.shape)


def _cast(values: Tensor, like: Tensor) -> Tensor:
    return (values if like.is_floating_point() else values.round().clamp(0, 255)).to(like.dtype)


def _blocks(mask: NDArray[np.bool_], like: Tensor) -> Iterator[Tensor]:
    """The examples of a mask [n], some at a time, on the device of `like`."""
    rows = torch.from_numpy(np.flatnonzero(mask))
    return (block.to(like.device) for block in rows.split(BLOCK) if len(block))


def _column(data: FederatedDataset, name: str) -> Tensor:
    if name not in data.columns:
        raise InputError(f"column {name!r}: the data have {', '.join(data.columns)}")
    column = data.columns[name]
    if column.dtype != torch.uint8 and not column.is_floating_point():
        raise InputError(f"column {name!r}: expected uint8 or floating values, got {column.dtype}")
    return column


def _of_examples(data: FederatedDataset, values: Any, name: str) -> NDArray[np.float64]:
    """The value of each example's client, [n], of `values` [N]."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (data.num_clients,) or not np.isfinite(array).all():
        raise InputError(
            f"{name}: expected {data.num_clients} finite numbers, one for each client, "
            f"got shape {list(array.shape)}"
        )
    return np.repeat(array, data.sizes.numpy())
