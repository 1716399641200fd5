"""Client streams: what is collected, and the one line about what does not fit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vecfl.data import collect
from vecfl.data.files import content, listing, needs, understood
from vecfl.errors import InputError


def f32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_clients_in_the_order_of_the_stream() -> None:
    clients = [
        ("b", {"x": f32([1, 2], [3, 4]), "y": np.array([1, 0])}),
        ("empty", {"y": [], "x": []}),
        ("a", {"y": torch.tensor([5]), "x": f32([5, 6])}),
    ]
    data = collect(iter(clients), "somewhere")
    assert list(data.client_ids) == ["b", "empty", "a"] and data.offsets.tolist() == [0, 2, 2, 3]
    assert data.columns["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert data.columns["y"].tolist() == [1, 0, 5]
    assert data.columns["x"].dtype == torch.float32 and data.columns["y"].dtype == torch.int64
    assert data.position("a") == 2


def test_bytes_in_the_other_order_are_turned() -> None:
    data = collect(iter([(0, {"x": np.array([1, 258], ">i2")})]), "s")
    assert data.columns["x"].tolist() == [1, 258] and data.columns["x"].dtype == torch.int16


ONE = ("a", {"x": f32([1, 2])})
WRONG = {
    "twice": ([ONE, ONE], "f, client 'a': the id occurs twice"),
    "no hash": ([([1], {"x": [1]})], "f, client [1]: the id occurs twice or has no hash"),
    "no clients": ([], "f: 0 clients, and none has an example"),
    "all empty": ([("a", {"x": []})], "f: 1 clients, and none has an example"),
    "no columns": ([("a", {})], "f, client 'a': expected {column: array [n, ...]}, got {}"),
    "names": ([ONE, ("b", {"z": [1]})], "f, client 'b': columns ['z'], but client 'a' has ['x']"),
    "dtype": (
        [ONE, ("b", {"x": np.ones((1, 2))})],
        "f, client 'b', column 'x': float64 [1, 2], but client 'a' has float32 [1, 2]",
    ),
    "shape": (
        [ONE, ("b", {"x": f32([1, 2, 3])})],
        "f, client 'b', column 'x': float32 [1, 3], but client 'a' has float32 [1, 2]",
    ),
    "lengths": (
        [("a", {"x": [1, 2], "y": [1]})],
        "f, client 'a': column 'y' is [1], but column 'x' is [2]",
    ),
    "a number": ([("a", {"x": 3})], "f, client 'a': column 'x' is [], but column 'x' is []"),
    "nan": ([("a", {"x": f32([1], [np.nan])})], "f, client 'a', column 'x', example 1: NaN or Inf"),
    "text": ([("a", {"x": ["hi"]})], "f, client 'a', column 'x': text; expected numbers: give enc"),
    "text array": ([("a", {"x": np.array(["hi"])})], "f, client 'a', column 'x': text; expected"),
    "objects": ([("a", {"x": [None]})], "f, client 'a', column 'x': expected numbers of at most 8"),
    "ragged": ([("a", {"x": [[1], [1, 2]]})], "f, client 'a', column 'x': expected an array of n"),
}


@pytest.mark.parametrize(("clients", "said"), WRONG.values(), ids=WRONG)
def test_one_line_names_source_client_and_column(clients: list, said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}") as caught:
        collect(iter(clients), "f")
    assert "\n" not in str(caught.value)


def test_files_and_packages(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).write_text("1")
    assert [path.name for path in listing(tmp_path, ".json")] == ["a.json", "b.json"]
    assert listing(tmp_path / "c.txt", ".json") == [tmp_path / "c.txt"]
    with pytest.raises(InputError, match="no such file in this directory; expected a file, or"):
        listing(tmp_path, ".h5")
    with pytest.raises(InputError, match="no such file or directory; expected a file, or"):
        listing(tmp_path / "none", ".h5")
    with pytest.raises(InputError, match="No such file or directory; expected words$"):
        content(tmp_path / "none", "words")
    with pytest.raises(InputError, match='reading X needs no_such, .* pip install "vecfl.data."'):
        needs("no_such", "reading X")
    with (
        pytest.raises(InputError, match="^here: one two; expected three$"),
        understood("here", "three"),
    ):
        raise ValueError("one\n two")
