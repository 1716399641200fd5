"""Trackers: where the metrics of a run go, one call a round."""

from collections.abc import Mapping
from typing import Protocol

from vecfl.track.clients import forget_clients, write_clients
from vecfl.track.console import Console, with_clients
from vecfl.track.jsonl import Jsonl
from vecfl.track.run_dir import as_yaml, check_out, create_run_dir, hold, letting_go
from vecfl.track.wandb import Wandb, check_wandb, new_id

__all__ = [
    "Console",
    "Jsonl",
    "Tracker",
    "Wandb",
    "as_yaml",
    "check_out",
    "check_wandb",
    "create_run_dir",
    "forget_clients",
    "hold",
    "letting_go",
    "new_id",
    "with_clients",
    "write_clients",
]


class Tracker(Protocol):
    """Takes the metrics of each round as it finishes, and is closed at the end of the run."""

    def log(self, metrics: Mapping[str, float | int | str]) -> None: ...

    def close(self) -> None: ...
