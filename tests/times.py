"""What of a row of metrics is a time, which two equal runs do not share."""

from collections.abc import Mapping
from typing import Any


def is_time(name: str) -> bool:
    """Seconds and rates: system/round_s, system/clients_per_s."""
    return name.startswith("system/") and name.endswith("_s")


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not is_time(name)}
