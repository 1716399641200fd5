"""What a recorded run evaluates and when, the first model, and the results of its clients."""

import csv
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vecfl
from tests.persist.tiny import X, Y, arguments, make_simulation
from tests.times import without_times
from vecfl.checkpoint import rounds_in
from vecfl.errors import InputError
from vecfl.evaluations import Evaluation, Evaluations, held_out
from vecfl.flags import RunArgs
from vecfl.record import record_run
from vecfl.resume import resume
from vecfl.simulation import Simulation
from vecfl.state import State
from vecfl.track import forget_clients, write_clients

Tiny = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]


def run(out: str | None, periods: dict[str, int], **flags: Any) -> list[dict[str, Any]]:
    """The rows of a run with an evaluation of each name and period."""
    args, before = resume(arguments(out, **flags), "tiny")
    sim = make_simulation(args)

    def of(name: str) -> Any:
        return lambda state: sim.evaluate(state, {"x": X, "y": Y}, name)

    evaluations = [Evaluation(of(name), every) for name, every in periods.items()]
    record_run(sim, evaluations, args, recipe="tiny", before=before)
    run_dir = Path(out or flags["resume"])
    run_dir = run_dir if run_dir.is_dir() else run_dir.parents[1]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [without_times(json.loads(line)) for line in lines]


def told(rows: list[dict[str, Any]], name: str) -> list[int]:
    return [row["round"] for row in rows if f"{name}/loss" in row]


def test_evaluations_have_periods_of_their_own(tiny: Tiny) -> None:
    rows = run("run", {"validation": 2, "test": 3}, initial_evaluation=True)
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert told(rows, "validation") == [0, 2, 4, 6, 8]
    assert told(rows, "test") == [0, 3, 6, 8]
    assert told(run("later", {"test": 5}), "test") == [5, 8]
    for row in rows:  # equal data, equal values
        if row.keys() >= {"validation/loss", "test/loss"}:
            assert row["validation/loss"] == row["test/loss"]


def test_the_best_of_two_evaluations_is_kept(tiny: Tiny, capsys: Any) -> None:
    """--watch may take the rarer one; rounds without it are no failure."""
    flags = {"watch": "test/loss:min", "keep": 1, "initial_evaluation": True}
    rows = run("run", {"validation": 1, "test": 3}, **flags)
    losses = {row["round"]: row["test/loss"] for row in rows if "test/loss" in row}
    best = min(losses, key=lambda round: losses[round])
    assert vecfl.load_run("run").best_round == best
    assert best in rounds_in(Path("run/checkpoints"))


def test_two_evaluations_of_one_name_are_refused(tiny: Tiny) -> None:
    call = Evaluations([Evaluation(lambda _: {"a/loss": 1.0}, 1)] * 2, 1, 8)
    with pytest.raises(InputError, match="^two evaluations give a/loss; give one another name="):
        call(State(1, {}), {"round": 1})


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_period_is_a_number_of_rounds(every: Any) -> None:
    with pytest.raises(InputError, match=r"^Evaluation\(every=.*\): expected rounds, at least 1$"):
        Evaluation(lambda _: {}, every)


def test_the_first_model_is_round_0(tiny: Tiny, rows: Rows) -> None:
    """It is what the module was, and training is as it is without."""
    plain, run_dir = tiny("plain"), tiny("run", initial_evaluation=True)
    first, *others = rows(run_dir)
    sim = make_simulation(arguments("none"))
    state = sim.start()
    expected = sim.evaluate(state, {"x": X, "y": Y}) | sim.evaluate_clients(state)
    assert first == {"round": 0, **expected}
    assert others == rows(plain)
    a, b = torch.load("plain/model.pt"), torch.load("run/model.pt")
    assert all(torch.equal(a[name], b[name]) for name in a)
    run = vecfl.load_run(run_dir)
    assert run.metrics["round"].tolist() == list(range(9))
    assert math.isnan(run.metrics["train/loss"][0]) and run.metrics["eval/loss"][0] > 0


def test_a_run_with_a_first_row_goes_on(tiny: Tiny, rows: Rows) -> None:
    """From any checkpoint, that of round 0 too, where the first model is evaluated again."""
    plan = {"initial_evaluation": True, "checkpoint_every": 2, "keep": 9, "watch": "eval/loss:min"}
    whole = tiny("whole", **plan, fall_back=True)
    for round in (0, 2, 6, 8):
        part = Path(shutil.copytree(whole, f"part-{round}"))
        name = f"{part}/checkpoints/round-{round:06}.ckpt"
        tiny(None, resume=name, **plan, fall_back=True)
        assert rows(part) == rows(whole), round
    short = tiny("short", rounds=3, **plan)
    with pytest.raises(InputError, match="jsonl, line 2: not the row of round 1$"):
        lines = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
        (short / "metrics.jsonl").write_text(lines[0] + "".join(lines[2:]))
        tiny("short", resume="auto", **plan)


@pytest.mark.parametrize(
    "rule", ["eval/acuracy:max", "evl/accuracy:max", "eval/loss_p90:min", "client/accuracy:max"]
)
def test_a_misspelt_metric_ends_the_run_before_its_first_round(
    tiny: Tiny, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulation, "round", lambda *_: pytest.fail("a round was trained"))
    with pytest.raises(InputError, match=f"^--watch: no metric {rule[:-4]} in this run; is it "):
        tiny(watch=rule, initial_evaluation=True)
    assert (Path("run") / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("rule", ["train/loss:min", "update/norm_mean:min", "system/round_s:min"])
def test_metrics_of_rounds_may_be_watched(tiny: Tiny, rule: str) -> None:
    tiny(watch=rule, initial_evaluation=True, statistics=2)
    assert vecfl.load_run("run").best_round in range(1, 9)


def test_the_first_model_may_be_the_best(tiny: Tiny, rows: Rows, capsys: Any) -> None:
    """A learning rate that spoils everything: round 0 stays the best, and is fallen back to."""
    flags = {"watch": "eval/accuracy:max", "fall_back": True, "keep": 1, "checkpoint_every": 3}
    run_dir = tiny(initial_evaluation=True, seed=11, **flags)
    values = [row["eval/accuracy"] for row in rows(run_dir)]
    run = vecfl.load_run(run_dir)
    assert run.best_round == values.index(max(values))
    assert run.best is not None


def test_the_parts_of_a_runs_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each look at moves on by one: 2 s for the evaluation of the first model ..."""
    clock = iter(range(100))
    monkeypatch.setattr("vecfl.evaluations.time.perf_counter", lambda: float(next(clock)))
    call = Evaluations(lambda _: {"eval/loss": 1.0}, 2, 8)  # 0
    first, every = call(State(0, {}), {"round": 0})  # begins at 1, ends at 2
    assert (first["system/housekeeping_s"], first["system/evaluate_s"], every) == (1, 1, True)
    # A round of half a second, told at 3: one second since the evaluation ended, less the round.
    second, every = call(State(1, {}), {"round": 1, "system/round_s": 0.5})  # 3, 4
    assert (second["system/housekeeping_s"], every) == (0.5, False)
    assert "system/evaluate_s" not in second


def test_a_share_of_each_client_is_held_out() -> None:
    sim = make_simulation(arguments("none"))
    train, none = held_out(RunArgs(), sim.data, 0)
    assert none is None and train is sim.data
    train, part = held_out(RunArgs(validation=0.5), sim.data, 0)
    assert part is not None
    sizes = zip(train.sizes.tolist(), part.sizes.tolist(), sim.data.sizes.tolist(), strict=True)
    assert all(a + b == n and abs(a - b) <= 1 for a, b, n in sizes)
    train, part = held_out(RunArgs(validation=0.3), sim.data, 0, clients=True)
    assert part is not None and (train.num_clients, part.num_clients) == (5, 2)
    with pytest.raises(InputError, match="^--test-every: needs --validation, a part of its own to"):
        held_out(RunArgs(test_every=2), sim.data, 0)


def test_results_of_clients_are_files(tiny: Tiny) -> None:
    run_dir = tiny(rounds=5, eval_every=2, client_results=True, statistics=4)
    names = [path.name for path in sorted((run_dir / "clients").iterdir())]
    assert names == ["round-000002.csv", "round-000004.csv", "round-000005.csv"]
    assert not (tiny("without", rounds=2) / "clients").exists()
    args = arguments("again", rounds=5, statistics=4)
    sim = make_simulation(args)
    state = sim.start()
    for _ in range(4):
        state, _ = sim.round(state)
    expected = sim.client_results(state)
    with (run_dir / "clients/round-000004.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["client", "examples", "loss", "accuracy", "weight", "update_norm"]
    assert [row["client"] for row in rows] == [*"0123456"]
    assert [int(row["examples"]) for row in rows] == sim.data.sizes.tolist()
    for name in ("loss", "accuracy", "weight", "update_norm"):  # every digit
        assert repr([float(row[name]) for row in rows]) == repr(expected[name].tolist())


def test_ids_are_quoted(tmp_path: Path) -> None:
    ids = ["7", 'a "b"', "x,y", "line\nbreak", "ä", ""]
    columns = {"client": ids, "loss": torch.tensor([1.5, math.nan, 0, 1e-300, -1, 1 / 3]).double()}
    write_clients(tmp_path, "client", 3, columns)
    text = (tmp_path / "clients/round-000003.csv").read_text(encoding="utf-8")
    assert text.startswith('"client","loss"\n"7",1.5\n"a ""b""",nan\n"x,y",0.0\n')
    reader = csv.reader(io.StringIO(text, newline=""), quoting=csv.QUOTE_NONNUMERIC)
    rows = list(reader)[1:]
    assert [row[0] for row in rows] == ids
    write_clients(tmp_path, "unseen", 3, {"client": [7], "loss": [0.5]})
    assert (tmp_path / "clients/unseen-round-000003.csv").read_text() == '"client","loss"\n7,0.5\n'


def test_files_of_later_rounds_go(tmp_path: Path) -> None:
    for name, round in (("client", 2), ("client", 4), ("unseen", 4), ("client", 1_000_000)):
        write_clients(tmp_path, name, round, {"client": [1]})
    (tmp_path / "clients/.round-000002.csv.77").touch()
    (tmp_path / "clients/notes.csv").touch()
    forget_clients(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "clients").iterdir())
    assert left == ["notes.csv", "round-000002.csv"]
    forget_clients(tmp_path / "nowhere", 0)


def test_a_resumed_run_leaves_the_files_of_one_that_never_stopped(tiny: Tiny) -> None:
    plan = {"client_results": True, "statistics": 3, "checkpoint_every": 3, "keep": 9}
    whole, part = tiny("whole", **plan), tiny("part", **plan)
    last = part / "clients/round-000008.csv"
    last.write_text("torn")
    tiny(None, resume="part/checkpoints/round-000003.ckpt", rounds=5, **plan)
    found = {path.name: path.read_bytes() for path in (part / "clients").iterdir()}
    there = {path.name: path.read_bytes() for path in (whole / "clients").iterdir()}
    assert found == {n: b for n, b in there.items() if n <= "round-000005.csv"} and len(found) == 5
