"""MNIST by its writers: handwritten digits whose clients are the people who wrote them."""

import os
from pathlib import Path

import numpy as np

from vecfl.data.dataset import FederatedDataset
from vecfl.data.idx import read_idx
from vecfl.errors import InputError

IMAGES, LABELS, WRITERS = (
    {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"},
    {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"},
    {"train": "qmnist-train-labels-idx2-int", "test": "qmnist-test-labels-idx2-int"},
)
DOWNLOAD = (
    "the four idx files of MNIST ({train,t10k}-{images-idx3,labels-idx1}-ubyte) and the two label "
    "files of QMNIST (qmnist-{train,test}-labels-idx2-int, in the repository facebookresearch/"
    "qmnist on GitHub), each plain or .gz"
)
CLASS, WRITER = 0, 2  # columns of a QMNIST label file


def mnist_writers(folder: Path | str) -> tuple[FederatedDataset, FederatedDataset]:
    """MNIST's training and test images as (train, test), each by its true writers.

    Columns x uint8 [n, 1, 28, 28] and y int64 [n]; client ids are the writer ids of NIST. The
    60,000 training images have 539 writers, the 10,000 test images 297 others. The writers come
    from QMNIST, whose rows have MNIST's order: Yadav and Bottou, NeurIPS 2019, arXiv:1905.10498.
    Raises InputError for a file that is missing, damaged or of another shape, and where the
    labels of MNIST and QMNIST differ.
    """
    return _part(Path(folder), "train"), _part(Path(folder), "test")


def default_folder() -> Path:
    """mnist_writers in the folder that VECFL_DATA names, or here."""
    folder = Path(os.environ.get("VECFL_DATA", "."), "mnist_writers")
    if not folder.is_dir():
        unset = "" if "VECFL_DATA" in os.environ else " here, and VECFL_DATA is not set"
        raise InputError(f"--data: no folder {folder}{unset}; it should hold {DOWNLOAD}")
    return folder


def _part(folder: Path, part: str) -> FederatedDataset:
    paths = [_find(folder, names[part]) for names in (IMAGES, LABELS, WRITERS)]
    images, labels, qmnist = map(read_idx, paths)
    n = len(images)
    if images.dtype != np.uint8 or images.shape != (n, 28, 28):
        raise _unfit(paths[0], "uint8 [n, 28, 28]", images)
    if labels.dtype != np.uint8 or labels.shape != (n,):
        raise _unfit(paths[1], f"uint8 [{n}], one label for each of the images", labels)
    # QMNIST's test file goes on behind MNIST's 10,000 images.
    if qmnist.dtype != np.int32 or qmnist.ndim != 2 or qmnist.shape[1] != 8 or len(qmnist) < n:
        raise _unfit(paths[2], f"int32 [{n} or more, 8], a row for each of the images", qmnist)
    qmnist = qmnist[:n]
    differ = np.flatnonzero(qmnist[:, CLASS] != labels)
    if len(differ):
        row = differ[0]
        raise InputError(
            f"{paths[2]}: row {row} has label {qmnist[row, CLASS]}, but {paths[1].name} has "
            f"{labels[row]}; rows must be in MNIST's order ({len(differ)} of {n} differ)"
        )
    columns = {"x": images[:, None], "y": labels.astype(np.int64)}
    return FederatedDataset.from_arrays(columns, qmnist[:, WRITER])


def _find(folder: Path, name: str) -> Path:
    """The file of this name in the folder, or with .gz behind it."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise InputError(f"no {name} in the folder {folder}; it should hold {DOWNLOAD}")


def _unfit(path: Path, expected: str, found: np.ndarray) -> InputError:
    return InputError(f"{path}: expected {expected}, got {found.dtype.name} {list(found.shape)}")
