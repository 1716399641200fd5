"""The recipe of Shakespeare as a user runs it: on a few generated speeches, and on TFF's files."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data.files import tff_file
from tests.data.real import DATA, real
from vecfl.data import read_tff_pair, text
from vecfl.models import CharGRU, CharLSTM, WindowLM

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "shakespeare.py"
TRAIN = {"HAMLET": ["aaaa bbb", "ab"], "OTHELLO": ["aaaa"], "YORICK": ["ba" * 60]}
TEST = {"HAMLET": ["aab"], "OTHELLO": ["cccc"], "YORICK": ["ba"]}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the recipe with two roles a round and gives the lines of its metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VECFL_DATA", raising=False)

    def command(*flags: str) -> list[dict[str, Any]]:
        how = ["--rounds=2", "--cohort=2", "--out=run", "--backend=loop", "--workers=1"]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *how, "--slots=1", *flags])
        runpy.run_path(str(RECIPE), run_name="__main__")
        lines = Path("run/metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[1:]]  # the first model has a line, too

    return command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "plays"
    folder.mkdir()
    for part, roles in (("train", TRAIN), ("test", TEST)):
        snippets = {role: {"snippets": speeches} for role, speeches in roles.items()}
        tff_file(folder / f"shakespeare_{part}.h5", snippets)
    return folder


def test_a_run_and_what_it_counts(
    command: Any, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = command(f"--data={data}", "--rounds=3", "--eval-every=2")
    assert ["eval/accuracy" in row for row in rows] == [False, True, True]
    assert sorted(path.name for path in Path("run").iterdir()) == [
        *("checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "model.pt")
    ]
    # In the training data a is most frequent. The test labels are a a b <eos>, c c c c <eos>,
    # b a <eos>: 3 of 12 are a, and padding is none of them.
    assert "always 'a' is right for 25.0 % of the test characters" in caplog.text
    model = WindowLM(90)
    model.load_state_dict(torch.load("run/model.pt"))
    vocabulary = text.tff_characters()
    right = 0
    for speech in ("aab", "cccc", "ba"):
        ids = torch.tensor([88, *vocabulary.encode(speech), 89])  # <bos>, characters, <eos>
        right += int((model(ids[None, :-1])[0].argmax(-1) == ids[1:]).sum())
    assert rows[-1]["eval/accuracy"] == pytest.approx(right / 12, abs=1e-12)


def test_it_learns(command: Any, data: Path) -> None:
    rows = command(f"--data={data}", "--rounds=30", "--cohort=3", "--eval-every=30")
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]


@pytest.mark.parametrize(("name", "model"), [("lstm", CharLSTM), ("gru", CharGRU)])
def test_recurrent_models(command: Any, data: Path, name: str, model: type[CharLSTM]) -> None:
    rows = command(f"--data={data}", f"--model={name}", "--rounds=1")
    trained = model(90)
    trained.load_state_dict(torch.load("run/model.pt"))
    ids = torch.tensor([88, *text.tff_characters().encode("aab"), 89])  # <bos>, characters, <eos>
    assert 0 < rows[-1]["eval/loss"] < 10 and trained(ids[None]).shape == (1, 5, 90)


def test_settings_repeat_a_run(command: Any, data: Path) -> None:
    rows = command(f"--data={data}", "--algorithm=fedadam", "--seed=4", "--epochs=2")
    settings = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (settings["lr"], settings["server_lr"], settings["batch"]) == (1.0, 0.03, 4)
    assert (settings["seed"], settings["sample_seed"], settings["epochs"]) == (4, 4, 2)
    Path("run").rename("first")
    again = command("--config=first/config.yaml", "--out=run")
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in rows]


def test_a_cap_in_tokens(command: Any, data: Path) -> None:
    """2 + 1 + 2 windows, the speech of 120 characters being two; one is left of each role."""
    full = command(f"--data={data}", "--cohort=3", "--batch=1", "--rounds=1")
    Path("run").rename("first")
    flags = (f"--data={data}", "--cohort=3", "--batch=1", "--rounds=1", "--max-tokens=1")
    capped = command(*flags)
    assert [row["system/client_steps"] for row in (*full, *capped)] == [5, 3]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--data: no folder shakespeare_tff here, and VECFL_DATA is not set; it should hold"),
        ("--data=none", "--data: no folder none; it should hold shakespeare_train.h5 and"),
        ("--data=.", ".: no such file in this directory; expected a file, or a directory of fil"),
        ("--data={data} --cohort=4", "--cohort: expected at most 3 (training clients), got 4"),
        ("--data={data} --lr=-1", "--lr: expected a positive number, got -1.0"),
        ("--data={data} --mu=1", "--mu: fedavg does not take it (got 1.0); it takes --epochs, "),
    ],
)
def test_wrong_input_is_one_line(
    command: Any, data: Path, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*flags.format(data=data).split())
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in err and not Path("run").exists()


def test_images_are_no_speeches(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        tff_file(tmp_path / f"fed_{part}.h5", {"u": {"pixels": [[1.0]], "label": [1]}})
    with pytest.raises(SystemExit) as caught:
        command("--data=.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: fed_train.h5, client 'u': column 'snippets': expected texts; the columns are "
        "['label', 'pixels']\n"
    )


@real("shakespeare_tff")
def test_the_original_files(command: Any, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("h5py")
    rows = command(
        f"--data={DATA / 'shakespeare_tff'}", "--rounds=8", "--cohort=10", "--eval-every=8"
    )
    assert "always ' ' is right for 18.5 % of the test characters" in caplog.text
    assert rows[-1]["eval/accuracy"] > 0.25  # more than spaces


@real("shakespeare_tff")
def test_the_original_roles() -> None:
    pytest.importorskip("h5py")
    encode = text.characters(text.tff_characters(), 80)
    train, test = read_tff_pair(DATA / "shakespeare_tff", encode)
    assert list(train.client_ids) == list(test.client_ids) and train.num_clients == 715
    y = test.columns["y"]
    # Characters of the 2,356 test speeches, with an end each; none of them is unknown.
    assert (int((y >= 0).sum()), int((y == 89).sum()), int((y == 87).sum())) == (342_108, 2356, 0)
