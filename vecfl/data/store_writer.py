"""Writing a store: into a folder beside it, which takes its name when it is complete."""

from __future__ import annotations

import io
import json
import os
import shutil
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vecfl.data.columns import client_columns, kind
from vecfl.data.dataset import FederatedDataset
from vecfl.data.ids import StoredIds, pack
from vecfl.data.store import (
    ID_FILES,
    META,
    NUMPY,
    OFFSETS,
    PART,
    VERSION,
    column_file,
    digest,
    seal,
)
from vecfl.errors import InputError
from vecfl.files import sync_folder

CHUNK = 1 << 22  # bytes that are written at a time


def save(dataset: FederatedDataset, folder: Path | str) -> None:
    """Write a dataset to a new store; `open_dataset` gives it back.

    Ids are integers below 2^63, or strings. Raises InputError for other ids, a dtype that a store
    does not hold, a folder that exists, and where the disk refuses.
    """
    with _new(Path(folder)) as part:
        outs: dict[str, ColumnFile] = {}
        with ExitStack() as files:
            for i, (name, column) in enumerate(dataset.columns.items()):
                out = ColumnFile(part / column_file(i), f"column {name!r}", column)
                outs[name] = files.enter_context(out)
                for some in column.split(max(1, CHUNK // max(1, column[:1].nbytes))):
                    out.append(some)
        _finish(part, outs, dataset.offsets.numpy(), dataset.client_ids)


def write_store(folder: Path | str, clients: Iterable[tuple[Hashable, Mapping[str, Any]]]) -> None:
    """Write a stream of (client id, {column: array [n_k, ...]}) to a new store.

    Of all clients only ids and sizes are kept in memory, of one the examples. Columns must agree as
    in `FederatedDataset.from_clients`. Raises InputError, naming client and column, where they do
    not, for NaN or Inf in a floating column, and as `save` does.
    """
    ids: list[Hashable] = []
    ends, names = array("q", [0]), set[str]()
    with _new(Path(folder)) as part:
        outs: dict[str, ColumnFile] = {}
        with ExitStack() as files:
            for id_, row in clients:
                columns = client_columns(row, id_)
                names = names or set(columns)
                if set(columns) != names:
                    raise InputError(
                        f"client {id_!r}: columns {sorted(columns)}, "
                        f"but client {ids[0]!r} has {sorted(names)}; names must agree"
                    )
                n = len(next(iter(columns.values())))
                ids.append(id_)
                ends.append(ends[-1] + n)
                for name in (outs or columns) if n else ():
                    where, column = f"client {id_!r}, column {name!r}", columns[name]
                    if name not in outs:
                        out = ColumnFile(part / column_file(len(outs)), where, column)
                        outs[name] = files.enter_context(out)
                    outs[name].check(where, column)
                    outs[name].append(column)
        if not outs:
            raise InputError(f"empty dataset: none of {len(ids)} clients has an example")
        _finish(part, outs, np.frombuffer(ends, np.int64), ids)


class ColumnFile:
    """A .npy file that grows: `append` examples; their number goes into the header at the end."""

    def __init__(self, path: Path, where: str, first: Tensor) -> None:
        self.dtype, self.shape = first.dtype, first.shape[1:]
        self.first = f"{where} has {kind(first)}"
        if self.dtype not in NUMPY:
            raise InputError(f"{where}: a store holds no {str(self.dtype).removeprefix('torch.')}")
        self.examples, self.file = 0, path.open("wb", buffering=CHUNK)
        self.file.write(self._header())

    def check(self, where: str, column: Tensor) -> None:
        """InputError unless a column [n, ...] is as the first, and finite."""
        if column.dtype != self.dtype or column.shape[1:] != self.shape:
            raise InputError(
                f"{where}: {kind(column)}, but {self.first}; all but the first axis must agree"
            )
        if column.is_floating_point() and not column.isfinite().all():
            raise InputError(f"{where}: NaN or Inf; clean it")

    def append(self, column: Tensor) -> None:
        """Add the examples of a column [n, ...]."""
        values = column.detach().cpu()
        values = values.view(torch.int16) if self.dtype == torch.bfloat16 else values
        self.file.write(values.numpy().astype(NUMPY[self.dtype], copy=False).tobytes())
        self.examples += len(column)

    def __enter__(self) -> ColumnFile:
        return self

    def __exit__(self, *error: object) -> None:
        with self.file:
            self.file.seek(0)
            self.file.write(self._header())
            _sync(self.file)

    def _header(self) -> bytes:
        header = io.BytesIO()  # numpy pads it, so that the number of examples can grow
        facts = {"descr": NUMPY[self.dtype], "fortran_order": False}
        np.lib.format.write_array_header_1_0(
            header, facts | {"shape": (self.examples, *self.shape)}
        )
        return header.getvalue()


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """The folder beside `folder` that is written; it is renamed, or removed if something fails."""
    part = folder.with_name((folder.name or "store") + PART)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder}: exists already; a store is written to a new folder")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise InputError(f"{part}: a half-written store is in the way: remove it") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from error
    try:
        yield part
        sync_folder(part)
        part.rename(folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{folder}: cannot be written: {error}") from error
        raise


def _finish(
    part: Path, outs: Mapping[str, ColumnFile], offsets: NDArray[Any], ids: Sequence[Hashable]
) -> None:
    """Write all but the columns; meta.json comes last."""
    if odd := [name for name in outs if not isinstance(name, str)]:
        raise InputError(f"column {odd[0]!r}: the name of a column in a store is a string")
    _write(part / OFFSETS, offsets)
    packed = pack(ids)
    if isinstance(packed, StoredIds):
        for name, values in zip(ID_FILES, (packed.words, packed.order, packed.bounds), strict=True):
            if values is not None:
                _write(part / name, values)
    files = {
        path.name: {"bytes": path.stat().st_size, "blake2b": digest(path)}
        for path in sorted(part.iterdir())
    }
    meta = {
        "vecfl_store": VERSION,
        "clients": len(offsets) - 1,
        "examples": int(offsets[-1]),
        "columns": {
            name: {"dtype": str(out.dtype).removeprefix("torch."), "shape": list(out.shape)}
            for name, out in outs.items()
        },
        "id_words": None if isinstance(packed, range) else len(packed.words),
        "files": files,
    }
    with (part / META).open("wb") as file:
        file.write(json.dumps(meta | {"blake2b": seal(meta)}, indent=1).encode())
        _sync(file)


def _write(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, values.astype(values.dtype.newbyteorder("<"), copy=False))
        _sync(file)


def _sync(file: BinaryIO) -> None:
    """Wait until the disk has what was written."""
    file.flush()
    os.fsync(file.fileno())
