"""Workers in processes of their own: forks, which have the task, the data and the algorithm as they
are.

Threads share Python's interpreter, which one of them holds at a time; where steps are short, they
wait for each other. What an algorithm's functions remember stays in their process.
"""

import io
import os
import pickle
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import Tensor

from vecfl.job import Fold, Job
from vecfl.losses import Batch
from vecfl.mesh import RankError


class Stop(Protocol):
    """An event of threads, or of processes."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...


Train = Callable[[Job, Stop], Fold]


class WorkerLost(RankError):
    """The process of a worker has ended; one line says how, and what can be done."""


class Crew:
    """Workers that train at the same time: the first in this process, each other in a fork of it.

    columns  those of the jobs; a job that comes with others brings them along
    """

    def __init__(self, workers: Sequence[Train], columns: Batch) -> None:
        self.stop = get_context("fork").Event()
        self.first, *others = workers
        self.forks = [Fork(train, columns, self.stop) for train in others]

    def train(self, jobs: Sequence[Job]) -> list[Fold]:
        """What comes of the jobs, one for each worker; where one fails, the others stop too.

        Raises what failed, WorkerLost where a process has ended; then the crew is not used again.
        """
        mine, *others = jobs
        try:
            for fork, job in zip(self.forks, others, strict=True):
                fork.start(job)
            first = self.first(mine, self.stop)
            return [first, *(fork.result() for fork in self.forks)]
        except BaseException:
            self.stop.set()
            raise


class Fork:
    """A process that trains."""

    def __init__(self, train: Train, columns: Batch, stop: Stop) -> None:
        self.columns, parent = columns, os.getpid()
        self.ours, theirs = Pipe()
        with warnings.catch_warnings():  # other threads of this process hold no lock of a worker
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            self.ours.close()
            serve(train, columns, theirs, stop)
        theirs.close()
        self.finalizer = weakref.finalize(self, end, self.pid, self.ours, parent)

    def start(self, job: Job) -> None:
        """Let it train the clients of a job."""
        has_them = job.columns is self.columns
        job = replace(job, columns={}) if has_them else job.packed()
        with suppress(OSError):  # `result` tells
            self.ours.send_bytes(dump(job))

    def result(self) -> Fold:
        """What it made of the last job; raises what failed, its traceback in a note."""
        try:
            found = pickle.loads(self.ours.recv_bytes())
        except (EOFError, OSError):
            how = self.ended()
            raise WorkerLost(f"process {self.pid} of a worker has ended {how}") from None
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Fold)
        return found

    def ended(self) -> str:
        """How it has ended: its number may be another process's then."""
        self.finalizer.detach()
        self.ours.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code == -signal.SIGKILL:
            return "by SIGKILL, as where memory runs out; give fewer processes"
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def possible() -> bool:
    """Whether this system can fork a process that uses torch."""
    return sys.platform == "linux"


def serve(train: Train, columns: Batch, ours: Connection, stop: Stop) -> None:
    """Train what comes, in the process of a worker, until nobody is left who could send; never
    return."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # they come to the group; the parent stops it
        torch.set_num_threads(1)  # those of the parent's pool are not here
        while True:
            content = ours.recv_bytes()
            try:
                job: Job = pickle.loads(content)
                content = dump(train(job if job.columns else replace(job, columns=columns), stop))
            except BaseException as error:
                stop.set()
                content = dump_error(error)
            ours.send_bytes(content)
    finally:
        os._exit(0)  # nothing of the parent's is to be ended here


def end(pid: int, ours: Connection, parent: int) -> None:
    """End a process: it holds nothing that is needed."""
    if os.getpid() != parent:  # another fork of the parent
        return
    ours.close()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class Pickler(pickle.Pickler):
    """Writes tensors as numpy's arrays: torch's own way takes ten times as long for small ones."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def dump(value: object) -> bytes:
    """`value` as bytes."""
    file = io.BytesIO()
    Pickler(file, protocol=5).dump(value)
    return file.getvalue()


def dump_error(error: BaseException) -> bytes:
    """An exception with its traceback as a note; its text, where it does not come back."""
    text = "".join(traceback.format_exception(error)).rstrip()
    note = f"in process {os.getpid()} of a worker:\n{text}"
    with suppress(Exception):
        error.add_note(note)
        content = dump(error)
        if note in pickle.loads(content).__notes__:
            return content
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.add_note(note)
    return dump(other)
