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
from vecfl.data import read_csv, read_csv_pair, read_npz
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


def write_all(folder: Path, **files: str) -> list[Path]:
    paths = [folder / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return paths


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["A/data.csv", "B/data.csv"], ["A", "B"]),
        (["A/raw/data.csv", "B/raw/data.csv"], ["A", "B"]),
        (["A/data.csv", "B/data.csv", "B/more.csv"], ["A/data", "B/data", "B/more"]),
        (["A/one.csv", "B/two.csv.gz"], ["one", "two"]),
    ],
)
def test_files_of_one_name_are_known_by_their_folders(
    tmp_path: Path, names: list[str], ids: list[str]
) -> None:
    paths = write_all(tmp_path, **{name: f"a,y\n{k},0\n" for k, name in enumerate(names)})
    data = read_csv(paths, client=None, label="y")
    assert list(data.client_ids) == ids
    assert data.columns["x"].tolist() == [[k] for k in range(len(names))]


def test_files_that_would_be_one_client_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, other = write_all(tmp_path, **{"a.csv": "a,y\n1,0\n", "a.txt": "a,y\n2,0\n"})
    said = f"{tmp_path}/a: two files would be this client; rename one of them"
    with pytest.raises(InputError, match=f"^/?{re.escape(said)}$"):
        read_csv([first, other], client=None, label="y")
    (tmp_path / "same.csv").symlink_to(first)
    for again in ("a.csv", "same.csv"):
        with pytest.raises(InputError, match=f"^{again}: given twice; its rows would count twice$"):
            read_csv([first, again], client=None, label="y")
    with pytest.raises(InputError, match="^no files: expected one path or several"):
        read_csv([], client=None, label="y")
    for path in (first, other):  # with a column of clients, names do not matter
        path.write_text("who,a,y\nu,1,0\n")
    assert read_csv([first, other], client="who", label="y").sizes.tolist() == [2]


def test_a_pair_shares_its_classes_and_its_kind_of_ids(tmp_path: Path) -> None:
    train, test = write_all(
        tmp_path,
        **{"train.csv": "who,a,y\n7,1,cat\n7,2,dog\n", "test.csv": "who,a,y\n8,3,dog\n8x,4,eel\n"},
    )
    apart = read_csv(test, "who", "y")
    assert apart.columns["y"].tolist() == [0, 1]  # by itself dog is 0, of all it is 1
    one, two = read_csv_pair(train, test, "who", "y")
    assert (one.columns["y"].tolist(), two.columns["y"].tolist()) == ([0, 1], [1, 2])
    assert (one.client_ids, two.client_ids) == (["7"], ["8", "8x"])
    assert two.columns["x"].tolist() == [[3], [4]]
    one, _ = read_csv_pair(train, test, "who", "y", classes=["eel", "dog", "cat"])
    assert one.columns["y"].tolist() == [2, 1]
    test.write_text("who,b,c,y\n8,3,3,dog\n")
    said = f"{test}: its columns are not those of {train}: ['a'] are missing, ['b', 'c'] are new"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        read_csv_pair(train, test, "who", "y")
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        read_csv([train, test], "who", "y")
    with pytest.raises(InputError, match=f"^{test}: no column 'y '; did you mean 'y'. it has"):
        read_csv(test, "who", "y ")


def test_other_delimiters_and_encodings(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("user;größe;y\nä;2;3\n".encode("latin-1"))
    with pytest.raises(InputError, match="no CSV in utf-8: .*, give encoding=, .*'latin-1'$"):
        read_csv(path, "user", "y")
    with pytest.raises(InputError, match="one column 'user;größe;y': give delimiter=';'$"):
        read_csv(path, "user", "y", encoding="latin-1")
    data = read_csv(path, "user", "y", encoding="latin-1", delimiter=";")
    assert data.client_ids == ["ä"] and data.columns["x"].tolist() == [[2]]
    path.write_text("a")
    for wrong in ({"encoding": "latin-0"}, {"delimiter": ";;"}):
        with pytest.raises(
            InputError, match=f"^{path}: no CSV in .*: (unknown enc|.delimiter. mu)"
        ):
            read_csv(path, "user", "y", **wrong)


@pytest.mark.parametrize("missing", ["mean", float("nan"), float("inf")])
def test_what_stands_for_a_missing_value_is_a_number(tmp_path: Path, missing: Any) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    np.savez(tmp_path / "a.npz", x=[1.0], y=[1], client=[1])
    for given in (
        lambda: read_csv(tmp_path / "a.csv", "user", "y", missing=missing),
        lambda: read_npz(tmp_path / "a.npz", missing=missing),
    ):
        with pytest.raises(
            InputError, match=f"^missing: expected a finite number, got {missing!r}"
        ):
            given()


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
    "twice": (
        b"a,a\n1,2\n",
        ": two columns have the name 'a'; a file without a header needs names=",
    ),
    "ragged": (TABLE.encode() + b"1,2\n", ", line 5: 2 fields, expected 4, one a column"),
    "text": (b"user,a,y\n1,one,2\n", ", line 2, column 'a': expected a number, got 'one'"),
    "latin": (b"user,a,y\n\xe9,1,2\n", ": no CSV in utf-8: 'utf-8' codec can't decode byte 0xe9"),
    "quote": (b'user,a,y\n"1,1,2\n', ": no CSV in utf-8: unexpected end of data"),
    "no header": (
        b"7,63,1\n8,64,0\n",
        ": no column 'y'; it has ['7', '63', '1']; a file without a header needs names=, those",
    ),
    "semicolons": (b"user;a;y\n1;2,5;3\n", ": one column 'user;a;y': give delimiter=';'"),
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
    said = "a.npz, client 'b', array 'x', row 0: NaN is a missing value; clean it, or give missing="
    with pytest.raises(InputError, match=said):
        read_npz(path, "who")
    data = read_npz(path, "who", missing=0.0)
    assert list(data.client_ids) == ["a", "b"] and data.columns["y"].tolist() == [6, 5]
    assert data.columns["x"].tolist() == [[2, 3], [1, 0]]
    assert list(read_npz(path, "who", columns=["y"]).columns) == ["y"]
    renamed = read_npz(path, "who", columns={"label": "y"})
    assert {name: c.tolist() for name, c in renamed.columns.items()} == {"label": [6, 5]}
    np.savez(path, x=[np.inf], y=[5], client=[2])
    with pytest.raises(InputError, match="a.npz, client 2, column 'x', example 0: NaN or Inf"):
        read_npz(path, missing=0.0)


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

    needs = ": NPZ needs the option 'client', the array with the client of each example: no array "
    assert said(x=[1], y=[1]) == needs + "'client'; it has ['x', 'y']"
    assert said(y=[1], client=[1]).startswith(": no array 'x'; it has ['y', 'client']; expected a")
    assert said(x=[1], client=[1]).endswith("; columns= names them otherwise: {'y': array, ...}")
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
