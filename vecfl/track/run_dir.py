"""The directory of a run, and its settings."""

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from vecfl.errors import InputError
from vecfl.files import Lock, atomic_file


def create_run_dir(out: str | None, recipe: str, config: Mapping[str, object]) -> Path:
    """Make the directory of a new run, with the settings in `config.yaml`.

    `out` is the directory, new or empty; None is `runs/<recipe>-<YYYYmmdd-HHMMSS>`. An empty
    `metrics.jsonl` marks it as taken. Raises `InputError` when it holds anything or cannot be
    written.
    """
    text = as_yaml(config)
    try:
        path = _dated_dir(recipe) if out is None else _empty_dir(Path(os.path.expanduser(out)))
        with atomic_file(path / "config.yaml") as file:
            file.write(text)
            file.flush()
            (path / "metrics.jsonl").touch(exist_ok=False)  # of two runs at once, one fails here
        hold(path)
    except OSError as error:
        raise InputError(cannot_write(error)) from error
    return path


_held: dict[Path, Lock] = {}


def hold(path: Path) -> None:
    """Keep other processes out of the directory of a run until `letting_go`, or this one ends.

    InputError where one is in it.
    """
    path = path.resolve()
    if path not in _held:
        taken = f"{path} is in use by another process; end it, or choose another directory"
        _held[path] = Lock(path, taken)


@contextmanager
def letting_go(path: Path) -> Iterator[None]:
    """After the block, other processes may take the directory."""
    try:
        yield
    finally:
        held = _held.pop(path.resolve(), None)
        if held is not None:
            held.release()


def as_yaml(config: Mapping[str, object]) -> bytes:
    """The settings as `config.yaml` has them."""
    import yaml

    text: str = yaml.safe_dump(dict(config), sort_keys=False)
    return text.encode()


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
    """InputError for a directory that holds something or cannot be made, before anything is."""
    path = Path("runs" if out is None else os.path.expanduser(out))
    if out is not None and path.is_dir():
        refuse_taken(path)
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        code = errno.EEXIST if there == path else errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES
    else:
        return
    raise InputError(cannot_write(OSError(code, os.strerror(code), path)))


def cannot_write(error: OSError) -> str:
    """What failed, and what to do."""
    reason = f"cannot write {error.filename}: {error.strerror}"
    return f"{reason}; choose another run directory with --out"


def refuse_taken(path: Path) -> None:
    """InputError for a directory that is not empty."""
    names = sorted(entry.name for entry in path.iterdir())
    if "metrics.jsonl" in names or "config.yaml" in names:
        raise InputError(f"{path} already holds a run; choose another --out or go on with --resume")
    if names:
        raise InputError(f"{path} is not empty (it holds {names[0]}); choose another --out")
