"""Pages of files that are mapped into memory: asking for them before they are touched."""

import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vecfl.errors import InputError

PAGE = mmap.PAGESIZE


def pages(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fewest ranges [R, 2] of whole pages, rising, that hold the bytes starts[i] : ends[i]."""
    some = ends > starts
    first, last = starts[some] // PAGE, -(-ends[some] // PAGE)
    order = np.argsort(first, kind="stable")
    first, reach = first[order], np.maximum.accumulate(last[order])
    gap = np.ones(len(first) + 1, bool)  # before each range, and behind the last
    gap[1:-1] = first[1:] > reach[:-1]
    return np.stack((first[gap[:-1]], reach[gap[1:]]), 1) * PAGE


def read_ahead(path: Path, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    """Ask the system to read these bytes of a file, and no more; it does so in the background.

    Without it, a page that is touched comes with as many around it as the system likes, up to
    megabytes. It is a hint: what goes wrong here will be said where the bytes are needed.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        return
    with suppress(OSError), path.open("rb") as file:
        for begin, end in pages(starts, ends).tolist():
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)


def check_lengths(lengths: Mapping[Path, int]) -> None:
    """InputError where a mapped file has fewer bytes than it had: reading it would end the process.

    A file that was removed is read on: the system keeps it for the map.
    """
    for path, length in lengths.items():
        with suppress(FileNotFoundError):
            if (now := path.stat().st_size) < length:
                raise InputError(f"{path}: {now} bytes, but {length} when it was opened")
