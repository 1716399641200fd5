"""Do the rivals get the same work, and does the comparison say what they did?"""

import hashlib
import json
import py_compile
import runpy
import sys
import time
import warnings
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from multiprocessing import Pipe, get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import apart, contest, contest_torch, rows
from benchmarks.rivals import compare

ROOT = Path(__file__).resolve().parents[2]
RIVALS = ROOT / "benchmarks" / "rivals"
FIRST, TUNED, PFL, JIT = ("plain", "1 thread"), ("plain", "2 threads"), ("pfl", "a"), ("pfl", "b")


def run_here(command: list[str], env: dict[str, str], limit: float) -> dict:
    """`run_apart` in this process, which saves the time to start others."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.setattr(sys, "argv", command[1:])
        patch.setenv("XDG_CACHE_HOME", env["XDG_CACHE_HOME"])
        runpy.run_path(command[1], run_name="__main__")
    return json.loads(said.getvalue())


def job_of(model: str, path: Path, **changes: object) -> contest.Job:
    """A job with two clients of four examples, written to `path`."""
    few = {"clients": 2, "examples": 4, "batch": 2} | changes
    contest.save(path, made := contest.make(replace(contest.WORKLOADS[model], **few)))
    return made


def test_data_and_models_come_from_the_seed_alone() -> None:
    """The digest was written down: neither another numpy nor another day may change the numbers."""
    work = replace(contest.WORKLOADS["logistic"], clients=2, examples=3)
    one, two, other = contest.make(work, 0), contest.make(work, 0), contest.make(work, 1)
    for a, b, c in ((one.x, two.x, other.x), (one.y, two.y, other.y)):
        assert np.array_equal(a, b) and not np.array_equal(a, c)
    content = one.y.tobytes() + np.round(one.x, 3).tobytes() + one.start["logits.bias"].tobytes()
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == "e3ea74daf9ad0e77"


@pytest.mark.parametrize("model", contest.WORKLOADS)
def test_a_contestant_sees_what_was_made(model: str, tmp_path: Path) -> None:
    made = job_of(model, tmp_path / "job.npz")
    here = contest_torch.Local(tmp_path / "job.npz")
    assert here.work == made.work and here.x.shape[:2] == (2, 4)
    assert np.array_equal(here.x, made.x) and np.array_equal(here.y, made.y)
    arrays = contest_torch.arrays(here.module)
    assert arrays.keys() == made.start.keys() == contest.SHAPES[model].keys()
    assert all(np.array_equal(arrays[name], made.start[name]) for name in arrays)
    x, y = here.shuffled(1)
    visited = {(a.numpy().tobytes(), b.numpy().tobytes()) for a, b in zip(x, y, strict=True)}
    there = {(a.tobytes(), b.tobytes()) for a, b in zip(made.x[1], made.y[1], strict=True)}
    assert visited == there and len(there) == 4


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("logistic", 7850), ("emnist", 1_199_882), ("cifar", 1_626_442), ("lstm", 822_570)],
)
def test_the_models_are_those_of_the_field(model: str, parameters: int) -> None:
    """LSTM: 90*8, 4*256*(8 + 256 + 2), 4*256*(2*256 + 2) and 90*257 parameters."""
    assert sum(int(np.prod(shape)) for shape in contest.SHAPES[model].values()) == parameters


def test_dropout_is_on_and_can_be_left_out(tmp_path: Path) -> None:
    for dropout, same in ((True, False), (False, True)):
        path = tmp_path / f"{dropout}.npz"
        made = job_of("emnist", path, dropout=dropout)
        net, x = contest_torch.module(made.work, made.start), torch.from_numpy(made.x[0])
        assert torch.equal(net(x), net(x)) == same


def test_training_is_learned_from(tmp_path: Path) -> None:
    """Without that, equal losses would say nothing about equal work."""
    made = job_of("logistic", path := tmp_path / "job.npz", clients=1, examples=300)
    here = contest_torch.Local(path)
    start = contest_torch.probe_loss(path, made.start)
    for _ in range(5):
        here.train(0)
    assert contest_torch.probe_loss(path, contest_torch.arrays(here.module)) < 0.7 * start


def test_the_plain_loop_and_vecfl_end_with_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run_apart", run_here)
    names = [FIRST, ("plain", "1 thread, as written"), ("vecfl", "auto")]
    assert compare.check("logistic", names)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(" agrees " in line for line in said)
    # A contestant that trains more rounds than it says is found.
    command, found = compare.train, {}

    def cheats(name: compare.Name, job: Path, rounds: int, *rest: Path) -> object:
        found[name] = rounds + (name != FIRST)
        return command(name, job, found[name], *rest)

    monkeypatch.setattr(compare, "train", cheats)
    assert not compare.check("logistic", names[:2]) and found == {FIRST: 3, names[1]: 4}
    assert " DISAGREES " in capsys.readouterr().out.splitlines()[1]


def test_the_table_by_hand() -> None:
    """Made-up times of three contestants; the slowest took two turns."""
    said = {
        FIRST: [{"times": [0.0, 1.0, 3.0, 5.0], "loss": 1.0, "startup_s": 2.0, "peak_mib": 100.0}],
        TUNED: [{"times": [0.0, 9.0, 10.0, 11.0], "loss": 1.1, "startup_s": 3.0, "peak_mib": 90.0}],
        PFL: [
            {"times": [0.0, 1.0, 2.0, 6.0], "loss": 1.12, "startup_s": 2.0, "peak_mib": None},
            {"times": [0.0, 7.0, 9.0, 12.0], "loss": 1.14, "startup_s": 4.0, "peak_mib": 70.0},
        ],
    }
    for one in (one for many in said.values() for one in many):
        one["versions"] = {"python": "3"}
    table = compare.rows("logistic", said, start=2.2)
    assert [(row["rival"], row["setting"]) for row in table] == [TUNED, FIRST, PFL]
    fast, first, pfl = table
    assert (fast["p50_ms"], first["p50_ms"], fast["speedup"], first["speedup"]) == (1e3, 2e3, 2, 1)
    # Rounds of 1, 4, 2 and 3 s after the first of each process: 2.5 s, 100 clients of 60 examples.
    assert (pfl["p50_ms"], pfl["p20_ms"], pfl["p80_ms"]) == (2500, 1600, 3400)
    assert (pfl["repeats"], pfl["rounds"], pfl["speedup"]) == (2, 4, 0.8)
    rates = (pfl["clients_per_s"], pfl["samples_per_s"], pfl["client_steps_per_s"])
    assert rates == (100 / 2.5, 6000 / 2.5, 600 / 2.5)
    assert (pfl["startup_s"], pfl["peak_mib"]) == (3.0, 70.0)
    # The plain loop gained 2.2 - 1.0; a tenth of it, 0.12, is as far as a loss may be.
    assert pfl["loss"] == pytest.approx(1.13)
    assert [row["same_work"] for row in table] == [True, True, False]
    head, *printed = compare.lines(table)
    assert head.split()[:3] == ["workload", "rival", "setting"] and len(printed) == 3
    assert printed[2].endswith("NOT THE SAME WORK") and "NOT" not in printed[0] + printed[1]
    assert "2500.0    (1600 to 3400)       40.0      0.8  1.1300     70      3.0" in printed[2]


def test_settings_that_are_far_from_the_best_take_one_turn() -> None:
    def once(*rounds: float) -> list[dict]:
        return [{"times": [0.0, *np.cumsum([9, *rounds])]}]

    first = {FIRST: once(5, 5), TUNED: once(1, 1), PFL: once(2, 2), JIT: once(2.4, 2.4)}
    assert compare.contenders(first, 1.25) == [FIRST, TUNED, PFL, JIT]
    first[JIT] = once(2.6, 2.6)
    assert compare.contenders(first, 1.25) == [FIRST, TUNED, PFL]  # the baseline stays
    assert compare.contenders(first, float("inf")) == list(first)


def test_a_contestant_that_is_not_there_or_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIVALS", str(tmp_path))
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--rivals", "pfl", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        compare.main()
    said = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and not out.exists()
    assert said == [f"pfl is left out: not installed, no {tmp_path}/pfl/bin/python (install.sh)"]
    # In processes of their own: one that trains, and one that does not understand its flags.
    monkeypatch.setitem(compare.CONTESTANTS, odd := ("plain", "odd"), compare.Setting("--odd"))
    assert not compare.check("logistic", [odd])
    agrees, failed = capsys.readouterr().out.splitlines()
    assert " agrees " in agrees
    assert "DISAGREES failed: 2: run_plain.py: error" in failed


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_memory_counts_children_and_none_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "EVERY", 0.2)
    hold = "import time; x = bytearray(60 << 20); time.sleep(2.2); print('{\"times\": [0, 0]}')"
    two = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    found = apart.run_apart([sys.executable, "-c", two], {}, 30)
    assert 60 < found["peak_mib"] < 120
    forever = "import subprocess as s; print(s.Popen(['sleep', '60']).pid, file=open(PID, 'w'))"
    forever = forever.replace("PID", repr(f"{tmp_path}/pid")) + "; s.run(['sleep', '60'])"
    with pytest.raises(apart.Failed, match="no end after 4 s"):
        apart.run_apart([sys.executable, "-c", forever], {}, 4)
    child, ends = Path("/proc", (tmp_path / "pid").read_text().strip()), time.monotonic() + 10
    while child.exists() and time.monotonic() < ends:
        with suppress(OSError):  # it ends just now
            if (child / "stat").read_text().split()[2] == "Z":  # it has ended, and nobody asked
                return
        time.sleep(0.05)
    assert not child.exists()


def test_the_peak_counts_what_forks_have_of_their_own() -> None:
    """60 MiB that a fork writes, once; what it shares with this process is here already."""
    shared, before = bytearray(60 << 20), rows.peak_mib()
    ours, theirs = Pipe()

    def hold() -> None:
        own = bytearray(60 << 20)
        theirs.send(len(own) + len(shared))
        theirs.recv()

    with warnings.catch_warnings():  # the fork does no more than that
        warnings.simplefilter("ignore", DeprecationWarning)
        fork = get_context("fork").Process(target=hold)
        fork.start()
    try:
        ours.recv()
        grown = rows.peak_mib() - before
    finally:
        ours.send(0)
        fork.join()
    assert 55 < grown < 100
    assert rows.peak_mib() - before < 50


@pytest.mark.parametrize("script", sorted(RIVALS.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_compile(script: Path, tmp_path: Path) -> None:
    py_compile.compile(str(script), cfile=str(tmp_path / "out.pyc"), doraise=True)


def test_every_rival_has_pinned_versions() -> None:
    names = {compare.SCRIPTS.get(rival, rival) for rival, _ in compare.CONTESTANTS}
    for name in names - set(compare.HERE):
        pins = (RIVALS / "requirements" / f"{name}.txt").read_text().split()
        assert all("==" in pin for pin in pins) and any(pin.startswith("numpy==") for pin in pins)
        assert name in (RIVALS / "install.sh").read_text()
        assert (RIVALS / f"run_{name}.py").exists()
