"""1, 2 and 3 ranks make the same run, and end together.

One start of torchrun serves all cases of a number of ranks.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vecfl
import vecfl.finish
import vecfl.record
from vecfl.cli import main
from vecfl.cohorts import Cohorts
from vecfl.mesh import Mesh

from ..oracles.bridge import dataset
from ..oracles.tasks import PROBLEMS
from ..persist import tiny
from ..times import without_times
from .cases import CASES, KINDS, B, all_cases, logs

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
MINUTE = 60
# vmap and stacked add up over the slots of a rank in another order, so that rows differ in bits;
# beyond the grid nothing is promised but a warning
BITS = sorted(CASES.keys() - {"vmap", "stacked", "beyond the grid"})
LOOP = ("--backend", "loop", "--workers", "1", "--threads", "1", "--slots", "1")
ALIKE = ("--exact-sums", "True", "--rows", "disk")
HOW = (*LOOP, "--cohort", "4", "--batch", "3", "--track", "none")


def start(ranks: int, *module: str, options: tuple[str, ...] = (), **env: str) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **env}
    command = [*LAUNCH, f"--nproc-per-node={ranks}", *options, "-m", *module]
    kind: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, **kind)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, within a minute."""
    try:
        out, err = process.communicate(timeout=MINUTE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[Any, Any]]:
    """What all cases give on 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[int, dict[Any, Any]] = {1: all_cases(folder)}
    for ranks in (2, 3):
        code, _, err = end(start(ranks, "tests.ranks.cases", str(folder / f"{ranks}")))
        assert code == 0, err
        found[ranks] = torch.load(folder / f"{ranks}" / "found", weights_only=True)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("name", "exact"), KINDS)
def test_the_same_run(worlds: Any, name: str, exact: bool, ranks: int) -> None:
    one, some = worlds[1][name, exact], worlds[ranks][name, exact]
    rtol = 1e-5 if name == "float32" else 1e-9
    torch.testing.assert_close(some["models"], one["models"], rtol=rtol, atol=rtol / 1e3)
    torch.testing.assert_close(some["rows"], one["rows"], rtol=rtol, atol=rtol / 1e3)
    assert some["warned"] == one["warned"]
    for kind in ("metrics", "evaluated"):
        left, right = flat(some[kind]), flat(one[kind])
        assert left.keys() == right.keys()
        for key, value in left.items():
            near = not isinstance(value, str)
            expected = pytest.approx(right[key], rel=rtol, nan_ok=True) if near else right[key]
            assert value == expected, key
    if exact and name in BITS:
        assert torch.equal(some["models"], one["models"])
        torch.testing.assert_close(some["rows"], one["rows"], rtol=0, atol=0)
        assert repr(some["metrics"]) == repr(one["metrics"])
        assert repr(some["evaluated"]) == repr(one["evaluated"])


def flat(found: Any) -> dict[str, float]:
    rounds = found if isinstance(found, list) else [found]
    return {f"{i} {key}": value for i, row in enumerate(rounds) for key, value in row.items()}


def test_the_cases_are_what_they_say(worlds: Any) -> None:
    """Every algorithm ends elsewhere, the plain sum is not already exact, a cohort may be empty."""
    last = {
        name: found["models"][-1].double() for (name, exact), found in worlds[1].items() if exact
    }
    ends = [tuple(model.tolist()) for model in last.values()]
    assert len(set(ends)) >= len(ends) - 3  # lists of clients that come to the same
    differ = [n for n in BITS if not torch.equal(*(worlds[w][n, False]["models"] for w in (1, 3)))]
    assert len(differ) > len(BITS) // 2
    for name in last:
        plain, exact = (worlds[1][name, e]["models"].double() for e in (False, True))
        torch.testing.assert_close(
            exact, plain, rtol=1e-5 if name == "float32" else 1e-9, atol=1e-9
        )
    sent = [m["comm/up_bytes"] for m in worlds[3]["codec", False]["metrics"]]
    assert sent[0] == 4 * sent[1] > 0 == sent[2]  # not finite: sent
    assert worlds[3]["error feedback", True]["rows"]["0.error_feedback top_k 0.2.residual"].any()
    updates = worlds[3]["updates", True]
    assert [m["update/sampled"] for m in updates["metrics"]] == [3, 0, 2]
    norms = [updates["evaluated"][f"norm {k}"] > 0 for k in range(7)]
    assert norms == [True, False, True, True, True, False, False]  # 6 is not finite
    metrics = worlds[3]["repeats, nobody", False]["metrics"]
    assert [m["train/clients"] for m in metrics] == [3, 0, 3]  # client 1 has no examples
    said = (
        "round 1: updates or losses are too large for exact sums: last bits may depend on the order"
    )
    assert [worlds[1]["beyond the grid", e]["warned"] for e in (False, True)] == [[], [said]]
    rows = worlds[3]["rows", False]["rows"]
    assert rows["visits"].sum() > 10 and rows["visits"][3] == 0 and rows["habit"].any()
    # Clients of the second cohort: 2 has one example, 3 has a NaN; of the first, 6 comes twice.
    assert worlds[3]["not finite", True]["warned"] == [
        "round 1: client 3, 6, 6 dropped: not finite",
        "round 2: client 3 dropped: not finite",
    ]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_shared_out(worlds: Any, name: str, ranks: int) -> None:
    """Nothing is trained twice or by nobody; where it can be, it is even to a tenth.

    Two epochs of batches of 4: clients 5 0 1 23 3 4 8 take 4 0 2 12 2 2 4 steps, 26 a round. Of two
    ranks one takes 12 and 2, the other 4 4 2 2; of three ranks one has the 12 alone, so that the
    others have 8 and 6.
    """
    steps = worlds[ranks][name, False]["steps"]
    assert len(steps) == ranks and sum(steps) == worlds[1][name, False]["steps"][0]
    if name == "many":
        assert max(steps) <= 1.1 * min(steps)
    if name in ("fedavg", "fedprox", "buffers"):
        assert sorted(steps) == {2: [24, 28], 3: [12, 16, 24]}[ranks]
    if name == "cohort of 2":
        assert ranks == 2 or 0 in steps


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_are_not_alike_are_told_so(worlds: Any, ranks: int) -> None:
    line = f"rank 1 of {ranks} has another {{}} than rank 0; all need the same"
    expected = [
        "InputError: " + line.format("seed"),
        "InputError: " + line.format("model"),
        "InputError: " + line.format("population"),
        "InputError: " + line.format("algorithm"),
        "RankError: " + line.format("cohort"),
        "InputError: clients keep rows, which several ranks share on disk: give table=FOLDER",
        "InputError: by rank 0",
        "InputError: --resume: of-rank-0 does not exist; expected the directory of a run",  # by all
    ]
    assert worlds[ranks]["refused"] == [expected] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_weights_that_no_float_holds(worlds: Any, ranks: int) -> None:
    """exp(-5000) and less; a rank without a client has no weight at all."""
    one, some = logs(), worlds[ranks]["logs"]
    torch.testing.assert_close(some, one, rtol=1e-9, atol=1e-12)
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_wait_for_the_first_to_end(worlds: Any, ranks: int) -> None:
    assert worlds[ranks]["waits"] == [True] * ranks


def test_what_is_measured_is_the_share_of_a_rank() -> None:
    data = dataset(PROBLEMS["linear"].clients())
    large = [
        Cohorts(vecfl.everyone(), data, B, (0, 0), 0.0, None, Mesh(1, n)).large() for n in (1, 2, 3)
    ]
    assert [clients.tolist() for clients in large] == [[*range(7)], [0, 1, 2, 3], [0, 1, 2]]


def recipe(tmp_path: Path, *options: str, launch: tuple[str, ...] = (), **env: str) -> Any:
    out = str(tmp_path / "run")
    flags = [*HOW, "--out", out, *options]
    diary = str(tmp_path / "diary")
    return start(2, "tests.ranks.recipe", *flags, options=launch, DIARY=diary, **env)


def diary(tmp_path: Path, rank: int) -> list[int]:
    return [int(line) for line in (tmp_path / f"diary{rank}").read_text().split()]


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    found = [without_times(json.loads(line)) for line in lines]
    return [{k: v for k, v in row.items() if k != "system/ranks"} for row in found]


def test_a_rank_that_is_killed_ends_all(tmp_path: Path) -> None:
    """Rank 1 dies after round 8, where rank 0 waits to evaluate."""
    began = time.monotonic()
    code, _, err = end(recipe(tmp_path, "--rounds", "12", PLANT="kill:8"))
    assert code == 1 and time.monotonic() - began < MINUTE
    assert "Signal 9 (SIGKILL)" in err
    assert re.search(r"^error: another rank has ended or hangs: .*Connection", err, re.M), err
    assert diary(tmp_path, 0) == diary(tmp_path, 1) == list(range(1, 9))
    log = (tmp_path / "run/error.log").read_text()
    assert re.fullmatch(r"[-\d]+ [:\d]+, rank 0: another rank has ended or hangs: .*\n", log)


def test_patience_ends_the_run_of_all_ranks(tmp_path: Path) -> None:
    """All after the same round; what goes on with it finds it finished."""
    flags = ("--rounds", "40", "--watch", "eval/loss:min", "--patience", "2")
    code, out, err = end(recipe(tmp_path, *flags))
    rounds = diary(tmp_path, 0)
    assert code == 0, err
    said = f"stopped         after round {len(rounds)}: 2 evaluations without a better eval/loss"
    assert out.count(said) == 1 and len(rounds) < 40 and diary(tmp_path, 1) == rounds
    assert (tmp_path / "run/model.pt").exists()
    (tmp_path / "run/curves.png").touch()  # which this recipe does not draw
    code, out, err = end(recipe(tmp_path, *flags, "--resume", "auto"))
    assert code == 0 and out.count(said) == 1, err
    assert diary(tmp_path, 0) == diary(tmp_path, 1) == rounds


def test_a_restart_trains_what_is_missing_and_ends_with_the_bits_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints at 4, 8 and 12; rank 1 dies before that of 8, so that 5 to 12 are trained by the
    second attempt. The last one is saved once, with the round: else ranks would wait for others."""
    long = ("--rounds", "12", "--checkpoint-every", "4", *ALIKE)
    again = ("--resume", "auto", "--track", "auto")
    code, out, err = end(
        recipe(tmp_path, *long, *again, launch=("--max-restarts=1",), PLANT="kill:8")
    )
    assert code == 0, err
    assert diary(tmp_path, 1) == [*range(1, 9), *range(5, 13)]
    boards = [(tmp_path / f"diary{rank}.board").read_text().split() for rank in (0, 1)]
    assert boards == [["auto"] * 2, ["none"] * 2]  # W&B, in each attempt, is of rank 0
    assert out.count("test accuracy") == 1 and err.count("round 12/12") == 1  # by rank 0 alone

    alone = tmp_path / "alone"
    monkeypatch.setattr(vecfl.finish, "draw_curves", lambda run_dir: None)
    monkeypatch.setattr(sys, "argv", ["recipe", *HOW, "--out", str(alone / "run"), *long])
    main(tiny.run, tiny.TinyArgs)
    assert rows(tmp_path) == rows(alone) and [r["round"] for r in rows(alone)] == [*range(13)]
    one, two = (torch.load(folder / "run/model.pt") for folder in (alone, tmp_path))
    torch.testing.assert_close(two, one, rtol=0, atol=0)
    columns = [column_bytes(folder) for folder in (alone, tmp_path)]
    assert columns[0] == columns[1] and len(columns[0]) == 2


def column_bytes(folder: Path) -> list[bytes]:
    """What clients keep."""
    return [path.read_bytes() for path in sorted(folder.glob("run-rows/column_*"))]


# Of rank 0, which saves, at every step of it; of either at the end of a round; at ten moments.
SAVING = ("ckpt written", "ckpt synced", "ckpt renamed", "checkpoint pruned", "round logged")
DEATHS = [f"0:{step}:2" for step in SAVING] + ["0:round trained:7", "1:round evaluated:7"]
DEATHS += [f"{k % 2}:after:{0.05 + 0.1 * k:.2f}" for k in range(10)]


@pytest.mark.slow
def test_one_of_two_ranks_dies_at_any_step(tmp_path: Path) -> None:
    """The second attempt trains what no checkpoint has, and ends as a run that nobody disturbed."""
    flags = ("--rounds", "40", "--checkpoint-every", "3", *ALIKE, "--resume", "auto")
    assert end(recipe(tmp_path, *flags))[0] == 0
    expected, kept, died = rows(tmp_path), column_bytes(tmp_path), 0
    model = torch.load(tmp_path / "run/model.pt")
    for death in DEATHS:
        folder = tmp_path / death.replace(" ", "-")
        folder.mkdir()
        code, _, err = end(recipe(folder, *flags, launch=("--max-restarts=1",), DEATH=death))
        assert code == 0, (death, err)
        trained = diary(folder, 0)
        first = next((i for i in range(1, len(trained)) if trained[i] <= trained[i - 1]), 0)
        died += first > 0
        assert trained[:first] == [*range(1, first + 1)]
        assert trained[first:] == [*range(trained[first], 41)]
        assert first - 3 < trained[first] <= first + 1 and trained[first] % 3 == 1, death
        assert rows(folder) == expected and column_bytes(folder) == kept, death
        torch.testing.assert_close(torch.load(folder / "run/model.pt"), model, rtol=0, atol=0)
    assert died > len(DEATHS) // 2


def test_an_error_on_one_rank_is_the_cause_in_the_summary_and_in_the_log(tmp_path: Path) -> None:
    code, _, err = end(recipe(tmp_path, "--rounds", "20", PLANT="error:3"))
    assert code == 1
    cause = err[err.index("Root Cause") :]
    assert "rank      : 1" in cause and "ZeroDivisionError: planted" in cause
    log = (tmp_path / "run/error.log").read_text()
    assert "rank 1: Traceback" in log and "ZeroDivisionError: planted" in log


def test_models_that_differ_end_the_run_in_one_line(tmp_path: Path) -> None:
    """Models are compared as round 11 begins, then 21, ...: the difference of round 3 comes out."""
    code, _, err = end(recipe(tmp_path, "--rounds", "40", PLANT="other:3"))
    line = "error: rank 1 of 2 has another model than rank 0; all need the same\n"
    assert code == 1 and err.count(line) == 1
    assert diary(tmp_path, 0) == list(range(1, 12))


def test_a_signal_to_one_rank_stops_all_after_their_round(tmp_path: Path) -> None:
    """It comes after round 3 was added up, and rides along with round 4."""
    code, _, err = end(recipe(tmp_path, "--rounds", "2000", PLANT="signal:3"))
    assert code == 1 and err.count("stopped after round 4 of 2000") == 1
    assert "exitcode  : 143" in err[err.index("Root Cause") :]
    assert not (tmp_path / "run/error.log").exists()
    assert (tmp_path / "run/checkpoints/round-000004.ckpt").exists()
    assert diary(tmp_path, 0) == diary(tmp_path, 1) == [1, 2, 3, 4]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    code, _, err = end(recipe(tmp_path, "--rounds", "3"))
    assert code == 1 and "exitcode  : 2" in err
    assert len(re.findall(r"^error: .*run already holds a run", err, re.M)) == 1
