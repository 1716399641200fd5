"""The per-client table: columns [N, ...] by name, zero at first, that rounds change in place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.table.folder import Folder
from vecfl.table.memory import Memory

log = logging.getLogger("vecfl")
Rows = dict[str, Tensor]
LARGE = 1 << 30  # bytes of rows that recorded runs keep on disk rather than in memory


class Store(Protocol):
    """Where rows lie: what `Table` needs of it. Clients [K] are positions, and distinct."""

    def read(self, clients: Tensor) -> Rows: ...

    def column(self, name: str) -> Tensor: ...

    def write(self, clients: Tensor, rows: Mapping[str, Tensor]) -> None: ...

    def keep(self, round: int, clients: Tensor) -> None:
        """Keep the rows of the clients that a round may change, before it does."""

    def kept(self) -> Iterator[tuple[Tensor, Rows]]:
        """Clients and their rows, as the last `keep` found them."""

    def check(self, round: int, content: Mapping[str, object]) -> None: ...

    def restore(self, round: int, content: Mapping[str, object]) -> None: ...

    def content(self, round: int) -> dict[str, object]: ...

    def forget(self, oldest: int) -> None: ...


class Table:
    """Rows of `clients` clients by column, zero at first.

    round  how many rounds they have seen; half: whether one more has begun

    Threads may gather and scatter at the same time, each rows of its own.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], clients: int, store: Store) -> None:
        self.shapes, self.clients, self.store = shapes, clients, store
        self.round, self.half = 0, False

    def gather(self, clients: Tensor) -> Rows:
        """Copies of the rows of clients [K] (positions): {column: [K, ...]}, on the CPU."""
        return self.store.read(clients)

    def column(self, name: str) -> Tensor:
        """A copy of one column, [N, ...] on the CPU."""
        return self.store.column(name)

    def scatter(self, clients: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Write {column: [K, ...]} as the rows of clients [K], which are distinct.

        InputError unless these are all columns, in their shapes.
        """
        found = {name: tuple(values.shape) for name, values in rows.items()}
        right = {name: (len(clients), *shape) for name, shape in self.shapes.items()}
        if found != right:
            raise InputError(f"rows for the table: {found or 'none'}, expected {right}")
        self.store.write(clients, rows)

    def begin(self, round: int, clients: Tensor) -> None:
        """Let a round (from 0) scatter rows of `clients` [C], which are distinct, until `end`.

        A round that began and did not end is taken back. InputError where rows have seen others.
        """
        self._check(round, f"round {round + 1} cannot be played")
        self.store.keep(round, clients)
        self.half = True

    def end(self) -> None:
        """The round is over: its rows stay."""
        self.round, self.half = self.round + 1, False

    def settle(self) -> None:
        """Take back what a round has written that began and did not end."""
        if self.half:
            for clients, rows in self.store.kept():
                self.store.write(clients, rows)
            self.half = False

    def restore(self, round: int, content: Mapping[str, object]) -> None:
        """Go back to a checkpoint after `round` rounds, which holds `content`.

        Every process that has the table open does so, one after the other, before one of them
        changes a row. Raises InputError if there is no way back to it.
        """
        self.store.restore(round, content)
        self.round, self.half = round, False

    def content(self, round: int) -> dict[str, object]:
        """What a checkpoint after `round` rounds has to hold: tensors and text.

        Every process that has the table open calls it, before the checkpoint is written; what lies
        on disk is there for good then. InputError where the rows have seen other rounds.
        """
        self._check(round, f"the state after round {round} cannot be saved")
        return self.store.content(round)

    def checkpointed(self, oldest: int) -> None:
        """Forget the ways back to checkpoints before that of `oldest` rounds."""
        self.store.forget(oldest)

    def _check(self, round: int, what: str) -> None:
        self.settle()
        if round != self.round:
            raise InputError(
                f"{what}: the table has one row for each client, and they are those after round "
                f"{self.round}; go on from the newest state, or start anew"
            )


@dataclass
class Tables:
    """Opens tables of these columns.

    shapes   {column: shape of a row}; no table is made where there is none
    clients  N; dtype: of all columns
    folder   where they lie, or None for the memory; writer: number of this process among those
             that share the folder
    """

    shapes: Mapping[str, tuple[int, ...]]
    clients: int
    dtype: torch.dtype
    folder: str | Path | None = None
    writer: int = 0
    on_disk: Table | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not self.shapes:
            raise InputError(
                f"--table {self.folder}: clients of this algorithm keep nothing; leave it away"
            )

    @property
    def bytes(self) -> int:
        """What the rows take when every client has come."""
        numbers = sum(prod(shape) for shape in self.shapes.values())
        return self.clients * numbers * self.dtype.itemsize

    def at(self, round: int, content: Mapping[str, object] | None = None) -> Table | None:
        """The table after `round` rounds; content: what the checkpoint of that round holds.

        Each call makes a table in memory; one on disk is one, and goes back for all who have it.
        Without content at round 0 a run starts: its folder is made. It may start again, but another
        one is refused where rounds have been played; one that goes on makes no folder.
        """
        if not self.shapes:
            return None
        if self.folder is None and self.bytes > LARGE:
            what = "the rows of %d clients may take %.1f GiB of memory, and so does a checkpoint; "
            size = self.bytes / (1 << 30)
            log.warning(what + "a folder keeps them on disk, table=FOLDER", self.clients, size)
        table = self._open(round, content or {})
        table.restore(round, content or {})
        return table

    def check(self, round: int, content: Mapping[str, object] | None) -> None:
        """InputError where `at` could not go back, before anything is changed."""
        if self.shapes:
            self._open(round, content or {}).store.check(round, content or {})

    def _open(self, round: int, content: Mapping[str, object]) -> Table:
        columns = (self.shapes, self.clients, self.dtype)
        if self.folder is None:
            return Table(self.shapes, self.clients, Memory(*columns))
        if self.on_disk is None:
            start = not round and not content
            store = Folder(Path(self.folder), *columns, self.writer, start)
            store.check(round, content)  # before it is known as this run's
            self.on_disk = Table(self.shapes, self.clients, store)
        return self.on_disk
