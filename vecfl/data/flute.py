"""FLUTE's blobs, JSON and HDF5: {users, num_samples, user_data, user_data_label}."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.dataset import FederatedDataset
from vecfl.data.hdf5 import array, group, is_group, names, opened
from vecfl.data.leaf import check_users, client_columns, read_document
from vecfl.data.stream import Clients, Encode, collect, encoded
from vecfl.errors import InputError

EXPECTED = "FLUTE's {users, num_samples, user_data: {user: {x}}, user_data_label: {user: labels}}"
HDF5 = b"\x89HDF\r\n\x1a\n"


def flute_clients(path: Path | str, encode: Encode | None = None) -> Clients:
    """The clients of a FLUTE blob, JSON (plain or gzipped) or HDF5, in the order of its users.

    Columns are those of user_data, x where it is a plain list, and y from user_data_label, which
    may be missing. Numbers are read as by `leaf_clients`; text needs `encode`. HDF5 is read one
    client at a time. Raises InputError, naming file, client and key, for a damaged file, and where
    h5py is missing. Source: microsoft/msrflute, documentation of the data format.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            hdf5 = file.read(8) == HDF5
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; expected {EXPECTED}") from error
    return _hdf5(path, encode) if hdf5 else _json(path, encode)


def read_flute(path: Path | str, encode: Encode | None = None) -> FederatedDataset:
    """The dataset of a FLUTE blob; see `flute_clients`."""
    return collect(flute_clients(path, encode), path)


def _json(path: Path, encode: Encode | None) -> Clients:
    document = read_document(path, EXPECTED)
    labels = document.get("user_data_label", {})
    if not isinstance(labels, Mapping):
        raise InputError(f"{path}: key 'user_data_label': expected a dict of users; {EXPECTED}")
    for user, n in zip(document["users"], document["num_samples"], strict=True):
        where = f"{path}, client {user!r}"
        row = _named(document["user_data"].pop(user), "x")
        if labels:
            if user not in labels:
                raise InputError(f"{where}: in users, but not in user_data_label")
            row = _merged(row, _named(labels[user], "y"), where)
        yield user, encoded(client_columns(row, n, where), encode, where)


def _hdf5(path: Path, encode: Encode | None) -> Clients:
    with opened(path, EXPECTED) as file:
        users = array(file, "users", str(path), EXPECTED)
        sizes = np.asarray(array(file, "num_samples", str(path), EXPECTED)).tolist()
        users = users if isinstance(users, list) else users.tolist()
        check_users(path, users, sizes)
        data = group(file, "user_data", str(path), EXPECTED)
        known = "user_data_label" in names(file, str(path), EXPECTED)
        labels = group(file, "user_data_label", str(path), EXPECTED) if known else None
        for user, n in zip(users, sizes, strict=True):
            where = f"{path}, client {user!r}"
            row = _columns(data, user, "x", where)
            if labels is not None:
                row = _merged(row, _columns(labels, user, "y", where), where)
            for key, values in row.items():
                if len(values) != n:
                    raise InputError(
                        f"{where}: key {key!r}: {len(values)} examples, but num_samples is {n}"
                    )
            yield user, encoded(row, encode, where)


def _columns(parent: Any, user: str, name: str, where: str) -> dict[str, Any]:
    """A user's columns: those of its group, or its one array under this name."""
    if is_group(parent, user, where, EXPECTED):
        member = group(parent, user, where, EXPECTED)
        keys = names(member, where, EXPECTED)
        found = {key: array(member, key, where, EXPECTED) for key in keys}
    else:
        found = {name: array(parent, user, where, EXPECTED)}
    return {key: _typed(values) for key, values in _named(found, name).items()}


def _named(row: Any, name: str) -> Any:
    """A plain list under this name; labels in {x: ...} as y."""
    if isinstance(row, Mapping):
        return {"y": next(iter(row.values()))} if name == "y" and len(row) == 1 else row
    return {name: row}


def _merged(row: Any, labels: Mapping[str, Any], where: str) -> dict[str, Any]:
    if twice := [key for key in labels if key in row]:
        raise InputError(f"{where}: key {twice[0]!r} is in user_data and in user_data_label")
    return {**row, **labels}


def _typed(values: Any) -> Any:
    """Numbers as in JSON: int64 or float32; bytes, as of images, stay uint8."""
    if isinstance(values, list) or values.dtype == np.uint8:
        return values
    with np.errstate(over="ignore"):  # becomes Inf, which `collect` refuses
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
