"""The quickstart as a user runs it."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import vecfl
from vecfl.data import digits, dirichlet

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart.py"
KEYS = {
    "round",
    "train/loss",
    "train/lr",
    "train/cohort",
    "train/lost_clients",
    "train/clients",
    "train/dropped_clients",
    *(f"comm/{name}_bytes" for name in ("up", "down", "total_up", "total_down")),
    "server/lr",
    "server/update_norm",
    "eval/loss",
    "eval/accuracy",
    "client/loss_p90",
    *(f"client/accuracy_{name}" for name in ("mean", "p10", "p50", "p90", "worst")),
    *(f"system/{name}" for name in ("clients_per_s", "round_s", "slots", "slot_efficiency")),
    *(f"system/{name}" for name in ("client_steps", "backend", "workers", "threads")),
    "system/processes",
    *("system/wait_s", "system/data", "system/ranks", "system/precision", "system/graphs"),
    *(f"system/{name}_s" for name in ("train", "aggregate", "client", "worker_max")),
    *(f"system/{name}_s" for name in ("evaluate", "housekeeping")),
}
CHOSEN = ("backend", "workers", "processes", "threads", "slots", "precision", "graphs")
FIRST = {name for name in KEYS if name.startswith(("eval/", "client/"))}  # of the first model
FIRST |= {"round", "system/evaluate_s", "system/housekeeping_s"}


# Runs the recipe where no file can grow beyond 20,000 bytes, as if the disk were full.
FULL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def start(folder: Path, *flags: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The recipe with these flags, in a process of its own in this folder."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-W", "error", *by, str(RECIPE), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learned(row: dict[str, Any]) -> dict[str, Any]:
    """What a round came to, without how it was computed."""
    return {key: value for key, value in row.items() if not key.startswith("system/")}


def command(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """The recipe in this process: the same code path, without another import of torch."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *flags])
    runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 4))]
)
def test_the_main_job_learns_the_digits(tmp_path: Path, seed: int) -> None:
    began = time.perf_counter()
    code, out, err = finish(start(tmp_path, f"--seed={seed}"))
    assert (code, time.perf_counter() - began < 60) == (0, True), err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}", run_dir.name)
    assert sorted(path.name for path in run_dir.iterdir()) == [
        *("checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "model.pt")
    ]
    first, *rows = rows_of(run_dir)
    assert first["round"] == 0 and first.keys() == FIRST
    assert first["eval/accuracy"] < 0.3
    assert [row["round"] for row in rows] == list(range(1, 101))
    stacked = rows[0]["system/backend"] == "stacked"
    layers = {"system/fused", "system/by_vmap"} if stacked else set()
    assert {frozenset(row) for row in rows} == {frozenset(KEYS | layers)}
    assert rows[-1]["eval/accuracy"] >= 0.95
    assert {row["train/clients"] for row in rows} == {20}
    assert f"test accuracy   final {rows[-1]['eval/accuracy']:.1%}" in out
    assert (
        f"runs/{run_dir.name}: checkpoints, config.yaml, curves.png, metrics.jsonl, model.pt" in out
    )
    assert len(re.findall(r"^round \d+/100  train loss", err, re.M)) == 10

    # model.pt is an ordinary state dict: plain PyTorch with it finds the accuracy of the record.
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    module.load_state_dict(torch.load(run_dir / "model.pt"))
    test = digits(seed)[1]
    right = module(test["x"] / 16).argmax(1) == test["y"]
    assert rows[-1]["eval/accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-12)


def test_config_holds_the_effective_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--rounds=1", "--cohort", "3", "--seed=5", "--sample-seed", "6", "--out")
    command(monkeypatch, *flags, str(tmp_path / "a"))
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    _, row = rows_of(tmp_path / "a")
    chosen = {name: config.pop(name) for name in CHOSEN}
    assert chosen == {name: row[f"system/{name}"] for name in chosen}  # what "auto" came to
    assert config == {
        "track": "auto",
        "rounds": 1,
        "cohort": 3,
        "clients": 100,
        "alpha": 0.3,
        "lr": 0.5,
        "batch": 10,
        "epochs": 5,
        "seed": 5,
        "data_seed": 5,
        "sample_seed": 6,
        "device": "cpu",
        "dtype": "float32",
        "private_clip": None,
        "noise_multiplier": None,
        "epsilon": None,
        "delta": None,
        "accountant": None,
        "stop_at_epsilon": None,
        "stands_for": None,
        "eval_every": 1,
        "test_every": None,
        "validation": 0.0,
        "initial_evaluation": True,
        "client_results": False,
        "statistics": 0,
        "init": None,
        "checkpoint_every": 10,
        "keep": 2,
        "watch": None,
        "fall_back": False,
        "safetensors": False,
        "exact_sums": False,
        "sampler": None,
        "transforms": [],
        "aggregator": None,
        "around": [],
        "client_dropout": 0.0,
        "freeze": None,
        "table": None,
        "metrics": [],
        "stop_at": None,
        "patience": None,
    }


def test_backends_slots_and_repetition_give_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--rounds=2", "--cohort=7", "--dtype=float64", "--out")
    kind = ("--backend=vmap", "--workers=2", "--slots=3")
    command(monkeypatch, *common, str(tmp_path / "vmap"), *kind)
    command(monkeypatch, *common, str(tmp_path / "again"), *kind)
    command(monkeypatch, *common, str(tmp_path / "loop"), "--backend=loop")
    vmap, again, loop = (rows_of(tmp_path / name)[1:] for name in ("vmap", "again", "loop"))
    names = ("backend", "workers", "slots")
    assert {tuple(row[f"system/{name}"] for name in names) for row in vmap} == {("vmap", 2, 3)}
    assert {row["system/backend"] for row in loop} == {"loop"}
    assert [learned(row) for row in again] == [learned(row) for row in vmap]
    for row, other in zip(vmap, loop, strict=True):
        assert learned(row) == pytest.approx(learned(other), rel=1e-9)
    assert vmap[1]["train/loss"] < vmap[0]["train/loss"]


def test_each_seed_has_its_own_job() -> None:
    recipe = runpy.run_path(str(RECIPE))
    args = recipe["Args"](seed=9, cohort=3)
    data, test = recipe["split_digits"](args, 7)
    train = digits(7)[0]
    assert torch.equal(test["x"], digits(7)[1]["x"])
    client = dirichlet(train["y"], 100, 0.3, 7)
    assert data.sizes.tolist() == np.bincount(client, minlength=100).tolist()

    sim = recipe["make_simulation"](args, data, 8)
    assert (sim.seed, sim.sample_seed) == (9, 8)
    assert (
        sim.cohort(0).tolist() == vecfl.uniform(3)(torch.ones(100, dtype=torch.bool), 8, 0).tolist()
    )
    torch.manual_seed(9)
    first = nn.Linear(64, 200).weight
    assert torch.equal(sim.state_dict(sim.start())["1.weight"], first)


def test_seeds_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(name: str, *flags: str) -> float:
        command(monkeypatch, "--rounds=1", "--cohort=3", "--out", str(tmp_path / name), *flags)
        return rows_of(tmp_path / name)[1]["train/loss"]

    plain = loss("plain")
    assert plain == loss("same", "--data-seed=0", "--sample-seed=0")
    losses = [loss(name, f"--{name}=1") for name in ("seed", "data-seed", "sample-seed")]
    assert len({plain, *losses}) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ronds 3", "Unrecognized options: --ronds, 3 .* --rounds INT"),
        ("--rounds many", "Error parsing --rounds: .*'many'"),
        ("--rounds -1", "--rounds: expected at least 1, got -1"),
        ("--cohort 0", "--cohort: expected at least 1, got 0"),
        ("--cohort 101", r"--cohort: expected at most --clients \(100\), got 101"),
        ("--clients 0", "--clients: expected at least 1, got 0"),
        ("--clients 1500", r"--clients: expected at most 1438 \(training examples\), got 1500"),
        ("--batch 0", "--batch: expected at least 1, got 0"),
        ("--batch 1500", r"--batch: expected at most 1438 \(training examples\), got 1500"),
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
        ("--slots 0", "--slots: expected auto or a number of at least 1, got 0"),
        ("--slots 21", r"--slots: expected auto or at most --cohort \(20\), got 21"),
        ("--workers 21", r"--workers: expected auto or at most --cohort \(20\), got 21"),
        ("--processes 21", "workers=21: give at most 20, the clients of a cohort"),
        ("--processes 0", "--processes: expected 1 for threads, or the number of workers, got 0"),
        ("--processes 2 --workers 3", "processes=2 with workers=3: give workers=2 or auto, or"),
        ("--processes 2 --workers 2 --threads 2", "processes=2: each has one operator thread; g"),
        ("--processes 2 --threads 2", "processes=2: each has one operator thread; give threads=1"),
        ("--threads 0", "--threads: expected at least 1, got 0"),
        ("--alpha 0", "--alpha: expected a positive number, got 0.0"),
        ("--lr nan", "--lr: expected a positive number, got nan"),
        ("--seed -1", r"--seed: expected 0 to 2\^63 - 1, got -1"),
        ("--sample-seed 9223372036854775808", r"--sample-seed: expected 0 to 2\^63 - 1, got 92"),
        (
            "--backend pmap",
            "'pmap' for argument '--backend'. Expected one of .*'auto', 'loop', 'vmap', 'stacked'",
        ),
        ("--dtype float16", "'float16' for argument '--dtype'. Expected one of .*'float32'"),
        ("--device gpu", "--device: expected a device of this machine, such as cpu, got gpu"),
        ("--device cuda:99", "--device: expected a device of this machine, .* got cuda:99"),
        (
            "--out taken",
            "taken already holds a run; choose another --out or go on with --resume",
        ),
        ("--out full", r"full is not empty \(it holds precious\); choose another --out"),
        ("--out full/precious", "cannot write full/precious: File exists; .* with --out"),
        ("--out full/precious/run", "cannot write full/precious/run: Not a directory; .* --out"),
    ],
)
def test_wrong_input_is_one_message_and_touches_nothing(
    flags: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("taken/metrics.jsonl", "full/precious"):
        Path(name).parent.mkdir()
        Path(name).write_text(name)
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--rounds=2", *flags.split())
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    message = " ".join(re.sub("[^!-~ ]", " ", captured.err).split())  # without tyro's box
    assert re.search(said, message), message
    if not message.startswith(("Unrecognized", "Error parsing", "Invalid choice", "Value error")):
        assert captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted((str(path.relative_to(tmp_path)), path.read_text()) for path in files) == [
        ("full/precious", "full/precious"),
        ("taken/metrics.jsonl", "taken/metrics.jsonl"),
    ]


def test_a_wrong_flag_in_a_shell(tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, "--cohort=2000"))
    assert (code, out) == (2, "")
    assert err == "error: --cohort: expected at most --clients (100), got 2000\n"


def test_a_signal_saves_the_run_and_it_goes_on(tmp_path: Path) -> None:
    run_dir, common = tmp_path / "run", ("--backend=loop", "--workers=2", "--out=run")
    process = start(tmp_path, "--rounds=1000000", *common)
    try:
        while not (run_dir / "metrics.jsonl").exists() or len(rows_of(run_dir)) < 2:
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code, out, err = finish(process)
    finally:
        process.kill()
    assert (code, out) == (143, ""), err
    said = re.fullmatch(
        r"stopped after round (\d+) of 1000000, not finished; to go on: the same command with "
        r"--resume run",
        err.splitlines()[-1],
    )
    assert said and "Traceback" not in err, err
    before = rows_of(run_dir)
    assert [row["round"] for row in before] == list(range(int(said[1]) + 1))
    assert all(row.keys() >= KEYS for row in before[1:])
    names = ["checkpoints", "config.yaml", "metrics.jsonl"]
    assert sorted(path.name for path in run_dir.iterdir()) == names

    rounds = int(said[1]) + 2
    code, out, err = finish(start(tmp_path, f"--rounds={rounds}", *common, "--resume=auto"))
    assert (code, rows_of(run_dir)[:-2]) == (0, before), err
    assert len(rows_of(run_dir)) == 1 + rounds and (run_dir / "model.pt").exists()


def test_a_full_disk_is_one_line_and_keeps_the_metrics(tmp_path: Path) -> None:
    # Three lines of metrics fit into 20,000 bytes, the 15,010 float32 of the model do not.
    process = start(tmp_path, "--rounds=2", "--out=run", by=("-c", FULL_DISK))
    code, out, err = finish(process)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "error: run/model.pt: File too large; the model of 2 rounds fits nowhere: metrics are in "
        "run, free some space and run again"
    )
    assert "round 0 is not saved: run/checkpoints/round-000000.ckpt: File too large; free so" in err
    assert "Traceback" not in err
    assert len(rows_of(tmp_path / "run")) == 3
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        *("checkpoints", "config.yaml", "error.log", "metrics.jsonl")
    ]
