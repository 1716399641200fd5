"""A dataset on disk: a folder that opens at once, however many clients it has.

meta.json          version, clients, examples, columns, kind of ids; bytes and BLAKE2b of files
column_0.npy ...   one array [n_examples, ...] for each column
offsets.npy        int64 [N + 1]
ids.npy, ids_order.npy, ids_bounds.npy    the fields of `StoredIds`; none for ids 0..N-1
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vecfl.data.dataset import FederatedDataset
from vecfl.data.ids import StoredIds
from vecfl.errors import InputError

VERSION = 1
META, PART = "meta.json", ".part"  # the folder NAME.part becomes NAME when it is complete
PAIR = ("train", "test")  # two stores in one folder, as `python -m vecfl.data convert` leaves them
OFFSETS = "offsets.npy"
ID_FILES = ("ids.npy", "ids_order.npy", "ids_bounds.npy")  # the fields of StoredIds
# What stands in a .npy file for a dtype of torch; it has no bfloat16, whose bits are kept as int16.
NUMPY = {
    torch.bool: "|b1",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.uint16: "<u2",
    torch.int32: "<i4",
    torch.uint32: "<u4",
    torch.int64: "<i8",
    torch.uint64: "<u8",
    torch.bfloat16: "<i2",
    torch.float16: "<f2",
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.complex64: "<c8",
    torch.complex128: "<c16",
}


def open_dataset(folder: Path | str) -> FederatedDataset:
    """The dataset of a store; its columns are read from disk where they are touched.

    Takes the same time for any number of clients: it looks at meta.json and at the sizes of files,
    while `verify` looks at everything. What is written into a column stays in this process. Raises
    InputError for a folder that is no store, of another version, half-written, or whose files are
    missing or cut.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    clients, examples = meta["clients"], meta["examples"]
    columns, files = {}, {}
    for i, (name, column) in enumerate(meta["columns"].items()):
        dtype = getattr(torch, column["dtype"])
        shape = (examples, *column["shape"])
        values, pages = _mapped(folder, column_file(i), NUMPY[dtype], shape, meta)
        columns[name] = torch.from_numpy(values).view(dtype)
        files[name] = (folder.absolute() / column_file(i), len(pages) - values.nbytes)
    offsets = torch.from_numpy(_scattered(folder, OFFSETS, "<i8", (clients + 1,), meta))
    lengths = {folder.absolute() / name: wrote["bytes"] for name, wrote in meta["files"].items()}
    return FederatedDataset.from_checked(columns, offsets, _ids(folder, meta), files, lengths)


def is_store(folder: Path) -> bool:
    """Whether a folder holds a store, be it damaged or half-written: `open_dataset` says more."""
    if not folder.exists() and not folder.name.endswith(PART):
        return is_store(folder.with_name(folder.name + PART))
    if not folder.is_dir():
        return False
    inside = {file.name for file in folder.iterdir()}
    own = all(name == META or name.endswith(".npy") for name in inside)
    if {OFFSETS, column_file(0)} & inside or folder.name.endswith(PART) and own:
        return True
    try:
        return b'"vecfl_store"' in (folder / META).read_bytes()
    except OSError:
        return False


def verify(folder: Path | str) -> None:
    """InputError unless every file of a store is as it was written, and its parts fit.

    Reads all of it: bytes against checksums, offsets that rise, ids that are distinct.
    """
    folder = Path(folder)
    data, meta = open_dataset(folder), read_meta(folder)
    for name, wrote in meta["files"].items():
        if digest(folder / name) != wrote["blake2b"]:
            raise InputError(f"{folder / name}: damaged: its bytes are not those that were written")
    try:
        FederatedDataset(data.columns, data.offsets)
        if isinstance(data.client_ids, StoredIds):
            data.client_ids.check()
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json; InputError unless it is whole, and all files have their sizes."""
    path = folder / META
    try:
        meta = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(_no_meta(folder)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as the meta file of a store: {error}") from error
    if not isinstance(meta, dict) or "vecfl_store" not in meta:
        raise InputError(f"{path}: no meta file of a store: it has no entry 'vecfl_store'")
    if meta["vecfl_store"] != VERSION:
        raise InputError(
            f"{folder}: a store of version {meta['vecfl_store']!r}, this vecfl reads version "
            f"{VERSION}: convert it again, or take the vecfl that wrote it"
        )
    if meta.pop("blake2b", None) != seal(meta):
        raise InputError(f"{path}: damaged: its content is not what was written")
    for name, wrote in meta["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != wrote["bytes"]:
            found = "missing" if size is None else f"{size} bytes"
            raise InputError(f"{folder / name}: {found}, expected {wrote['bytes']} bytes")
    return meta


def column_file(i: int) -> str:
    """The file of column i: names of columns may be no names of files."""
    return f"column_{i}.npy"


def digest(path: Path) -> str:
    """BLAKE2b of a file, as `b2sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def seal(meta: dict[str, Any]) -> str:
    """BLAKE2b of the content of meta.json but this entry."""
    return hashlib.blake2b(json.dumps(meta).encode()).hexdigest()


def _no_meta(folder: Path) -> str:
    """What is wrong with a folder without meta.json, which is written last."""
    part = folder if folder.name.endswith(PART) else folder.with_name(folder.name + PART)
    if part.is_dir():
        return f"{part}: a half-written store: remove it, and write the store again"
    if any(is_store(folder / half) for half in PAIR):
        both = " and ".join(str(folder / half) for half in PAIR)
        return f"{folder}: no store, but a folder of two: open {both}"
    if folder.exists():
        return f"{folder}: no store: it has no {META}"
    return f"{folder}: no such folder; expected a store, as `save` and `write_store` leave it"


def _mapped(
    folder: Path, name: str, dtype: str, shape: tuple[int, ...], meta: dict[str, Any]
) -> tuple[NDArray[Any], mmap.mmap]:
    """The values of a .npy file, which are its last bytes, and its map: read where touched."""
    size = meta["files"][name]["bytes"]
    with (folder / name).open("rb") as file:
        if sys.platform == "linux":
            # Copies on write, and asks for no memory for them: else a store that is larger than
            # the memory could not be mapped.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
            pages = mmap.mmap(file.fileno(), size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    start = size - np.dtype(dtype).itemsize * math.prod(shape)
    return np.ndarray(shape, dtype, buffer=pages, offset=start), pages


def _scattered(
    folder: Path, name: str, dtype: str, shape: tuple[int, ...], meta: dict[str, Any]
) -> NDArray[Any]:
    """As `_mapped`, for values that are read here and there: pages come one by one."""
    values, pages = _mapped(folder, name, dtype, shape, meta)
    if hasattr(mmap, "MADV_RANDOM"):
        pages.madvise(mmap.MADV_RANDOM)
    return values


def _ids(folder: Path, meta: dict[str, Any]) -> range | StoredIds:
    clients, (words, order, bounds) = meta["clients"], ID_FILES
    if meta["id_words"] is None:
        return range(clients)
    strings = bounds in meta["files"]
    return StoredIds(
        _scattered(folder, words, "|u1" if strings else "<i8", (meta["id_words"],), meta),
        _scattered(folder, order, "<i8", (clients,), meta),
        _scattered(folder, bounds, "<i8", (clients + 1,), meta) if strings else None,
    )
