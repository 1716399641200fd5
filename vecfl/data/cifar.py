"""CIFAR-10 and CIFAR-100 in their binary version: rows of labels and 3,072 pixels."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vecfl.data.files import content
from vecfl.errors import InputError

PIXELS = 3 * 32 * 32


def read_cifar10(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CIFAR-10 as (train, test), each {"x": uint8 [n, 3, 32, 32], "y": int64 [n]}, unsplit.

    The folder holds data_batch_1.bin to data_batch_5.bin and test_batch.bin, each plain or .gz.
    Raises InputError, naming the file. Source: Krizhevsky 2009, the binary version.
    """
    train = _joined([_batch(folder, f"data_batch_{k}.bin", (10,)) for k in range(1, 6)])
    return train, _joined([_batch(folder, "test_batch.bin", (10,))])


def read_cifar100(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CIFAR-100 as (train, test): as `read_cifar10`, with the int64 column "coarse_label" [n].

    The folder holds train.bin and test.bin; y is the fine label, 0..99, the coarse one is 0..19.
    """
    parts = [_joined([_batch(folder, name, (20, 100))]) for name in ("train.bin", "test.bin")]
    return parts[0], parts[1]


def _batch(folder: Path | str, name: str, classes: tuple[int, ...]) -> np.ndarray:
    """The rows of a file, uint8 [n, labels + 3072]."""
    path, width = Path(folder) / name, len(classes) + PIXELS
    if not path.exists():
        path = path.with_name(f"{name}.gz") if path.with_name(f"{name}.gz").exists() else path
    expected = f"a CIFAR batch, rows of {width} bytes"
    data = np.frombuffer(content(path, expected), np.uint8)
    if len(data) == 0 or len(data) % width:
        raise InputError(f"{path}: {len(data)} bytes; expected {expected}")
    rows = data.reshape(-1, width)
    for place, count in enumerate(classes):
        wrong = np.flatnonzero(rows[:, place] >= count)
        if len(wrong):
            raise InputError(
                f"{path}, row {wrong[0]}: label {rows[wrong[0], place]}, expected 0..{count - 1}"
            )
    return rows


def _joined(batches: list[np.ndarray]) -> dict[str, Tensor]:
    rows = np.concatenate(batches)
    labels = rows[:, :-PIXELS].astype(np.int64)
    x = torch.from_numpy(rows[:, -PIXELS:].reshape(-1, 3, 32, 32).copy())
    columns = {"x": x, "y": torch.from_numpy(labels[:, -1].copy())}
    coarse = labels[:, 0].copy()
    return columns | ({"coarse_label": torch.from_numpy(coarse)} if labels.shape[1] == 2 else {})
