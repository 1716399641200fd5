"""Parts of rounds, bytes and arithmetic: by hand, and through a recipe."""

import json
import re
import runpy
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import vecfl
from vecfl import Batches, FederatedDataset, InputError, Simulation, Task, profile
from vecfl.profile import PARTS, ROUNDS, Clock, Profile
from vecfl.roof import executed, step_bytes, step_flops
from vecfl.worker import Worker

from .recipes.conftest import no_curves

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.py"
(SNIPPET,) = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/profiling.md").read_text("utf-8"), re.M | re.S
)


class Ticks:
    """A clock that shows these times, one after the other."""

    def __init__(self, *times: float) -> None:
        self.perf_counter = iter(times).__next__


def test_a_part_does_not_count_the_parts_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # step from 0 to 10, in it gather from 2 to 5 and from 6 to 7: 4 of the 10 are gather's.
    monkeypatch.setattr(profile, "time", Ticks(0, 2, 5, 6, 7, 10))
    clock = Clock(workers=1)
    gather = clock.timed("gather", lambda: 3)
    step = clock.timed("step", lambda: gather() + gather())
    assert step() == 6
    assert clock.seconds == {"gather": 4, "step": 6}


def test_an_iterator_counts_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks():
        yield from "ab"

    monkeypatch.setattr(profile, "time", Ticks(0, 1, 5, 7, 20, 24))
    clock = Clock(workers=1)
    assert list(clock.timed("tape", blocks)()) == ["a", "b"]
    assert clock.seconds == {"tape": 1 + 2 + 4}  # not what the consumer took in between


def test_workers_count_with_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "time", Ticks(0, 3, 10, 15))
    clock = Clock(workers=2)
    step = clock.timed("step", lambda: None)
    for _ in range(2):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert clock.seconds == {"step": (3 + 5) / 2}


def simulation(backend: str, algorithm: vecfl.Algorithm, workers: int = 1) -> Simulation:
    """Five clients of ten examples of 6 numbers, 3 classes."""
    g = torch.Generator().manual_seed(0)
    columns = {"x": torch.rand(50, 6, generator=g), "y": torch.arange(50) % 3}
    data = FederatedDataset(columns, torch.arange(0, 51, 10))
    module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    task = Task(module, vecfl.cross_entropy, example=data.examples(2))
    return Simulation(
        task, data, algorithm, vecfl.everyone(), backend=backend, workers=workers, slots=2
    )


def test_bytes_and_arithmetic_by_hand() -> None:
    batches = Batches(2)
    # 6 * 4 + 4 + 4 * 3 + 3 = 43 numbers of 4 bytes; an example is 6 floats and a label of 8 bytes.
    examples = 2 * 2 * (6 * 4 + 8)
    plain, heavy = (vecfl.fedavg(lr=0.1, batches=batches, optimizer=o) for o in OPTIMIZERS)
    assert step_bytes(simulation("vmap", plain)) == 6 * 43 * 4 + examples
    assert step_bytes(simulation("stacked", plain)) == 4 * 43 * 4 + examples
    assert step_bytes(simulation("stacked", heavy)) == (6 + 2 * 2) * 43 * 4 + examples
    pull = vecfl.fedprox(lr=0.1, batches=batches, mu=0.1)
    assert step_bytes(simulation("stacked", pull)) == 6 * 43 * 4 + examples
    # Forward and weight gradients 2 * 2 * (6 * 4 + 4 * 3) each, 2 * 2 * 4 * 3 below the last layer.
    assert step_flops(simulation("loop", plain)) == 2 * 144 + 48


OPTIMIZERS = vecfl.sgd(), vecfl.adam()


def test_slot_steps_by_hand() -> None:
    sim = simulation("vmap", vecfl.fedavg(lr=0.1, batches=Batches(2)))
    _, metrics = sim.round(sim.start())
    # Five clients of five steps in two slots: three take turns in one slot, two in the other.
    assert metrics["system/client_steps"] == 25
    assert executed(metrics) == pytest.approx(30)


@pytest.mark.parametrize("backend", ["loop", "vmap", "stacked"])
def test_a_profile_sees_every_part_and_leaves_no_trace_behind(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim = simulation(backend, vecfl.fedavg(lr=0.1, batches=Batches(2)))
    plain = [getattr(owner, name) for calls in PARTS.values() for owner, name in calls]
    algorithm, state, seen = sim.algorithm, sim.start(), Profile(sim, tmp_path)
    for done in range(ROUNDS):
        state, metrics = sim.round(state)
        sim.evaluate(state, sim.data.columns)
        seen.log(metrics)
        now = [getattr(owner, name) for calls in PARTS.values() for owner, name in calls]
        assert (now == plain) == (done not in (0, 1))
    seen.close()
    assert sim.algorithm is algorithm
    out = capsys.readouterr().out
    for part in (*PARTS, "other"):
        (line,) = (x for x in out.splitlines() if x.startswith(f"  {part} "))
        assert float(line[len("  ") + 16 :].split()[0]) >= 0, line
    assert all(seen.clock.seconds[part] > 0 for part in PARTS)
    assert "clients take 83.3% of them" in out or backend == "loop"
    names = {e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert any(name.startswith("aten::") for name in names)


def test_rows_of_round_0_do_not_count(tmp_path: Path) -> None:
    seen = Profile(simulation("loop", vecfl.fedavg(lr=0.1, batches=Batches(2))), tmp_path)
    plain = Worker._seat
    seen.log({"round": 0})
    assert Worker._seat is plain
    seen.log({"round": 1})
    assert Worker._seat is not plain
    seen.close()
    assert Worker._seat is plain


@pytest.mark.parametrize("workers", [1, 2])
def test_the_snippet_makes_its_folder_and_tells_what_the_trace_lacks(
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sim = simulation("loop", vecfl.fedavg(lr=0.1, batches=Batches(2)), workers)
    said = replace(sim.arrangement, processes=workers)  # threads all the same
    monkeypatch.setattr(Simulation, "arrangement", said)
    exec(compile(SNIPPET, "docs/profiling.md", "exec"), {"sim": sim})
    assert json.loads(Path("profiles/first/trace.json").read_text())["traceEvents"]
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("trace             profiles/first/trace.json")
    missing = "what runs in its forks (1) is missing"
    assert [missing in line for line in lines[at + 1 :]] == [True] * (workers - 1)
    assert "a slot is a place where a client trains" in lines[len(PARTS) + 3]


def test_a_folder_that_cannot_be_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    sim = simulation("loop", vecfl.fedavg(lr=0.1, batches=Batches(2)))
    with pytest.raises(InputError) as error:
        Profile(sim, "file")
    assert str(error.value) == "file: no folder for a trace: File exists"
    Path("run/trace.json").mkdir(parents=True)
    with pytest.raises(InputError, match="^run: no folder for a trace: "):
        Profile(sim, "run")


def test_a_trace_that_is_not_there_is_not_named_as_one(tmp_path: Path) -> None:
    seen = Profile(simulation("loop", vecfl.fedavg(lr=0.1, batches=Batches(2))), tmp_path)
    assert seen.trace() == [f"trace             not written: {tmp_path}/trace.json"]
    (tmp_path / "trace.json").touch()
    assert seen.trace() == [f"trace             {tmp_path}/trace.json"]


def test_a_run_that_ends_early_has_no_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim = simulation("loop", vecfl.fedavg(lr=0.1, batches=Batches(2)))
    state, seen = sim.start(), Profile(sim, tmp_path)
    for _ in range(3):
        state, metrics = sim.round(state)
        seen.log(metrics)
    seen.close()
    assert capsys.readouterr().err.splitlines()[-1] == (
        "no profile: it takes 4 rounds, there were 3"
    )
    assert not (tmp_path / "trace.json").exists()


def recipe(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("vecfl.finish.draw_curves", no_curves)
    fixed = ["--cohort=3", "--epochs=1", "--track=none", "--out=run", "--backend=stacked"]
    fixed += ["--workers=1", "--threads=1", "--slots=2"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *fixed, *flags])
    runpy.run_path(str(RECIPE), run_name="__main__")
    return folder / "run"


def test_a_recipe_profiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = recipe(monkeypatch, tmp_path, "--rounds=4", "--profile=True")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a round ") and "folding messages" in lines[5]
    assert (run_dir / "trace.json").stat().st_size > 1000
    assert "profile" not in (run_dir / "config.yaml").read_text()  # another start may do without


def test_a_recipe_refuses_to_profile_too_few_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe(monkeypatch, tmp_path, "--rounds=3", "--profile=True")
    assert capsys.readouterr().err == "error: --profile: expected --rounds 4 or more, got True\n"
