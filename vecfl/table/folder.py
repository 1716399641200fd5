"""Rows on disk: a folder of .npy files, with journals that lead back to checkpoints.

meta.json      version, a random name of the run whose rows it holds, and what rows these are
column_0.npy   an array [N, ...] for each column, sparse: rows take room when they are written
undo-...       see `vecfl.table.journal`
lock-WRITER    held by the process that writes as WRITER
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.files import Lock, naming
from vecfl.table.journal import Journal, Records, write_all
from vecfl.table.meta import Shapes, create, name_of, renamed

NEW, MOVED = "give --table a new folder", "if it was moved, give --table NEWPLACE"


class Folder:
    """Columns [N, ...] as files. Processes may share them, if no two write the same row.

    start  of a run: the folder is made, or holds a table that no run has written to yet; else it
           is there. The first process, writer 0, looks for all.
    """

    def __init__(
        self,
        path: Path,
        shapes: Shapes,
        clients: int,
        dtype: torch.dtype,
        writer: int,
        start: bool,
    ) -> None:
        if os.name != "posix":
            raise InputError(f"{path}: a table on disk needs Linux or macOS; leave it in memory")
        self.path, number = path.absolute(), torch.empty(0, dtype=dtype).numpy().dtype
        whole = {name: (clients, *shape) for name, shape in shapes.items()}
        facts = {"dtype": str(number), "columns": {name: [*s] for name, s in whole.items()}}
        new = start and not self.path.exists()
        if new:
            create(self.path, whole, number, facts)
        self.name = name_of(self.path, facts, NEW if start else MOVED)
        taken = f"{self.path}: in use by another run; give each run a folder of its own"
        self.lock = Lock(self.path / f"lock-{writer}", taken, os.O_RDWR | os.O_CREAT)
        self.columns = {
            name: Column(self.path / f"column_{i}.npy", shape, number)
            for i, (name, shape) in enumerate(whole.items())
        }
        row = np.dtype([(name, number, shape) for name, shape in shapes.items()])
        self.journal = Journal(self.path, row, writer)
        if start and not new and writer == 0:
            self._take(facts)

    def _take(self, facts: Mapping[str, object]) -> None:
        """Let a table be this run's that a start left which did not come to its first round."""
        if not self.journal.untouched():
            raise InputError(f"table {self.path} holds the rows of another run; {NEW}")
        self.name = renamed(self.path, facts)

    def read(self, clients: Tensor) -> dict[str, Tensor]:
        return {name: c.rows.index_select(0, clients) for name, c in self.columns.items()}

    def column(self, name: str) -> Tensor:
        return self.columns[name].rows.clone()

    def write(self, clients: Tensor, rows: Mapping[str, Tensor]) -> None:
        for name, values in rows.items():
            self.columns[name].write(clients, values)

    def keep(self, round: int, clients: Tensor) -> None:
        for column in self.columns.values():
            column.check()
            column.reserve(clients)
        self.journal.append(self._records(round, clients))

    def _records(self, round: int, clients: Tensor) -> Iterator[Records]:
        for some in clients.split(self.journal.some):
            records = np.zeros(len(some), self.journal.record)
            records["round"], records["client"] = round, some.numpy()
            for name, values in self.read(some).items():
                records["row"][name] = values.numpy()
            yield records

    def kept(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return (self._rows(records) for records in self.journal.last())

    def _rows(self, records: Records) -> tuple[Tensor, dict[str, Tensor]]:
        """Clients [K] and rows of records [K]."""
        rows = {name: torch.from_numpy(records["row"][name].copy()) for name in self.columns}
        return torch.from_numpy(records["client"].copy()), rows

    def check(self, round: int, content: Mapping[str, object]) -> None:
        """InputError if no journal leads to that round, or it is another table's."""
        if content and "table" not in content:
            raise InputError(
                f"table {self.path}: the checkpoint after round {round} holds its rows itself; "
                "leave --table away"
            )
        if content and content["table"] != self.name:
            raise InputError(
                f"table {self.path} is not the table that this checkpoint belongs to; {MOVED}"
            )
        bases = self.journal.bases()
        if round not in bases:
            raise InputError(
                f"{self.path}: no way back to its rows after round {round}, only after round "
                f"{', '.join(map(str, bases))}: resume from there, or give a new folder"
            )

    def restore(self, round: int, content: Mapping[str, object]) -> None:
        """Write back what has changed since."""
        self.check(round, content)
        self.journal.absorb(round)
        for record in self.journal.since(round):
            self.write(*self._rows(record.reshape(1)))
        self._sync()
        self.journal.open(round)

    def content(self, round: int) -> dict[str, object]:
        """Which table it is. Rows are on the disk now, and a journal will lead back to them."""
        if self.journal.base != round:
            self._sync()
            self.journal.open(round)
        return {"table": self.name}

    def forget(self, oldest: int) -> None:
        self.journal.forget(oldest)

    def _sync(self) -> None:
        for column in self.columns.values():
            with naming(column.path):
                os.fsync(column.file)


class Column:
    """A .npy file of rows [N, ...], read through a map, `rows`, and written past it.

    Written through the map, a row that finds no room on the disk would end the process (SIGBUS).
    """

    def __init__(self, path: Path, shape: tuple[int, ...], number: np.dtype) -> None:
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                expected = file.tell() + number.itemsize * prod(shape)
            if path.stat().st_size != expected:  # a map would make it longer, with zeros
                raise ValueError(f"{path.stat().st_size} bytes, expected {expected}")
            mapped = np.load(path, mmap_mode="r+")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: no column of a table, or cut: {error}") from error
        if (mapped.shape, mapped.dtype) != (shape, number):
            raise InputError(f"{path}: {mapped.dtype} {mapped.shape}, expected {number} {shape}")
        self.path, self.start, self.end = path, mapped.offset, mapped.offset + mapped.nbytes
        self.size, self.rows = mapped.nbytes // shape[0], torch.from_numpy(mapped)
        self.file = os.open(path, os.O_RDWR)
        weakref.finalize(self, os.close, self.file)

    def write(self, clients: Tensor, rows: Tensor) -> None:
        """Write rows [K, ...] of clients [K]."""
        numbers = rows.to(self.rows.dtype)[..., None].flatten(1).contiguous()
        raw = numbers.numpy().view(np.uint8)
        with naming(self.path):
            for client, row in zip(clients.tolist(), raw, strict=True):
                write_all(self.file, row.data, self.start + client * self.size)

    def reserve(self, clients: Tensor) -> None:
        """Take the room of the rows of clients [C], so that a full disk is seen before a round."""
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with naming(self.path):
                for client in clients.tolist():
                    os.posix_fallocate(self.file, self.start + client * self.size, self.size)

    def check(self) -> None:
        """InputError where the file is gone or cut: reading it would end the process (SIGBUS)."""
        size = self.path.stat().st_size if self.path.exists() else None
        if size != self.end:
            found = "missing" if size is None else f"{size} bytes"
            raise InputError(f"{self.path}: {found}, expected {self.end} bytes")
