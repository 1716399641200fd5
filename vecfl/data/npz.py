"""NumPy archives with an array that names the client of each row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import among, understood
from vecfl.data.stream import Clients, by_client, collect
from vecfl.data.tables import FILL, check_missing
from vecfl.errors import InputError


def npz_clients(
    path: Path | str,
    client: str = "client",
    columns: Sequence[str] | Mapping[str, str] = ("x", "y"),
    missing: float | None = None,
) -> Clients:
    """The clients of a NumPy archive with arrays `columns` [n, ...] and `client` [n].

    `columns` may give new names, {column: array}: {"x": "features", "y": "target"}. Arrays keep
    their dtypes. NaN is replaced by `missing` where it is given, and refused otherwise. Clients are
    ordered by id. Nothing is unpickled. Raises InputError, naming file and array.
    """
    check_missing(missing)
    named = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    path, wanted, arrays = Path(path), [client, *named.values()], {}
    expected = f"a NumPy archive with {wanted}, arrays of one length"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {expected}")
    with understood(path, expected), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        there = list(archive.files)
        for name in set(wanted).intersection(there):
            arrays[name] = archive[name]
    if client not in arrays:
        raise InputError(
            f"{path}: NPZ needs the option 'client', the array with the client of each example: "
            f"no array {client!r}; {among(client, there)}"
        )
    for column, name in named.items():
        if name not in arrays:
            raise InputError(
                f"{path}: no array {name!r}; {among(name, there)}; expected {expected}; columns= "
                f"names them otherwise: {{{column!r}: array, ...}}"
            )
        array, owner = arrays[name], arrays[client]
        if array.ndim == 0 or owner.ndim != 1 or len(array) != len(owner):
            raise InputError(
                f"{path}: array {name!r} is {list(array.shape)}, {client!r} is "
                f"{list(owner.shape)}; expected {expected}"
            )
        if array.dtype.kind == "f" and (lost := np.isnan(array)).any():
            if missing is None:
                row = int(np.argwhere(lost)[0][0])
                where = f"{path}, client {owner[row].item()!r}, array {name!r}, row {row}"
                raise InputError(f"{where}: NaN is a missing value; {FILL}")
            array[lost] = missing
    pooled = {column: arrays[name] for column, name in named.items()}
    yield from by_client(pooled, arrays[client], f"{path}, array {client!r}")


def read_npz(path: Path | str, client: str = "client", **options: Any) -> FederatedDataset:
    """The dataset of a NumPy archive; see `npz_clients`, which takes the same arguments."""
    return collect(npz_clients(path, client, **options), path)
