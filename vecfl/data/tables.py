"""Tables: CSV files and NPZ archives with a column that names the client of each row."""

import csv
import io
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import content, understood
from vecfl.data.stream import Clients, by_client, collect
from vecfl.errors import InputError

MISSING = {"", "?", "na", "n/a", "nan", "null"}
Paths = Path | str | Sequence[Path | str]


def csv_clients(
    path: Paths,
    client: str | None,
    label: str,
    *,
    names: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    missing: float | None = None,
    classes: Sequence[str] | None = None,
) -> Clients:
    """The clients of one CSV file or several, plain or gzipped: x float32 [n, columns], y [n].

    `client` and `label` are columns; without `client` each file is a client, known by its name
    without .csv, .data, .txt and .gz. `names` are the columns of files without a header. x has
    all columns but client, label and `drop`, in order. Integer labels become int64, other numbers
    float32, text its place in `classes` (the sorted labels that occur, unless given). Clients are
    ordered by id. Empty fields, ?, NA and NaN are missing: replaced by `missing` where it is given,
    in x only, and refused otherwise. Raises InputError, naming file, line and column.
    """
    files = [Path(path)] if isinstance(path, Path | str) else [Path(file) for file in path]
    x: list[list[float]] = []
    labels: list[str] = []
    owners: list[str] = []
    columns: list[str] = []
    for file in files:
        header, rows = _rows(file, names)
        inputs = [name for name in header if name not in {client, label, *drop}]
        for name in [label, *([client] if client else []), *drop]:
            if name not in header:
                raise InputError(f"{file}: no column {name!r}; it has {header}")
        if columns and inputs != columns:
            raise InputError(f"{file}: columns {inputs}, but {files[0]} has {columns}")
        columns, at = inputs, {name: header.index(name) for name in header}
        for line, row in rows:
            where = f"{file}, line {line}"
            x.append([_number(row[at[name]], missing, where, name) for name in columns])
            labels.append(_present(row[at[label]], where, label))
            owners.append(_present(row[at[client]], where, client) if client else _stem(file))
    source = ", ".join(map(str, files))
    if not x or not columns:
        raise InputError(f"{source}: {len(x)} rows of {len(columns)} input columns; expected some")
    with np.errstate(over="ignore"):
        pooled = {"x": np.array(x, np.float32), "y": _labels(labels, classes, source)}
    yield from by_client(pooled, _integers(owners), f"{source}, column {client!r}")


def read_csv(path: Paths, client: str | None, label: str, **options: Any) -> FederatedDataset:
    """The dataset of CSV files; see `csv_clients`, which takes the same arguments."""
    return collect(csv_clients(path, client, label, **options), path)


def npz_clients(
    path: Path | str,
    client: str = "client",
    columns: Sequence[str] = ("x", "y"),
    missing: float | None = None,
) -> Clients:
    """The clients of a NumPy archive with arrays `columns` [n, ...] and `client` [n].

    Arrays keep their dtypes. NaN is replaced by `missing` where it is given, and refused otherwise.
    Clients are ordered by id. Nothing is unpickled. Raises InputError, naming file and array.
    """
    path, arrays = Path(path), {}
    expected = f"a NumPy archive with {[client, *columns]}, arrays of one length"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {expected}")
    with understood(path, expected), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        there = list(archive.files)
        for name in {client, *columns}.intersection(there):
            arrays[name] = archive[name]
    for name in (client, *columns):
        if name not in arrays:
            raise InputError(f"{path}: no array {name!r} among {there}; expected {expected}")
        array = arrays[name]
        if array.ndim == 0 or arrays[client].ndim != 1 or len(array) != len(arrays[client]):
            raise InputError(
                f"{path}: array {name!r} is {list(array.shape)}, {client!r} is "
                f"{list(arrays[client].shape)}; expected {expected}"
            )
        if missing is not None and array.dtype.kind == "f":
            array[np.isnan(array)] = missing
    owner = arrays[client]
    yield from by_client({n: arrays[n] for n in columns}, owner, f"{path}, array {client!r}")


def read_npz(path: Path | str, client: str = "client", **options: Any) -> FederatedDataset:
    """The dataset of a NumPy archive; see `npz_clients`, which takes the same arguments."""
    return collect(npz_clients(path, client, **options), path)


def _rows(file: Path, names: Sequence[str] | None) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows of a CSV file, each row with its line."""
    data = content(file, "a CSV file")
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: no CSV in UTF-8: {error}") from error
    if not rows:
        raise InputError(f"{file}: empty; expected a CSV file with rows")
    header = list(names) if names else rows.pop(0)[1]
    if len(set(header)) != len(header):
        raise InputError(f"{file}: two columns have one name in {header}")
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(
                f"{file}, line {line}: {len(row)} fields, expected {len(header)}, one a column"
            )
    return header, rows


def _number(field: str, missing: float | None, where: str, name: str) -> float:
    if field.lower() in MISSING:
        if missing is None:
            raise InputError(
                f"{where}, column {name!r}: {field!r} is a missing value; clean it, or give "
                "missing= a number to put there"
            )
        return missing
    try:
        return float(field)
    except ValueError:
        raise InputError(
            f"{where}, column {name!r}: expected a number, got {field!r:.60}"
        ) from None


def _present(field: str, where: str, name: str | None) -> str:
    if field.lower() in MISSING:
        raise InputError(f"{where}, column {name!r}: {field!r} is missing; every row needs one")
    return field


def _labels(labels: list[str], classes: Sequence[str] | None, source: str) -> NDArray[Any]:
    """Labels as int64, as float32, or as their places in the classes."""
    if classes is None:
        array = _integers(labels)
        if array.dtype.kind == "i":
            return array
        try:
            return np.array(labels, np.float64).astype(np.float32)
        except ValueError:
            classes = sorted(set(labels))
    place: dict[Hashable, int] = {name: k for k, name in enumerate(classes)}
    if unknown := set(labels) - set(place):
        raise InputError(f"{source}: label {min(unknown)!r} is none of the classes {classes}")
    return np.array([place[name] for name in labels], np.int64)


def _integers(fields: list[str]) -> NDArray[Any]:
    """Fields as int64 if all are whole numbers that fit, else as text."""
    try:
        return np.array([int(field) for field in fields], np.int64)
    except (ValueError, OverflowError):
        return np.array(fields)


def _stem(file: Path) -> str:
    name = file.name
    for ending in (".gz", ".csv", ".data", ".txt"):
        name = name.removesuffix(ending)
    return name
