"""What all readers of files share: listings, gzip, and one line for whatever is damaged."""

import difflib
import gzip
import importlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vecfl.errors import InputError


def content(path: Path, expected: str) -> bytes:
    """The bytes of a file, unpacked where it is gzipped, whatever its name.

    Raises InputError, naming the file, where it cannot be read and where the packing is damaged.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: damaged gzip file: {error}; expected {expected}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {reason}; expected {expected}") from error


def listing(path: Path | str, *endings: str) -> list[Path]:
    """The file itself, or the files of a directory with one of these endings, by name.

    Raises InputError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else []
    files = sorted(file for file in found if file.is_file() and file.name.endswith(endings))
    if not files:
        what = "no such file in this directory" if path.is_dir() else "no such file or directory"
        raise InputError(f"{path}: {what}; expected a file, or a directory of files {endings}")
    return files


def several(paths: Path | str | Sequence[Path | str]) -> tuple[list[Path], str]:
    """One path or several as a list, and their name in messages; InputError for one twice."""
    if isinstance(paths, Path | str):
        return [Path(paths)], str(paths)
    files = [Path(path) for path in paths]
    if not files:
        raise InputError("no files: expected one path or several, got an empty list")
    seen = set[Path]()
    for file in files:
        if (real := file.resolve()) in seen:
            raise InputError(f"{file}: given twice; its rows would count twice")
        seen.add(real)
    others = f" and {len(files) - 3:,} others" if len(files) > 3 else ""
    return files, ", ".join(map(str, files[:3])) + others


def known_as(files: list[Path]) -> list[str]:
    """A name for each file: its own, or the folders that tell it from the others.

    Raises InputError where only the ending does.
    """
    paths = [(*file.absolute().parts[:-1], _stem(file)) for file in files]
    for k in range(1, max(map(len, paths)) + 1):
        ends = [path[-k:] for path in paths]
        if len(set(ends)) == len(files):
            while k > 1 and len({end[-1] for end in ends}) == 1:
                ends = [end[:-1] for end in ends]
            return ["/".join(end) for end in ends]
    twice = Counter(paths).most_common(1)[0][0]
    raise InputError(f"{'/'.join(twice)}: two files would be this client; rename one of them")


def among(name: object, there: Sequence[str]) -> str:
    """What there is in place of a name, for a message: the closest, and at most five."""
    close = difflib.get_close_matches(str(name), there, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {len(there) - 5:,} more" if len(there) > 5 else ""
    return f"{hint}it has {list(there[:5])}{more}"


@contextmanager
def understood(where: Any, expected: str) -> Iterator[None]:
    """Turns whatever a library raises on a damaged file into one InputError.

    What it may raise is nowhere written down, so every exception is meant; keep the block to the
    calls of that library.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: {reason}; expected {expected}") from error


def needs(module: str, purpose: str) -> Any:
    """An optional module; InputError with the command that installs it where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module, module).split(".")[0]
        raise InputError(
            f'{purpose} needs {package}, which is not installed: pip install "vecfl[data]"'
        ) from error


def _stem(file: Path) -> str:
    name = file.name
    for ending in (".gz", ".csv", ".data", ".txt"):
        name = name.removesuffix(ending)
    return name
