"""CSV files with a column that names the client of each row, or with one file for each client."""

import csv
import io
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import among, content, known_as, several
from vecfl.data.stream import Clients, by_client, collect
from vecfl.errors import InputError

MISSING = {"", "?", "na", "n/a", "nan", "null"}
FILL = "clean it, or give missing= a number to put there (vecfl.data convert: --missing 0)"
HEADER = "a file without a header needs names=, those of its columns"
Paths = Path | str | Sequence[Path | str]


@dataclass(frozen=True)
class Table:
    """Rows of one file or several: x float32 [n, columns]; labels and clients, text [n]."""

    x: NDArray[np.float32]
    columns: list[str]
    labels: list[str]
    owners: list[str]
    source: str


def csv_clients(
    path: Paths,
    client: str | None,
    label: str,
    *,
    names: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    missing: float | None = None,
    classes: Sequence[str] | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> Clients:
    """The clients of one CSV file or several, plain or gzipped: x float32 [n, columns], y [n].

    `client` and `label` are columns; without `client` each file is a client, known by its name
    without .csv, .data, .txt and .gz, or, where names are equal, by folders. `names` are the
    columns of files without a header. x has all columns but client, label and `drop`, in
    order. Integer labels become int64, other numbers float32, text its place in `classes` (the
    sorted labels that occur, unless given: `read_csv_pair` gives training and test files the same).
    Clients are ordered by id. Empty fields, ?, NA and NaN are missing: replaced by `missing` where
    it is given, in x only, and refused otherwise. Raises InputError, naming file, line and column,
    and for a file that is given twice.
    """
    table = _table(path, client, label, names, drop, missing, delimiter, encoding)
    y = _labels(table.labels, classes, table.source)
    name = f"{table.source}, column {client!r}"
    yield from by_client({"x": table.x, "y": y}, _integers(table.owners), name)


def read_csv(path: Paths, client: str | None, label: str, **options: Any) -> FederatedDataset:
    """The dataset of CSV files; see `csv_clients`, which takes the same arguments.

    Text labels are numbered by those that occur in these files: for training and test files take
    `read_csv_pair`, or give both the same `classes=`.
    """
    return collect(csv_clients(path, client, label, **options), several(path)[1])


def read_csv_pair(
    train: Paths,
    test: Paths,
    client: str | None,
    label: str,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> tuple[FederatedDataset, FederatedDataset]:
    """The datasets (train, test) of CSV files whose text labels are numbered together.

    Arguments are those of `csv_clients`. Raises InputError where columns differ, too.
    """
    one, two = (_table(part, client, label, **options) for part in (train, test))
    _same(two.columns, one.columns, two.source, one.source)
    cut = [len(one.labels)]
    labels = np.split(_labels(one.labels + two.labels, classes, f"{one.source}, {two.source}"), cut)
    owners = np.split(_integers(one.owners + two.owners), cut)
    parts = [
        collect(by_client({"x": part.x, "y": y}, owner, part.source), part.source)
        for part, y, owner in zip((one, two), labels, owners, strict=True)
    ]
    return parts[0], parts[1]


def check_missing(missing: Any) -> None:
    """InputError unless this can stand in place of a missing value."""
    number = isinstance(missing, int | float | np.number)
    if missing is not None and not (number and math.isfinite(missing)):
        raise InputError(f"missing: expected a finite number, got {missing!r}")


def _table(
    path: Paths,
    client: str | None,
    label: str,
    names: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    missing: float | None = None,
    delimiter: str = ",",
    encoding: str = "utf-8",
) -> Table:
    check_missing(missing)
    files, source = several(path)
    x: list[list[float]] = []
    labels: list[str] = []
    owners: list[str] = []
    columns: list[str] = []
    known = files if client else known_as(files)
    for file, own in zip(files, known, strict=True):
        header, rows = _rows(file, names, delimiter, encoding)
        inputs = [name for name in header if name not in {client, label, *drop}]
        for name in [label, *([client] if client else []), *drop]:
            if name not in header:
                hint = f"; {HEADER}" if any(map(_is_number, header)) else ""
                raise InputError(f"{file}: no column {name!r}; {among(name, header)}{hint}")
        _same(inputs, columns or inputs, str(file), str(files[0]))
        columns, at = inputs, {name: header.index(name) for name in header}
        for line, row in rows:
            where = f"{file}, line {line}"
            x.append([_number(row[at[name]], missing, where, name) for name in columns])
            labels.append(_present(row[at[label]], where, label))
            owners.append(_present(row[at[client]], where, client) if client else str(own))
    if not x or not columns:
        raise InputError(f"{source}: {len(x)} rows of {len(columns)} input columns; expected some")
    with np.errstate(over="ignore"):
        return Table(np.array(x, np.float32), columns, labels, owners, source)


def _rows(
    file: Path, names: Sequence[str] | None, delimiter: str, encoding: str
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows of a CSV file, each row with its line."""
    data = content(file, "a CSV file")
    try:
        text = io.StringIO(data.decode(encoding).removeprefix("\ufeff"), newline="")
        reader = csv.reader(text, strict=True, delimiter=delimiter)
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if row]
    except UnicodeDecodeError as error:
        hint = "if it is older than UTF-8, give encoding=, such as 'latin-1'"
        raise InputError(f"{file}: no CSV in {encoding}: {error}; {hint}") from error
    except (csv.Error, TypeError, LookupError) as error:  # the latter two: no such argument
        raise InputError(f"{file}: no CSV in {encoding}: {error}") from error
    if not rows:
        raise InputError(f"{file}: empty; expected a CSV file with rows")
    header = list(names) if names else rows.pop(0)[1]
    if len(set(header)) != len(header):
        twice = Counter(header).most_common(1)[0][0]
        hint = "" if names else f"; {HEADER}"
        raise InputError(f"{file}: two columns have the name {twice!r}{hint}")
    if other := [sign for sign in ";\t|" if len(header) == 1 and sign in header[0]]:
        raise InputError(f"{file}: one column {header[0]!r:.60}: give delimiter={other[0]!r}")
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(
                f"{file}, line {line}: {len(row)} fields, expected {len(header)}, one a column"
            )
    return header, rows


def _number(field: str, missing: float | None, where: str, name: str) -> float:
    if field.lower() in MISSING:
        if missing is None:
            raise InputError(f"{where}, column {name!r}: {field!r} is a missing value; {FILL}")
        return missing
    try:
        return float(field)
    except ValueError:
        raise InputError(
            f"{where}, column {name!r}: expected a number, got {field!r:.60}"
        ) from None


def _is_number(field: str) -> bool:
    try:
        return math.isfinite(float(field))
    except ValueError:
        return False


def _same(columns: list[str], first: list[str], where: str, there: str) -> None:
    """InputError unless the columns of two files agree."""
    if columns == first:
        return
    lost, more = ([c for c in a if c not in b] for a, b in ((first, columns), (columns, first)))
    differ = f"{lost[:5]} are missing, {more[:5]} are new" if lost or more else "another order"
    raise InputError(f"{where}: its columns are not those of {there}: {differ}")


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
