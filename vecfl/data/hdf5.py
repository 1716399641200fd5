"""HDF5 files, read with suspicion: groups and arrays of the file itself, and nothing else.

The HDF5 library itself can loop without end on a damaged heap of strings of variable length; files
of strangers belong into a process that may be stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vecfl.data.files import needs, understood
from vecfl.errors import InputError

SLACK = 1 << 20  # bytes that a small file may promise


@contextmanager
def opened(path: Path, expected: str) -> Iterator[Any]:
    """The root group of an HDF5 file; InputError, naming the file, where it is none."""
    h5py = needs("h5py", f"{path}: reading HDF5")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {expected}")
    with understood(path, expected):
        file = h5py.File(path, "r")
    with file:
        yield file


def group(parent: Any, key: str, where: str, expected: str) -> Any:
    """A group of the file by its own name; InputError for anything else."""
    if not is_group(parent, key, where, expected):
        raise InputError(f"{where}, key {key!r}: an array, not a group; expected {expected}")
    return parent[key]


def is_group(parent: Any, key: str, where: str, expected: str) -> bool:
    """Whether a name of this group is a group; InputError where it is not there."""
    return isinstance(_member(parent, key, where, expected), needs("h5py", "HDF5").Group)


def names(parent: Any, where: str, expected: str) -> list[str]:
    """The names of what is in a group; InputError for one that is no UTF-8."""
    with understood(where, expected):
        found = list(parent)
    for name in found:
        if not isinstance(name, str):
            raise InputError(f"{where}: the name {name!r} is no UTF-8; expected {expected}")
    return found


def array(parent: Any, key: str, where: str, expected: str) -> Any:
    """An array of numbers, or a list of str, of the file; InputError for anything else."""
    found = _member(parent, key, where, expected)
    where = f"{where}, key {key!r}"
    h5py = needs("h5py", "HDF5")
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{where}: a group, not an array; expected {expected}")
    with understood(where, expected):
        # A filter packs at most about a thousand to one; a larger promise is damage, or a trap.
        promised, there = found.nbytes, Path(found.file.filename).stat().st_size
        foreign = found.is_virtual or found.external
        dtype, shape = found.dtype, found.shape
        text = dtype.kind == "S" or h5py.check_string_dtype(dtype)
    if promised > 1100 * there + SLACK:
        raise InputError(f"{where}: {promised} bytes in a file of {there}; expected {expected}")
    if foreign:
        raise InputError(f"{where}: its data are in another file, which is not opened")
    if not shape or not (text or dtype.kind in "biuf"):
        raise InputError(f"{where}: {dtype} {shape}; expected numbers or text [n, ...]")
    with understood(where, expected):
        values = found[()]
    return _strings(values, where) if text else values


def _member(parent: Any, key: str, where: str, expected: str) -> Any:
    """What the group itself has under this name, links to elsewhere left alone."""
    if not key or "/" in key or key == ".":
        raise InputError(f"{where}, key {key!r}: a path, not a name; expected {expected}")
    with understood(where, expected):
        there = key in parent
        link = parent.get(key, getlink=True) if there else None
    if link is None or type(link).__name__ != "HardLink":
        why = "not there" if link is None else "a link, which is not followed"
        raise InputError(f"{where}, key {key!r}: {why}; expected {expected}")
    with understood(f"{where}, key {key!r}", expected):
        return parent[key]


def _strings(values: np.ndarray, where: str) -> list[str]:
    if values.ndim != 1:
        raise InputError(f"{where}: text of shape {list(values.shape)}; expected one string a row")
    strings = []
    for row, value in enumerate(values.tolist()):
        try:
            strings.append(value if isinstance(value, str) else value.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{where}, row {row}: no UTF-8: {error.reason}") from error
    return strings
