"""TensorFlow Federated's HDF5 files: examples/<client>/<column>."""

from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.dataset import FederatedDataset
from vecfl.data.files import listing
from vecfl.data.hdf5 import array, group, names, opened
from vecfl.data.stream import Clients, Encode, collect, encoded
from vecfl.errors import InputError

EXPECTED = "TFF's HDF5: examples/<client>/<column>, each column [n, ...]"
KNOWN = {"pixels": "x", "image": "x", "label": "y"}  # EMNIST, CIFAR-100


def tff_clients(path: Path | str, encode: Encode | None = None) -> Clients:
    """The clients of an HDF5 file of TFF, one in memory at a time, in the order of the file.

    Columns pass under their names, but for pixels [n, 28, 28] -> x [n, 1, 28, 28], image
    [n, 32, 32, 3] -> x [n, 3, 32, 32] and label -> y; integers other than images become int64.
    Text (Shakespeare's snippets, Stack Overflow's tokens, title, tags, ...) needs `encode`, which
    gets the file's own columns. Raises InputError, naming file, client and key, for a damaged file
    and where h5py is missing. Source: TensorFlow Federated, simulation.datasets (HDF5 files).
    """
    path = Path(path)
    with opened(path, EXPECTED) as file:
        examples = group(file, "examples", str(path), EXPECTED)
        for client in names(examples, str(path), EXPECTED):
            where = f"{path}, client {client!r}"
            member = group(examples, client, where, EXPECTED)
            raw = {key: array(member, key, where, EXPECTED) for key in names(member, where, "")}
            if len({len(values) for values in raw.values()}) != 1:
                sizes = {key: len(values) for key, values in raw.items()}
                raise InputError(f"{where}: columns of lengths {sizes}; expected one length")
            yield client, _known(raw) if encode is None else encoded(raw, encode, where)


def read_tff(path: Path | str, encode: Encode | None = None) -> FederatedDataset:
    """The dataset of an HDF5 file of TFF; see `tff_clients`."""
    return collect(tff_clients(path, encode), path)


def read_tff_pair(
    folder: Path | str, encode: Encode | None = None
) -> tuple[FederatedDataset, FederatedDataset]:
    """The datasets (train, test) of the *_train.h5 and the *_test.h5 of a directory.

    Raises InputError where there is not just one of each.
    """
    pair = []
    for ending in ("_train.h5", "_test.h5"):
        found = listing(folder, ending)
        if len(found) != 1 or Path(folder).is_file():
            raise InputError(
                f"{folder}: {len(found)} files; expected a directory with one *{ending}"
            )
        pair.append(read_tff(found[0], encode))
    return pair[0], pair[1]


def _known(raw: dict[str, Any]) -> dict[str, Any]:
    """Columns of known contents as x and y."""
    columns = {}
    for name, values in raw.items():
        image = isinstance(values, np.ndarray) and name in ("pixels", "image")
        if image and values.ndim == 3:
            values = values[:, None]
        elif image and values.ndim == 4:
            values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
        elif isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            values = values.astype(np.int64)
        columns[KNOWN.get(name, name)] = values
    return columns
