"""The files of a table as they are made, and what says which table it is: meta.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from vecfl.errors import InputError
from vecfl.files import atomic_file, sync_folder
from vecfl.table.journal import UNDO, opened, write_all

VERSION, META = 1, "meta.json"
Shapes = Mapping[str, tuple[int, ...]]


def renamed(path: Path, facts: Mapping[str, object]) -> str:
    """The new random name that the table at `path` gets."""
    name = uuid4().hex
    with atomic_file(path / META) as file:
        file.write(meta_of(name, facts))
    return name


def name_of(path: Path, facts: Mapping[str, object], remedy: str) -> str:
    """The random name of the table at `path`.

    Raises InputError, with the remedy, for a folder that holds something else than these columns.
    """
    if not path.exists():
        raise InputError(f"table {path} is missing; {remedy}")
    try:
        meta = json.loads((path / META).read_text("utf-8"))
        version, name = meta["vecfl_table"], meta["name"]
        found = {key: meta[key] for key in facts}
        held, needed = said(found), said(facts)
    except OSError as error:
        what = f"{META}: {error.strerror}"
        raise InputError(f"{path} is no table of clients' rows ({what}); {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{META} is damaged"
        raise InputError(f"{path} is no table of clients' rows ({what}); {remedy}") from error
    if version != VERSION:
        raise InputError(f"{path}: a table of version {version!r}, this vecfl has {VERSION}")
    if found != facts:
        raise InputError(f"table {path} has {held}, this run needs {needed}; {remedy}")
    return str(name)


def said(facts: Mapping[str, Any]) -> str:
    """Columns as text, with their shapes: a row for each client."""
    columns = ", ".join(f"{name} {shape}" for name, shape in facts["columns"].items())
    return f"columns {columns} of {facts['dtype']}"


def meta_of(name: str, facts: Mapping[str, object]) -> bytes:
    return json.dumps({"vecfl_table": VERSION, "name": name, **facts}, indent=1).encode()


def create(path: Path, whole: Shapes, number: np.dtype, facts: Mapping[str, object]) -> None:
    """Make a table of zeros; of several processes that do so at once, one comes first.

    Raises InputError where the system does not let it.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        (part / f"{UNDO}0").mkdir(parents=True)
        for i, shape in enumerate(whole.values()):
            with (part / f"column_{i}.npy").open("wb") as file:
                header = {"descr": number.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + number.itemsize * prod(shape))
                os.fsync(file.fileno())
        with opened(part / META, os.O_WRONLY | os.O_CREAT) as descriptor:
            write_all(descriptor, meta_of(uuid4().hex, facts))
            os.fsync(descriptor)
        sync_folder(part)
        try:
            part.rename(path)
        except OSError:
            if not path.exists():
                raise
            shutil.rmtree(part)
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        what = f"table {path} cannot be made: {error.strerror}"
        raise InputError(f"{what}; give --table a folder in a place with room to write") from error
