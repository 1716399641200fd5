"""Checkpoints: tensors and plain values in, files out that are whole or refused by name.

A file is a header, 8 bytes that say what it is, the BLAKE2b (32 bytes) and the length (uint64) of
what follows; then the version (uint32), and what `torch.save` makes of the content. Numbers are
little-endian. Every version keeps this frame, so a damaged file is told from a newer one. A folder
holds `round-NNNNNN.ckpt`, named after the rounds that are finished.
"""

import hashlib
import io
import logging
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vecfl.errors import InputError
from vecfl.files import atomic_file

VERSION = 1
MAGIC = b"vecflckp"
HEADER, SCHEMA = struct.Struct("<8s32sQ"), struct.Struct("<I")
PLAIN = (bool, int, float, str, type(None))
log = logging.getLogger("vecfl")


class Damaged(InputError):
    """A file that is no whole checkpoint."""


def save(path: Path | str, content: Mapping[str, Any]) -> None:
    """Write `content`, dicts, lists and tuples of tensors and plain values, whole or not at all.

    The disk has it when this returns. Raises `OSError` with the path, and TypeError for what
    `load` would not read.
    """
    _check(content, "content")
    payload = io.BytesIO()
    payload.write(SCHEMA.pack(VERSION))
    torch.save(dict(content), payload)
    body = payload.getbuffer()
    with atomic_file(Path(path)) as file:
        file.write(HEADER.pack(MAGIC, _digest(body), len(body)))
        file.write(body)


def load(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU; nothing in it is executed.

    Raises InputError where the file cannot be read, is of a newer version or holds what `save`
    never wrote, and `Damaged` where it is cut off, changed or no checkpoint.
    """
    try:
        data = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a checkpoint") from error
    if len(data) < HEADER.size and bytes(data[:8]) == MAGIC[: len(data)]:
        raise Damaged(f"{path}: damaged: it ends after {len(data)} bytes")
    if bytes(data[:8]) != MAGIC:
        raise Damaged(f"{path}: not a checkpoint of vecfl")
    (_, digest, length), body = HEADER.unpack_from(data), data[HEADER.size :]
    if len(body) < length:
        raise Damaged(f"{path}: damaged: it ends after {len(body)} of {length} bytes")
    if len(body) != length or _digest(body) != digest:
        raise Damaged(f"{path}: damaged: its checksum differs")
    (version,) = SCHEMA.unpack_from(body)
    if version > VERSION:
        raise InputError(
            f"{path}: written by a newer vecfl: version {version} of checkpoints, this one reads "
            f"up to {VERSION}; update vecfl"
        )
    payload = io.BytesIO(body[SCHEMA.size :])
    try:
        content: dict[str, Any] = torch.load(payload, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: holds more than tensors and plain values") from error
    return content


def path_of(folder: Path, round: int) -> Path:
    """Where the checkpoint after `round` rounds lies."""
    return folder / f"round-{round:06}.ckpt"


def rounds_in(folder: Path) -> list[int]:
    """The rounds of which there is a checkpoint, rising."""
    names = (re.fullmatch(r"round-(\d{6,})\.ckpt", p.name) for p in folder.glob("round-*.ckpt"))
    return sorted(int(name[1]) for name in names if name)


def newest_good(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The last checkpoint that is whole, and its content; a warning names each damaged one.

    Raises InputError where there is none, and as `load` does.
    """
    damaged = []
    for round in reversed(rounds_in(folder)):
        path = path_of(folder, round)
        try:
            content = load(path)
        except Damaged as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            log.warning("%s; taking %s, the one before it", line, path.name)
        return path, content
    if not damaged:
        raise InputError(f"{folder}: no checkpoint")
    raise InputError(f"{'; '.join(damaged)}; no whole one is left: start a new run")


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the last `keep` and that of the round `best`."""
    for round in rounds_in(folder)[:-keep]:
        if round != best:
            path_of(folder, round).unlink()


def rewind(folder: Path, round: int) -> None:
    """Remove what is later than the checkpoint of `round`, and what a kill left half-written."""
    later = [path_of(folder, r) for r in rounds_in(folder) if r > round]
    for path in (*later, *folder.glob(".round-*.ckpt.*")):
        path.unlink(missing_ok=True)


def _digest(body: memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=32).digest()


def _check(value: Any, where: str) -> None:
    """TypeError for what `torch.load(weights_only=True)` would refuse."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check(part, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, part in enumerate(value):
            _check(part, f"{where}[{i}]")
    elif type(value) not in (*PLAIN, Tensor):
        raise TypeError(f"{where}: a checkpoint holds no {type(value).__name__}")
