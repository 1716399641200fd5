"""FLUTE's blobs: the same data as JSON and as HDF5, and damaged ones."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.files import hdf5_file as as_hdf5
from tests.data.fuzz import fuzz
from vecfl.data import read_flute
from vecfl.errors import InputError

GOOD: dict[str, Any] = {
    "users": ["bo", "al", "no one"],
    "num_samples": [2, 1, 0],
    "user_data": {
        "al": {"x": [[5.0, 6.0]]},
        "bo": {"x": [[1.0, 2.0], [3.0, 4.0]]},
        "no one": {"x": []},
    },
    "user_data_label": {"al": [9], "bo": [7, 8], "no one": []},
}


def as_json(path: Path, blob: dict[str, Any]) -> Path:
    path.write_bytes(gzip.compress(json.dumps(blob).encode()))
    return path


both = pytest.mark.parametrize("written", [as_json, as_hdf5])


@both
def test_values_by_hand(tmp_path: Path, written: Callable[[Path, Any], Path]) -> None:
    data = read_flute(written(tmp_path / "blob", GOOD))
    assert list(data.client_ids) == ["bo", "al", "no one"]
    assert data.offsets.tolist() == [0, 2, 3, 3]
    assert data.columns["x"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert data.columns["y"].tolist() == [7, 8, 9]
    assert data.columns["x"].dtype == torch.float32 and data.columns["y"].dtype == torch.int64


@both
def test_plain_lists_labels_in_groups_and_no_labels(tmp_path: Path, written: Any) -> None:
    plain = {name: row["x"] for name, row in GOOD["user_data"].items()}
    labels = {name: {"x": row} for name, row in GOOD["user_data_label"].items()}
    wanted = read_flute(written(tmp_path / "blob", GOOD))
    for change in ({"user_data": plain}, {"user_data_label": labels}):
        data = read_flute(written(tmp_path / "other", GOOD | change))
        assert {n: c.tolist() for n, c in data.columns.items()} == {
            n: c.tolist() for n, c in wanted.columns.items()
        }
    alone = {key: value for key, value in GOOD.items() if key != "user_data_label"}
    assert list(read_flute(written(tmp_path / "other", alone)).columns) == ["x"]


@both
def test_text_goes_through_encode(tmp_path: Path, written: Any) -> None:
    blob = {"users": ["u"], "num_samples": [2], "user_data": {"u": {"x": ["one", "é"]}}}
    path = written(tmp_path / "blob", blob)
    with pytest.raises(InputError, match="blob, client 'u', column 'x': text; expected numbers"):
        read_flute(path)
    data = read_flute(path, lambda raw: {"n": [len(line) for line in raw["x"]]})
    assert data.columns["n"].tolist() == [3, 1]


LONG = {"al": [9], "bo": [7, 8, 9], "no one": []}
DAMAGED = {
    "no users": ({"users": None}, as_json, ": key 'users': expected a list, got NoneType; FLUTE's"),
    "labels": ({"user_data_label": [1]}, as_json, ": key 'user_data_label': expected a dict of us"),
    "no label": (
        {"user_data_label": {"bo": [7, 8]}},
        as_json,
        ", client 'al': in users, but not in user_data_label",
    ),
    "long": (
        {"user_data_label": LONG},
        as_json,
        ", client 'bo': key 'y': expected a list of 2 examples (num_samples), got 3 of them",
    ),
    "long, hdf5": (
        {"user_data_label": LONG},
        as_hdf5,
        ", client 'bo': key 'y': 3 examples, but num_samples is 2",
    ),
    "two labels": (
        {"user_data_label": {"bo": {"x": [1, 2], "z": [1, 2]}}},
        as_hdf5,
        ", client 'bo': key 'x' is in user_data and in user_data_label",
    ),
    "few counts": (
        {"num_samples": [2]},
        as_hdf5,
        ": key 'num_samples': 1 entries, expected one fo",
    ),
    "half": (
        {"num_samples": [2, 1, 0.5]},
        as_hdf5,
        ", client 'bo': key 'num_samples': expected an",
    ),
    "numbers": ({"users": [1, 2, 3]}, as_hdf5, ", client 1: expected a string"),
    "twice": ({"users": ["bo", "bo", "al"]}, as_hdf5, ", client 'bo': occurs twice in users"),
    "a path": (
        {"users": ["/user_data/bo", "al", "no one"]},
        as_hdf5,
        ", client '/user_data/bo', key '/user_data/bo': a path, not a name; expected FLUTE's",
    ),
    "lost": ({"users": ["bo", "eve", "al"]}, as_hdf5, ", client 'eve', key 'eve': not there; exp"),
    "no data": ({"user_data": [1]}, as_hdf5, ", key 'user_data': an array, not a group; expected"),
}


@pytest.mark.parametrize(("change", "written", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_blob_is_one_line(tmp_path: Path, change: Any, written: Any, said: str) -> None:
    path = written(tmp_path / "blob", GOOD | change)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + said)}") as caught:
        read_flute(path)
    assert "\n" not in str(caught.value)


def test_no_blob(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: .*No such file.*; expected FLUTE's {users, num_s"):
        read_flute(tmp_path / "none")
    (tmp_path / "a").write_text("users")
    with pytest.raises(InputError, match="a: no valid JSON: .*; expected FLUTE's {users, num_samp"):
        read_flute(tmp_path / "a")


def test_mutated_blobs(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    assert 100 < fuzz(read_flute, json.dumps(GOOD).encode(), path, runs=300) < 300
    # Names of fixed length: on a damaged heap of longer ones the HDF5 library may never return.
    good = as_hdf5(path, GOOD | {"users": np.array(GOOD["users"], "S6")}).read_bytes()
    assert 30 < fuzz(read_flute, good, path, runs=300) < 300
