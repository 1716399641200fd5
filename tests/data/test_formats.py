"""`read` finds the reader by content; what it does not know is one line."""

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.files import hdf5_file, parquet_file, tff_file
from tests.data.fuzz import answers, mutate
from tests.data.idx_files import write_mnist
from tests.data.test_examples import batch
from vecfl.data import __main__ as command
from vecfl.data import read
from vecfl.errors import InputError

BLOB = {"users": ["u"], "num_samples": [1], "user_data": {"u": {"x": [[1.5]]}}}
LABELLED = BLOB | {"user_data_label": {"u": [3]}}


def leaf(path: Path) -> Path:
    path.write_text(json.dumps(BLOB))
    return path


def leaf_pair(path: Path) -> Path:
    for part in ("train", "test"):
        (path / part).mkdir(parents=True)
        leaf(path / part / "a.json")
    return path


def flute(path: Path) -> Path:
    path.write_bytes(gzip.compress(json.dumps(LABELLED).encode()))
    return path


def flute_hdf5(path: Path) -> Path:
    return hdf5_file(path, LABELLED)


def tff(path: Path) -> Path:
    return tff_file(path, {"u": {"x": np.float32([[1.5]])}})


def tff_pair(path: Path) -> Path:
    path.mkdir()
    tff(path / "fed_train.h5")
    tff(path / "fed_test.h5")
    return path


def parquet(path: Path) -> Path:
    return parquet_file(path, x=[1.5], who=["u"], label=[3])


def parquet_pair(path: Path) -> Path:
    path.mkdir()
    parquet(path / "train-0.parquet")
    parquet(path / "test-0.parquet")
    return path


def table(path: Path) -> Path:
    path = path.with_suffix(".csv")
    path.write_text("x,who,label\n1.5,u,3\n")
    return path


def archive(path: Path) -> Path:
    np.savez(path.with_suffix(".npz"), x=[1.5], y=[3], client=["u"])
    return path.with_suffix(".npz")


def cifar(path: Path) -> Path:
    path.mkdir()
    for name in ("train.bin", "test.bin"):
        (path / name).write_bytes(batch(1, 2))
    return path


def mnist(path: Path) -> Path:
    path.mkdir()
    write_mnist(path, "train", [3], [70], seed=0)
    write_mnist(path, "test", [9], [8], seed=1)
    return path


def store_pair(path: Path) -> Path:
    command.convert(leaf_pair(path.with_name("leaf")), path)
    return path


WHO = {"client": "who"}
KNOWN: dict[Callable[[Path], Path], tuple[dict[str, Any], bool]] = {
    leaf: ({}, False),
    leaf_pair: ({}, True),
    flute: ({}, False),
    flute_hdf5: ({}, False),
    tff: ({}, False),
    tff_pair: ({}, True),
    parquet: (WHO, False),
    parquet_pair: (WHO, True),
    table: (WHO | {"label": "label"}, False),
    archive: ({}, False),
    cifar: ({"client": lambda labels: ["u"] * len(labels)}, True),
    mnist: ({}, True),
    store_pair: ({}, True),
}


@pytest.mark.parametrize("write", KNOWN, ids=lambda write: write.__name__)
def test_formats_are_recognised(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    options, pair = KNOWN[write]
    path = write(tmp_path / "data")
    train, test = read(path, **options)
    assert train.num_examples == 1 and (test is not None) == pair
    assert list(train.client_ids) == ([70] if write is mnist else ["u"])
    if write not in (cifar, mnist):
        assert train.columns["x"].flatten().tolist() == [1.5]
    if write in (flute, flute_hdf5, parquet, table, archive):
        assert train.columns["y"].tolist() == [3]
    with pytest.raises(InputError, match=f"^{path}: .* has no option 'colour'; it takes "):
        read(path, colour=1)


def test_a_store_that_is_missing_in_a_pair_is_named(tmp_path: Path) -> None:
    path = store_pair(tmp_path / "data")
    shutil.rmtree(path / "test")
    leaf_pair(tmp_path / "other")
    (tmp_path / "other" / "test").rename(path / "test")
    with pytest.raises(InputError, match=f"^{path}/test: no store: it has no meta.json$"):
        read(path)


def test_a_damaged_store_is_never_another_format(tmp_path: Path) -> None:
    whole = tmp_path / "s"
    command.convert(leaf(tmp_path / "leaf"), whole)
    for lost in ("offsets.npy", "column_0.npy"):
        path = shutil.copytree(whole, tmp_path / f"without {lost}")
        (path / lost).unlink()
        with pytest.raises(InputError, match=f"^{path / lost}: missing, expected .* bytes$"):
            read(path)
    (tmp_path / "bare").mkdir()
    shutil.copy(whole / "meta.json", tmp_path / "bare")
    with pytest.raises(InputError, match="bare/column_0.npy: missing, expected .* bytes$"):
        read(tmp_path / "bare")
    (tmp_path / "killed.part").mkdir()
    with pytest.raises(InputError, match="killed.part: a half-written store: remove it"):
        read(tmp_path / "killed")
    (whole / "meta.json").rename(tmp_path / "meta.json")
    with pytest.raises(InputError, match=f"^{whole}: no store: it has no meta.json$"):
        read(whole)
    whole.rename(tmp_path / "s.part")
    for name in ("s", "s.part"):
        with pytest.raises(InputError, match=f"^{tmp_path}/s.part: a half-written store: remove"):
            read(tmp_path / name)
    (tmp_path / "meta.json").rename(tmp_path / "s.part" / "meta.json")
    (tmp_path / "pair" / "train").mkdir(parents=True)
    (tmp_path / "s.part").rename(tmp_path / "pair" / "test")
    with pytest.raises(InputError, match="pair/train: no store: it has no meta.json$"):
        read(tmp_path / "pair")


def test_json_that_only_looks_like_a_store_is_leaf(tmp_path: Path) -> None:
    (tmp_path / "a.part").mkdir()
    leaf(tmp_path / "a.part" / "meta.json")
    leaf(tmp_path / "a.part" / "b.json").write_text(json.dumps(BLOB).replace('"u"', '"v"'))
    assert list(read(tmp_path / "a.part")[0].client_ids) == ["v", "u"]


def test_a_folder_of_tables_says_how_to_read_them(tmp_path: Path) -> None:
    table(tmp_path / "a")
    said = f"{tmp_path}: a folder of tables: read one file, or several with read_csv"
    with pytest.raises(InputError, match=f"^{said}"):
        read(tmp_path, client="who", label="label")


def test_options_that_are_needed(tmp_path: Path) -> None:
    path = table(tmp_path / "a")
    with pytest.raises(InputError, match=f"^{path}: CSV needs the option 'label'$"):
        read(path, client="who")
    with pytest.raises(InputError, match="CIFAR needs the option 'client'$"):
        read(cifar(tmp_path / "cifar"))
    with pytest.raises(InputError, match="cifar: client: expected a function from labels to clie"):
        read(tmp_path / "cifar", client="who")


def test_what_is_understood_is_said(tmp_path: Path) -> None:
    said = r"understood are LEAF \(a .json file.*TFF.*FLUTE.*parquet.*CSV, NPZ, CIFAR.*MNIST by wr"
    with pytest.raises(InputError, match=f"none: no such file or directory; {said}"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match=f"^{re.escape(str(tmp_path))}: no data of a .*; {said}"):
        read(tmp_path)
    for content in (b"", b"hello", b"[1]", b"\x89PNG"):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(InputError, match=f"a: no data of a known format; {said}"):
            read(tmp_path / "a")


def test_anything_is_data_or_a_line(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    files = [leaf(tmp_path / "leaf"), flute(tmp_path / "flute"), archive(tmp_path / "npz")]
    for good in files:
        content = good.read_bytes()
        for _ in range(60):
            good.write_bytes(mutate(content, rng))
            answers(lambda path=good: read(path)[0])
    shutil.rmtree(tmp_path)
