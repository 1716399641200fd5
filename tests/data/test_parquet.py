"""Parquet: values, images, partitions, damaged files, and the real files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.files import packed
from tests.data.files import parquet_file as written
from tests.data.fuzz import fuzz
from tests.data.real import DATA, real, same_images
from vecfl.data import dirichlet, read, read_parquet, read_parquet_pair
from vecfl.errors import InputError

pa = pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
pq = pytest.importorskip("pyarrow.parquet")


def test_values_by_hand_over_shards(tmp_path: Path) -> None:
    grey = [packed([[k, k + 1, k + 2]]) for k in range(3)]
    written(tmp_path / "b.parquet", image=grey[2:], who=["q"], label=[7], age=[3])
    written(tmp_path / "a.parquet", image=grey[:2], who=["q", "p"], label=[5, 6], age=[1, 2])
    data = read_parquet(tmp_path, client="who")
    assert list(data.client_ids) == ["p", "q"] and data.offsets.tolist() == [0, 1, 3]
    assert data.columns["x"].tolist() == [[[[1, 2, 3]]], [[[0, 1, 2]]], [[[2, 3, 4]]]]
    assert data.columns["x"].dtype == torch.uint8 and data.columns["y"].dtype == torch.int64
    assert data.columns["y"].tolist() == [6, 5, 7] and data.columns["age"].tolist() == [2, 1, 3]
    some = read_parquet(tmp_path / "a.parquet", client="who", label="age", columns=["image"])
    assert list(some.columns) == ["x", "y"] and some.columns["y"].tolist() == [2, 1]


def test_colours_come_first(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    path = written(tmp_path / "a.parquet", img=[packed(pixels)], label=[1], who=[9])
    assert read_parquet(path, "who").columns["x"][0].tolist() == pixels.transpose(2, 0, 1).tolist()


def test_lists_text_and_encode(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.parquet", x=[[1.0, 2], [3, 4]], words=["a b", "c"], who=[1, 1], label=[0, 1]
    )
    with pytest.raises(InputError, match="a.parquet, client 1, column 'words': text; expected num"):
        read_parquet(path, "who")
    assert read_parquet(path, "who", columns=["x"]).columns["x"].tolist() == [[1, 2], [3, 4]]

    def encode(raw: Any) -> dict[str, Any]:
        return {"n": [len(words.split()) for words in raw["words"]], "y": raw["label"]}

    assert read_parquet(path, "who", encode=encode).columns["n"].tolist() == [2, 1]


def test_a_partition_makes_the_clients(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", v=[10, 11, 12, 13], label=[0, 1, 0, 1])
    data = read_parquet(path, client=lambda labels: 1 - labels)
    assert list(data.client_ids) == [0, 1] and data.columns["v"].tolist() == [11, 13, 10, 12]
    with pytest.raises(InputError, match="client= gave 1 clients for 4 examples"):
        read_parquet(path, client=lambda labels: [1])


def test_training_and_test_files_stay_apart(tmp_path: Path) -> None:
    for k, name in enumerate(("train-0", "train-1", "test-0")):
        written(tmp_path / f"{name}.parquet", v=[k], label=[k], who=["a"])
    said = f"{tmp_path}: files of train and test, which must not mix: read_parquet_pair reads "
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        read_parquet(tmp_path, "who")
    for pair in (read_parquet_pair(tmp_path, "who"), read(tmp_path, client="who")):
        assert [part.columns["v"].tolist() for part in pair if part] == [[0, 1], [2]]
    some = read_parquet(sorted(tmp_path.glob("train*")), "who")
    assert some.columns["v"].tolist() == [0, 1]
    (tmp_path / "test-0.parquet").rename(tmp_path / "validation-0.parquet")
    with pytest.raises(InputError, match="files of train and validation, which must not mix"):
        read(tmp_path, client="who")
    with pytest.raises(InputError, match=f"^{tmp_path}: no test.*.parquet; expected train.* and"):
        read_parquet_pair(tmp_path, "who")


def test_messages_name_files_and_columns_in_few_words(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{k}.parquet", who=["a"], label=["x"]) for k in range(5)]
    named = f"{tmp_path}/0.parquet, {tmp_path}/1.parquet, {tmp_path}/2.parquet and 2 others"
    with pytest.raises(InputError, match=f"^{named}, client 'a', column 'y': text; expected n"):
        read_parquet(files, "who")
    columns = {f"a{k}": [0] for k in range(800)} | {"writer_id": [1], "label": [1]}
    path = written(tmp_path / "wide.parquet", **columns)
    said = f"{path}: no column 'writer'; did you mean 'writer_id'? it has ['a0', 'a1', 'a2', 'a3',"
    with pytest.raises(InputError, match=f"^{re.escape(said)} 'a4'. and 797 more$"):
        read_parquet(path, "writer")


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no client": ({"label": [1]}, ": no column 'who'; it has ['label']"),
    "no label": ({"who": [1]}, ": no column 'label'; it has ['who']"),
    "null": ({"who": [1], "label": [None]}, ", column 'label': 1 rows have no value; clean them"),
    "no rows": ({"who": [], "label": []}, ": 0 rows of ['who', 'label']; expected rows and own"),
    "float client": ({"who": [0.5], "label": [1]}, ", client: expected n > 0 integers or strings"),
    "nan": (
        {"who": [1], "label": [1], "v": [float("nan")]},
        ", client 1, column 'v', example 0: N",
    ),
    "no image": (
        {"who": [1], "label": [1], "image": [{"bytes": b"GIF8", "path": "/etc/passwd"}]},
        ", client 1, column 'image', example 0: cannot identify image file",
    ),
    "a path alone": (
        {"who": [1], "label": [1], "image": [{"bytes": None, "path": "/etc/passwd"}]},
        ", client 1, column 'image', example 0: no bytes of an image; expected {bytes, path} with",
    ),
    "sizes": (
        {"who": [1, 1], "label": [1, 1], "image": [packed([[1]]), packed([[1, 2]])]},
        ", client 1, column 'image', example 1: an image [1, 1, 2], but example 0 is [1, 1, 1]",
    ),
}


@pytest.mark.parametrize(("columns", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, columns: Any, said: str) -> None:
    path = written(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + said)}") as caught:
        read_parquet(path, "who")
    assert "\n" not in str(caught.value)


def test_other_formats_are_not_decoded(tmp_path: Path) -> None:
    script = {"bytes": packed([[1]], "EPS")["bytes"], "path": None}  # PostScript is a program
    path = written(tmp_path / "a.parquet", image=[script], who=[1], label=[1])
    with pytest.raises(
        InputError, match="example 0: cannot identify image file .*; expected an im"
    ):
        read_parquet(path, "who")


def test_no_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("no parquet")
    with pytest.raises(InputError, match=f"^{path}: Parquet .*; expected parquet files with"):
        read_parquet(path, "who")
    with pytest.raises(InputError, match="no such file in this directory"):
        (tmp_path / "empty").mkdir()
        read_parquet(tmp_path / "empty", "who")
    written(tmp_path / "b.parquet", who=[1], label=["a"])
    written(path, who=[1], label=[1])
    with pytest.raises(InputError, match=f"^{tmp_path}: Schema at index 1 was different"):
        read_parquet(tmp_path, "who")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        InputError, match='needs pyarrow, which is not .*pip install "vecfl.data."$'
    ):
        read_parquet(path, "who")


def test_mutated_files(tmp_path: Path) -> None:
    columns = {
        "who": ["a", "b", "a"],
        "label": [1, 2, 3],
        "image": [packed([[k]]) for k in range(3)],
    }
    good = written(tmp_path / "good.parquet", **columns).read_bytes()
    refused = fuzz(lambda p: read_parquet(p, "who"), good, tmp_path / "a.parquet", runs=300)
    assert 50 < refused < 300


@real("mnist_writers")
def test_writers_have_the_pixels_of_mnist() -> None:
    data = read_parquet(DATA / "mnist_writers/hf", client="writer_id", label="character")
    assert (data.num_clients, data.num_examples) == (60, 6573)
    assert data.columns["x"].shape == (6573, 1, 28, 28) and data.columns["hsf_id"].max() < 8
    same_images(data)


@real("cifar10_jpeg_hf")
def test_cifar_by_a_partition() -> None:
    def clients(labels: Any) -> Any:
        return dirichlet(labels, 20, 0.3, seed=0)

    path = DATA / "cifar10_jpeg_hf/test-00000-of-00001.parquet"
    data = read_parquet(path, client=clients)
    assert (data.num_clients, data.num_examples) == (20, 5000)
    assert data.columns["x"].shape == (5000, 3, 32, 32)
    assert data.columns["y"].bincount().tolist() == [500] * 10


@pytest.mark.slow
@real("cifar10_jpeg_hf")
def test_cifar_in_full_is_a_pair() -> None:
    train, test = read(
        DATA / "cifar10_jpeg_hf", client=lambda labels: dirichlet(labels, 100, 0.3, seed=0)
    )
    assert test is not None and (train.num_examples, test.num_examples) == (50_000, 5000)
    assert train.columns["y"].bincount().tolist() == [5000] * 10
