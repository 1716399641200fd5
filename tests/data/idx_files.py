"""Writes idx files, by the format's description: the other side of `read_idx`."""

import gzip
from pathlib import Path

import numpy as np

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    kind = array.dtype.str[1:]
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, CODES[kind], array.ndim]) + sizes + array.astype(f">{kind}").tobytes()


def write_mnist(folder: Path, part: str, labels: list[int], writers: list[int], seed: int) -> None:
    """The three files of one part: noise around a bright bar that shows the label, gzipped."""
    n, prefix = len(labels), {"train": "train", "test": "t10k"}[part]
    images = np.random.default_rng(seed).integers(0, 100, (n, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3] = 255
    qmnist = np.zeros((n, 8), np.int32)
    qmnist[:, 0], qmnist[:, 2] = labels, writers
    for name, array in {
        f"{prefix}-images-idx3-ubyte": images,
        f"{prefix}-labels-idx1-ubyte": np.array(labels, np.uint8),
        f"qmnist-{part}-labels-idx2-int": qmnist,
    }.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
