"""LEAF's JSON files, and FLUTE's, which keep the labels apart: {users, num_samples, user_data}."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import content, listing
from vecfl.data.stream import Clients, Encode, collect, encoded
from vecfl.errors import InputError

EXPECTED = "LEAF JSON: {users, num_samples, user_data: {user: {x, y}}}"
ENDINGS = (".json", ".json.gz")


def leaf_clients(path: Path | str, encode: Encode | None = None) -> Clients:
    """The clients of a LEAF file, or of all .json and .json.gz files of a directory, by name.

    Columns are those of the file, as a rule x and y: integers become int64, other numbers float32,
    784 floats an image [1, 28, 28] (FEMNIST). Text needs `encode`. Clients without examples are
    legal; `hierarchies` is not read. One file is in memory at a time. Raises InputError, naming
    file, client and key, for a damaged file. Source: Caldas et al. 2018, arXiv:1812.01097.
    """
    seen: dict[str, Path] = {}
    for file in listing(path, *ENDINGS):
        document = read_document(file, EXPECTED)
        for user, n in zip(document["users"], document["num_samples"], strict=True):
            where = f"{file}, client {user!r}"
            if user in seen:
                raise InputError(f"{where}: {seen[user].name} has this client too; ids must differ")
            seen[user] = file
            columns = client_columns(document["user_data"].pop(user), n, where)
            yield user, encoded(columns, encode, where)


def read_leaf(path: Path | str, encode: Encode | None = None) -> FederatedDataset:
    """The dataset of a LEAF file or of a directory of files; see `leaf_clients`."""
    return collect(leaf_clients(path, encode), path)


def read_leaf_pair(
    folder: Path | str, encode: Encode | None = None
) -> tuple[FederatedDataset, FederatedDataset]:
    """The datasets (train, test) of the directories `folder`/train and `folder`/test.

    They keep their own clients: LEAF splits each client's examples, or the clients.
    """
    return read_leaf(Path(folder) / "train", encode), read_leaf(Path(folder) / "test", encode)


def read_document(path: Path, expected: str) -> dict[str, Any]:
    """A JSON file whose users, num_samples and user_data agree; InputError where they do not."""
    try:
        document = json.loads(content(path, expected), object_pairs_hook=_distinct(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no valid JSON: {error}; expected {expected}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: a JSON {type(document).__name__}; expected {expected}")
    for key, kind in (("users", list), ("num_samples", list), ("user_data", dict)):
        if not isinstance(document.get(key), kind):
            found = type(document[key]).__name__ if key in document else "nothing"
            raise InputError(
                f"{path}: key {key!r}: expected a {kind.__name__}, got {found}; {expected}"
            )
    check_users(path, document["users"], document["num_samples"])
    users, data = document["users"], document["user_data"]
    if lost := [user for user in users if user not in data]:
        raise InputError(f"{path}, client {lost[0]!r}: in users, but not in user_data")
    if len(data) != len(users):
        extra = next(user for user in data if user not in set(users))
        raise InputError(f"{path}, client {extra!r}: in user_data, but not in users")
    return document


def check_users(path: Path, users: list[Any], sizes: list[Any]) -> None:
    """InputError unless users are distinct strings with a count >= 0 each."""
    if len(sizes) != len(users):
        raise InputError(
            f"{path}: key 'num_samples': {len(sizes)} entries, expected one for each of the "
            f"{len(users)} users"
        )
    known: set[str] = set()
    for user, n in zip(users, sizes, strict=True):
        if not isinstance(user, str) or user in known:
            why = "occurs twice in users" if isinstance(user, str) else "expected a string"
            raise InputError(f"{path}, client {user!r:.60}: {why}")
        known.add(user)
        if type(n) is not int or n < 0:
            raise InputError(
                f"{path}, client {user!r}: key 'num_samples': expected an integer >= 0, got "
                f"{n!r:.60}"
            )


def client_columns(row: Any, n: int, where: str) -> dict[str, Any]:
    """One client's {column: list of n}, as arrays where it holds numbers."""
    if not isinstance(row, Mapping) or not row:
        raise InputError(f"{where}: expected {{x: [...], y: [...]}}, got {type(row).__name__}")
    columns = {}
    for name, values in row.items():
        if not isinstance(values, list) or len(values) != n:
            found = f"{len(values)} of them" if isinstance(values, list) else type(values).__name__
            raise InputError(
                f"{where}: key {name!r}: expected a list of {n} examples (num_samples), got {found}"
            )
        columns[name] = column(values, f"{where}, key {name!r}")
    return columns


def column(values: list[Any], where: str) -> Any:
    """A list of numbers as an array: int64, or float32, images of 784 as [n, 1, 28, 28].

    Lists that begin with text stay as they are, for `encode`.
    """
    first = values[0] if values else 0
    while isinstance(first, list) and first:
        first = first[0]
    if isinstance(first, str):
        return values
    lengths = {len(v) if isinstance(v, list) else None for v in values}
    if len(lengths) > 1:
        row = next(i for i, v in enumerate(values) if _length(v) != _length(values[0]))
        raise InputError(
            f"{where}: example {row} has {_length(values[row])} numbers, but example 0 has "
            f"{_length(values[0])}; rows must be of one length"
        )
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where}: rows of different shapes: {error}") from error
    if array.dtype.kind not in "bif":
        raise InputError(
            f"{where}: expected numbers, got {type(first).__name__} or more than one type"
        )
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes Inf, which `collect` refuses
            array = array.astype(np.float32)
        return array.reshape(-1, 1, 28, 28) if array.shape[1:] == (784,) else array
    return array.astype(np.int64)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def _distinct(path: Path) -> Any:
    """A hook for JSON objects that refuses a key that occurs twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{path}: key {twice!r} occurs twice in one JSON object")
        return found

    return pairs
