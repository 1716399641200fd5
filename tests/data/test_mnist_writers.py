"""MNIST by its writers: small files with known writers, wrong ones, and the real ones."""

import gzip
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.idx_files import idx_bytes, write_mnist
from vecfl.data import mnist_writers, read_idx
from vecfl.errors import InputError

TRAIN, TEST = "train-images-idx3-ubyte.gz", "qmnist-test-labels-idx2-int.gz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mnist(tmp_path, "train", [3, 1, 4, 1, 5], [70, 20, 70, 50, 20], seed=0)
    write_mnist(tmp_path, "test", [9, 2], [8, 9], seed=1)
    return tmp_path


def rewrite(path: Path, array: np.ndarray) -> None:
    path.write_bytes(gzip.compress(idx_bytes(array)))


def test_images_go_to_their_writers_in_order(folder: Path) -> None:
    train, test = mnist_writers(folder)
    assert list(train.client_ids) == [20, 50, 70] and list(test.client_ids) == [8, 9]
    assert train.offsets.tolist() == [0, 2, 3, 5] and test.offsets.tolist() == [0, 1, 2]
    assert train.columns["y"].tolist() == [1, 5, 1, 3, 4] and test.columns["y"].tolist() == [9, 2]
    assert train.columns["y"].dtype == torch.int64 and train.columns["x"].dtype == torch.uint8
    assert train.columns["x"].shape == (5, 1, 28, 28)
    images = read_idx(folder / TRAIN)
    order = [1, 4, 3, 0, 2]  # rows of writers 20, 20, 50, 70, 70
    assert np.array_equal(train.columns["x"][:, 0].numpy(), images[order])
    # write_mnist draws a bar of three rows at twice the label.
    assert (train.columns["x"][3, 0, 6:9] == 255).all()


def test_plain_files_are_read_too(folder: Path) -> None:
    packed = mnist_writers(folder)[0]
    for path in folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = mnist_writers(str(folder))[0]
    assert torch.equal(plain.columns["x"], packed.columns["x"])


def test_rows_of_qmnist_behind_the_images_are_left_out(folder: Path) -> None:
    rows = read_idx(folder / TEST)
    rewrite(folder / TEST, np.concatenate([rows, rows + 1]))
    assert list(mnist_writers(folder)[1].client_ids) == [8, 9]


@pytest.mark.parametrize("name", [TRAIN, "t10k-labels-idx1-ubyte.gz", TEST])
def test_a_missing_file_says_what_to_download(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError) as caught:
        mnist_writers(folder)
    said = str(caught.value)
    assert said.startswith(f"no {name[:-3]} in the folder {folder}; it should hold the four idx ")
    assert "MNIST" in said and "facebookresearch/qmnist" in said and "\n" not in said


def test_labels_that_differ_name_the_row(folder: Path) -> None:
    path = folder / "qmnist-train-labels-idx2-int.gz"
    rows = read_idx(path)
    rows[[2, 4], 0] = 7  # MNIST says 4 and 5
    rewrite(path, rows)
    said = f"{path}: row 2 has label 7, but train-labels-idx1-ubyte.gz has 4; rows must be in"
    with pytest.raises(InputError, match=f"^{re.escape(said)}.*2 of 5 differ"):
        mnist_writers(folder)


WRONG = {
    "images of another size": (TRAIN, np.zeros((5, 8, 8), np.uint8), "uint8 [n, 28, 28]"),
    "images as int32": (TRAIN, np.zeros((5, 28, 28), np.int32), "uint8 [n, 28, 28]"),
    "labels for images": (TRAIN, np.zeros(5, np.uint8), "uint8 [n, 28, 28]"),
    "too few labels": ("train-labels-idx1-ubyte.gz", np.zeros(4, np.uint8), "uint8 [5], one label"),
    "too few writers": (TEST, np.zeros((1, 8), np.int32), "int32 [2 or more, 8], a row"),
    "no writers": (TEST, np.zeros((2, 2), np.int32), "int32 [2 or more, 8], a row"),
}


@pytest.mark.parametrize(("name", "array", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_named(folder: Path, name: str, array: np.ndarray, expected: str) -> None:
    rewrite(folder / name, array)
    with pytest.raises(InputError) as caught:
        mnist_writers(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder / name}: expected {expected}")
    assert said.endswith(f"got {array.dtype.name} {list(array.shape)}")


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / TEST).write_bytes((folder / TEST).read_bytes()[:-5])
    with pytest.raises(InputError, match=f"^{re.escape(str(folder / TEST))}: damaged gzip file"):
        mnist_writers(folder)


@pytest.mark.skipif("VECFL_DATA" not in os.environ, reason="VECFL_DATA names no folder of data")
def test_the_real_files() -> None:
    folder = Path(os.environ["VECFL_DATA"], "mnist_writers")
    train, test = mnist_writers(folder)
    assert (train.num_clients, train.num_examples) == (539, 60_000)
    assert (test.num_clients, test.num_examples) == (297, 10_000)
    for data, sizes in ((train, (19, 116, 131)), (test, (8, 21, 130))):
        assert (data.sizes.min(), np.median(data.sizes), data.sizes.max()) == sizes
    assert set(train.client_ids).isdisjoint(test.client_ids)
    # MNIST's first image is a 5, and QMNIST's first row says that writer 2154 wrote it.
    first = train.client(train.position(2154))
    image = torch.from_numpy(read_idx(folder / TRAIN)[0])
    (at,) = (first["x"][:, 0] == image).flatten(1).all(1).nonzero().flatten().tolist()
    assert first["y"][at] == 5
    # Every image once: how often each label is there, and the sum of all pixels.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.columns["y"].bincount().tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert test.columns["y"].bincount().tolist() == counts
    sums = [data.columns["x"].sum().item() for data in (train, test)]
    # the mean of MNIST's pixels, 0.1307 of 255 over 60,000 images of 784
    assert sums == [1_567_298_545, 264_923_200]
    assert sums[0] / (60_000 * 784 * 255) == pytest.approx(0.1307, abs=5e-5)
