"""Runs that end before their last round are finished: their files, and what going on does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vecfl
from tests.persist.test_evaluations import run as two_periods
from tests.persist.tiny import TinyArgs
from vecfl.checkpoint import rounds_in
from vecfl.errors import InputError
from vecfl.flags import RunArgs, check_run
from vecfl.simulation import Simulation

Tiny = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]
PATIENT = {"watch": "eval/loss:min", "patience": 2, "rounds": 40, "checkpoint_every": 3}


def first_after(values: list[float], enough: Callable[[int], bool]) -> int:
    return next(t for t in range(1, len(values) + 1) if enough(t))


def test_a_target_that_is_reached_finishes_the_run(
    tiny: Tiny, rows: Rows, trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = rows(tiny("whole"))
    losses = [row["eval/loss"] for row in whole]
    target = sorted(losses)[3]
    ends = first_after(losses, lambda t: losses[t - 1] <= target)
    assert 1 < ends < 8, losses
    trained.clear()
    capsys.readouterr()
    stop_at = f"eval/loss<={target!r}"
    run_dir = tiny("part", stop_at=stop_at)
    said = f"stopped         after round {ends}: eval/loss {losses[ends - 1]:g} <= {target:g}\n"
    assert said in capsys.readouterr().out
    assert trained == list(range(1, ends + 1)) and rows(run_dir) == whole[:ends]
    run = vecfl.load_run(run_dir)
    assert run.finished and run.round == ends and max(rounds_in(run_dir / "checkpoints")) == ends
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    tiny("part", resume="auto", stop_at=stop_at)
    assert said in capsys.readouterr().out and len(trained) == ends
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    (run_dir / "curves.png").unlink()
    tiny("part", resume="auto", stop_at=stop_at)
    assert (run_dir / "curves.png").exists() and len(trained) == ends
    assert said in capsys.readouterr().out
    tiny("part", resume="auto")  # without the target it goes on
    assert trained[ends:] == list(range(ends + 1, 9)) and rows(run_dir) == whole
    assert "stopped" not in capsys.readouterr().out


@pytest.mark.parametrize("fall_back", [False, True])
@pytest.mark.parametrize("back", [1, 2])
def test_patience_ends_the_run_and_survives_going_on(
    tiny: Tiny,
    rows: Rows,
    trained: list[int],
    capsys: pytest.CaptureFixture[str],
    back: int,
    fall_back: bool,
) -> None:
    flags = PATIENT | {"fall_back": fall_back}
    whole = tiny("whole", **flags)
    losses = [row["eval/loss"] for row in rows(whole)]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 40
    out = capsys.readouterr().out
    assert f"after round {best + 2}: 2 evaluations without a better eval/loss, the best is" in out
    # Cut where the count stands at one or two: it is counted on, not anew.
    tiny("part", **flags | {"checkpoint_every": 1, "keep": 99})
    trained.clear()
    file = Path("part") / "checkpoints" / f"round-{best + 2 - back:06d}.ckpt"
    tiny(None, resume=str(file), **flags | {"checkpoint_every": 1, "keep": 99})
    assert trained == list(range(best + 3 - back, best + 3))
    assert rows(Path("part")) == rows(whole) and (Path("part") / "model.pt").exists()
    assert best in rounds_in(whole / "checkpoints")


def test_a_metric_counts_wherever_it_is_told(tiny: Tiny, rows: Rows) -> None:
    """train/loss stands in every row; the round that ends a run is evaluated."""
    run_dir = tiny(stop_at="train/loss<=100", eval_every=3)
    assert [("eval/loss" in row) for row in rows(run_dir)] == [True]
    (first,) = rows(tiny("one", rounds=1))
    assert rows(run_dir) == [first]


def scripted(monkeypatch: pytest.MonkeyPatch, values: dict[str, list[float]]) -> None:
    """`Simulation.evaluate` gives these values of NAME/loss after round 0, 1, 2, ..."""

    def evaluate(sim: Simulation, state: Any, columns: Any, name: str = "eval") -> Any:
        return {f"{name}/loss": values[name][state.round]}

    monkeypatch.setattr(Simulation, "evaluate", evaluate)


FALLS = [9.0, 8.0, 7.0] + [7.5] * 38  # the best in round 2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("flags", "ends"),
    [
        # No better in rounds 3, 4 and 5; the test is due in none of them.
        ({"watch": "validation/loss:min", "patience": 3}, 5),
        ({"watch": "validation/loss:min", "patience": 1}, 3),
        # Evaluated in rounds 10, 20, 30: the best is that of 10, and 20, 30 are no better.
        ({"watch": "test/loss:min", "patience": 2}, 30),
        ({"stop_at": "validation/loss<=7"}, 2),
        ({"stop_at": "validation/loss<=9"}, 1),  # so is the first model, which is to be trained
        ({"stop_at": "test/loss<=7.5"}, 10),
        ({"stop_at": "test/loss<=7"}, 40),
        ({"watch": "train/loss:max", "stop_at": "validation/loss<=8"}, 1),
    ],
)
def test_evaluations_of_several_periods(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], ends: int, first: bool
) -> None:
    test = [9.0] + FALLS[1:] if "watch" not in flags else [9.9] + [7.5] * 40
    scripted(monkeypatch, {"validation": FALLS, "test": test})
    if first:
        flags = flags | {"initial_evaluation": True}
    found = two_periods("run", {"validation": 1, "test": 10}, rounds=40, **flags)
    found = [row for row in found if row["round"]]
    assert len(found) == ends
    told = [row["round"] for row in found if "test/loss" in row]
    assert told == sorted({*range(10, ends + 1, 10), ends})  # and after the last round
    assert all("validation/loss" in row for row in found)


def test_patience_over_several_periods_goes_on_from_a_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {"validation": FALLS, "test": FALLS})
    flags = {"watch": "validation/loss:min", "patience": 3, "rounds": 40, "checkpoint_every": 1}
    periods = {"validation": 1, "test": 10}
    whole = two_periods("run", periods, **flags, keep=9)
    for round in (2, 3, 4):  # where the count stands at 0, 1, 2
        file = f"run/checkpoints/round-{round:06}.ckpt"
        assert two_periods(None, periods, **flags, keep=9, resume=file) == whole


def test_what_is_refused(tiny: Tiny) -> None:
    for flags, said in (
        ({"patience": 2}, "--patience: expected --watch beside it, got 2"),
        ({"patience": 0, "watch": "a:min"}, "--patience: expected at least 1, got 0"),
        ({"stop_at": "x"}, "--stop-at: expected METRIC>=VALUE or METRIC<=VALUE, got x"),
    ):
        with pytest.raises(InputError) as caught:
            tiny(None, **flags)
        assert str(caught.value) == said
    assert not Path("runs").exists()
    check_run(RunArgs(track="none", stop_at="eval/accuracy>=0.97"))
    assert TinyArgs().patience is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"stop_at": "eval/acc>=0.9"}, "--stop-at: no metric eval/acc in this run; is it eval/acc"),
        ({"stop_at": "evl/accuracy>=1"}, "--stop-at: no metric evl/accuracy in this run; is it ev"),
        (
            {"around": ("server_on_plateau('eval/acc', 'max')", "ema(0.5)")},
            "--around: no metric eval/acc in this run; is it eval/accuracy?",
        ),
        (
            {"around": ("clients_on_plateau(metric='evl/loss', direction='min')",)},
            "--around: no metric evl/loss in this run; is it eval/loss?",
        ),
    ],
)
def test_a_misspelt_metric_is_told_before_anything_is_trained(
    tiny: Tiny, trained: list[int], flags: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        tiny(initial_evaluation=True, **flags)
    assert str(caught.value).startswith(said) and trained == []


def test_metrics_that_are_there_are_not_misspelt(tiny: Tiny, trained: list[int]) -> None:
    around = ("server_on_plateau('train/loss', 'min')", "clients_on_plateau('eval/loss', 'min')")
    flags = {"around": around, "stop_at": "train/loss<=-1", "rounds": 1}
    tiny(initial_evaluation=True, **flags)
    assert trained == [1]
