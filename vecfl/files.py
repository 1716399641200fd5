"""Files that appear whole or not at all, and the named steps at which tests kill a run."""

import os
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vecfl.errors import InputError

_seen: Counter[str] = Counter()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends well, and never half-written.

    When the block is left, the disk has both the file and its name. Raises `OSError` with the path.
    """
    temporary, kind = path.with_name(f".{path.name}.{os.getpid()}"), path.suffix[1:]
    with naming(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                reached(f"{kind} written")
                os.fsync(file.fileno())
            reached(f"{kind} synced")
            temporary.replace(path)
            reached(f"{kind} renamed")
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder; not every system has a way to say so."""
    if os.name == "posix":
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an `OSError`: a write to a full disk carries no path."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class Lock:
    """Held on the file or folder at `path` until `release`, or as long as it lives.

    InputError, with the text `taken`, where another one is held. Without effect where the system
    has no such locks.
    """

    def __init__(self, path: Path, taken: str, flags: int = os.O_RDONLY) -> None:
        self.release: Callable[[], object] = lambda: None
        if os.name != "posix":
            return
        import fcntl

        with naming(path):
            file = os.open(path, flags, 0o666)
        self.release = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise InputError(taken) from None
        except OSError:  # a network folder without locks
            pass


def reached(step: str) -> None:
    """A named step of a save or of a round is behind us.

    For tests of what survives a kill: where VECFL_KILL_AT is "STEP:n", the n-th time is the last
    thing that this process does.
    """
    _seen[step] += 1
    if os.environ.get("VECFL_KILL_AT") == f"{step}:{_seen[step]}":
        os.kill(os.getpid(), signal.SIGKILL)
