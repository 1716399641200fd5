"""CSV and NPZ: values, missing values, damaged files, and the real files."""

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.fuzz import fuzz
from tests.data.real import DATA, real
from vecfl.data import read_csv, read_npz
from vecfl.errors import InputError

TABLE = "user,a,b,y\n2,1,.5,0\n1,3,4,1\n2,5,6,2\n"


def test_csv_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode()))
    data = read_csv(path, client="user", label="y")
    assert list(data.client_ids) == [1, 2] and data.offsets.tolist() == [0, 1, 3]
    assert data.columns["x"].tolist() == [[3, 4], [1, 0.5], [5, 6]]
    assert data.columns["y"].tolist() == [1, 0, 2] and data.columns["y"].dtype == torch.int64
    assert read_csv(path, "user", "y", drop=["a"]).columns["x"].tolist() == [[4], [0.5], [6]]
    assert read_csv(path, "user", "b").columns["y"].tolist() == [4, 0.5, 6]  # float32


def test_files_as_clients_text_labels_and_no_header(tmp_path: Path) -> None:
    paths = [tmp_path / "north.data", tmp_path / "south.data"]
    paths[0].write_text('1,"no"\n2,yes\n')
    paths[1].write_text("\n3,yes\n")
    data = read_csv(paths, client=None, label="sick", names=["age", "sick"])
    assert list(data.client_ids) == ["north", "south"] and data.columns["y"].tolist() == [0, 1, 1]
    options: dict[str, Any] = {"names": ["age", "sick"], "classes": ["yes", "no"]}
    assert read_csv(paths, None, "sick", **options).columns["y"].tolist() == [1, 0, 0]
    paths[1].write_text("3,maybe\n")
    with pytest.raises(InputError, match="label 'maybe' is none of the classes .'yes', 'no'."):
        read_csv(paths, None, "sick", **options)


@pytest.mark.parametrize("mark", ["?", "", "NaN", " NA "])
def test_missing_values_are_refused_or_replaced(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(TABLE.replace(".5", mark))
    with pytest.raises(InputError, match=f"^{path}, line 2, column 'b': .* is a missing value; cl"):
        read_csv(path, "user", "y")
    filled = read_csv(path, "user", "y", missing=-1.0)
    assert filled.columns["x"].tolist() == [[3, 4], [1, -1], [5, 6]]
    for old in ("2,1,.5,0", "1,3,4,1"):
        at = (0, 3)["1,3" in old]
        fields = old.split(",")
        fields[at] = mark
        path.write_text(TABLE.replace(old, ",".join(fields)))
        with pytest.raises(InputError, match="is missing; every row needs one"):
            read_csv(path, "user", "y", missing=-1.0)


DAMAGED = {
    "empty": (b"", ": empty; expected a CSV file with rows"),
    "header alone": (b"user,a,y\n", ": 0 rows of 1 input columns; expected some"),
    "no inputs": (b"user,y\n1,2\n", ": 1 rows of 0 input columns; expected some"),
    "no column": (b"a,y\n1,2\n", ": no column 'user'; it has ['a', 'y']"),
    "twice": (b"a,a\n1,2\n", ": two columns have one name in ['a', 'a']"),
    "ragged": (TABLE.encode() + b"1,2\n", ", line 5: 2 fields, expected 4, one a column"),
    "text": (b"user,a,y\n1,one,2\n", ", line 2, column 'a': expected a number, got 'one'"),
    "latin": (b"user,a,y\n\xe9,1,2\n", ": no CSV in UTF-8: 'utf-8' codec can't decode byte 0xe9"),
    "quote": (b'user,a,y\n"1,1,2\n', ": no CSV in UTF-8: unexpected end of data"),
    "infinite": (b"user,a,y\n1,inf,2\n", ", client 1, column 'x', example 0: NaN or Inf"),
    "too large": (b"user,a,y\n1,1e99,2\n", ", client 1, column 'x', example 0: NaN or Inf"),
}


@pytest.mark.parametrize(("text", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_one_line(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + said)}"):
        read_csv(path, "user", "y")


def test_npz_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    x = np.array([[1, np.nan], [2, 3]], np.float32)
    np.savez(path, x=x, y=[5, 6], who=["b", "a"], classes=["p"])
    with pytest.raises(InputError, match="a.npz, client 'b', column 'x', example 0: NaN or Inf"):
        read_npz(path, "who")
    data = read_npz(path, "who", missing=0.0)
    assert list(data.client_ids) == ["a", "b"] and data.columns["y"].tolist() == [6, 5]
    assert data.columns["x"].tolist() == [[2, 3], [1, 0]]
    assert list(read_npz(path, "who", columns=["y"]).columns) == ["y"]


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


def test_a_damaged_archive_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"

    def said(**arrays: Any) -> str:
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=f"^{path}") as caught:
            read_npz(path)
        return str(caught.value).removeprefix(str(path))

    assert said(x=[1], y=[1]).startswith(": no array 'client' among ['x', 'y']; expected a NumPy")
    assert said(x=[1], y=[1], client=[1, 2]).startswith(": array 'x' is [1], 'client' is [2]; ex")
    assert said(x=[1], y=1, client=[1]).startswith(": array 'y' is [], 'client' is [1]; expected")
    assert said(x=[1], y=[1], client=[0.5]).startswith(", array 'client': expected n > 0 integers")
    assert said(x=["a"], y=[1], client=[1]).startswith(", client 1, column 'x': text; expected")
    evil = said(x=np.array([Evil()], object), y=[1], client=[1])
    assert evil.startswith(": Object arrays cannot be loaded when allow_pickle=False; expected")
    np.save(path.with_suffix(".npy"), np.array([Evil()], object))
    with pytest.raises(InputError, match="Object arrays cannot be loaded"):
        read_npz(path.with_suffix(".npy"))
    np.save(path.with_suffix(".npy"), np.ones(3))
    with pytest.raises(InputError, match="a.npy: .*; expected a NumPy archive with"):
        read_npz(path.with_suffix(".npy"))
    with pytest.raises(InputError, match="none: no such file; expected a NumPy archive with"):
        read_npz(tmp_path / "none")
    assert not (tmp_path / "pwned").exists()


def test_mutated_tables(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert 50 < fuzz(lambda p: read_csv(p, "user", "y"), TABLE.encode(), path, runs=300) < 300
    np.savez(path.with_suffix(".npz"), x=np.ones((3, 2)), y=[1, 2, 3], client=[1, 2, 1])
    good = path.with_suffix(".npz").read_bytes()
    assert 50 < fuzz(read_npz, good, path, runs=300) < 300


@real("heart_disease")
def test_heart_disease_in_four_hospitals() -> None:
    places = ["cleveland", "hungarian", "switzerland", "va"]
    paths = [DATA / f"heart_disease/processed.{place}.data" for place in places]
    with pytest.raises(
        InputError, match="hungarian.data, line 2, column 'slope': '.' is a missing value"
    ):
        read_csv(paths, client=None, label="target")
    data = read_csv(paths, client=None, label="target", missing=0.0)
    assert list(data.client_ids) == [f"processed.{place}" for place in places]
    assert data.sizes.tolist() == [303, 294, 123, 200]
    assert data.client(1)["x"][0].tolist() == [28, 1, 2, 130, 132, 0, 2, 185, 0, 0, 0, 0, 0]
    assert data.columns["y"].unique().tolist() == [0, 1, 2, 3, 4]


@real("wisdm_har")
def test_wisdm_is_the_same_as_csv_and_npz() -> None:
    names = ["id", "user", *(f"f{k}" for k in range(43)), "class"]
    archive = DATA / "wisdm_har/wisdm_transformed.npz"
    packed = read_npz(archive, "user", missing=0.0)
    assert (packed.num_clients, packed.num_examples) == (36, 5418)
    assert (int(packed.sizes.min()), int(packed.sizes.max())) == (60, 273)
    classes = np.load(archive)["classes"].tolist()
    table = read_csv(
        DATA / "wisdm_har/WISDM_ar_v1.1_transformed.csv.gz",
        client="user",
        label="class",
        names=names,
        drop=["id"],
        missing=0.0,
        classes=classes,
    )
    assert list(table.client_ids) == list(packed.client_ids)
    assert torch.equal(table.columns["y"], packed.columns["y"])
    assert torch.equal(table.columns["x"], packed.columns["x"])
