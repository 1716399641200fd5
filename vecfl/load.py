"""A run, finished or not, read back from its directory."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vecfl.checkpoint import load, newest_good, path_of
from vecfl.errors import InputError
from vecfl.model_file import load_model
from vecfl.report import Rows, read_metrics
from vecfl.resume import CHECKPOINTS, FIRST

Model = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What is in the directory of a run.

    config    the settings of config.yaml
    metrics   name -> column over the rows of metrics.jsonl: float64, NaN where a round has none
              of it; "round" int64; text (a backend) as a list
    finished  whether all rounds are done and model.pt is there
    model     its state dict, of an unfinished run after the `round` of its last checkpoint
    best      the same after the round that --watch found best, and `best_round`; None without it
    """

    config: dict[str, Any]
    metrics: dict[str, Any]
    finished: bool
    round: int
    model: Model
    best_round: int | None
    best: Model | None


def load_run(run_dir: Path | str) -> Run:
    """The run in a directory.

    A damaged checkpoint is passed over with a warning. Raises InputError, naming the file, where
    there is no run, or nothing of it that is whole.
    """
    run_dir = Path(run_dir).expanduser()
    config = _config(run_dir / "config.yaml")
    path, content = newest_good(run_dir / CHECKPOINTS)
    run, watch = content["run"], content["watch"] or {}
    best_round = watch.get("round")
    file = None if best_round is None else path_of(run_dir / CHECKPOINTS, best_round)
    finished = (run_dir / "model.pt").exists()
    first = load_model(run_dir / FIRST) if (run_dir / FIRST).exists() else {}
    return Run(
        config=config,
        metrics=_columns(read_metrics(run_dir)) if run["round"] else {},
        finished=finished,
        round=run["round"],
        model=load_model(run_dir / "model.pt") if finished else first | run["model"],
        best_round=best_round,
        best=first | load(file)["run"]["model"] if file and file.exists() else None,
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError("load_run needs PyYAML: pip install pyyaml") from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the directory of a run") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected the settings of a run")
    return found


def _columns(rows: Rows) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name, math.nan) for row in rows] for name in names}
    return {
        name: values if any(isinstance(v, str) for v in values) else np.array(values, np.float64)
        for name, values in columns.items()
    } | {"round": np.array([row["round"] for row in rows])}
