"""The store: what comes back, how it opens, and every way in which it can be damaged."""

import json
import os
import re
import resource
import shutil
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.data import FederatedDataset, open_dataset, save, store, verify, write_store
from vecfl.data.ids import StoredIds
from vecfl.data.store import NUMPY, seal
from vecfl.data.store_writer import CHUNK
from vecfl.errors import InputError


def small(ids: Any = ("b", "é", "")) -> FederatedDataset:
    """Clients of 2, 0 and 3 examples."""
    x = torch.arange(10, dtype=torch.uint8).reshape(5, 2)
    return FederatedDataset({"x": x, "y": torch.arange(5)}, torch.tensor([0, 2, 2, 5]), ids)


def stream(data: FederatedDataset) -> Iterator[tuple[Hashable, dict[str, Any]]]:
    return ((id_, data.client(k)) for k, id_ in enumerate(data.client_ids))


def assert_same(found: FederatedDataset, expected: FederatedDataset) -> None:
    """Equal names, dtypes, bits, offsets and ids, and each id is found where it is."""
    assert list(found.columns) == list(expected.columns)
    for name, column in expected.columns.items():
        other = found.columns[name]
        assert (other.dtype, other.shape) == (column.dtype, column.shape)
        assert torch.equal(other, column)
    assert found.offsets.dtype == torch.int64 and torch.equal(found.offsets, expected.offsets)
    assert list(found.client_ids) == list(expected.client_ids)
    places = [found.position(id_) for id_ in expected.client_ids]
    assert places == list(range(expected.num_clients))


def refused(message: str):
    """Expects an InputError whose text is this one line."""
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# What comes back

IDS = {
    "strings": ["b", "é", ""],
    "without a byte": [""],
    "integers": [7, -(2**63), 2**63 - 1],
    "numpy's integers": list(np.array([3, 1, 2], np.uint8)),
    "surrogates": ["\ud800", "\U0001f600", "\uffff"],
    "range": range(3),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("streamed", [False, True])
def test_ids_come_back(tmp_path: Path, ids: Any, streamed: bool) -> None:
    data = small(ids) if len(ids) == 3 else FederatedDataset.from_clients({ids[0]: {"y": [1]}})
    write_store(tmp_path / "s", stream(data)) if streamed else save(data, tmp_path / "s")
    assert_same(open_dataset(tmp_path / "s"), data)
    verify(tmp_path / "s")


def test_consecutive_ids_take_no_room(tmp_path: Path) -> None:
    save(small([0, 1, 2]), tmp_path / "s")
    assert open_dataset(tmp_path / "s").client_ids == range(3)
    assert {p.name for p in (tmp_path / "s").iterdir()} == {
        *("column_0.npy", "column_1.npy", "meta.json", "offsets.npy")
    }


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_dtypes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [2, 3], [100, 120]]).to(dtype)
    data = FederatedDataset({"x": values, "none": values[:, :0]}, torch.tensor([0, 1, 3]))
    save(data, tmp_path / "s")
    write_store(tmp_path / "t", stream(data))
    for name in ("s", "t"):
        assert_same(open_dataset(tmp_path / name), data)
        on_disk = np.load(tmp_path / name / "column_0.npy")  # an ordinary .npy file
        assert (on_disk.dtype, on_disk.shape) == (np.dtype(NUMPY[dtype]), (3, 2))


def test_an_overlapping_view_is_written_out(tmp_path: Path) -> None:
    x = torch.arange(6.0).unfold(0, 3, 1)
    save(FederatedDataset({"x": x}, torch.tensor([0, 4])), tmp_path / "s")
    assert open_dataset(tmp_path / "s").columns["x"].tolist() == [
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
    ]


def test_a_column_longer_than_a_chunk(tmp_path: Path) -> None:
    x = torch.arange(3 * CHUNK // 8 + 1)
    save(FederatedDataset({"x": x}, torch.tensor([0, 5, len(x)])), tmp_path / "s")
    assert torch.equal(open_dataset(tmp_path / "s").columns["x"], x)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=8).filter(any),
    names=st.lists(st.text(max_size=3), min_size=1, max_size=3, unique=True),
    ids=st.data(),
)
def test_anything_comes_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], names: list[str], ids: Any
) -> None:
    kinds = st.text(max_size=4), st.integers(-(2**63), 2**63 - 1)
    of = ids.draw(
        st.sampled_from(kinds).flatmap(
            lambda kind: st.lists(kind, min_size=len(sizes), max_size=len(sizes), unique=True)
        )
    )
    columns = {
        name: torch.arange(3 * sum(sizes)).reshape(-1, 3) + i for i, name in enumerate(names)
    }
    data = FederatedDataset(columns, torch.tensor([0, *sizes]).cumsum(0), of)
    folder = tmp_path_factory.mktemp("stores")
    save(data, folder / "s")
    write_store(folder / "t", stream(data))
    verify(folder / "s")
    assert_same(open_dataset(folder / "s"), data)
    assert_same(open_dataset(folder / "t"), data)
    shutil.rmtree(folder)


# How it opens


def test_ids_are_a_sequence(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    ids = open_dataset(tmp_path / "s").client_ids
    assert isinstance(ids, StoredIds)
    assert (ids[0], ids[-1], ids[1:], len(ids)) == ("b", "", ["é", ""], 3)
    assert ids.index("é") == 1 and "é" in ids
    for id_ in ("a", "z", 1, None, 0.5):
        assert id_ not in ids
    with pytest.raises(IndexError):
        ids[3]
    with pytest.raises(ValueError):
        ids.index("é", 2)


def test_an_unknown_id_is_refused(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    data = open_dataset(tmp_path / "s")
    with refused("client id 'a': none of the 3 clients has it; the first is 'b'"):
        data.position("a")


def test_nothing_that_is_written_into_a_column_reaches_the_disk(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    data = open_dataset(tmp_path / "s")
    data.columns["y"][0] = 9
    assert data.client(0)["y"].tolist() == [9, 1]
    assert open_dataset(tmp_path / "s").client(0)["y"].tolist() == [0, 1]
    verify(tmp_path / "s")


def test_on_its_own_device_nothing_is_copied(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    data = open_dataset(tmp_path / "s")
    moved = data.to("cpu")
    assert moved.columns["x"].data_ptr() == data.columns["x"].data_ptr()
    assert moved.offsets is data.offsets and moved.client_ids is data.client_ids


def test_opening_reads_neither_ids_nor_offsets_nor_columns(tmp_path: Path) -> None:
    # Only meta.json is read: with all other content wiped out, at equal sizes, it still opens.
    save(small(), tmp_path / "s")
    for path in (tmp_path / "s").glob("*.npy"):
        path.write_bytes(bytes(path.stat().st_size))
    assert open_dataset(tmp_path / "s").num_clients == 3
    with pytest.raises(InputError, match="damaged"):
        verify(tmp_path / "s")


def test_a_store_that_nobody_may_write_opens(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    for path in [*(tmp_path / "s").iterdir(), tmp_path / "s"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert_same(open_dataset(tmp_path / "s"), small())
    (tmp_path / "s").chmod(0o755)


# Damage

FILES = ["column_0.npy", "column_1.npy", "ids.npy", "ids_bounds.npy", "ids_order.npy"]
FILES += ["offsets.npy"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_missing_is_named(tmp_path: Path, name: str) -> None:
    save(small(), tmp_path / "s")
    path = tmp_path / "s" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with refused(f"{path}: {len(whole) - 1} bytes, expected {len(whole)} bytes"):
        open_dataset(tmp_path / "s")
    path.unlink()
    with refused(f"{path}: missing, expected {len(whole)} bytes"):
        open_dataset(tmp_path / "s")


@pytest.mark.parametrize("name", FILES)
def test_every_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    save(small(), tmp_path / "s")
    path = tmp_path / "s" / name
    whole = path.read_bytes()
    for at in (0, 20, 127, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with refused(f"{path}: damaged: its bytes are not those that were written"):
            verify(tmp_path / "s")
    path.write_bytes(whole)
    verify(tmp_path / "s")


def test_meta_is_whole_or_refused(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    path = tmp_path / "s" / "meta.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at])
        with pytest.raises(InputError):
            open_dataset(tmp_path / "s")
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if at < len(whole) - 1 and not whole[at : at + 1].isspace():
            with pytest.raises(InputError):
                open_dataset(tmp_path / "s")
    for text in ("[]", "{}", "3", "null", "nothing", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="meta.json"):
            open_dataset(tmp_path / "s")


def forge(folder: Path, change: Mapping[str, Any]) -> None:
    """Write other entries into meta.json, under a seal that fits."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text()) | change
    meta.pop("blake2b")
    path.write_text(json.dumps(meta | {"blake2b": seal(meta)}))


def replace(folder: Path, name: str, values: Any) -> None:
    """Write another array into a file of a store, under a checksum that fits."""
    np.save(folder / name, values)
    files = json.loads((folder / "meta.json").read_text())["files"]
    files[name]["blake2b"] = store.digest(folder / name)
    forge(folder, {"files": files})


def test_another_version_is_refused(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    forge(tmp_path / "s", {"vecfl_store": 2})
    with refused(
        f"{tmp_path}/s: a store of version 2, this vecfl reads version 1: convert it again, or "
        "take the vecfl that wrote it"
    ):
        open_dataset(tmp_path / "s")


WRONG = {  # the ids are "b", "é", "": bytes b c3 a9, bounds 0 1 3 3, order 2 0 1
    "falling": ("offsets.npy", [0, 3, 2, 5], "falling at clients [1]"),
    "too few": ("offsets.npy", [0, 2, 2, 4], "got 0 to 4"),
    "same ids": ("ids_bounds.npy", [0, 0, 3, 3], "clients 2 and 0 have the same id ''"),
    "order": ("ids_order.npy", [0, 2, 1], "clients 0 and 2 are in wrong order: '' after 'b'"),
    "order twice": ("ids_order.npy", [2, 0, 0], "clients 0 and 0 have the same id 'b'"),
    "order outside": ("ids_order.npy", [2, 0, 3], "positions outside 0..2"),
    "bounds": ("ids_bounds.npy", [0, 3, 1, 3], "their bounds do not rise"),
}


@pytest.mark.parametrize(("name", "values", "said"), WRONG.values(), ids=WRONG)
def test_verify_looks_behind_checksums(
    tmp_path: Path, name: str, values: list[int], said: str
) -> None:
    save(small(), tmp_path / "s")
    replace(tmp_path / "s", name, np.array(values))
    open_dataset(tmp_path / "s")
    with pytest.raises(InputError, match=re.escape(said)):
        verify(tmp_path / "s")


# Writing


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with refused(f"{tmp_path}: no store: it has no meta.json"):
        open_dataset(tmp_path)
    with refused(
        f"{tmp_path}/a: no such folder; expected a store, as `save` and `write_store` leave it"
    ):
        open_dataset(tmp_path / "a")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    with refused(f"{tmp_path}/s: exists already; a store is written to a new folder"):
        save(small(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == [tmp_path / "s"] and not list((tmp_path / "s").iterdir())


def test_a_half_written_store_is_named(tmp_path: Path) -> None:
    save(small(), tmp_path / "s")
    (tmp_path / "s" / "meta.json").unlink()
    (tmp_path / "s").rename(tmp_path / "s.part")
    line = f"{tmp_path}/s.part: a half-written store: remove it, and write the store again"
    for name in ("s", "s.part"):
        with refused(line):
            open_dataset(tmp_path / name)
    with refused(f"{tmp_path}/s.part: a half-written store is in the way: remove it"):
        save(small(), tmp_path / "s")
    assert (tmp_path / "s.part").is_dir()


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, dict[str, list[int]]]]:
        yield "a", {"y": [1]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", broken())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    # The system refuses files of more than 4 KiB, as a full disk would: 8,000 bytes do not fit.
    data = FederatedDataset({"y": torch.arange(1000)}, torch.tensor([0, 1000]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=f"^{tmp_path}/s: cannot be written: .*too large"):
            save(data, tmp_path / "s")
        with pytest.raises(InputError, match=f"^{tmp_path}/s: cannot be written: .*too large"):
            write_store(tmp_path / "s", stream(data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_sync_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(f"{tmp_path}/s: cannot be written: [Errno 28] No space left on device"):
        save(small(), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^{tmp_path}/file/s: cannot be written: .*Not a dir"):
        save(small(), tmp_path / "file" / "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match=f"^{tmp_path}/s: cannot be written: .*Permission"):
        save(small(), tmp_path / "s")
    tmp_path.chmod(0o755)


REFUSED = {
    "no clients": ([], "empty dataset: none of 0 clients has an example"),
    "no examples": ([("a", {"y": []})], "empty dataset: none of 1 clients has an example"),
    "names": (
        [("a", {"y": [1]}), ("b", {"z": [1]})],
        "client 'b': columns ['z'], but client 'a' has ['y']; names must agree",
    ),
    "shape": (
        [("a", {"y": [1]}), ("b", {"y": [[1]]})],
        "client 'b', column 'y': int64 [1, 1] on cpu, but client 'a', column 'y' has "
        "int64 [1] on cpu; all but the first axis must agree",
    ),
    "dtype": (
        [("a", {"y": []}), ("b", {"y": [1]}), ("c", {"y": [1.0]})],
        "client 'c', column 'y': float32 [1] on cpu, but client 'b', column 'y' has "
        "int64 [1] on cpu; all but the first axis must agree",
    ),
    "nan": ([("a", {"y": [float("nan")]})], "client 'a', column 'y': NaN or Inf; clean it"),
    "twins": (
        [("a", {"y": [1]}), ("b", {"y": [1]}), ("a", {"y": [1]})],
        "client_ids: clients 0 and 2 have the same id 'a'; ids must be distinct",
    ),
    "mixed ids": (
        [("a", {"y": [1]}), (1, {"y": [1]})],
        "client ids: all integers or all strings, got 'a' among others",
    ),
    "odd ids": (
        [((1, 2), {"y": [1]})],
        "client ids: a store holds integers or strings, got (1, 2)",
    ),
    "bool ids": ([(True, {"y": [1]})], "client ids: a store holds integers or strings, got True"),
    "large ids": (
        [(2**63, {"y": [1]})],
        "client ids: a store holds integers from -2^63 to 2^63 - 1",
    ),
    "dtype of none": (
        [("a", {"y": torch.zeros(1, dtype=torch.float8_e5m2)})],
        "client 'a', column 'y': a store holds no float8_e5m2",
    ),
    "name": ([("a", {0: [1]})], "column 0: the name of a column in a store is a string"),
    "no columns": ([("a", [1])], "client 'a': expected {column: array}, got list"),
}


@pytest.mark.parametrize(("clients", "line"), REFUSED.values(), ids=REFUSED)
def test_a_stream_that_does_not_fit_is_refused(
    tmp_path: Path, clients: list[Any], line: str
) -> None:
    with refused(line):
        write_store(tmp_path / "s", iter(clients))
    assert not list(tmp_path.iterdir())
