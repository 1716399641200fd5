"""The benchmarks run, on a small scale and on the CPU, and write rows that tell what they are."""

import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.workloads import MODELS, plain_round, vecfl_round

ROOT = Path(__file__).resolve().parents[2]
PROVENANCE = {"cpu", "cores", "torch", "python", "commit", "date"}


def call(*command: str, **env: str) -> str:
    """What a command prints; warnings are errors, and so is any exit code but 0."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "error"} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(script: str, out: Path, *flags: str) -> list[dict]:
    """The rows that a script writes."""
    printed = call(sys.executable, f"{ROOT}/benchmarks/{script}.py", *flags, "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(printed.splitlines()) == len(rows)  # one line each
    assert all(row.keys() >= PROVENANCE and row["torch"] == torch.__version__ for row in rows)
    return rows


def test_round_time(tmp_path: Path) -> None:
    flags = ("--workloads", "logistic-100", "--passes", "1", "--arrangements", "tuned 1", "vmap 1")
    tuned, vmap = rows_of("round_time", tmp_path / "new" / "rows.jsonl", *flags)
    assert (tuned["arrangement"], tuned["speedup"], "ran" in tuned) == ("tuned 1", 1.0, False)
    told = {"backend": "vmap", "workers": 1, "processes": 1, "threads": 1, "slots": 100}
    assert vmap["ran"] == [told]
    assert vmap["speedup"] == pytest.approx(tuned["p50_ms"] / vmap["p50_ms"], abs=0.01)
    for row in (tuned, vmap):
        assert (row["workload"], row["rounds"], row["passes"]) == ("logistic-100", 5, 1)
        assert (row["examples"], row["batch"]) == (60, 10)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        # 100 clients a round, of 60 examples each in batches of 10
        for name, clients in (("clients", 1), ("client_steps", 6), ("samples", 60)):
            rate = 100 * clients / row["p50_ms"] * 1e3
            assert row[f"{name}_per_s"] == pytest.approx(rate, rel=1e-3)
        assert 50 < row["peak_mib"] < 4000
    # The same first model, data and steps, but in another order; log(10) before the first step.
    assert vmap["loss"] == pytest.approx(tuned["loss"], rel=0.02) and tuned["loss"] < 1


def test_round_time_says_what_cannot_train(tmp_path: Path, monkeypatch: Any) -> None:
    """What raises InputError, here for an unknown backend, is tried once and has a row."""
    script = runpy.run_path(f"{ROOT}/benchmarks/round_time.py")["compare"].__globals__
    how = script["Arrangement"]("vecfl", 1, simulation={"backend": "none"})
    monkeypatch.setitem(script["ARRANGEMENTS"], "none 1", how)
    calls = []

    def here(*what: str) -> dict[str, Any]:
        calls.append(what)
        return script["measure"](*what)

    monkeypatch.setitem(script, "measure_apart", here)
    script["compare"]("logistic-2", ["none 1", "tuned 1"], 2, tmp_path / "rows.jsonl")
    none, tuned = (json.loads(row) for row in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert none["skipped"].startswith("backend 'none' is not known") and "p50_ms" not in none
    assert (tuned["passes"], tuned["rounds"], len(calls)) == (2, 10, 3)
    assert tuned["clients_per_s"] == pytest.approx(2 / tuned["p50_ms"] * 1e3, rel=1e-3)


def test_round_time_goes_on_with_the_baseline_and_those_near_the_fastest() -> None:
    """1.5 times the 2 s of the fastest are 3 s."""
    contenders = runpy.run_path(f"{ROOT}/benchmarks/round_time.py")["contenders"]
    seconds = {"tuned 1": [9.0], "auto": [2.0, 1.0, 3.0], "loop 1": [3.0], "vmap 1": [3.1]}
    found = {name: [{"seconds": times}] for name, times in seconds.items()}
    found |= {"stacked 1": [{"skipped": "no form"}]}
    assert contenders(found) == ["tuned 1", "auto", "loop 1"]


@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_round_time_tells_of_processes_and_fused_layers() -> None:
    measure = runpy.run_path(f"{ROOT}/benchmarks/round_time.py")["measure"]
    found = measure("small_cnn-2", "stacked 2 processes")
    told = {"backend": "stacked", "workers": 2, "processes": 2, "threads": 1}
    assert found["ran"].items() >= told.items()
    assert found["ran"]["fused"] == 4 and found["ran"]["by_vmap"] == 0


def test_the_losses_of_a_round_are_those_of_each_other() -> None:
    """Texts, in float32: one client whose examples are one batch, so that order means nothing."""
    work = replace(MODELS["lstm"], clients=1, examples=2, batch=2, shape=(5,))
    plain, ours = plain_round(work, tuned=False), vecfl_round(work, backend="loop")
    assert plain.loss() == pytest.approx(ours.loss(), rel=1e-6)
    assert plain.loss() == pytest.approx(math.log(90), rel=0.02)
    before = plain.loss()
    for player in (plain, ours):
        player()
    assert plain.loss() == pytest.approx(ours.loss(), rel=1e-5) and plain.loss() < before - 1e-3


def test_two_plain_processes_make_the_mean_of_one() -> None:
    """Clients of several sizes, each of one batch."""
    work = replace(MODELS["ragged"], clients=5, examples=4, batch=40)
    assert work.sizes.unique().numel() > 2 and work.samples == work.sizes.sum()
    one, two = (plain_round(work, tuned=True, processes=n) for n in (1, 2))
    for _ in range(2):
        one(), two()
    assert two.loss() == pytest.approx(one.loss(), rel=1e-5) and two.loss() < math.log(10)


def test_generated_data() -> None:
    """Of an image, half is the picture of its class; a character has one successor, mostly."""
    images = replace(MODELS["cifar_cnn"], clients=3).data()
    x, y = images.columns["x"], images.columns["y"]
    assert x.shape == (300, 3, 32, 32) and x.min() >= 0 and x.max() <= 1 and len(y.unique()) == 10
    same = x[y == 3].mean(0)
    assert (x[y == 3][0] - same).abs().mean() < (x[y == 4][0] - same).abs().mean()
    texts = MODELS["lstm"].data()
    x, y = texts.columns["x"], texts.columns["y"]
    assert x.shape == y.shape == (200, 80) and torch.equal(x[:, 1:], y[:, :-1])
    pairs = torch.zeros(90, 90)
    pairs.index_put_((x.flatten(), y.flatten()), torch.tensor(1.0), accumulate=True)
    often = pairs.max(1).values.sum() / pairs.sum()
    assert often == pytest.approx(0.9 + 0.1 / 90, abs=0.01)


@pytest.mark.parametrize(
    ("name", "steps", "parameters"),
    [
        *(("logistic", 600, 7_850), ("mlp", 600, 199_210), ("small_cnn", 600, 14_410)),
        *(("cnn", 50, 1_206_590), ("cifar_cnn", 50, 545_098), ("pfl_cnn", 250, 1_626_442)),
        *(("lstm", 50, 822_570), ("resnet", 4, 11_173_962)),
    ],
)
def test_workloads(name: str, steps: int, parameters: int) -> None:
    work = MODELS[name]
    assert (work.steps, sum(p.numel() for p in work.module().parameters())) == (steps, parameters)


def test_memory(tmp_path: Path) -> None:
    rows = rows_of("memory", tmp_path / "rows.jsonl", "--cohorts", "3")
    assert [(row["cohort"], row["malloc"]) for row in rows] == [(3, "default"), (3, "returning")]
    assert all(50 < row["peak_mib"] < 4000 and row["growth_mib"] >= 0 for row in rows)


@pytest.mark.slow
def test_parts(tmp_path: Path) -> None:
    small = ("--clients", "2", "--width", "3", "--rounds", "2")
    rows = rows_of("parts", tmp_path / "rows.jsonl", *small)
    assert len({row["part"] for row in rows}) == len(rows) == 14
    assert rows[0]["rounds_of_fedavg"] == 1 and rows[-1]["state_mb"] > rows[0]["state_mb"] > 0
    assert all(row["p50_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_codecs(tmp_path: Path) -> None:
    rows = rows_of("codecs", tmp_path / "rows.jsonl", "--numbers", "500", "--passes", "2")
    assert [row["codec"] for row in rows[:2]] == ["fold", "flute"] and len(rows) == 8
    assert [row["bytes"] for row in rows[:2]] == [2000, 500 + 5 * 8]
    for row in rows:
        ratio = row["p50_ms"] / max(rows[0]["p50_ms"], 1e-9)
        assert 0 < row["p20_ms"] <= row["p80_ms"] and row["folds"] == pytest.approx(ratio, abs=0.06)


def test_bandwidth(tmp_path: Path) -> None:
    """Of 4 rows of 100 numbers: a copy reads and writes 1600 bytes, Adam moves 7 times as many."""
    small = ("--numbers", "100", "--cells", "400", "--passes", "2")
    rows = {row["operation"]: row for row in rows_of("bandwidth", tmp_path / "rows.jsonl", *small)}
    moved = {
        name: rows[name]["bytes"] for name in ("copy", "norms", "noise", "clip, sum and noise")
    }
    assert moved == {"copy": 3200, "norms": 1600, "noise": 1600, "clip, sum and noise": 6400}
    assert (rows["momentum"]["bytes"], rows["adam"]["bytes"]) == (5 * 1600, 7 * 1600)
    assert len(rows) == 11 and {row["kernels"] for row in rows.values()} == {"reference"}
    assert rows["copy"]["of_a_copy"] == 1
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]


def test_private_rounds(tmp_path: Path, monkeypatch: Any) -> None:
    """A ratio is the median over turns, of one here."""
    flags = ["--models", "logistic", "--cohort", "3", "--few", "2"]
    flags += ["--passes", "1", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["", *flags, "--out", f"{tmp_path}/rows.jsonl"])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # this process goes on
    runpy.run_path(f"{ROOT}/benchmarks/private_rounds.py", run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row.keys() >= PROVENANCE for row in rows)
    by = {(row["unit"], row["mechanism"], row["backend"]): row for row in rows}
    central = [(name, b) for b in ("stacked", "vmap") for name in ("clip_by_norm", "adaptive_clip")]
    assert list(by) == [
        *(("client", "none", "stacked"), ("client", "none", "vmap")),
        *(("client", *one) for one in central),
        *(("example", "none", name) for name in ("stacked", "vmap", "loop")),
        *(("example", "dp_sgd", name) for name in ("vmap", "loop")),
    ]
    for (unit, name, backend), row in by.items():
        plain = {b: by[unit, "none", b] for u, m, b in by if (u, m) == (unit, "none")}
        times = {b: other["p50_ms"] for b, other in plain.items()}
        assert row["fastest"] == min(times, key=times.__getitem__)
        assert row["slots"] == plain[backend]["slots"]
        assert row["of_plain"] == pytest.approx(row["p50_ms"] / times[backend], rel=2e-3)
        assert row["of_fastest"] == pytest.approx(row["p50_ms"] / times[row["fastest"]], rel=2e-3)
        assert row["cohort"] == (3 if unit == "client" else 2)
        assert row.get("clipped") == {"none": None, "dp_sgd": None}.get(name, 1.0)


def test_scaling(tmp_path: Path) -> None:
    flags = ("--axes", "cohort", "parameters", "--most", "100", "--rounds", "2")
    rows = rows_of("scaling", tmp_path / "rows.jsonl", *flags)
    assert [(row["axis"], row["value"], row["cohort"], row["parameters"]) for row in rows] == [
        *(("cohort", 10, 10, 7850), ("cohort", 100, 100, 7850)),
        # 4 hidden units: 784 * 4 + 4 + 4 * 10 + 10
        *(("parameters", 4, 20, 3190), ("parameters", 32, 20, 25450)),
    ]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["rounds"] == 2
        rate = row["cohort"] / row["p50_ms"] * 1e3
        assert row["clients_per_s"] == pytest.approx(rate, rel=1e-3)
        assert row["client_steps_per_s"] == pytest.approx(6 * rate, rel=1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
def test_scaling_over_workers_slots_and_population() -> None:
    script = runpy.run_path(f"{ROOT}/benchmarks/scaling.py")
    setting, axes = script["Setting"], script["AXES"]
    assert axes.keys() == {"cohort", "slots", "parameters", "population", "workers"}
    assert [s.how for s in axes["slots"]] == [{"slots": s.value} for s in axes["slots"]]
    assert all(s.population == s.value for s in axes["population"])
    small = [setting(s.value, cohort=4, population=9, how=s.how) for s in axes["workers"]]
    rows = script["measure"]("workers", small, 1)
    assert [(row["value"], row["workers"], row["processes"]) for row in rows] == [
        *(("1", 1, 1), ("2 threads", 2, 1), ("2 processes", 2, 2)),
    ]
    slots = [setting(3, cohort=4, population=9, how={"slots": 3})]
    assert [row["slots"] for row in script["measure"]("slots", slots, 1)] == [3]


@pytest.mark.slow  # what it tells of its rows is tested every day, below
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_scale(tmp_path: Path) -> None:
    flags = ("--clients", "30", "--cohorts", "4", "8", "--rounds", "2", "--folder", str(tmp_path))
    rows = rows_of("scale", tmp_path / "rows.jsonl", *flags, "--models", "logistic")
    assert [(row["workload"], row["cohort"], row["population"]) for row in rows] == [
        *(("logistic", 4, 30), ("logistic", 8, 30)),
    ]
    four, eight = rows
    for row in rows:
        assert row["rounds"] == 2 and row["anon_peak_mib"] > 50
        assert row["ms_per_client"] == pytest.approx(row["p50_ms"] / row["cohort"], abs=1e-5)
        # Three examples one by one are three steps.
        assert row["client_steps_per_s"] == pytest.approx(3 * row["clients_per_s"], rel=1e-3)
        assert row["ran"] == four["ran"]  # chosen once
    assert four["of_smallest"] == 1 and four["grown_bytes_per_client"] == 0
    ratio = eight["ms_per_client"] / four["ms_per_client"]
    assert eight["of_smallest"] == pytest.approx(ratio, abs=1e-3)
    grown = (eight["anon_peak_mib"] - four["anon_peak_mib"]) * 2**20 / (8 - 4)
    assert eight["grown_bytes_per_client"] == round(grown)
    assert (tmp_path / "clients-30" / "meta.json").exists()  # for the next time


def test_scale_says_whether_time_is_flat() -> None:
    said = runpy.run_path(f"{ROOT}/benchmarks/scale.py")["said"]
    row = {"workload": "logistic", "cohort": 5000, "clients_per_s": 9.5, "anon_peak_mib": 300.5}
    row |= {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "ms_per_client": 0.1}
    row["grown_bytes_per_client"] = 938
    told = {
        ratio: said(row | {"of_smallest": ratio}, 7850) for ratio in (0.576, 0.9, 1.0, 1.1, 1.101)
    }
    assert "0.1 ms a client, x0.576 of that in the smallest cohort: less;" in told[0.576]
    assert all("flat (within 10%);" in told[ratio] for ratio in (0.9, 1.0, 1.1))
    assert "smallest cohort: more;" in told[1.101]
    end = "a further client takes 938 bytes of memory (a copy of the model has 31,400)"
    assert all(line.endswith(end) for line in told.values())


SMALL = ("--device", "cpu", "--models", "logistic", "--slots", "1", "2", "--cohorts", "2")


def test_gpu_time_on_the_cpu(tmp_path: Path) -> None:
    one, two, tuned, vmap, stacked = rows_of(
        "gpu_time", tmp_path / "rows.jsonl", *SMALL, "--seconds", "0.01", "--budget", "90"
    )
    for row, slots in ((one, 1), (two, 2)):
        assert (row["measure"], row["workload"], row["slots"]) == ("step", "logistic", slots)
        assert 0 < row["host_ms"] <= 1.5 * row["p80_ms"]
        expected = slots / row["p50_ms"] * 1e3
        assert row["client_steps_per_s"] == pytest.approx(expected, rel=0.02)
    for row, arrangement in ((tuned, "tuned"), (vmap, "vmap"), (stacked, "stacked")):
        assert (row["measure"], row["cohort"]) == ("round", 2)
        assert (row["arrangement"], row["tf32"]) == (arrangement, True)
    assert vmap["speedup"] == pytest.approx(tuned["p50_ms"] / vmap["p50_ms"], abs=0.01)


def test_gpu_time_says_what_it_leaves_out(tmp_path: Path) -> None:
    rows = rows_of("gpu_time", tmp_path / "rows.jsonl", *SMALL, "--model", "logistic", "--budget=0")
    assert len(rows) == 5
    assert all(row["skipped"] == "0.0 s left, two calls may take 0.0" for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    said = call("bash", f"{ROOT}/benchmarks/gpu.sh", PYTHON=sys.executable, OUT=str(tmp_path))
    assert said == "no CUDA GPU here: nothing to test and nothing to time\n"
    said = call(sys.executable, f"{ROOT}/benchmarks/gpu_time.py", "--out", f"{tmp_path}/rows.jsonl")
    assert said.startswith("no CUDA GPU here") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_feed(tmp_path: Path) -> None:
    flags = ("--models", "logistic", "--clients", "5", "--cohorts", "3", "--rounds", "2")
    rows = rows_of("feed", tmp_path / "rows.jsonl", *flags)
    ran = [(row["from"], row["data"]) for row in rows]
    assert ran == [(a, b) for a in ("memory", "store") for b in ("resident", "streamed")]
    for row in rows:
        assert 0 < row["wait"]["p50_ms"] < row["round"]["p50_ms"] and row["fetch"]["p50_ms"] > 0
        assert (row["workload"], row["cohort"], row["device"]) == ("logistic", 3, "cpu")


@pytest.mark.slow  # tests/ranks holds several ranks to one every day
def test_ranks(tmp_path: Path) -> None:
    one, two = rows_of("ranks", tmp_path / "rows.jsonl", "--models", "logistic", "--rounds", "2")
    for row, ranks in ((one, 1), (two, 2)):
        assert (row["ranks"], row["parameters"], row["cohort"]) == (ranks, 7850, 100)
    assert 0 < two["sum"]["p50_ms"] < two["round"]["p50_ms"]
    assert one["exact_round"]["p50_ms"] > 0 and "sum" not in one


@pytest.mark.slow
def test_checkpoint(tmp_path: Path) -> None:
    flags = ("--sizes", "8000", "--repeats", "2", "--folder", str(tmp_path))
    plain, adam = rows_of("checkpoint", tmp_path / "rows.jsonl", *flags)
    for row, server, size in ((plain, "plain", 4), (adam, "adam", 4 + 2 * 8)):
        assert (row["parameters"], row["server"]) == (8000, server)
        assert 8000 * size < row["bytes"] < 8000 * size + 4_000
        assert all(row[name]["p50_ms"] > 0 for name in ("take", "save", "bare", "load"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc/self/io")
def test_data_store(tmp_path: Path) -> None:
    flags = ("--clients", "3", "--folder", str(tmp_path))
    warm, cold = rows_of("data_store", tmp_path / "rows.jsonl", *flags)
    assert (cold["pages"], warm["pages"], warm["clients"]) == ("cold", "warm", 3)
    assert cold["store_bytes"] > 3 * 8 * (64 + 8)  # bytes read depend on what else the machine does
    assert {"gather_read_bytes"} <= cold.keys() & warm.keys()
    assert all(row[step]["p50_ms"] > 0 for row in (cold, warm) for step in ("open", "gather"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.slow
def test_table(tmp_path: Path) -> None:
    flags = ("--cohort", "3", "--clients", "5", "--rounds", "4", "--every", "2")
    rows = rows_of("table", tmp_path / "rows.jsonl", *flags, "--folder", str(tmp_path))
    assert [row["table"] for row in rows] == ["none", "memory", "disk"]
    assert "journal" not in rows[0]
    for row in rows[1:]:
        assert all(row[part]["p50_ms"] > 0 for part in ("journal", "read", "write", "checkpoint"))
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc/self/status")
def test_table_size(tmp_path: Path) -> None:
    flags = ("--clients", "50", "--width", "64", "--cohort", "3", "--rounds", "2", "--option", "1")
    rows = rows_of("table_size", tmp_path / "rows.jsonl", *flags, "--folder", str(tmp_path))
    numbers = 784 * 64 + 64 + 64 * 200 + 200 + 200 * 10 + 10  # of a client
    assert [(row["round"], row["parameters"]) for row in rows] == [(1, numbers), (2, numbers)]
    for row in rows:
        assert row["table_gib"] == round(50 * numbers * 4 / 2**30, 3) > 0
        assert 0 < row["anon_start_mib"] <= row["anon_peak_mib"] >= row["anon_end_mib"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc/self/status")
@pytest.mark.parametrize("option", ["1", "2"])
def test_a_table_of_44_gib_takes_no_memory(tmp_path: Path, option: str) -> None:
    """10,000 rows of 1.2 million numbers; a row is 4.5 MiB, those of a cohort 90 MiB."""
    flags = ("--option", option, "--folder", str(tmp_path))
    rows = rows_of("table_size", tmp_path / "rows.jsonl", *flags)
    assert [row["table_gib"] for row in rows] == [rows[0]["table_gib"]] * 3
    assert 44 < rows[0]["table_gib"] < 45
    for row in rows:  # what clients sent before training is held, by option 1
        assert row["anon_peak_mib"] - row["anon_start_mib"] < 400
        assert row["on_disk_mib"] < 100 * row["round"]


@pytest.mark.slow
def test_precision(tmp_path: Path) -> None:
    small = ("--models", "mlp", "--backends", "loop", "--clients", "1", "--passes", "1")
    rows = rows_of("precision", tmp_path / "rows.jsonl", *small)
    assert [(r["steps"], r["precision"]) for r in rows] == [
        (steps, name) for steps in (1, 6) for name in ("float64", "float32", "bf16")
    ]
    assert [r["error"] for r in rows[::3]] == [0, 0]
    assert all(0 < r["error"] < 1e-4 for r in rows[1::3])
    assert all(1e-3 < r["error"] < 0.3 for r in rows[2::3])


def test_limits(tmp_path: Path) -> None:
    small = ("--workloads", "logistic", "cnn", "--clients", "2", "--rounds", "2")
    row, cnn = rows_of("limits", tmp_path / "rows.jsonl", *small)
    assert 0.2 < cnn["share"] < 1 and cnn["at_most"] == pytest.approx(1 / cnn["share"], abs=0.01)
    step = {name: times["p50_us"] for name, times in row["client_step"].items()}
    assert list(step) == ["plain loop", "vecfl", "products", "once a client"]
    assert min(step.values()) > 0
    assert row["by_products_alone"] == round(step["plain loop"] / step["products"], 2)
    assert row["speedup"] == round(step["plain loop"] / step["vecfl"], 2)


@pytest.mark.slow
def test_round_time_profiles(tmp_path: Path) -> None:
    flags = ["--workloads", "logistic-100", "--arrangements", "tuned 1", "stacked 1", "--profile"]
    flags += ["--traces", str(tmp_path)]
    printed = call(sys.executable, f"{ROOT}/benchmarks/round_time.py", *flags)
    lines = printed.splitlines()
    assert lines[0] == "logistic-100, stacked 1"
    assert lines[1].startswith("a round ") and lines[-1].startswith("trace ")
    traces = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert traces == [Path("logistic-100-stacked-1/trace.json")]
    assert len(lines) == 17
