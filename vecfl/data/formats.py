"""Which format is it? `read` looks at the content of a path and calls its reader."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.cifar import read_cifar10, read_cifar100
from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import content
from vecfl.data.flute import HDF5, flute_clients, read_flute
from vecfl.data.hdf5 import names, opened
from vecfl.data.leaf import ENDINGS, leaf_clients, read_leaf, read_leaf_pair
from vecfl.data.mnist_writers import mnist_writers
from vecfl.data.npz import npz_clients, read_npz
from vecfl.data.parquet import Partition, parquet_clients, read_parquet, read_parquet_pair
from vecfl.data.store import PAIR, is_store, open_dataset
from vecfl.data.tables import csv_clients, read_csv
from vecfl.data.tff import read_tff, read_tff_pair, tff_clients
from vecfl.errors import InputError

TABLES = tuple(name + gz for name in (".csv", ".data", ".txt") for gz in ("", ".gz"))
UNDERSTOOD = (
    "LEAF (a .json file, a directory of them, or train/ and test/), TFF (.h5, or a directory with "
    "*_train.h5 and *_test.h5), FLUTE (.json, .hdf5), parquet (files, or train* and test* in a "
    "directory), CSV, NPZ, CIFAR's .bin batches, MNIST by writers, a store, or the stores train/ "
    "and test/"
)
Pair = tuple[FederatedDataset, FederatedDataset | None]


@dataclass(frozen=True)
class Format:
    """A format by its name: the function that reads it, and one whose arguments are its options."""

    name: str
    read: Callable[..., Any]
    options: Callable[..., Any]


def read(path: Path | str, **options: Any) -> Pair:
    """The data at a path as (train, test), test None where there is none.

    The format is recognised by content (`recognise`); `options` are those of its reader: `client`,
    `label`, `encode`, `missing`, ... CIFAR takes `client`, a function from labels [n] to the client
    of each training example; its test images are one client. Raises InputError where nothing
    matches, saying what is understood, and for options that the format lacks or needs.
    """
    found = recognise(path)
    takes = dict(list(inspect.signature(found.options).parameters.items())[1:])
    needed = [name for name, option in takes.items() if option.default is option.empty]
    for name in options:
        if name not in takes:
            raise InputError(
                f"{path}: {found.name} has no option {name!r}; it takes {list(takes) or 'none'}"
            )
    for name in needed:
        if name not in options:
            raise InputError(f"{path}: {found.name} needs the option {name!r}")
    data = found.read(path, **options)
    return data if isinstance(data, tuple) else (data, None)


def recognise(path: Path | str) -> Format:
    """The format of a file or directory, by its content; InputError saying what is understood."""
    path = Path(path)
    found = None
    if is_store(path):
        return Format("store", open_dataset, open_dataset)
    if path.is_dir():
        found = _directory(path, {file.name for file in path.iterdir()})
    elif path.is_file():
        found = _file(path)
    else:
        raise InputError(f"{path}: no such file or directory; understood are {UNDERSTOOD}")
    if found is None:
        raise InputError(f"{path}: no data of a known format; understood are {UNDERSTOOD}")
    return found


def _directory(path: Path, inside: set[str]) -> Format | None:
    def some(ending: str | tuple[str, ...], start: str = "") -> bool:
        return any(name.endswith(ending) and name.startswith(start) for name in inside)

    if any(is_store(path / half) for half in PAIR):
        return Format("stores", _open_pair, open_dataset)
    if set(PAIR) <= inside:
        return Format("LEAF", read_leaf_pair, leaf_clients)
    if some("_train.h5") and some("_test.h5"):
        return Format("TFF", read_tff_pair, tff_clients)
    if some((".gz", "ubyte"), "train-images-idx3") and some("", "qmnist-"):
        return Format("MNIST by writers", mnist_writers, mnist_writers)
    if some("", "data_batch_1.bin") or some("", "train.bin"):
        return Format("CIFAR", _cifar, _cifar)
    if some(".parquet"):
        pair = some(".parquet", "train") and some(".parquet", "test")
        return Format("parquet", read_parquet_pair if pair else read_parquet, parquet_clients)
    if some(ENDINGS):
        return Format("LEAF", read_leaf, leaf_clients)
    if some((*TABLES, ".npz")):
        raise InputError(
            f"{path}: a folder of tables: read one file, or several with read_csv([...]), training "
            "and test files with read_csv_pair"
        )
    return None


def _file(path: Path) -> Format | None:
    with path.open("rb") as file:
        start = file.read(8)
    if start == HDF5:
        with opened(path, "HDF5 of TFF or FLUTE") as root:
            keys = names(root, str(path), "HDF5 of TFF or FLUTE")
        flute = Format("FLUTE", read_flute, flute_clients) if "user_data" in keys else None
        return Format("TFF", read_tff, tff_clients) if "examples" in keys else flute
    if start.startswith(b"PAR1"):
        return Format("parquet", read_parquet, parquet_clients)
    if start.startswith(b"PK"):
        return Format("NPZ", read_npz, npz_clients)
    if path.name.endswith(TABLES):
        return Format("CSV", read_csv, csv_clients)
    text = content(path, UNDERSTOOD)
    if text.lstrip()[:1] != b"{":
        return None
    if b'"user_data_label"' in text:
        return Format("FLUTE", read_flute, flute_clients)
    return Format("LEAF", read_leaf, leaf_clients)


def _open_pair(folder: Path | str) -> Pair:
    """The stores train and test in a folder, as `python -m vecfl.data convert` leaves them."""
    train, test = (open_dataset(Path(folder) / half) for half in PAIR)
    return train, test


def _cifar(folder: Path | str, client: Partition) -> Pair:
    ten = any(Path(folder).glob("data_batch_1.bin*"))
    train, test = (read_cifar10 if ten else read_cifar100)(folder)
    if not callable(client):
        raise InputError(
            f"{folder}: client: expected a function from labels to clients, in Python, for CIFAR "
            "names no writers: lambda labels: dirichlet(labels, 100, 0.3, seed=0)"
        )
    pooled = np.zeros(len(test["y"]), np.int64)
    return (
        FederatedDataset.from_arrays(train, client(train["y"])),
        FederatedDataset.from_arrays(test, pooled),
    )
