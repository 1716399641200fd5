"""The recipe of MNIST's writers as a user runs it, on a few generated writers."""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data.idx_files import write_mnist
from vecfl.data import mnist_writers

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "mnist_writers.py"
ALGORITHMS = ["fedavg", "fedsgd", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "dga"]
ALGORITHMS += ["fedprox_adaptive"]  # which a recorded run lets see its metrics


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 4 writers to train on, 12 images of 3 others to test on."""
    folder = tmp_path_factory.mktemp("data") / "mnist_writers"
    folder.mkdir()
    write_mnist(folder, "train", [i % 10 for i in range(60)], [i % 7 % 4 for i in range(60)], 0)
    write_mnist(folder, "test", [i % 10 for i in range(12)], [9, 8, 7] * 4, 1)
    return folder


@pytest.fixture
def command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the recipe with two clients a round and gives the lines of its rounds, from 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VECFL_DATA", raising=False)

    def command(name: str, *flags: str) -> list[dict[str, Any]]:
        given = any(f == "--data" or f.startswith("--data=") for f in flags)
        where = [] if given else [f"--data={data}"]
        common = [str(RECIPE), "--rounds=2", "--cohort=2", f"--out={name}", *where]
        monkeypatch.setattr(sys, "argv", [*common, *flags])
        runpy.run_path(str(RECIPE), run_name="__main__")
        lines = Path(name, "metrics.jsonl").read_text().splitlines()
        first, *rows = [json.loads(line) for line in lines]
        assert first["round"] == 0 and first.keys() >= {"eval/accuracy", "client/accuracy_p50"}
        return rows

    return command


def settings(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(Path(name, "config.yaml").read_text())
    return values


def learned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("system/")} for row in rows]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_by_name(command: Any, algorithm: str) -> None:
    rows = command("run", f"--algorithm={algorithm}")
    assert [row["round"] for row in rows] == [1, 2]
    assert {row["train/clients"] for row in rows} == {2}
    assert ["eval/accuracy" in row for row in rows] == [False, True]  # each fifth, and the last
    assert sorted(path.name for path in Path("run").iterdir()) == [
        *("checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "model.pt")
    ]
    assert settings("run")["algorithm"] == algorithm
    # The settings of a run, given back, repeat it.
    again = command("again", "--config=run/config.yaml")
    assert learned(again) == learned(rows)
    assert settings("again") == settings("run")


def test_the_test_writers_are_what_is_evaluated(command: Any, data: Path) -> None:
    row = command("run")[-1]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    model.load_state_dict(torch.load("run/model.pt"))
    test = mnist_writers(data)[1]
    right = (model(test.columns["x"] / 255).argmax(1) == test.columns["y"]).double()
    assert row["eval/accuracy"] == pytest.approx(right.mean().item(), abs=1e-12)
    # three test writers of four images each
    assert row["client/accuracy_worst"] == right.view(3, 4).mean(1).min().item()


@pytest.mark.parametrize("model", ["logistic", "cnn"])
def test_backends_agree(command: Any, model: str) -> None:
    common = (f"--model={model}", "--dtype=float64", "--rounds=1")
    rows = [command(name, f"--backend={name}", *common) for name in ("vmap", "loop")]
    for row, other in zip(*map(learned, rows), strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    assert [row["system/backend"] for (row,) in rows] == ["vmap", "loop"]


def test_it_learns(command: Any) -> None:
    rows = command("run", "--rounds=30", "--cohort=4", "--eval-every=10", "--epochs=5")
    assert [row["round"] for row in rows if "eval/loss" in row] == [10, 20, 30]
    assert rows[-1]["eval/accuracy"] == 1.0  # a bright bar shows the label
    assert rows[-1]["train/loss"] < 0.2 * rows[0]["train/loss"]


def test_writers_are_held_out_for_validation(command: Any) -> None:
    """One of the four training writers, who then does not train."""
    rows = command("run", "--validation=0.25", "--rounds=4", "--eval-every=2", "--test-every=3")
    told = [("validation/loss" in row, "eval/loss" in row) for row in rows]
    assert told == [(False, False), (True, False), (False, True), (True, True)]
    config = settings("run")
    assert (config["validation"], config["test_every"]) == (0.25, 3)
    with pytest.raises(SystemExit):  # three are left
        command("more", "--validation=0.25", "--cohort=4", "--slots=1")


def test_another_algorithm_carries_no_default_over(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--algorithm=fedadam", "--print-config"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPE), run_name="__main__")
    Path("adam.yaml").write_text(capsys.readouterr().out)
    switched = command("switched", "--config=adam.yaml", "--algorithm=fedavg")
    assert learned(switched) == learned(command("plain"))
    Path("adam.yaml").write_text("algorithm: fedadam\nserver_lr: 0.5\n")
    with pytest.raises(SystemExit):
        command("refused", "--config=adam.yaml", "--algorithm=fedavg")
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: --server-lr: fedavg does not take it (got 0.5); it takes --")
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--cohort 5 --slots 1", "--cohort: expected at most 4 (training clients), got 5"),
        ("--batch 0", "--batch: expected at least 1, got 0"),
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
        ("--eval-every 0", "--eval-every: expected at least 1, got 0"),
        ("--test-every 0", "--test-every: expected at least 1, got 0"),
        ("--test-every 2", "--test-every: needs --validation, a part of its own to evaluate"),
        ("--validation 1", "--validation: expected a share below 1, got 1.0"),
        ("--validation nan", "--validation: expected a number of at least 0, got nan"),
        ("--validation 0.01", "--validation: "),
        ("--statistics -1", "--statistics: expected a number of at least 0, got -1"),
        ("--slots 3", "--slots: expected auto or at most --cohort (2), got 3"),
        ("--lr 0", "--lr: expected a positive number, got 0.0"),
        ("--clip nan", "--clip: expected a positive number, got nan"),
        ("--algorithm fedavgm --beta 1", "--beta: expected a number in [0, 1), got 1.0"),
        ("--algorithm fedprox --mu -1", "--mu: expected a number of at least 0, got -1.0"),
        ("--algorithm fedyogi --tau 0", "--tau: expected a positive number, got 0.0"),
        ("--mu 0.1", "--mu: fedavg does not take it (got 0.1); it takes --epochs, "),
        ("--seed -1", "--seed: expected 0 to 2^63 - 1, got -1"),
        ("--device cuda:99", "--device: expected a device of this machine, such as cpu, got cuda"),
        ("--data none", "none: no such file or directory; understood are LEAF (a .json file, "),
        ("--data .", ".: no data of a known format; understood are LEAF (a .json file, "),
        ("--test-clients 0.5", "--test-clients: expected none: {data} has test data of its own, g"),
        ("--data-seed 5", "--data-seed: expected none: {data} has test data of its own, got 5"),
        ("--data-seed -1", "--data-seed: expected 0 to 2^63 - 1, got -1"),
        ("--test-clients 1", "--test-clients: expected a share between 0 and 1, got 1.0"),
        ("--client who", "{data}: MNIST by writers has no option 'client'; it takes none"),
    ],
)
def test_wrong_input_is_one_line(
    command: Any, data: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command("run", *flags.split())
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    said = said.replace("{data}", str(data))
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1
    assert not Path("run").exists()


def test_the_folder_of_vecfl_data_is_the_default(
    command: Any,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [str(RECIPE), "--rounds=1", "--cohort=2", "--out=run"]
    monkeypatch.setattr(sys, "argv", flags)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert re.match(
        "error: --data: no folder mnist_writers here, and VECFL_DATA is not set; .*search/qmn",
        err,
    )
    monkeypatch.setenv("VECFL_DATA", str(data.parent))
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert Path("run", "model.pt").exists()
