"""LEAF JSON: values, directories, damaged files, and the real files."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.fuzz import answers, fuzz
from tests.data.real import DATA, real, same_images
from vecfl.data import leaf_clients, read_leaf, read_leaf_pair
from vecfl.errors import InputError


def document(**users: dict[str, list[Any]]) -> dict[str, Any]:
    sizes = [len(next(iter(row.values()))) for row in users.values()]
    return {"users": list(users), "num_samples": sizes, "user_data": users}


GOOD = document(ann={"x": [[0.5, 1], [2, 3]], "y": [7, 8]}, bob={"x": [[4.0, 5]], "y": [9]})


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_values_by_hand(tmp_path: Path) -> None:
    empty = {"x": [], "y": []}
    good = document(ann=GOOD["user_data"]["ann"], none=empty, bob=GOOD["user_data"]["bob"])
    data = read_leaf(written(tmp_path / "a.json", good | {"hierarchies": ["h", "h", "h"]}))
    assert list(data.client_ids) == ["ann", "none", "bob"] and data.offsets.tolist() == [0, 2, 2, 3]
    assert data.columns["x"].tolist() == [[0.5, 1], [2, 3], [4, 5]]
    assert data.columns["x"].dtype == torch.float32 and data.columns["y"].dtype == torch.int64
    assert data.columns["y"].tolist() == [7, 8, 9]


def test_images_of_784_get_their_shape(tmp_path: Path) -> None:
    row = [i / 784 for i in range(784)]
    data = read_leaf(written(tmp_path / "a.json", document(u={"x": [row], "y": [1]})))
    assert data.columns["x"].shape == (1, 1, 28, 28)
    assert data.columns["x"][0, 0, 2, 3] == torch.tensor(59 / 784)  # 2 * 28 + 3


def test_a_directory_and_a_pair(tmp_path: Path) -> None:
    written(tmp_path / "train" / "b.json", document(zoe={"x": [1], "y": [2]}))
    packed = gzip.compress(json.dumps(document(amy={"x": [3], "y": [4]})).encode())
    (tmp_path / "train" / "c.json.gz").write_bytes(packed)
    (tmp_path / "train" / "notes.txt").write_text("no data")
    written(tmp_path / "test" / "a.json", document(zoe={"x": [5], "y": [6]}))
    train, test = read_leaf_pair(tmp_path)
    assert list(train.client_ids) == ["zoe", "amy"] and train.columns["x"].tolist() == [1, 3]
    assert list(test.client_ids) == ["zoe"] and test.columns["y"].tolist() == [6]
    written(tmp_path / "train" / "d.json", document(amy={"x": [3], "y": [4]}))
    with pytest.raises(InputError, match="d.json, client 'amy': c.json.gz has this client too"):
        read_leaf(tmp_path / "train")


def test_text_goes_through_encode(tmp_path: Path) -> None:
    text = document(u={"x": ["ab", "c"], "y": ["d", "e"]})
    path = written(tmp_path / "a.json", text)
    with pytest.raises(InputError, match="a.json, client 'u', column 'x': text; expected numbers"):
        read_leaf(path)
    with pytest.raises(InputError, match="client 'u': encode= found no 'z' in .'x', 'y'.$"):
        read_leaf(path, lambda raw: {"x": raw["z"]})
    lengths = read_leaf(path, lambda raw: {"x": np.array([len(line) for line in raw["x"]])})
    assert lengths.columns["x"].tolist() == [2, 1] and list(lengths.columns) == ["x"]


def test_clients_are_streamed(tmp_path: Path) -> None:
    written(tmp_path / "a.json", GOOD)
    written(tmp_path / "b.json", "no json")
    clients = leaf_clients(tmp_path)
    assert [next(clients)[0], next(clients)[0]] == ["ann", "bob"]
    with pytest.raises(InputError, match="b.json: no valid JSON"):
        next(clients)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


DAMAGED = {
    "cut": (json.dumps(GOOD)[:-9], ": no valid JSON: Unterminated string"),
    "a list": ([1], ": a JSON list; expected LEAF JSON: {users, num_samples, user_data: {user:"),
    "deep": ("[" * 100_000, ": no valid JSON: maximum recursion depth"),
    "no utf-8": ('{"users": "\udcff"}', ": no valid JSON: 'utf-8' codec can't decode"),
    "no users": (without("users"), ": key 'users': expected a list, got nothing; LEAF JSON"),
    "no num_samples": (without("num_samples"), ": key 'num_samples': expected a list, got nothing"),
    "user_data": (GOOD | {"user_data": []}, ": key 'user_data': expected a dict, got list; LEAF"),
    "few counts": (
        GOOD | {"num_samples": [2]},
        ": key 'num_samples': 1 entries, expected one for each of the 2 users",
    ),
    "a lie": (
        GOOD | {"num_samples": [2, 3]},
        ", client 'bob': key 'x': expected a list of 3 examples (num_samples), got 1 of them",
    ),
    "a smaller lie": (
        GOOD | {"num_samples": [1, 1]},
        ", client 'ann': key 'x': expected a list of 1 examples (num_samples), got 2 of them",
    ),
    "half": (GOOD | {"num_samples": [2, 1.0]}, ", client 'bob': key 'num_samples': expected an in"),
    "true": (GOOD | {"num_samples": [2, True]}, ", client 'bob': key 'num_samples': expected an i"),
    "twice": (GOOD | {"users": ["ann", "ann"]}, ", client 'ann': occurs twice in users"),
    "no name": (GOOD | {"users": ["ann", 5]}, ", client 5: expected a string"),
    "unknown": (GOOD | {"users": ["ann", "eve"]}, ", client 'eve': in users, but not in user_data"),
    "unlisted": (
        GOOD | {"users": ["ann"], "num_samples": [2]},
        ", client 'bob': in user_data, but not in users",
    ),
    "a key twice": ('{"users": 1, "users": 2}', ": key 'users' occurs twice in one JSON object"),
    "no columns": (
        document(u={"x": [1]}) | {"user_data": {"u": [1]}},
        ", client 'u': expected {x:",
    ),
    "no list": (
        document(u={"x": [1]}) | {"user_data": {"u": {"x": 1}}},
        ", client 'u': key 'x': expected a list of 1 examples (num_samples), got int",
    ),
    "ragged": (
        document(u={"x": [[1, 2], [1]]}),
        ", client 'u', key 'x': example 1 has 1 numbers, but example 0 has 2; rows must be of one",
    ),
    "deeply ragged": (document(u={"x": [[[1], [2]], [[1], 2]]}), ", client 'u', key 'x': rows of"),
    "null": (document(u={"x": [None]}), ", client 'u', key 'x': expected numbers, got NoneType"),
    "mixed": (
        document(u={"x": [1, "a"]}),
        ", client 'u', key 'x': expected numbers, got int or mo",
    ),
    "huge": (
        document(u={"x": [10**30]}),
        ", client 'u', key 'x': expected numbers, got int or mor",
    ),
    "too large": (document(u={"x": [1e300]}), ", client 'u', column 'x', example 0: NaN or Inf"),
    "nan": (document(u={"x": [1.0, float("nan")]}), ", client 'u', column 'x', example 1: NaN or"),
    "disagree": (
        document(u={"x": [1.5]}, v={"x": [1]}),
        ", client 'v', column 'x': int64 [1], but client 'u' has float32 [1]",
    ),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "a.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + said)}") as caught:
        read_leaf(path)
    assert "\n" not in str(caught.value)


def test_damaged_gzip_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-10])
    with pytest.raises(
        InputError, match=f"^{path}: damaged gzip file: .*; expected LEAF JSON: {{u"
    ):
        read_leaf(path)
    with pytest.raises(InputError, match="/train: no such file or directory; expected a file, or"):
        read_leaf_pair(tmp_path)


def test_mutated_files(tmp_path: Path) -> None:
    text = json.dumps(GOOD, indent=0).encode()
    assert 150 < fuzz(read_leaf, text, tmp_path / "a.json", runs=400) < 400
    assert fuzz(read_leaf, gzip.compress(text), tmp_path / "a.json.gz", runs=100) > 50


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from("xyz"), st.lists(VALUES, max_size=3) | VALUES, max_size=2)
NAMES = st.sampled_from(["u", "v", "\udc00", ""])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    users=st.lists(NAMES | VALUES, max_size=3),
    sizes=st.lists(st.integers(-1, 3) | VALUES, max_size=3),
    rows=st.dictionaries(NAMES, ROWS | VALUES) | VALUES,
)
def test_generated_structures(tmp_path_factory, users: list, sizes: list, rows: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "generated.json"
    path.write_text(json.dumps({"users": users, "num_samples": sizes, "user_data": rows}))
    answers(lambda: read_leaf(path))


@real("mnist_writers")
def test_femnist_layout_has_the_pixels_of_the_writers() -> None:
    train, test = read_leaf_pair(DATA / "mnist_writers/leaf")
    assert (train.num_clients, train.num_examples, test.num_examples) == (30, 2948, 342)
    assert train.columns["x"].shape == (2948, 1, 28, 28)
    same_images(train, test)
