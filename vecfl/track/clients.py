"""What each client came to in an evaluation: a CSV file, one line a client."""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vecfl.files import atomic_file

FOLDER = "clients"  # in the directory of a run


def write_clients(run_dir: Path, name: str, round: int, columns: Mapping[str, Any]) -> None:
    """Write columns [N] as `clients/round-NNNNNN.csv`, whole or not at all.

    Of an evaluation with another `name` than client, as `clients/NAME-round-NNNNNN.csv`. Text is
    quoted and numbers are not, so that the ids 7 and "7" stay two; numbers keep all their digits,
    and what is not known is nan. Raises OSError with the path.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(columns)
    values = [v.tolist() if hasattr(v, "tolist") else v for v in columns.values()]
    writer.writerows(zip(*values, strict=True))
    prefix = "" if name == "client" else f"{name}-"
    path = run_dir / FOLDER / f"{prefix}round-{round:06}.csv"
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def forget_clients(run_dir: Path, round: int) -> None:
    """Remove the files of later rounds, and what a kill left half-written."""
    for path in (run_dir / FOLDER).glob("*.csv*"):
        found = re.search(r"round-(\d{6,})\.csv$", path.name)
        if path.name[0] == "." or (found and int(found[1]) > round):
            path.unlink(missing_ok=True)
