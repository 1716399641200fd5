"""Runs of `tiny` in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vecfl.finish
import vecfl.record
from tests.persist.tiny import arguments, run
from tests.times import without_times
from vecfl.simulation import Simulation


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Runs `tiny` with these flags in a directory of this name, and gives the directory."""
    # Half a second each.
    monkeypatch.setattr(vecfl.finish, "draw_curves", lambda folder: (folder / "curves.png").touch())
    monkeypatch.chdir(tmp_path)

    def tiny(out: str | None = "run", **flags: Any) -> Path:
        run(arguments(out, **flags))  # type: ignore[arg-type]
        return Path(out or flags["resume"])

    return tiny


@pytest.fixture
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a run without times."""

    def rows(run_dir: Path) -> list[dict[str, Any]]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [without_times(json.loads(line)) for line in lines]

    return rows


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that simulations run from here on, from 1."""
    done: list[int] = []
    train = Simulation.round

    def counted(sim: Simulation, state: Any) -> Any:
        done.append(state.round + 1)
        return train(sim, state)

    monkeypatch.setattr(Simulation, "round", counted)
    return done
