"""Weights & Biases, offline and against a server of the tests; never a real one."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.track.wandb_file import Offline
from tests.track.wandb_server import serving
from vecfl.errors import InputError
from vecfl.track import Tracker, Wandb
from vecfl.track import wandb as module

ROOT = Path(__file__).resolve().parents[2]
KEY = "a" * 40
ROWS: list[dict[str, Any]] = [
    {"round": 1, "train/loss": 2.5, "system/backend": "vmap"},
    {"round": 2, "train/loss": math.nan, "eval/accuracy": 0.25, "system/backend": "vmap"},
    {"round": 4, "train/loss": math.inf, "client/accuracy_worst": 0.0, "system/slots": 7},
]
NOTICE = r"W&B: offline \({}\); to upload: wandb sync (\S+)\n"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B without a login or a server, which writes below this directory, the current one."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setattr(sys, "exit", sys.exit)  # W&B replaces both, and leaves it at that
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(tmp_path)
    wandb.termsetup(wandb.Settings(), None)  # as talkative as in a new process
    yield tmp_path
    wandb.teardown()


def run_dir(name: str = "run") -> Path:
    path = Path(name)
    path.mkdir()
    return path


def python(*arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def recipe(*flags: str) -> subprocess.Popen[str]:
    return python("-W", "error", str(ROOT / "recipes" / "quickstart.py"), *flags)


def learned(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what W&B adds to it."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


def offline_in(err: str, reason: str) -> Offline:
    """The run of the only notice, which gives this reason."""
    said = re.fullmatch(NOTICE.format(reason), err)
    assert said, err
    run = Offline(Path(said[1]))
    assert run.folder.samefile(said[1])
    return run


def exact(row: Mapping[str, float | int | str]) -> dict[str, str]:
    """A row whose NaN equals NaN."""
    return {key: v if isinstance(v, str) else str(float(v)) for key, v in row.items()}


def test_an_offline_run_holds_settings_and_rows(
    alone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {"lr": 0.1, "slots": None, "server": {"optimizer": "adam", "betas": [0.9, 0.99]}}
    tracker: Tracker = Wandb(run_dir(), config, group="quickstart")
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    captured = capfd.readouterr()
    run = offline_in(captured.err, "not logged in")
    assert captured.out == ""
    assert run.folder.parent.samefile("run/wandb")
    assert run.config() == config
    assert run.metrics() == {"round": ""} | {
        f"{prefix}/*": "round" for prefix in ("train", "eval", "client", "system")
    }
    rows = run.rows()
    assert [row["_step"] for row in rows] == [1, 2, 4]
    assert [exact(learned(row)) for row in rows] == [exact(row) for row in ROWS]
    assert run.exit_codes() == [0]
    assert (run.run.project, run.run.display_name, run.run.run_group) == (
        *("vecfl", "run", "quickstart"),
    )


def test_an_evaluation_with_a_name_is_drawn_over_rounds(alone: Path) -> None:
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log({"round": 1, "train/loss": 1.0})
        tracker.log({"round": 2, "unseen/loss": 1.0, "unseen/accuracy": 0.5, "eval/loss": 2.0})
        tracker.log({"round": 3, "unseen/loss": 0.5})
    run = Offline(Path("run"))
    assert run.metrics()["unseen/*"] == "round" and len(run.metrics()) == 6
    assert [learned(row).get("unseen/loss") for row in run.rows()] == [None, 1.0, 0.5]


def test_metrics_of_any_name_and_of_the_first_model(alone: Path) -> None:
    names = ["f1-score:macro", "x" * 200, "Genauigkeit_ä", "a.b[0]", "%d"]
    row = {"round": 0} | {f"eval/{name}": i / 8 for i, name in enumerate(names)}
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(row)
        tracker.log({"round": 1, "update/norm_mean": 1.0})
    first, second = Offline(Path("run")).rows()
    assert (first["_step"], learned(first)) == (0, row)
    assert (second["_step"], second["update/norm_mean"]) == (1, 1.0)


def test_a_run_that_goes_on_has_its_id(alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    id = module.new_id()
    for row in ROWS[:2]:  # by two processes, as it were: offline, each writes a folder
        with Wandb(run_dir(f"part-{row['round']}"), {}, group="g", id=id) as tracker:
            tracker.log(row)
    assert len(re.findall("^W&B: offline", capfd.readouterr().err, re.M)) == 2
    first, second = (Offline(Path(f"part-{number}")) for number in (1, 2))
    assert first.run.run_id == second.run.run_id == id
    assert [learned(row)["round"] for run in (first, second) for row in run.rows()] == [1, 2]
    assert module.new_id() != id


def test_a_round_can_be_seen_at_once(alone: Path) -> None:
    # W&B's own process writes within 15 s what it has; a step kept back is in no file at all.
    pytest.importorskip("wandb").setup().settings.x_transaction_log_flush_interval = 0.01
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(ROWS[0])
        (file,) = Path("run").rglob("*.wandb")
        until = time.monotonic() + 10
        while b"train/loss" not in file.read_bytes() and time.monotonic() < until:
            time.sleep(0.01)
        assert b"train/loss" in file.read_bytes()


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 255), (InputError, 1)])
def test_a_run_that_stops_is_not_finished(
    alone: Path, error: type[BaseException], code: int
) -> None:
    with pytest.raises(error), Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(ROWS[0])
        raise error("stop")
    assert Offline(Path("run")).exit_codes() == [code]


def test_the_variables_of_wandb_overrule(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"PROJECT": "digits", "ENTITY": "team", "RUN_GROUP": "sweep", "NAME": "mine"}
    for name, value in (said | {"DIR": str(alone / "else"), "MODE": "offline"}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    Path("else").mkdir()
    with Wandb(run_dir(), {}, group="quickstart"):
        pass
    run = offline_in(capsys.readouterr().err, "mode offline")
    assert run.folder.parent.samefile("else/wandb")
    assert list(Path("run").iterdir()) == []
    assert (run.run.project, run.run.entity) == ("digits", "team")
    assert (run.run.run_group, run.run.display_name) == ("sweep", "mine")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (KEY, r"Timed out [^\n]*127\.0\.0\.1:9\b.*"),
        ("short", r"WANDB_API_KEY invalid: [^\n]*"),
    ],
)
def test_a_key_that_does_not_work_leaves_a_run_offline(
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    key: str,
    reason: str,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    began = time.monotonic()
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(ROWS[0])
    assert time.monotonic() - began < 20  # 1 s of waiting, and two starts on a busy machine
    (found,) = re.findall("wandb sync (.*)", capfd.readouterr().err)
    assert [learned(row) for row in Offline(Path(found)).rows()] == [ROWS[0]]


def test_no_one_is_asked_for_a_key(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with Wandb(run_dir(), {}, group="g"):
        pass
    captured = capfd.readouterr()
    assert captured.out == ""
    offline_in(captured.err, "not logged in")


def test_a_run_of_the_caller_stays_apart(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = wandb.init(dir=run_dir("own"), settings={"silent": True, "console": "off"})
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(ROWS[0])
    own.log({"mine": 1})
    own.finish()
    assert [learned(row) for row in Offline(Path("run")).rows()] == [ROWS[0]]
    assert [learned(row) for row in Offline(Path("own")).rows()] == [{"mine": 1}]


@pytest.mark.parametrize(("mode", "track"), [("disabled", "wandb"), ("offline", "none")])
def test_a_run_without_wandb_writes_nothing(
    alone: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    mode: str,
    track: Any,
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(module, "_start", pytest.fail)  # not even an import
    with Wandb(run_dir(), {}, group="g", track=track) as tracker:
        tracker.log(ROWS[0])
    assert (list(alone.rglob("*")), capfd.readouterr()) == ([alone / "run"], ("", ""))


def test_disabled_by_wandb_disabled(alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = alone / "elsewhere" / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nmode = disabled\n")
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(ROWS[0])
    assert (list(Path("run").iterdir()), capfd.readouterr()) == ([], ("", ""))


def test_without_wandb_auto_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "online")
    with Wandb(tmp_path, {}, group="g") as tracker:
        tracker.log(ROWS[0])
    assert capsys.readouterr().err == (
        "W&B: not installed, no dashboard: pip install wandb (or run with --track none)\n"
    )
    with pytest.raises(InputError, match="^--track wandb needs wandb: pip install wandb$"):
        Wandb(tmp_path, {}, group="g", track="wandb")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_runs_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert module.find_spec("wandb") is not None
    with pytest.raises(InputError, match="^--track wandb needs wandb"):
        module.check_wandb("wandb")


def test_what_wandb_refuses_at_the_start_is_a_line(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with Wandb(run_dir(), {}, group="g") as tracker:
        tracker.log(ROWS[0])
    err = capfd.readouterr().err
    assert err.startswith("W&B: no dashboard: ") and err.count("\n") == 1


# Logs on after the process that W&B started, the only child, has been killed.
KILLED = """
import os, signal, time
from pathlib import Path
from vecfl.track import Wandb
Path("run").mkdir()
with Wandb(Path("run"), {}, group="g") as tracker:
    (child,) = "".join(f.read_text() for f in Path("/proc/self/task").glob("*/children")).split()
    os.kill(int(child), signal.SIGKILL)
    for number in range(1, 200):
        tracker.log({"round": number})
        time.sleep(0.01)
    tracker.log_image("curves", Path("none.png"))
print("done")
"""


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/children")), reason="needs /proc")
def test_a_run_outlives_wandb(alone: Path) -> None:
    process = python("-c", KILLED)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, "done\n"), err
    assert re.fullmatch(
        r"W&B: offline .*\n"
        r"W&B: stopped \(.+\), the run goes on; to upload: wandb sync run/wandb/offline-run-\S+\n",
        err,
    ), err


def test_online_a_run_tells_its_url(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "30")
        with Wandb(run_dir(), {"server": {"lr": 0.5}}, group="quickstart") as tracker:
            for row in ROWS:
                tracker.log(row)
    begun = server.runs[0]
    assert capfd.readouterr() == ("", f"W&B: {server.url}/me/vecfl/runs/{begun['name']}\n")
    assert json.loads(begun["config"])["server"] == {"value": {"lr": 0.5}}
    assert (begun["displayName"], begun["groupName"], begun["entity"]) == (
        *("run", "quickstart", None),
    )
    files = [sent["files"] for sent in server.sent if "files" in sent]
    history = [file["wandb-history.jsonl"] for file in files if "wandb-history.jsonl" in file]
    rows = [json.loads(line) for part in history for line in part["content"]]
    assert [(row["_step"], row["round"]) for row in rows] == [(1, 1), (2, 2), (4, 4)]
    assert [sent["exitcode"] for sent in server.sent if sent.get("complete")] == [0]


def test_an_upload_that_gets_stuck_does_not_hold_the_run(
    alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as server:
        server.stuck.set()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "30")
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
        tracker = Wandb(run_dir(), {}, group="g")
        tracker.log(ROWS[0])
        began = time.monotonic()
        tracker.close()
        assert time.monotonic() - began < 20
    (said,) = [r.getMessage() for r in caplog.records if r.name == "vecfl"]
    found = re.fullmatch(r"W&B: not all uploaded \(.+\); to upload: wandb sync (\S+)", said)
    assert found and [learned(row) for row in Offline(Path(found[1])).rows()] == [ROWS[0]]


def test_the_waits_are_short_unless_the_user_says_so(alone: Path) -> None:
    with Wandb(run_dir(), {}, group="g"):
        settings = pytest.importorskip("wandb").setup().settings
    assert (settings.init_timeout, settings.finish_timeout) == (1, 30)  # 1: WANDB_INIT_TIMEOUT


def test_the_quickstart_with_wandb(alone: Path) -> None:
    process = recipe("--track=wandb", "--rounds=3", "--cohort=3", "--out=run")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    known = ("round ", "INFO vecfl: ")  # progress, and what the probe chose
    (line,) = [line for line in err.splitlines(keepends=True) if not line.startswith(known)]
    run = offline_in(line, "not logged in")
    assert "run: checkpoints, config.yaml, curves.png, metrics.jsonl, model.pt, wandb\n" in out
    *rows, last = run.rows()
    metrics = Path("run", "metrics.jsonl").read_text().splitlines()
    assert [learned(row) for row in rows] == [json.loads(line) for line in metrics]
    assert {"curves"} == {key.split("/")[0] for key in learned(last)}
    (image,) = (run.folder / "files").rglob("*.png")
    assert image.read_bytes() == Path("run", "curves.png").read_bytes()
    assert (run.config()["alpha"], run.config()["track"]) == (0.3, "wandb")
    assert run.exit_codes() == [0]
    assert {path.name for path in alone.iterdir()} == {"run", "elsewhere"}


def test_ctrl_c_reaches_wandb(alone: Path) -> None:
    process = recipe("--rounds=1000000", "--cohort=3", "--backend=loop", "--out=run")
    try:
        metrics = Path("run", "metrics.jsonl")
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("stopped after round ")
    assert Offline(Path("run")).exit_codes() == [255]


def test_the_command_of_the_notice_is_one_for_a_shell(alone: Path) -> None:
    class Run:
        dir = str(alone / "my runs" / "offline-run-1" / "files")

    said = module._sync(Run())
    assert shlex.split(said)[-1] == "my runs/offline-run-1"
