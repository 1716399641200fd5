"""What stands in the results: the newest rows, ratios with their spread, and tables of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]
RUN = ("cpu", "cores", "torch", "commit", "date")  # rows of one run have these in common
NONE = "not measured"


def read(folder: Path, name: str) -> list[Found]:
    """The rows of NAME.jsonl, oldest first; none where there is no such file."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(map(json.loads, lines), key=lambda row: str(row["date"]))


def newest(rows: Iterable[Found], *keys: str) -> dict[tuple[Any, ...], Found]:
    """The newest row of each combination of values, in the order in which these first came."""
    return {tuple(row.get(key) for key in keys): row for row in rows}


def partner(rows: Iterable[Found], row: Found, **same: Any) -> Found | None:
    """The newest row of the same run with these values that was timed; None if there is none."""
    wanted = same | {key: row.get(key) for key in RUN}
    fit = [r for r in rows if "p50_ms" in r and wanted.items() <= r.items()]
    return fit[-1] if fit else None


def of_one_run(rows: Mapping[str, Found], first: str) -> dict[str, Found]:
    """Those of the run that the row `first` is of; of the newest run if there is no such row."""
    if not rows:
        return {}
    one = rows.get(first) or max(rows.values(), key=lambda row: str(row["date"]))
    return {name: row for name, row in rows.items() if all(row.get(k) == one.get(k) for k in RUN)}


def machines(rows: Iterable[Found]) -> str:
    """Cores and dates of rows, in a few words."""
    rows = list(rows)
    cores = " or ".join(map(str, sorted({row["cores"] for row in rows}, key=str)))
    dates = sorted({str(row["date"]) for row in rows})
    return f"{cores} cores, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


@dataclass(frozen=True)
class Ratio:
    """How many times faster one is than another, by medians, and between which bounds by the 20th
    and 80th percentiles of both."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Found, other: Found) -> "Ratio":
        """`row` against `other`."""
        return cls(
            other["p50_ms"] / row["p50_ms"],
            other["p20_ms"] / row["p80_ms"],
            other["p80_ms"] / row["p20_ms"],
        )

    @property
    def verdict(self) -> str:
        """What it says of the first."""
        if self.low > 1:
            return "faster"
        return "**slower**" if self.high < 1 else "**within the spread**"

    def __str__(self) -> str:
        return f"x{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def time_of(row: Found) -> str:
    """Median and percentiles of a row; why there are none."""
    if "p50_ms" not in row:
        return str(row.get("skipped", NONE)).replace("|", "/")
    return f"{number(row['p50_ms'])} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"


def number(value: Any) -> str:
    """Whole numbers as they are, others with three digits that count; what is missing as a dash."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"


def table(head: Sequence[str], lines: Iterable[Sequence[object]], rows: Iterable[Found]) -> str:
    """A table, and below it where and from what its rows were measured; or that there are none."""
    body = [f"| {' | '.join(map(str, line))} |" for line in lines]
    if not body:
        return f"{NONE.capitalize()}.\n"
    top = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return "\n".join([*top, *body, "", *sources(rows), ""])


def sources(rows: Iterable[Found]) -> list[str]:
    """A line for each run: hardware, versions, commit and date."""
    names = ("gpu", "driver", "cuda", *RUN, "python")
    runs = dict.fromkeys(tuple((k, row[k]) for k in names if k in row) for row in rows)
    return ["<sub>" + ", ".join(map(told, run)) + "</sub>" for run in runs]


def told(item: tuple[str, object]) -> str:
    name, value = item
    return f"{value} cores" if name == "cores" else f"{name} {value}"
