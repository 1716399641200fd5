"""Signals, full disks and failing trackers in the middle of a run."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import vecfl
import vecfl.keeper
import vecfl.record
from tests.persist.tiny import TinyArgs, run
from vecfl.checkpoint import rounds_in
from vecfl.cli import main
from vecfl.errors import InputError
from vecfl.signals import Stopped
from vecfl.simulation import Simulation
from vecfl.track import Wandb
from vecfl.worker import Worker

Tiny = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]


def call_before(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, act: Any) -> list[int]:
    """Have `act(count)` called before each call of a method; returns the counts so far."""
    method, count = getattr(owner, name), []

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        count.append(len(count) + 1)
        act(len(count))
        return method(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return count


def send(number: int, *at: int) -> Callable[[int], None]:
    """Sends this process a signal at these counts."""

    def act(count: int) -> None:
        if count in at:
            os.kill(os.getpid(), number)

    return act


# Where a signal comes: before round 3 is trained, in one of its two workers, in its evaluation.
MOMENTS = [(Simulation, "round", 3), (Worker, "train", 6), (Simulation, "evaluate", 3)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("owner", "name", "count"), MOMENTS)
def test_a_signal_finishes_the_round_and_saves(
    tiny: Tiny,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    owner: type,
    name: str,
    count: int,
) -> None:
    whole = tiny("whole")
    with monkeypatch.context() as patch:
        call_before(patch, owner, name, send(number, count))
        with pytest.raises(Stopped) as caught:
            tiny("part")
    assert caught.value.code == code
    assert str(caught.value) == (
        "stopped after round 3 of 8, not finished; to go on: the same command with --resume part"
    )
    part = Path("part")
    assert [row["round"] for row in rows(part)] == [1, 2, 3]
    assert all("eval/loss" in row for row in rows(part))
    assert rounds_in(part / "checkpoints") == [0, 3] and not (part / "model.pt").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    tiny(None, resume="part")
    assert rows(part) == rows(whole)
    a, b = torch.load("part/model.pt"), torch.load("whole/model.pt")
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_a_finished_run_that_goes_on_looks_unfinished_again(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tiny(rounds=2)
    assert vecfl.load_run(run_dir).finished
    (run_dir / "model.safetensors").touch()  # as --safetensors leaves it
    call_before(monkeypatch, Simulation, "round", send(signal.SIGTERM, 2))
    with pytest.raises(Stopped):
        tiny(resume="auto")
    run = vecfl.load_run(run_dir)
    assert (run.finished, run.round, run.config["rounds"]) == (False, 4, 8)
    names = ["checkpoints", "config.yaml", "first.pt", "metrics.jsonl"]
    assert sorted(path.name for path in run_dir.iterdir()) == names


def test_a_signal_in_the_last_round_changes_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_before(monkeypatch, Simulation, "round", send(signal.SIGTERM, 8))
    assert (tiny() / "model.pt").exists()


def test_a_second_signal_stops_at_once(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_before(monkeypatch, Simulation, "round", send(signal.SIGINT, 5))
    call_before(monkeypatch, Simulation, "evaluate", send(signal.SIGTERM, 5))
    with pytest.raises(Stopped) as caught:
        tiny(checkpoint_every=2)
    assert caught.value.code == 143
    assert str(caught.value) == (
        "stopped at once after round 5 of 8, not finished; to go on after round 4: the same "
        "command with --resume run"
    )
    assert [row["round"] for row in rows(Path("run"))] == [1, 2, 3, 4]
    assert rounds_in(Path("run/checkpoints")) == [2, 4]


def test_the_command_line_ends_with_the_code(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    call_before(monkeypatch, Simulation, "round", send(signal.SIGTERM, 2))
    flags = ("--out=run", "--rounds=8", "--cohort=4", "--batch=3", "--track=none", "--resume=auto")
    how = ("--backend=loop", "--workers=1", "--threads=1", "--slots=1")
    monkeypatch.setattr(sys, "argv", ["tiny", *flags, *how])
    with pytest.raises(SystemExit) as caught:
        main(run, TinyArgs)
    out, err = capfd.readouterr()
    assert (caught.value.code, out) == (143, "")
    assert "SIGTERM: finishing this round; again to stop at once\n" in err
    assert err.splitlines()[-1] == (
        "stopped after round 2 of 8, not finished; to go on: the same command with --resume run"
    )
    main(run, TinyArgs)  # no other signal comes: the counts go on
    assert Path("run/model.pt").exists()


def test_a_run_in_a_thread_gets_no_signal(tiny: Tiny) -> None:
    thread = Thread(target=tiny)
    thread.start()
    thread.join()
    assert Path("run/model.pt").exists()


def full(*saves: int) -> Callable[[Path, dict[str, Any]], None]:
    """A disk that is full at these saves, counted from 1 (the one before the first round)."""
    count, save = [0], vecfl.keeper.save

    def act(path: Path, content: dict[str, Any]) -> None:
        count[0] += 1
        if count[0] in saves:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, content)

    return act


def test_a_full_disk_at_a_checkpoint_is_a_warning(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny("whole")
    monkeypatch.setattr(vecfl.keeper, "save", full(3))
    part = tiny("part", checkpoint_every=2)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "round 4 is not saved: part/checkpoints/round-000004.ckpt: No space left on device; "
        "free some space, the run goes on"
    ]
    assert rows(part) == rows(whole) and rounds_in(part / "checkpoints") == [6, 8]


@pytest.mark.parametrize(
    ("saves", "said"),
    [
        ((3, 4), "; to go on after round 2: the same command with --resume run"),
        ((1, 2, 3, 4), "; to go on, start again: no checkpoint could be saved in run"),
    ],
)
def test_a_full_disk_when_a_signal_comes(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, saves: tuple[int, ...], said: str
) -> None:
    monkeypatch.setattr(vecfl.keeper, "save", full(*saves))
    call_before(monkeypatch, Simulation, "round", send(signal.SIGTERM, 4))
    with pytest.raises(Stopped) as caught:
        tiny(checkpoint_every=2)
    assert str(caught.value) == f"stopped after round 4 of 8, not finished{said}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_that_cannot_be_written_end_the_run(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(count: int) -> None:
        if count == 3:
            os.dup2(os.open("/dev/full", os.O_WRONLY), jsonl[-1])

    jsonl: list[int] = []
    create = vecfl.record.Jsonl

    def opened(path: Path) -> Any:
        log = create(path)
        jsonl.append(log._file.fileno())
        return log

    whole = tiny("whole")
    monkeypatch.setattr(vecfl.record, "Jsonl", opened)
    call_before(monkeypatch, Simulation, "evaluate", fill)
    with pytest.raises(InputError) as caught:
        tiny("part", checkpoint_every=2)
    assert str(caught.value) == (
        "part/metrics.jsonl: No space left on device; stopped after round 3 of 8, not finished; to "
        "go on after round 2: the same command with --resume part"
    )
    monkeypatch.setattr(vecfl.record, "Jsonl", create)
    assert rows(tiny(None, resume="part")) == rows(whole)


def test_the_way_on_is_known_before_a_resumed_run_has_saved(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(rounds=2)
    monkeypatch.setattr(vecfl.keeper, "save", full(1, 2))
    call_before(monkeypatch, Simulation, "round", send(signal.SIGTERM, 2))
    with pytest.raises(Stopped, match="^stopped after round 4 .* to go on after round 2: the same"):
        tiny(resume="auto")


def test_rows_reach_the_disk_before_the_checkpoint_that_counts_them(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    sync, save, metrics = os.fsync, vecfl.keeper.save, Path("run/metrics.jsonl")

    def fsync(file: int) -> None:
        sync(file)
        if os.path.samestat(os.fstat(file), metrics.stat()):
            done.append(("rows", len(metrics.read_text().splitlines())))

    def saved(path: Path, content: dict[str, Any]) -> None:
        done.append(("checkpoint", content["run"]["round"]))
        save(path, content)

    tiny(rounds=1)  # this one has metrics.jsonl
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(vecfl.keeper, "save", saved)
    tiny(rounds=3, checkpoint_every=1, resume="auto")
    assert done == [("rows", 2), ("checkpoint", 2), ("rows", 3), ("checkpoint", 3)]


class Board:
    """A run of W&B that fails in its third round."""

    dir, url = "wandb/offline-run-1/files", "http://nowhere"

    def __init__(self) -> None:
        self.logged: list[int] = []

    def define_metric(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self, row: dict[str, Any], **kwargs: Any) -> None:
        if row["round"] == 3:
            raise ConnectionError("the server has gone")
        self.logged.append(row["round"])

    def finish(self, exit_code: int) -> None:
        pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_launcher_cannot_stop_a_rank_that_says_why_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """It sends SIGTERM to all ranks when another one has ended."""
    heard: list[int] = []

    def told() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "planted"

    monkeypatch.setattr(vecfl.record, "format_exc", told)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(ZeroDivisionError), vecfl.record.failures(tmp_path, 1, ranks):
            raise ZeroDivisionError
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ([signal.SIGTERM] if ranks == 1 else [])
    assert "rank 1: planted" in (tmp_path / "error.log").read_text()


def test_a_tracker_that_fails_leaves_training_and_rows(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, board = tiny("whole"), Board()
    module = sys.modules[Wandb.__module__]
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(module, "_start", lambda *args: board)
    monkeypatch.setattr(module, "_installed", lambda: True)
    monkeypatch.setattr(module, "_abandon", lambda: None)
    part = tiny("part", track="auto")
    assert board.logged == [1, 2]
    assert "W&B: stopped (the server has gone), the run goes on; to upload: " in caplog.text
    assert rows(part) == rows(whole)


def test_a_terminal_that_has_gone_leaves_training_and_rows(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone:
        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = close = lambda self: None

    whole = tiny("whole")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        part = tiny("part")
    assert rows(part) == rows(whole) and (part / "model.pt").exists()


def test_wandb_goes_on_with_the_same_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []

    class Known(Wandb):
        def __init__(self, *args: Any, id: str, **kwargs: Any) -> None:
            ids.append(id)
            super().__init__(*args, id=id, **kwargs)

    monkeypatch.setattr(vecfl.record, "Wandb", Known)
    tiny("one", rounds=2)
    tiny("two", rounds=2)
    tiny("one", resume="auto")
    assert ids[0] == ids[2] != ids[1] and all(ids)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    tiny("three", rounds=1)
    assert ids[3] == "mine"
