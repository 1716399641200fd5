"""The directory of a run, and files that appear in it whole or not at all."""

import io
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

import torch

from vecfl.errors import InputError


def create_run_dir(out: str | None, recipe: str, config: Mapping[str, object]) -> Path:
    """Make the directory of a new run, with the settings in `config.yaml`.

    `out` is the directory, new or empty; None is `runs/<recipe>-<YYYYmmdd-HHMMSS>`. An empty
    `metrics.jsonl` marks it as taken. Raises `InputError` when it holds anything or cannot be
    written.
    """
    import yaml

    text = yaml.safe_dump(dict(config), sort_keys=False).encode()
    try:
        path = _dated_dir(recipe) if out is None else _empty_dir(Path(os.path.expanduser(out)))
        with atomic_file(path / "config.yaml") as file:
            file.write(text)
            file.flush()
            (path / "metrics.jsonl").touch(exist_ok=False)  # of two runs at once, one fails here
    except OSError as error:
        reason = f"cannot write {error.filename}: {error.strerror}"
        raise InputError(f"{reason}; choose another run directory with --out") from error
    return path


def _dated_dir(recipe: str) -> Path:
    stem = Path("runs", f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    for i in count(1):
        path = stem if i == 1 else stem.with_name(f"{stem.name}-{i}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


def _empty_dir(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    refuse_taken(path)
    return path


def check_out(out: str | None) -> None:
    """InputError for a directory that holds something, before anything is made."""
    if out is not None and (path := Path(os.path.expanduser(out))).is_dir():
        refuse_taken(path)


def refuse_taken(path: Path) -> None:
    """InputError for a directory that is not empty."""
    names = sorted(entry.name for entry in path.iterdir())
    if "metrics.jsonl" in names or "config.yaml" in names:
        raise InputError(f"{path} already holds a run; remove it or choose another --out")
    if names:
        raise InputError(f"{path} is not empty (it holds {names[0]}); choose another --out")


def save_model(path: Path, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict on the CPU, whole or not at all; `torch.load(path)` reads it.

    Raises `OSError` with the path.
    """
    buffer = io.BytesIO()  # torch.save hides the OSError of a full disk in a RuntimeError
    torch.save({name: value.cpu() for name, value in state_dict.items()}, buffer)
    with atomic_file(path) as file:
        file.write(buffer.getbuffer())


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends well, and never half-written.

    Raises `OSError` with the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an `OSError`: a write to a full disk carries no path."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
