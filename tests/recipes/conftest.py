"""Generated writers, and how the recipes that compare runs are called on them."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.idx_files import write_mnist


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 4 writers to train on, 12 images of 3 others to test on."""
    folder = tmp_path_factory.mktemp("data") / "mnist_writers"
    folder.mkdir()
    write_mnist(folder, "train", [i % 10 for i in range(60)], [i % 7 % 4 for i in range(60)], 0)
    write_mnist(folder, "test", [i % 10 for i in range(12)], [9, 8, 7] * 4, 1)
    return folder


def no_curves(run_dir: Path) -> None:
    """The file alone: drawing takes most of the time of runs as short as these."""
    (run_dir / "curves.png").touch()


@pytest.fixture
def compare(
    data: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs RECIPE of the module, two clients a round on the loop, and gives what it prints."""
    recipe = str(request.module.RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vecfl.finish.draw_curves", no_curves)
    fixed = ["--cohort=2", "--backend=loop", "--workers=1", "--threads=1", "--slots=1"]
    fixed += ["--track=none", f"--data={data}"]

    def compare(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [recipe, *fixed, *flags])
        runpy.run_path(recipe, run_name="__main__")
        return capsys.readouterr().out

    return compare
