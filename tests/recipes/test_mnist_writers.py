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

import vecfl
from tests.data.idx_files import write_mnist
from vecfl.data import mnist_writers

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "mnist_writers.py"
RUN = runpy.run_path(str(RECIPE))
OPTIONS: dict[str, dict[str, Any]] = RUN["OPTIONS"]
ALGORITHMS = ["fedavg", "fedsgd", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]


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
    """Runs the recipe with two clients a round and gives the lines of its metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VECFL_DATA", raising=False)

    def command(name: str, *flags: str) -> list[dict[str, Any]]:
        where = [] if any(f.startswith("--data") for f in flags) else [f"--data={data}"]
        common = [str(RECIPE), "--rounds=2", "--cohort=2", f"--out={name}", *where]
        monkeypatch.setattr(sys, "argv", [*common, *flags])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]

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
        *("config.yaml", "curves.png", "metrics.jsonl", "model.pt")
    ]
    assert settings("run")["algorithm"] == algorithm
    # The settings of a run, given back, repeat it.
    again = command("again", "--config=run/config.yaml")
    assert learned(again) == learned(rows)
    assert settings("again") == settings("run") | {"out": "again"}


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


CHANGED = {"lr": 0.07, "epochs": 2, "optimizer": "momentum", "clip": 0.01, "mu": 3.0, "tau": 0.5}
CHANGED |= {"server_lr": 0.5, "beta": 0.1, "beta1": 0.3, "beta2": 0.2, "start": 2.0}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_has_an_effect(data: Path, algorithm: str) -> None:
    def model(**options: Any) -> torch.Tensor:
        args = RUN["settle"](RUN["Args"](algorithm=algorithm, cohort=4, batch=4, **options))
        sim = RUN["make_simulation"](args, mnist_writers(data)[0])
        assert sim.algorithm.name == algorithm
        state = sim.start()
        for _ in range(2):
            state, _ = sim.round(state)
        return state.server["w"]

    plain = model()
    assert torch.equal(plain, model())
    without = [n for n in OPTIONS[algorithm] if torch.equal(plain, model(**{n: CHANGED[n]}))]
    assert without == []


def test_values_where_none_is_given() -> None:
    def settled(**given: Any) -> dict[str, Any]:
        args = RUN["settle"](RUN["Args"](**given))
        return {name: value for name in CHANGED if (value := getattr(args, name)) is not None}

    client = {"lr": 0.1, "epochs": 1, "optimizer": "sgd"}
    assert settled() == client
    assert settled(algorithm="fedsgd") == {"lr": 0.5}
    assert settled(algorithm="fedprox", mu=0.0) == client | {"mu": 0.0}
    assert settled(algorithm="fedavgm") == client | {"server_lr": 1.0, "beta": 0.9}
    adam = {"server_lr": 0.03, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}
    assert settled(algorithm="fedadam") == settled(algorithm="fedyogi") == client | adam
    assert settled(algorithm="fedyogi", tau=0.1, lr=0.3)["tau"] == 0.1
    assert settled(optimizer="adamw") == client | {"lr": 0.001, "optimizer": "adamw"}
    assert settled(optimizer="momentum") == client | {"lr": 0.01, "optimizer": "momentum"}


REFUSED = [(a, o) for a in ALGORITHMS for o in CHANGED if o not in OPTIONS[a]]


@pytest.mark.parametrize(("algorithm", "option"), REFUSED)
def test_what_an_algorithm_does_not_take_is_an_error(algorithm: str, option: str) -> None:
    args = RUN["Args"](algorithm=algorithm, **{option: CHANGED[option]})
    flag = "--" + option.replace("_", "-")
    said = f"^{flag}: {algorithm} does not take it \\(got {CHANGED[option]}\\); it takes --"
    with pytest.raises(vecfl.InputError, match=said):
        RUN["settle"](args)


def test_the_table_of_options_is_whole() -> None:
    assert list(OPTIONS) == ALGORITHMS
    assert set(RUN["EVERY_OPTION"]) == set(CHANGED)


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
        ("--cohort 5 --slots 1", "--cohort: expected at most 4 (training writers), got 5"),
        ("--batch 0", "--batch: expected at least 1, got 0"),
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
        ("--eval-every 0", "--eval-every: expected at least 1, got 0"),
        ("--slots 3", "--slots: expected auto or at most --cohort (2), got 3"),
        ("--lr 0", "--lr: expected a positive number, got 0.0"),
        ("--clip nan", "--clip: expected a positive number, got nan"),
        ("--algorithm fedavgm --beta 1", "--beta: expected a number in [0, 1), got 1.0"),
        ("--algorithm fedprox --mu -1", "--mu: expected a number of at least 0, got -1.0"),
        ("--algorithm fedyogi --tau 0", "--tau: expected a positive number, got 0.0"),
        ("--mu 0.1", "--mu: fedavg does not take it (got 0.1); it takes --epochs, "),
        ("--seed -1", "--seed: expected 0 to 2^63 - 1, got -1"),
        ("--device cuda:99", "--device: expected a device of this machine, such as cpu, got cuda"),
        ("--data none", "--data: no folder none; it should hold the four idx files of MNIST"),
        ("--data .", "no train-images-idx3-ubyte in the folder .; it should hold the four idx"),
    ],
)
def test_wrong_input_is_one_line(
    command: Any, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command("run", *flags.split())
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
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
    assert re.match("error: --data: no folder mnist_writers; it should .*facebookresearch/qmn", err)
    monkeypatch.setenv("VECFL_DATA", str(data.parent))
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert Path("run", "model.pt").exists()
