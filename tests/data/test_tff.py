"""TFF's HDF5: values, known contents, damaged files, and the real files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.files import tff_file as written
from tests.data.fuzz import fuzz
from tests.data.real import DATA, real, same_images
from vecfl.data import read_tff, read_tff_pair, tff_clients
from vecfl.errors import InputError

h5py = pytest.importorskip("h5py")


def test_emnist_and_cifar_100_by_hand(tmp_path: Path) -> None:
    pixels = np.arange(2 * 28 * 28, dtype=">f4").reshape(2, 28, 28)
    path = written(tmp_path / "a.h5", {"f1": {"pixels": pixels, "label": np.int32([3, 4])}})
    data = read_tff(path)
    assert data.columns["x"].shape == (2, 1, 28, 28) and data.columns["x"].dtype == torch.float32
    assert data.columns["x"][1, 0, 0, 5] == 789  # 28 * 28 + 5
    assert data.columns["y"].tolist() == [3, 4] and data.columns["y"].dtype == torch.int64

    image = np.arange(32 * 32 * 3).astype(np.uint8).reshape(1, 32, 32, 3)
    row = {"image": image, "label": np.int64([90]), "coarse_label": np.int64([7])}
    data = read_tff(written(tmp_path / "b.h5", {"0": row}))
    assert data.columns["x"].shape == (1, 3, 32, 32) and data.columns["x"].dtype == torch.uint8
    assert data.columns["x"][0, 2, 0, 5] == 17  # the third channel of pixel 5: 3 * 5 + 2
    assert data.columns["coarse_label"].tolist() == [7] and list(data.client_ids) == ["0"]


def test_text_of_both_kinds_goes_through_encode(tmp_path: Path) -> None:
    row = {"tokens": ["a b", "c"], "title": np.array([b"t", "é".encode()]), "score": [5, 6]}
    path = written(tmp_path / "a.h5", {"1": row})
    with pytest.raises(InputError, match="client '1', column 'title': text; expected numbers"):
        read_tff(path)

    def encode(raw: Any) -> dict[str, Any]:
        assert raw["tokens"] == ["a b", "c"] and raw["title"] == ["t", "é"]
        return {"score": raw["score"]}

    assert read_tff(path, encode).columns["score"].tolist() == [5, 6]


def test_odd_names_and_empty_clients(tmp_path: Path) -> None:
    odd = ["a b", "é\n", "..", "<&>", "🙂"]
    clients = {name: {"x": [1.0]} for name in odd} | {"none": {"x": np.zeros(0)}}
    data = read_tff(written(tmp_path / "a.h5", clients))
    assert sorted(data.client_ids) == sorted([*odd, "none"])
    assert data.sizes[data.position("none")] == 0


def test_a_pair_and_its_files(tmp_path: Path) -> None:
    written(tmp_path / "fed_train.h5", {"a": {"x": [1], "y": [2]}})
    with pytest.raises(
        InputError, match=f"^{tmp_path}: no such file in this directory; .*_test.h5"
    ):
        read_tff_pair(tmp_path)
    written(tmp_path / "fed_test.h5", {"b": {"x": [3], "y": [4]}})
    train, test = read_tff_pair(tmp_path)
    assert list(train.client_ids) == ["a"] and list(test.client_ids) == ["b"]
    written(tmp_path / "more_test.h5", {"b": {"x": [3]}})
    with pytest.raises(InputError, match="2 files; expected a directory with one .*_test.h5"):
        read_tff_pair(tmp_path)


def soft(file: Any) -> None:
    file["examples/b"] = h5py.SoftLink("/examples/a")


def external(file: Any) -> None:
    file["examples/a/y"] = h5py.ExternalLink("other.h5", "/x")


def raw_file(file: Any) -> None:
    file.create_dataset(
        "examples/a/y", (1,), "u1", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
    )


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((1,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (1,))
    file["examples/a"].create_virtual_dataset("y", layout)


def huge(file: Any) -> None:
    file.create_dataset("examples/a/y", (10**12,), "f8", chunks=(1000,))


def bytes_name(file: Any) -> None:
    h5py.h5g.create(file["examples"].id, b"\xff")


def replaced(name: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value

    return change


DAMAGED = {
    "no examples": (replaced("examples", None), ", key 'examples': not there; expected TFF's HDF5"),
    "an array": (replaced("examples", [1]), ", key 'examples': an array, not a group; expected"),
    "client is an array": (replaced("examples/b", [1]), ", client 'b', key 'b': an array, not a"),
    "a path for an id": (
        replaced("examples/b/c/x", [1]),
        ", client 'b', key 'c': a group, not an array; expected TFF's HDF5",
    ),
    "lengths": (replaced("examples/a/y", [1, 2]), ", client 'a': columns of lengths {'x': 1, 'y'"),
    "no column": (replaced("examples/a/x", None), ", client 'a': columns of lengths {}; expected"),
    "one number": (
        replaced("examples/a/y", 3),
        ", client 'a', key 'y': int64 (); expected numbers",
    ),
    "complex": (replaced("examples/a/y", [1j]), ", client 'a', key 'y': complex128 (1,); expected"),
    "latin": (
        replaced("examples/a/y", np.array([b"\xe9"])),
        ", client 'a', key 'y', row 0: no UTF-8: unexpected end of data",
    ),
    "text table": (replaced("examples/a/y", np.array([[b"a"]])), ", client 'a', key 'y': text of "),
    "nan": (replaced("examples/a/x", [np.nan]), ", client 'a', column 'x', example 0: NaN or Inf"),
    "a name": (bytes_name, ": the name b'\\xff' is no UTF-8; expected TFF's HDF5"),
    "soft link": (soft, ", client 'b', key 'b': a link, which is not followed; expected TFF's"),
    "external link": (external, ", client 'a', key 'y': a link, which is not followed; expected"),
    "external data": (raw_file, ", client 'a', key 'y': its data are in another file, which is"),
    "virtual": (virtual, ", client 'a', key 'y': its data are in another file, which is not"),
    "a trap": (huge, ", client 'a', key 'y': 8000000000000 bytes in a file of "),
}


@pytest.mark.parametrize(("change", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, change: Any, said: str) -> None:
    path = written(tmp_path / "a.h5", {"a": {"x": [1.0]}})
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(InputError, match=f"^{re.escape(str(path) + said)}") as caught:
        read_tff(path)
    assert "\n" not in str(caught.value)


def test_no_hdf5_no_file_no_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(InputError, match=f"^{path}: no such file; expected TFF's HDF5"):
        read_tff(path)
    path.write_text("no hdf5")
    with pytest.raises(InputError, match=f"^{path}: .*file signature not found.*; expected TFF's"):
        read_tff(path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(InputError, match='needs h5py, which is not .*pip install "vecfl.data."$'):
        read_tff(path)


def test_mutated_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clients = {f"c{k}": {"x": rng.random((3, 4)), "y": [1, 2, 3]} for k in range(3)}
    good = written(tmp_path / "good.h5", clients).read_bytes()
    assert 50 < fuzz(read_tff, good, tmp_path / "a.h5", runs=400) < 400


@real("mnist_writers")
def test_writers_have_the_pixels_of_mnist() -> None:
    train, test = read_tff_pair(DATA / "mnist_writers/tff")
    assert (train.num_clients, train.num_examples, test.num_examples) == (60, 6025, 697)
    same_images(train, test)


@real("shakespeare_tff")
def test_shakespeare_has_its_roles_and_speeches() -> None:
    counts = {}
    for part in ("train", "test"):
        path = DATA / f"shakespeare_tff/shakespeare_{part}.h5"
        sizes = [len(raw["snippets"]) for _, raw in tff_clients(path, lambda raw: raw)]
        counts[part] = (len(sizes), sum(sizes), min(sizes), max(sizes))
    assert counts == {"train": (715, 16068, 1, 292), "test": (715, 2356, 1, 33)}
    id_, raw = next(tff_clients(DATA / "shakespeare_tff/shakespeare_train.h5", lambda raw: raw))
    assert id_ == "ALL_S_WELL_THAT_ENDS_WELL_ADAM"
    assert raw["snippets"][0] == "Yonder comes my master, your brother."
