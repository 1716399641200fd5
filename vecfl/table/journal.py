"""An undo journal: old rows are on disk before new ones overwrite them.

undo-ROUND/WRITER   records of what process WRITER changed after the checkpoint of ROUND

A record is (round, client, old row, checksum). Many may hold the same client: its row at the
checkpoint is that of the earliest round. A record that is torn, and all behind it, never had its
row overwritten.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from vecfl.files import naming, sync_folder

Records = NDArray[np.void]
UNDO, GONE = "undo-", "gone-"
CHUNK = 1 << 22  # bytes of records that are made at a time


class Journal:
    """The journals of one process in a folder; `row` is the structured dtype of a client's rows."""

    def __init__(self, folder: Path, row: np.dtype, writer: int) -> None:
        self.folder, self.writer = folder, str(writer)
        fields = [("round", "<i8"), ("client", "<i8"), ("row", row), ("check", "<u4")]
        self.record = np.dtype(fields)
        self.some = max(1, CHUNK // self.record.itemsize)
        self.path, self.base, self.mark = folder, -1, 0

    def bases(self) -> list[int]:
        """Rounds of the checkpoints that the journals lead back to."""
        names = (path.name.removeprefix(UNDO) for path in self.folder.glob(f"{UNDO}*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def open(self, base: int) -> None:
        """What is appended from now on leads back to the checkpoint of round `base`."""
        folder = self.folder / f"{UNDO}{base}"
        path = folder / self.writer
        with naming(folder):
            folder.mkdir(exist_ok=True)
        whole = sum(len(records) for records in self._whole(path))
        with opened(path, os.O_RDWR | os.O_CREAT) as file:
            os.ftruncate(file, whole * self.record.itemsize)  # what is torn would hide the next
            os.fsync(file)
        sync_folder(folder)
        sync_folder(self.folder)
        self.path, self.base = path, base  # where it fails, the journal before goes on

    def append(self, parts: Iterable[Records]) -> None:
        """Add records, all but their checksums, and wait until the disk has them."""
        with opened(self.path, os.O_RDWR | os.O_APPEND) as file:
            self.mark = os.fstat(file).st_size
            try:
                for records in parts:
                    records["check"] = checksums(records)
                    write_all(file, records.tobytes())
                os.fsync(file)
            except BaseException:
                os.ftruncate(file, self.mark)
                raise

    def last(self) -> Iterator[Records]:
        """The records of the last `append`."""
        return self._whole(self.path, self.mark)

    def since(self, base: int) -> list[np.void]:
        """A record of each client changed after the checkpoint of round `base`: its row there."""
        first: dict[int, np.void] = {}
        for records in self._since(base):
            for record in records:
                known = first.setdefault(int(record["client"]), record)
                if record["round"] < known["round"]:
                    first[int(record["client"])] = record
        return list(first.values())

    def untouched(self) -> bool:
        """Whether no round has changed a row since the table was made."""
        return self.bases() == [0] and not any(len(records) for records in self._since(0))

    def _since(self, base: int) -> Iterator[Records]:
        for folder in (self.folder / f"{UNDO}{b}" for b in self.bases() if b >= base):
            for path in (p for p in folder.rglob("*") if p.is_file()):
                yield from self._whole(path)

    def absorb(self, base: int) -> None:
        """Let the journals of later checkpoints lead back to that of round `base`, too.

        They cannot be removed: a process that is killed while it goes back needs them again.
        """
        for later in (b for b in self.bases() if b > base):
            inside = self.folder / f"{UNDO}{base}" / f"{later}-{uuid4().hex}"
            with suppress(FileNotFoundError):  # another process did it
                (self.folder / f"{UNDO}{later}").rename(inside)

    def forget(self, oldest: int) -> None:
        """Remove the journals of checkpoints before that of round `oldest`, each at one stroke."""
        for base in (b for b in self.bases() if b < oldest):
            with suppress(FileNotFoundError):
                (self.folder / f"{UNDO}{base}").rename(self.folder / f"{GONE}{uuid4().hex}")
        for folder in self.folder.glob(f"{GONE}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _whole(self, path: Path, start: int = 0) -> Iterator[Records]:
        """Maps of the records from byte `start` of a file to the first that is torn."""
        count = (path.stat().st_size - start) // self.record.itemsize if path.exists() else 0
        if count:
            mapped = np.memmap(path, self.record, "r", start, (count,))
            for first in range(0, count, self.some):
                records = mapped[first : first + self.some]
                wrong = np.flatnonzero(checksums(records) != records["check"])
                yield records[: wrong[0]] if len(wrong) else records
                if len(wrong):
                    return


def checksums(records: Records) -> NDArray[np.uint32]:
    """CRC-32 of each record [K], but for its last field."""
    raw = records.view(np.uint8).reshape(len(records), records.itemsize)
    return np.array([zlib.crc32(record) for record in raw[:, :-4]], np.uint32)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """The file at `path`; an OSError names it."""
    with naming(path):
        file = os.open(path, flags, 0o666)
        try:
            yield file
        finally:
            os.close(file)


def write_all(file: int, data: bytes | memoryview, at: int | None = None) -> None:
    """Write `data` at byte `at`, or at the end of a file that was opened to append."""
    left = memoryview(data)
    while len(left):
        done = os.write(file, left) if at is None else os.pwrite(file, left, at)
        left, at = left[done:], None if at is None else at + done
