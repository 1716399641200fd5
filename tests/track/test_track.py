"""Console, JSONL and the run directory."""

import io
import json
import logging
import math
import re
import sys
from pathlib import Path

import pytest
import yaml

from vecfl.errors import InputError
from vecfl.track import Console, Jsonl, Tracker, check_out, console, create_run_dir
from vecfl.track import run_dir as run_dir_module


def test_jsonl_writes_a_line_a_round_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker: Tracker = Jsonl(path)
    tracker.log({"round": 1, "train/loss": 0.5, "system/backend": "vmap"})
    assert path.read_text() == '{"round": 1, "train/loss": 0.5, "system/backend": "vmap"}\n'
    tracker.log({"round": 2})
    assert path.read_text().splitlines()[1:] == ['{"round": 2}']
    tracker.close()


def test_jsonl_writes_what_is_not_finite_as_null(tmp_path: Path) -> None:
    tracker = Jsonl(tmp_path / "metrics.jsonl")
    tracker.log({"round": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    tracker.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"round": 1, "a": None, "b": None, "c": None, "d": 0.0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_jsonl_names_its_file_when_the_disk_is_full() -> None:
    tracker = Jsonl("/dev/full")
    for write in (lambda: tracker.log({"round": 1}), tracker.close):
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize(
    ("rounds", "shown"),
    [
        (1, [1]),
        (7, [1, 2, 3, 4, 5, 6, 7]),
        (25, [3, 6, 9, 12, 15, 18, 21, 24, 25]),  # every ceil(25 / 10) = 3, and the last
        (100, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
    ],
)
def test_console_without_a_terminal_prints_about_ten_lines(
    rounds: int, shown: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Console(rounds)
    for rnd in range(1, rounds + 1):
        tracker.log({"round": rnd, "train/loss": 1.0})
    tracker.close()
    assert [int(n) for n in re.findall(r"^round (\d+)/", capsys.readouterr().err, re.M)] == shown


def test_console_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 20.0, 60.0])
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(now))
    tracker = Console(100)
    tracker.log({"round": 5, "eval/accuracy": 0.5, "system/clients_per_s": 1234.5})
    tracker.log({"round": 10, "train/loss": 0.04321, "system/clients_per_s": 1234.5})
    tracker.log({"round": 20, "train/loss": 2.0, "eval/accuracy": 0.9721})
    # Two rounds seen in 20 s, 90 to go: 900 s. Then three in 60 s, 80 to go: 1600 s.
    assert capsys.readouterr().err == (
        "round 10/100  train loss 0.0432, test acc 50.0% (round 5), 1,234 clients/s, 15:00 left\n"
        "round 20/100  train loss 2.00, test acc 97.2%, 1,234 clients/s (round 10), 26:40 left\n"
    )


def test_console_keeps_the_loss_of_the_last_round_with_clients(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = Console(1)
    for rnd, loss, clients in ((0, 0.5, 3), (1, math.nan, 0)):
        tracker.log({"round": rnd, "train/loss": loss, "train/clients": clients})
    assert "round 1/1  train loss 0.500 (round 0), 00:00" in capsys.readouterr().err


def test_console_shows_an_evaluation_under_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Console(1)
    row = {"eval/accuracy": 0.5, "unseen/accuracy": 0.25, "unseen/loss": 3.0}
    tracker.log({"round": 1, "system/clients_per_s": 7.0, **row, "client/accuracy_worst": 0.0})
    assert capsys.readouterr().err == (
        "round 1/1  test acc 50.0%, unseen acc 25.0%, 7 clients/s, 00:00 left\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that are left to see: a carriage return overwrites from the left."""
        lines = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for part in line.split("\r"):
                seen = part + seen[len(part) :]
            lines.append(seen.rstrip())
        return lines


def test_console_bar_and_log_messages_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    before = list(logging.root.handlers)
    tracker = Console(3)
    for rnd in (1, 2, 3):
        tracker.log({"round": rnd, "train/loss": 0.5, "eval/accuracy": 0.75})
        logging.getLogger("vecfl").warning("round %d: client 7 dropped", rnd)
    tracker.close()
    assert logging.root.handlers == before
    lines = [line for line in terminal.screen() if line]
    assert lines[:3] == [f"round {rnd}: client 7 dropped" for rnd in (1, 2, 3)]
    (bar,) = lines[3:]
    assert re.fullmatch(r"round 3/3 [█#]+ train loss 0.500, test acc 75.0%, 00:00 left", bar)


def test_run_dir_has_the_settings(tmp_path: Path) -> None:
    config = {"rounds": 3, "lr": 1e-5, "out": None, "backend": "vmap"}
    path = create_run_dir(str(tmp_path / "new" / "run"), "quickstart", config)
    assert path == tmp_path / "new" / "run"
    assert yaml.safe_load((path / "config.yaml").read_text()) == config
    assert sorted(entry.name for entry in path.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert (path / "metrics.jsonl").read_text() == ""


def test_run_dirs_of_one_second_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir_module.time, "strftime", lambda _: "20260102-030405")
    made = [str(create_run_dir(None, "quickstart", {})) for _ in range(3)]
    stem = "runs/quickstart-20260102-030405"
    assert made == [stem, f"{stem}-2", f"{stem}-3"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    assert create_run_dir(str(tmp_path), "quickstart", {}) == tmp_path


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            "metrics.jsonl",
            "{path} already holds a run; choose another --out or go on with --resume",
        ),
        ("config.yaml", "{path} already holds a run; choose another --out or go on with --resume"),
        ("thesis.tex", "{path} is not empty (it holds thesis.tex); choose another --out"),
    ],
)
def test_a_directory_in_use_is_refused(tmp_path: Path, held: str, message: str) -> None:
    (tmp_path / held).write_text("precious")
    with pytest.raises(InputError) as caught:
        create_run_dir(str(tmp_path), "quickstart", {"rounds": 1})
    assert str(caught.value) == message.format(path=tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(held, "precious")]


@pytest.mark.parametrize(
    ("out", "reason"), [("file", "File exists"), ("file/run", "Not a directory")]
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, out: str, reason: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError) as caught:
        create_run_dir(str(tmp_path / out), "quickstart", {})
    with pytest.raises(InputError) as before:  # anything is measured
        check_out(str(tmp_path / out))
    assert str(before.value) == str(caught.value)
    assert str(caught.value) == (
        f"cannot write {tmp_path / out}: {reason}; choose another run directory with --out"
    )
    assert (tmp_path / "file").read_text() == "precious"


def test_runs_being_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("precious")
    with pytest.raises(InputError, match="cannot write runs: File exists"):
        create_run_dir(None, "quickstart", {})


def test_of_two_runs_at_once_one_gets_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir_module, "_empty_dir", lambda path: path)  # both saw it empty
    create_run_dir(str(tmp_path), "quickstart", {"run": "first"})
    with pytest.raises(InputError, match="config.yaml: File exists; choose another"):
        create_run_dir(str(tmp_path), "quickstart", {"run": "second"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert (tmp_path / "config.yaml").read_text() == "run: first\n"
