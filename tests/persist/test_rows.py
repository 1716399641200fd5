"""Recorded runs whose clients keep rows: what goes on has the rows of the checkpoint."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vecfl.files
from tests.persist.tiny import arguments, make_simulation
from vecfl.checkpoint import load, path_of, rounds_in
from vecfl.errors import InputError
from vecfl.simulation import Simulation
from vecfl.table.journal import Journal

Tiny = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]
PLACES = ["memory", "disk"]


def kept(run_dir: Path) -> dict[str, torch.Tensor]:
    """What clients keep after the last checkpoint."""
    there = (run_dir.parent / f"{run_dir.name}-rows").exists()
    sim = make_simulation(arguments(str(run_dir), rows="disk" if there else "memory"))
    content = load(path_of(run_dir / "checkpoints", max(rounds_in(run_dir / "checkpoints"))))
    table = sim.load(content["run"]).table
    assert table is not None
    return table.gather(torch.arange(7))


def assert_same(one: Path, other: Path, rows: Rows) -> None:
    assert rows(one) == rows(other)
    models = (torch.load(path / "model.pt") for path in (one, other))
    torch.testing.assert_close(*models, rtol=0, atol=0)
    torch.testing.assert_close(kept(one), kept(other), rtol=0, atol=0)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tiny: Tiny, rows: Rows, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny("whole", rows="memory")
    visits = kept(whole)["visits"]  # 4 of 7 clients in each of 8 rounds
    assert visits.sum() == 32 and kept(whole)["habit"].any()
    part = tiny("part", rows=place, checkpoint_every=3)
    last = path_of(part / "checkpoints", 8)
    last.write_bytes(last.read_bytes()[:-7])
    tiny("part", rows=place, checkpoint_every=3, resume="auto")
    assert "round-000008.ckpt: damaged" in caplog.text
    assert_same(whole, part, rows)


@pytest.mark.parametrize("place", PLACES)
def test_every_checkpoint_that_is_kept_leads_on(tiny: Tiny, rows: Rows, place: str) -> None:
    """Forwards and backwards; of those that are pruned no journal is left."""
    plan = {"rows": place, "checkpoint_every": 1, "keep": 3, "watch": "eval/loss:min"}
    whole, part = tiny("whole", rows="memory"), tiny("part", **plan)
    for _ in range(3):
        there = rounds_in(part / "checkpoints")
        assert len(there) in (3, 4)  # the last three, and the best
        tiny("part", resume=f"part/checkpoints/{path_of(Path(), there[0]).name}", **plan)
        assert_same(whole, part, rows)
    if place == "disk":
        journals = sorted(
            int(p.name.removeprefix("undo-")) for p in Path("part-rows").glob("undo-*")
        )
        assert journals == rounds_in(part / "checkpoints")


def test_a_table_of_another_run_is_refused(tiny: Tiny) -> None:
    tiny("one", rows="disk", rounds=2)
    tiny("other", rows="disk", rounds=2)
    Path("one-rows").rename("mine")
    Path("other-rows").rename("one-rows")
    with pytest.raises(InputError, match="one-rows is not the table that this checkpoint"):
        tiny("one", rows="disk", resume="auto", rounds=3)


def test_falling_back_is_refused_for_the_rows_would_stay(tiny: Tiny) -> None:
    with pytest.raises(InputError) as caught:
        tiny("run", rows="memory", watch="eval/loss:min", fall_back=True)
    assert str(caught.value) == (
        "--fall-back: clients of habit keep rows between rounds, which do not go back with the "
        "model; give --watch alone"
    )
    assert not Path("run").exists()


def test_falling_back_is_refused_where_messages_are_on_their_way(tiny: Tiny) -> None:
    late = {"around": ("delayed(stale(0.3))",), "watch": "eval/loss:min"}
    with pytest.raises(InputError) as caught:
        tiny("run", fall_back=True, **late)
    assert str(caught.value) == (
        "--fall-back: messages that have arrived since would arrive again; give --watch alone"
    )
    assert not Path("run").exists()
    tiny("run", **late)
    assert Path("run/model.pt").exists()


def test_a_disk_without_room_for_a_journal_is_a_warning(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the checkpoint of round 3: that of round 0 stays, and the journal that leads to it."""
    real = Journal.open

    def full(journal: Journal, base: int) -> None:
        if base == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "undo-3")
        real(journal, base)

    monkeypatch.setattr(Journal, "open", full)
    part = tiny("part", rows="disk", checkpoint_every=3)
    assert "round 3 is not saved: undo-3: No space left on device; free some" in caplog.text
    assert rounds_in(part / "checkpoints") == [6, 8]
    assert_same(tiny("whole", rows="memory"), part, rows)


@pytest.mark.parametrize("step", ["jsonl written", "jsonl renamed", "yaml written", "load"])
def test_going_back_may_be_killed_and_refused(
    tiny: Tiny, rows: Rows, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is a run that goes on from the newest of its checkpoints."""
    plan = {"rows": "disk", "checkpoint_every": 2, "keep": 9}
    part = tiny("part", **plan)
    lines = (part / "metrics.jsonl").read_text()
    (part / "metrics.jsonl").write_text("x")
    back = {"resume": "part/checkpoints/round-000004.ckpt", **plan}
    with pytest.raises(InputError, match="line 1: not the row of round 1"):
        tiny("part", **back)
    (part / "metrics.jsonl").write_text(lines)

    class Killed(BaseException):
        pass

    load = Simulation.load

    def reached(name: str) -> None:
        if name == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vecfl.files, "reached", reached)
        patch.setattr(Simulation, "load", lambda *_, **__: reached("load") or load(*_, **__))
        tiny("part", **back)
    tiny("part", resume="auto", **plan)
    assert_same(tiny("whole", rows="memory"), part, rows)
