"""Small files of the formats that need a package; without it the test is skipped."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def hdf5_file(path: Path, blob: dict[str, Any]) -> Path:
    h5py = pytest.importorskip("h5py")

    def fill(group: Any, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                fill(group.create_group(key), value)
            else:
                group.create_dataset(key, data=value)

    with h5py.File(path, "w") as file:
        fill(file, blob)
    return path


def tff_file(path: Path, clients: dict[str, dict[str, Any]]) -> Path:
    return hdf5_file(path, {"examples": clients})


def packed(pixels: Any, kind: str = "PNG") -> dict[str, Any]:
    image = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    image.fromarray(np.asarray(pixels, np.uint8)).save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


def parquet_file(path: Path, **columns: Any) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path
