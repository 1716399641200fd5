"""idx files: every type, plain and gzipped, and what is said about damaged ones."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from tests.data.idx_files import idx_bytes
from vecfl.data import read_idx
from vecfl.errors import InputError


def test_bytes_by_hand(tmp_path: Path) -> None:
    # int16 (0b), 2 axes, 2 x 3; 256 = 01 00, -1 = ff ff, 258 = 01 02, big end first.
    path = tmp_path / "a"
    path.write_bytes(
        bytes.fromhex("0000 0b02 00000002 00000003 0001 0002 0003 0100 ffff 0102".replace(" ", ""))
    )
    array = read_idx(path)
    assert array.dtype == np.int16 and array.dtype.isnative
    assert array.tolist() == [[1, 2, 3], [256, -1, 258]]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_every_type_comes_back(tmp_path: Path, dtype: str, pack) -> None:
    array = (np.arange(24).reshape(2, 3, 4) * 5 - (0 if dtype == "u1" else 60)).astype(dtype)
    path = tmp_path / "file"  # whether it is packed is seen in the bytes, not in the name
    path.write_bytes(pack(idx_bytes(array)))
    found = read_idx(str(path))
    assert found.dtype == array.dtype and np.array_equal(found, array)
    found[0] = 1  # ours, not a view of the file's bytes


def test_no_examples(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx_bytes(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(tmp_path / "a").shape == (0, 28, 28)


GOOD = idx_bytes(np.arange(6, dtype=np.int32).reshape(2, 3))  # 4 + 2 * 4 + 6 * 4 = 36 bytes
FLIPPED = bytearray(gzip.compress(GOOD))
FLIPPED[-8] ^= 1  # in the checksum

DAMAGED = {
    "nothing": (b"", "not an idx file: it starts with nothing, expected 00 00, a type"),
    "another format": (b"\x89PNG\r\n", "not an idx file: it starts with 89 50 4e 47, expected"),
    "unknown type": (b"\0\0\x0a\1\0\0\0\0", "not an idx file: it starts with 00 00 0a 01"),
    "no axis": (b"\0\0\x08\0", "not an idx file: it starts with 00 00 08 00"),
    "half a header": (GOOD[:11], "truncated: 11 bytes, but its header alone has 12"),
    "a byte short": (GOOD[:-1], r"truncated: 35 bytes, expected 36 for int32 \[2, 3\]"),
    "a byte more": (GOOD + b"\0", r"too long: 37 bytes, expected 36 for int32 \[2, 3\]"),
    "half a gzip": (gzip.compress(GOOD)[:-12], "damaged gzip file: Compressed file ended"),
    "a flipped bit": (bytes(FLIPPED), "damaged gzip file: CRC check failed"),
    "garbage in gzip": (b"\x1f\x8b" + b"x" * 30, "damaged gzip file: "),
    "spoiled stream": (gzip.compress(GOOD)[:10] + b"\xff" * 30, "damaged gzip file: Error -3"),
    "huge axes": (
        b"\0\0\x08\2" + b"\xff" * 8,
        "truncated: 12 bytes, expected 18446744065119617037",
    ),
}


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {said}") as caught:
        read_idx(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/none: No such file or directory; expected an idx file$"):
        read_idx(tmp_path / "none")
    with pytest.raises(InputError, match="Is a directory; expected an idx file$"):
        read_idx(tmp_path)
