"""Map-style datasets and CIFAR's binary batches."""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from vecfl.data import FederatedDataset, iid, read_cifar10, read_cifar100, read_examples
from vecfl.errors import InputError


def test_pairs_of_tensors() -> None:
    x, y = torch.arange(6.0).reshape(3, 2), torch.tensor([7, 8, 9])
    data = read_examples(TensorDataset(x, y), client=["b", "a", "b"])
    assert list(data.client_ids) == ["a", "b"] and data.columns["y"].tolist() == [8, 7, 9]
    assert data.columns["x"].tolist() == [[2, 3], [0, 1], [4, 5]]
    assert data.columns["x"].dtype == torch.float32 and data.columns["y"].dtype == torch.int64


def test_images_of_pillow_and_numbers_of_python() -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    data = read_examples([(image.fromarray(pixels), 3), (image.fromarray(pixels), 4)], [0, 0])
    assert data.columns["x"].shape == (2, 3, 2, 4) and data.columns["y"].tolist() == [3, 4]
    assert data.columns["x"][0, 2].tolist() == pixels[:, :, 2].tolist()
    assert read_examples([(0.1, 1)], [0]).columns["x"].dtype == torch.float32


class Rows(list):
    """As `datasets.Dataset`: rows by number, columns by name."""

    column_names = ("image", "who", "label")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row[key] for row in iter(self)]
        return super().__getitem__(key)


def test_rows_of_named_columns() -> None:
    rows = [
        {"image": [[1]], "who": "q", "label": 5, "tag": "ab"},
        {"image": [[2]], "who": "p", "label": 6, "tag": "c"},
    ]

    def encode(raw: Any) -> dict[str, Any]:
        return {"x": raw["x"], "n": [len(tag) for tag in raw["tag"]]}

    for dataset in (rows, Rows(rows)):
        with pytest.raises(
            InputError, match="^(list|Rows), client 'p', column 'tag': text; expect"
        ):
            read_examples(dataset, client="who")
        data = read_examples(dataset, "who", encode)
        assert list(data.client_ids) == ["p", "q"] and data.columns["n"].tolist() == [1, 2]
        assert data.columns["x"].tolist() == [[[2]], [[1]]]


WRONG = {
    "a function": (
        [(1, 2), (1, 2)],
        lambda labels: labels,
        "list: client: expected the clients of the 2 examples, or the key that holds them, got a f",
    ),
    "few": ([(1, 2), (1, 2)], [0], "list: 1 clients for 2 examples"),
    "no key": ([{"x": 1}], "who", "list, example 0: no key 'who' for the client: ['x']"),
    "no mapping": ([(1, 2)], "who", "list, example 0: no key 'who' for the client: tuple"),
    "three": ([(1, 2, 3)], [0], "list, example 0: a tuple; expected (x, y) or {column: value}"),
    "shapes": ([([1], 2), ([1, 2], 3)], [0, 0], "list, client 0, column 'x': examples of differe"),
    "names": ([{"x": 1}, {"z": 1}], [0, 0], "list, example 1: columns ['z'], expected ['x']"),
    "nothing": ([], [], "list, client: expected n > 0 integers or strings"),
}


@pytest.mark.parametrize(("dataset", "client", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_one_line(dataset: Any, client: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        read_examples(dataset, client)


def batch(*labels: int, first: int = 0) -> bytes:
    """One row of these labels, with the pixels 0, 1, ..., 255, 0, 1, ... from `first`."""
    return bytes(labels) + bytes((first + k) % 256 for k in range(3072))


def test_cifar_by_hand(tmp_path: Path) -> None:
    for k in range(1, 5):
        (tmp_path / f"data_batch_{k}.bin").write_bytes(batch(k, first=k) + batch(k + 1))
    (tmp_path / "data_batch_5.bin.gz").write_bytes(gzip.compress(batch(9)))
    (tmp_path / "test_batch.bin").write_bytes(batch(0))
    train, test = read_cifar10(tmp_path)
    assert train["y"].tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 9] and test["y"].tolist() == [0]
    assert train["x"].shape == (9, 3, 32, 32) and train["x"].dtype == torch.uint8
    assert train["x"][2, 1, 2, 3] == (2 + 1024 + 2 * 32 + 3) % 256
    owner = iid(9, clients=3, seed=0)
    assert FederatedDataset.from_arrays(train, owner).num_clients == 3

    (tmp_path / "train.bin").write_bytes(batch(19, 99))
    (tmp_path / "test.bin").write_bytes(batch(0, 7) * 2)
    train, test = read_cifar100(tmp_path)
    assert (train["y"].tolist(), train["coarse_label"].tolist()) == ([99], [19])
    assert test["y"].tolist() == [7, 7] and test["x"][1, 0, 0, 1] == 1


def test_damaged_cifar(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="train.bin: No such file or directory; expected a CIFAR b"
    ):
        read_cifar100(tmp_path)
    path = tmp_path / "train.bin"
    path.write_bytes(batch(1, 1)[:-1])
    with pytest.raises(
        InputError, match=f"^{path}: 3073 bytes; expected a CIFAR batch, rows of 3074"
    ):
        read_cifar100(tmp_path)
    path.write_bytes(batch(1, 1) + batch(1, 100))
    with pytest.raises(InputError, match=f"^{path}, row 1: label 100, expected 0..99$"):
        read_cifar100(tmp_path)
