"""The idx file format of MNIST: arrays of one type behind a header of big-endian sizes."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfl.errors import InputError

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


def read_idx(path: Path | str) -> NDArray[Any]:
    """The array of an idx file, plain or gzipped, in the machine's byte order.

    Raises InputError, naming the file, where it cannot be read, is no idx file, or is not as long
    as its header says. Source: LeCun, Cortes, Burges, The MNIST database, "the IDX file format".
    """
    data = _content(Path(path))
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in DTYPES or data[3] == 0:
        raise InputError(
            f"{path}: not an idx file: it starts with {data[:4].hex(' ') or 'nothing'}, expected "
            "00 00, a type (08, 09, 0b, 0c, 0d or 0e) and the number of axes"
        )
    dtype, header = np.dtype(f">{DTYPES[data[2]]}"), 4 + 4 * data[3]
    if len(data) < header:
        raise InputError(f"{path}: truncated: {len(data)} bytes, but its header alone has {header}")
    shape = [int(n) for n in np.frombuffer(data, ">u4", data[3], offset=4)]
    expected = header + dtype.itemsize * math.prod(shape)
    if len(data) != expected:
        wrong = "truncated" if len(data) < expected else "too long"
        raise InputError(
            f"{path}: {wrong}: {len(data)} bytes, expected {expected} for {dtype.name} {shape}"
        )
    values = np.frombuffer(data, dtype, offset=header).reshape(shape)
    return values.astype(dtype.newbyteorder("="))


def _content(path: Path) -> bytes:
    """The bytes of a file, unpacked where it is gzipped, whatever its name."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected an idx file") from error
