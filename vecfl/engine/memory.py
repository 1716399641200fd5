"""Freed memory is kept for the next step, on Linux."""

import ctypes
import os
import platform
from functools import cache

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGEST = 32 << 20  # bytes of a block that is kept, the most that glibc allows
KEPT = 1 << 30  # bytes at the end of a heap


@cache
def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed, for the whole process; whether it does.

    As it comes, it gives the temporaries of a training step back to the system, and the next step
    waits while it gets the same pages again, filled with zeros: up to a fifth of the time of an
    LSTM. Nothing is changed where the environment says how malloc is to work.
    """
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP, LARGEST)) and bool(mallopt(TRIM, KEPT))
