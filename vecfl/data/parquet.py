"""Parquet files, as data sets of Hugging Face come: one row an example, in one file or shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import among, listing, needs, several, understood
from vecfl.data.images import NAMES, decoded, is_image
from vecfl.data.stream import Clients, Encode, by_client, collect, encoded
from vecfl.errors import InputError

EXPECTED = "parquet files with the same columns"
SPLITS = ("train", "validation", "test")  # how the names of their files begin on Hugging Face
Partition = Callable[[Any], Any]  # labels [n] -> the client of each example [n]


def parquet_clients(
    path: Path | str | Sequence[Path | str],
    client: str | Partition,
    label: str = "label",
    columns: Sequence[str] | None = None,
    encode: Encode | None = None,
) -> Clients:
    """The clients of a parquet file, of several, or of those of a directory, ordered by id.

    A directory with train* and test* files is refused: `read_parquet_pair` keeps them apart.

    `client` is a column, or a function that gives the client of each example from the labels:
    `lambda labels: dirichlet(labels, 100, 0.3, seed=0)`. `columns` are those to read, all unless
    given. Images {bytes, path} are decoded, one client at a time: image and img become x uint8
    [n, C, H, W]. `label` becomes y int64, other columns keep their names; text needs `encode`,
    which gets the file's own columns. Raises InputError, naming file, client and column, for a
    damaged file, nulls, and where pyarrow or Pillow are missing.
    """
    given, source = several(path)
    files = [file for entry in given for file in _of_one_split(entry)]
    by_column = [client] if isinstance(client, str) else []
    wanted = None if columns is None else list(dict.fromkeys([*columns, label, *by_column]))
    pooled = _pooled(files, wanted, [label, *by_column], source)
    if isinstance(client, str):
        owner = pooled.pop(client)
    else:
        owner = client(pooled[label])
        if len(owner) != len(pooled[label]):
            raise InputError(
                f"{source}: client= gave {len(owner)} clients for {len(pooled[label])} examples"
            )
    for id_, raw in by_client(pooled, owner, f"{source}, client"):
        where = f"{source}, client {id_!r}"
        for name, values in raw.items():
            if isinstance(values, list) and is_image(values[0]):
                raw = {**raw, name: decoded(values, f"{where}, column {name!r}")}
        yield id_, _known(raw, label) if encode is None else encoded(raw, encode, where)


def read_parquet(
    path: Path | str | Sequence[Path | str], client: str | Partition, **options: Any
) -> FederatedDataset:
    """The dataset of parquet files; see `parquet_clients`, which takes the same arguments."""
    return collect(parquet_clients(path, client, **options), several(path)[1])


def read_parquet_pair(
    folder: Path | str, client: str | Partition, **options: Any
) -> tuple[FederatedDataset, FederatedDataset]:
    """The datasets (train, test) of the train*.parquet and the test*.parquet of a directory.

    Arguments are those of `parquet_clients`. Raises InputError where there are no such files.
    """
    pair = []
    for split in ("train", "test"):
        files = sorted(Path(folder).glob(f"{split}*.parquet"))
        if not files:
            raise InputError(f"{folder}: no {split}*.parquet; expected train* and test* in it")
        pair.append(read_parquet(files, client, **options))
    return pair[0], pair[1]


def _of_one_split(path: Path) -> list[Path]:
    """The files of a path; InputError for a directory that has more than one split."""
    files = listing(path, ".parquet")
    found = [split for split in SPLITS if any(file.name.startswith(split) for file in files)]
    if len(found) > 1:
        raise InputError(
            f"{path}: files of {' and '.join(found)}, which must not mix: read_parquet_pair reads "
            "train and test apart; or give the files of one of them as a list"
        )
    return files


def _pooled(
    files: list[Path], wanted: list[str] | None, needed: list[str], source: str
) -> dict[str, Any]:
    """The columns of all files: arrays of numbers, lists of anything else."""
    arrow, parquet = needs("pyarrow", source), needs("pyarrow.parquet", source)
    tables = []
    for file in files:
        with understood(file, EXPECTED):
            # A file object: a path could name another file system.
            with file.open("rb") as handle:
                there = parquet.read_schema(handle).names
            lost = [name for name in wanted or needed if name not in there]
            if not lost:
                with file.open("rb") as handle:
                    tables.append(parquet.ParquetFile(handle).read(columns=wanted))
        if lost:
            raise InputError(f"{file}: no column {lost[0]!r}; {among(lost[0], there)}")
    with understood(source, EXPECTED):
        table = arrow.concat_tables(tables)
        names, nulls = table.column_names, [column.null_count for column in table.columns]
    if len(set(names)) != len(names) or table.num_rows == 0:
        raise InputError(f"{source}: {table.num_rows} rows of {names}; expected rows and own names")
    for name, count in zip(names, nulls, strict=True):
        if count:
            raise InputError(f"{source}, column {name!r}: {count} rows have no value; clean them")
    with understood(source, EXPECTED):
        return {name: _values(table[name]) for name in names}


def _values(column: Any) -> Any:
    """An array where the column holds numbers; else a list."""
    types = needs("pyarrow", "parquet").types
    kind = column.type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return np.array(column.to_numpy())
    values = column.to_pylist()
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        try:
            array = np.array(values)
        except ValueError:  # ragged: for `encode`
            return values
        return array if array.dtype.kind in "biuf" else values
    return values


def _known(raw: Any, label: str) -> dict[str, Any]:
    """Images as x, labels as y, integers but images as int64."""
    columns = {}
    for name, values in raw.items():
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim < 4:
            values = values.astype(np.int64)
        columns["y" if name == label else NAMES.get(name, name)] = values
    return columns
