"""The record of a run: `metrics.jsonl`, one JSON object a round."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from vecfl.files import naming


class Jsonl:
    """Appends one line a round and flushes it; NaN and infinity become null, so that it is JSON.

    Raises `OSError` with the path when the line cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float | int | str]) -> None:
        line = json.dumps({key: _finite(value) for key, value in metrics.items()})
        with naming(self._path):
            self._file.write(line + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Wait until the disk has all lines."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self._path):
            self._file.close()


def _finite(value: float | int | str) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
