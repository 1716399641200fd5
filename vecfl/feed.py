"""What a round trains on: the examples of its cohort, on the device.

Data that fit lie there as a whole (`Resident`). Of others, in the host's memory or in a store of
any size, a cohort's examples are gathered into columns of their own and sent there (`Streamed`).
What takes time is done for the next round while one trains (`Ahead`).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from torch import Tensor

from vecfl.data import FederatedDataset
from vecfl.engine import free_memory
from vecfl.errors import InputError
from vecfl.losses import Batch
from vecfl.schedule import packed
from vecfl.trainer import operator_threads
from vecfl.trial import first_line

RESIDENT = 0.5  # of the free GPU memory: larger data are streamed; slots share what data leave
CHUNK = 1 << 24  # bytes that are gathered between two looks at whether to stop


@dataclass(frozen=True)
class Examples:
    """Clients and their examples.

    clients  [C] positions in the dataset
    columns  [n, ...] on the device
    first    [C] where in the columns the examples of each client begin
    """

    clients: Tensor
    columns: Batch
    first: np.ndarray


Draw = Callable[[int], Tensor]  # round -> clients [C]
Feed = Callable[[Draw, int], AbstractContextManager[Examples]]  # entered when the round can train


class Resident:
    """All columns are on the device; on a CPU those of a store are read where they are touched."""

    name = "resident"

    def __init__(self, data: FederatedDataset, device: torch.device) -> None:
        self.data = data.to(device)
        self.waits = bool(self.data.files)

    def fetch(self, clients: Tensor, stop: Event | None = None) -> Examples:
        """All columns; the disk is asked for the examples of `clients` [C]."""
        self.data.prefetch(clients)
        return Examples(clients, self.data.columns, self.data.offsets.numpy()[clients.numpy()])


class Streamed:
    """Columns stay on the host; the examples of a cohort, each client's once, are copied."""

    name, waits = "streamed", True

    def __init__(self, data: FederatedDataset, device: torch.device) -> None:
        self.data, self.device = data.to("cpu"), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(self, clients: Tensor, stop: Event | None = None) -> Examples:
        """Columns of the examples of `clients` [C] alone; CancelledError if `stop` is set."""
        self.data.prefetch(clients)
        who = clients.numpy()
        first, end = (self.data.offsets.numpy()[who + i] for i in (0, 1))
        index, begin = packed(who, first, end - first)
        return Examples(clients, self._send(torch.from_numpy(index), stop or Event()), begin)

    def _send(self, index: Tensor, stop: Event) -> dict[str, Tensor]:
        """The examples `index` [n] on the device; on a GPU beside what runs there."""
        columns = {}
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for name, column in self.data.columns.items():
                some = gather(column, index, stop, pinned=self.stream is not None)
                columns[name] = some.to(self.device, non_blocking=True)
        if self.stream is not None:
            for column in columns.values():  # its memory is free when the steps have read it
                column.record_stream(torch.cuda.default_stream(self.device))
            self.stream.synchronize()
        return columns


def gather(column: Tensor, index: Tensor, stop: Event, *, pinned: bool) -> Tensor:
    """The examples `index` [n] of a column on the CPU; CancelledError soon after `stop` is set."""
    shape, some = (len(index), *column.shape[1:]), max(1, CHUNK // max(1, column[:1].nbytes))
    out = torch.empty(shape, dtype=column.dtype, pin_memory=pinned)
    for part, into in zip(index.split(some), out.split(some), strict=True):
        if stop.is_set():
            raise CancelledError
        torch.index_select(column, 0, part, out=into)
    return out


def place(
    data: FederatedDataset, device: torch.device, resident: bool | None
) -> Resident | Streamed:
    """Where the data are: on the device (`resident`), or on the host; None: by what fits.

    Everything fits on a CPU, and on a GPU up to RESIDENT of its free memory.
    """
    if resident not in (None, True, False):
        raise InputError(f"resident must be True, False or None (what fits), not {resident!r}")
    if resident is None:
        coming = sum(c.nbytes for c in data.columns.values() if c.device.type != device.type)
        resident = device.type != "cuda" or coming <= RESIDENT * free_memory(device)
    return Resident(data, device) if resident else Streamed(data, device)


def make_feed(source: Resident | Streamed) -> Feed:
    """The feed of `source`: ahead where fetching takes time, else when a round needs it."""
    if source.waits:
        return Ahead(source)
    return lambda draw, round: nullcontext(source.fetch(draw(round)))


class Ahead:
    """Fetches the examples of the next round in a thread of its own while one trains.

    `with feed(draw, round) as examples:` holds the training; what fails in it, Ctrl-C too, stops
    the fetching. Raises InputError where the examples of this round could not be fetched.
    """

    def __init__(self, source: Resident | Streamed) -> None:
        self.source, self.pool = source, ThreadPoolExecutor(1, "vecfl-feed")
        with operator_threads(1):  # the others are for training
            self.pool.submit(torch.get_num_threads).result()
        self.round, self.coming, self.stop = -1, Future[Examples](), Event()

    @contextmanager
    def __call__(self, draw: Draw, round: int) -> Iterator[Examples]:
        try:
            if self.round != round:
                self._fetch(draw, round)
            coming, self.round = self.coming, -1
            examples = self._result(coming, round)
            self.source.data.check_files()  # a round would end in a SIGBUS
            with suppress(Exception):  # a sampler may end with the run; its round says so
                self._fetch(draw, round + 1)
            yield examples
        except BaseException:
            self.stop.set()
            self.round = -1
            raise

    def _fetch(self, draw: Draw, round: int) -> None:
        """Have the thread fetch the examples of a round, and stop what it does for another."""
        clients = draw(round)
        self.stop.set()
        self.stop = Event()
        self.coming = self.pool.submit(self.source.fetch, clients, self.stop)
        self.round = round

    def _result(self, coming: Future[Examples], round: int) -> Examples:
        while wait([coming], timeout=0.5).not_done:
            pass  # one wait without end would not see a Ctrl-C that comes just before it
        try:
            return coming.result()
        except Exception as error:
            why = first_line(error)
            raise InputError(
                f"round {round + 1}: the examples of its clients cannot be fetched: {why}"
            ) from error
