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
from torch import nn

import vecfl
from vecfl.data import hold_out, mnist_writers

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "mnist_writers.py"
ALGORITHMS = ["fedavg", "fedsgd", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "dga"]
ALGORITHMS += ["fedprox_adaptive"]  # which a recorded run lets see its metrics
ALGORITHMS += ["scaffold", "feddyn", "fednova"]


REPLAY = "replay(lr=0.1, batches=Batches(2, steps=3))"


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


@pytest.mark.parametrize("model", ["logistic", "cnn", "small_cnn"])
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


def test_parts_around_and_what_the_server_has(command: Any, data: Path) -> None:
    """By flags as in Python, settings and all: one of four writers is the server's."""
    around = ("clients_on_plateau('eval/loss', 'min', patience=0)", REPLAY, "ema(0.5)")
    flags = ("--server-clients=0.25", "--augment", "crop(2)", "mine.py:darken", "--epochs")
    flags += ("random_epochs(1, 3)", "--client-dropout=0.3", "--lr-schedule", "cosine(9)")
    flags += ("--seed=3", "--eval-every=1", "--around", *around)
    flags += ("--backend=loop", "--workers=1", "--slots=1")
    Path("mine.py").write_text("def darken(x, words):\n    return x / 2\n")
    rows = command("run", *flags, "--rounds=4")
    config = settings("run")
    assert (config["around"], config["server_clients"]) == ([*around], 0.25)
    assert (config["epochs"], config["client_dropout"]) == ("random_epochs(1, 3)", 0.3)
    assert (config["augment"], config["lr_schedule"]) == (
        ["crop(2)", "mine.py:darken"],
        ["cosine(9)"],
    )
    # as given back, and as gone on with
    assert learned(command("again", "--config=run/config.yaml", "--rounds=4")) == learned(rows)
    command("half", *flags, "--rounds=4", "--checkpoint-every=2")
    on = command("half", "--resume=half/checkpoints/round-000002.ckpt", "--rounds=4")
    assert learned(on) == learned(rows)

    train, test = mnist_writers(data)
    split = hold_out(train, 3, clients=0.25)
    assert split.test_clients is not None and split.test_clients.num_clients == 1
    torch.manual_seed(3)
    augment, own = (vecfl.crop(2), lambda x, words: x / 2), split.test_clients.columns
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    example = split.train.examples(2)
    task = vecfl.Task(module, vecfl.cross_entropy, example=example, augment=augment)
    batches = vecfl.Batches(10, epochs=vecfl.random_epochs(1, 3))
    algorithm = vecfl.fedavg(lr=vecfl.scaled(0.1, vecfl.cosine(9)), batches=batches)
    algorithm = vecfl.clients_on_plateau(algorithm, "eval/loss", "min", patience=0)
    steps = vecfl.Batches(2, steps=3)
    algorithm = vecfl.ema(vecfl.replay(algorithm, task, own, lr=0.1, batches=steps), 0.5)
    how: dict[str, Any] = {"seed": 3, "client_dropout": 0.3, "backend": "loop"}
    sim = vecfl.Simulation(task, split.train, algorithm, vecfl.uniform(2), **how)
    state = sim.start()
    for _ in range(4):
        state, metrics = sim.round(state)
        state = sim.observe(state, metrics | sim.evaluate(state, test.columns))
    model = torch.load("run/model.pt")
    assert all(torch.equal(model[n], t) for n, t in sim.state_dict(state).items())
    assert sum(row["train/lost_clients"] for row in rows) > 0


def test_the_server_s_writers_neither_train_nor_validate(command: Any, data: Path) -> None:
    recipe = runpy.run_path(str(RECIPE))
    args = recipe["Args"](server_clients=0.25, validation=0.34)
    train = mnist_writers(data)[0]
    left, own = recipe["of_server"](args, train, 5)
    train_part, validation = recipe["held_out"](args, left, 5, clients=True)
    parts = [
        {bytes(x.numpy()) for x in c["x"]} for c in (train_part.columns, validation.columns, own)
    ]
    assert (train_part.num_clients, validation.num_clients) == (2, 1)
    assert sum(map(len, parts)) == len(set().union(*parts)) == 60


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--around", "replay(lr=1, batches=Batches(2))"), "--around: replay needs examples that"),
        (("--server-clients=0.2",), "--server-clients: expected --around 'replay(...)' beside it"),
        (("--server-clients=2", "--around", REPLAY), "--server-clients: expected a share between"),
        (("--server-clients=0.01", "--around", REPLAY), "--server-clients: clients: expected a n"),
        (("--augment", "flip"), "--augment: flip takes arguments, or (): flip()"),
        (("--augment", "crop(99)"), "crop(99) may leave nothing of an image of 28 x 28: pad by"),
        (
            ("--augment", "normalise([1], [0])"),
            "--augment: normalise takes finite means and positive stds",
        ),
        (("--max-tokens=9",), "--max-tokens: these examples have no tokens; give --max-examples"),
        (("--lr-schedule", "cosine"), "--lr-schedule: cosine takes arguments, or (): cosine("),
        (("--around", "ema(1)"), "--around: ema(decay) must be in [0, 1), not 1"),
        (("--around", "ema(0.5)", "ema(0.5)"), "fedavg, ema 0.5: ema stands around it already"),
        (("--lr-schedule", "mine.py:falls"), "--lr-schedule: mine.py:falls gives -1; expected"),
    ],
)
def test_wrong_parts_are_one_line(
    command: Any, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    Path("mine.py").write_text("def falls(round):\n    return -1\n")
    with pytest.raises(SystemExit) as caught:
        command("run", *flags, "--backend=loop", "--workers=1", "--slots=1")
    err = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {said}")
    assert not Path("run").exists()


def test_a_run_goes_on_with_the_same_parts(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plateau = "server_on_plateau('eval/loss', 'min')"
    common = ("--backend=loop", "--workers=1", "--slots=1")
    command("run", "--around", plateau, "--lr-schedule", "cosine(5)", *common)
    for flags, said in (
        (("--around", "ema(0.5)"), f"around ({plateau!r},) there, ('ema(0.5)',) here; "),
        (("--lr-schedule", "cosine(6)"), "lr_schedule ('cosine(5)',) there, ('cosine(6)',) here; "),
        (("--rounds=4",), "rounds 2 there, 4 here; "),  # the last round is always evaluated
        (("--eval-every=1",), "eval_every 5 there, 1 here; "),
        (("--client-dropout=0.1",), "client_dropout 0.0 there, 0.1 here; "),
        (("--max-examples=9",), "max_examples None there, 9 here; "),
    ):
        with pytest.raises(SystemExit) as caught:
            command("run", "--resume=run", *flags)
        assert caught.value.code == 2
        err = capsys.readouterr().err.splitlines()[-1]
        assert err.startswith(f"error: --resume: run was begun with other settings: {said}")


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


def test_frozen_parameters_stay_and_are_no_part_of_updates(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of --model logistic only the bias trains: the weight is that of a run of another seed's
    cohort, too, for the first model is --seed's."""
    for name, flags in {"run": (), "other": ("--sample-seed=5",)}.items():
        command(name, "--freeze=weight$", *flags)
    models = [torch.load(f"{name}/model.pt") for name in ("run", "other")]
    weight, bias = models[0].keys()
    assert torch.equal(models[0][weight], models[1][weight])
    assert not torch.equal(models[0][bias], models[1][bias])
    with pytest.raises(SystemExit) as caught:
        command("none", "--freeze=conv")
    assert caught.value.code == 2
    assert "freeze('conv'): no parameter is called so; there are" in capsys.readouterr().err


def test_an_aggregator_by_name(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two clients the middle is the mean of both, whatever their weights."""
    median = command("median", "--aggregator=coordinate_median()")
    uniform = command("uniform", "--weights=uniform_weights")
    assert median[1]["eval/loss"] == pytest.approx(uniform[1]["eval/loss"], rel=1e-5)
    assert median[1]["eval/loss"] != command("mean")[1]["eval/loss"]
    assert settings("median")["aggregator"] == "coordinate_median()"
    for text, line in {
        "coordinate_media()": "no coordinate_media here; is it coordinate_median",
        "trimmed_mean(0.5)": "must be at least 0 and below 0.5",
        "trimmed_mean": "trimmed_mean takes arguments, or (): trimmed_mean(share)",
    }.items():
        with pytest.raises(SystemExit) as caught:
            command("wrong", f"--aggregator={text}")
        assert caught.value.code == 2 and line in capsys.readouterr().err
