"""Where recorded runs keep the rows of clients: in memory, in --table, or beside the rest."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vecfl.record
import vecfl.table.table
from tests.persist.tiny import arguments, make_simulation
from vecfl.errors import InputError
from vecfl.signals import Stopped
from vecfl.simulation import Simulation

Tiny = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]
PLAN: dict[str, Any] = {"rows": "memory", "algorithm": "scaffold", "checkpoint_every": 3}


def same(one: Path, other: Path, rows: Rows) -> None:
    assert rows(one) == rows(other)
    models = (torch.load(path / "model.pt") for path in (one, other))
    torch.testing.assert_close(*models, rtol=0, atol=0)


def stopped_after(monkeypatch: pytest.MonkeyPatch, round: int) -> None:
    """The next run ends in an error behind this round."""
    train = Simulation.round

    def some(sim: Simulation, state: Any) -> Any:
        if state.round == round:
            raise KeyboardInterrupt
        return train(sim, state)

    monkeypatch.setattr(Simulation, "round", some)


@pytest.mark.parametrize("where", ["memory", "flag", "large"])
def test_a_run_goes_on_with_its_rows(
    tiny: Tiny, rows: Rows, where: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Stopped in round 6, behind the checkpoint of round 3; the flag names another path then."""
    whole = tiny("whole", **PLAN)
    caplog.set_level(logging.INFO, "vecfl")
    flags = {"table": "kept"} if where == "flag" else {}
    if where == "large":
        monkeypatch.setattr(vecfl.record, "LARGE", 100)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopped_after(patch, 5)
        tiny("part", **PLAN, **flags)
    if where == "flag":
        Path("kept").rename("moved")
        flags = {"table": "moved"}
    tiny("part", resume="auto", **PLAN, **flags)
    same(whole, part := Path("part"), rows)
    assert (part / "table" / "column_0.npy").exists() == (where == "large")
    assert ("lies in part/table: up to 0.00 GiB" in caplog.text) == (where == "large")


def test_rows_elsewhere_are_missed(tiny: Tiny) -> None:
    tiny("run", rounds=3, table="kept", **PLAN)
    line = "belongs to rows of clients on disk: give their folder, --table or Simulation"
    with pytest.raises(InputError, match=line):
        tiny("run", resume="auto", rounds=4, **PLAN)
    for _ in range(2):
        with pytest.raises(InputError, match="other is missing; if it was moved, give --table NEW"):
            tiny("run", resume="auto", rounds=4, table="other", **PLAN)
    assert not Path("other").exists()
    with pytest.raises(InputError, match="--table kept: clients of this algorithm keep nothing; "):
        tiny("plain", rounds=1, table="kept")


def test_another_run_does_not_take_the_rows(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first run can still go back to round 0, and when it is over."""
    whole = tiny("whole", **PLAN)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopped_after(patch, 2)  # before the checkpoint of round 3
        tiny("part", table="kept", **PLAN)
    line = "kept holds the rows of another run; give --table a new folder$"
    with pytest.raises(InputError, match=line):
        tiny("other", seed=7, table="kept", **PLAN)
    assert not Path("other").exists()
    tiny("part", resume="auto", table="kept", rounds=5, **PLAN)
    with pytest.raises(InputError, match=line):
        tiny("other", resume="auto", seed=7, table="kept", **PLAN)
    tiny("other", resume="auto", seed=7, table="new", **PLAN)
    with pytest.raises(InputError, match="new is not the table that this checkpoint belongs to"):
        tiny("part", resume="auto", table="new", **PLAN)
    tiny("part", resume="auto", table="kept", **PLAN)
    same(whole, Path("part"), rows)


def test_a_start_that_was_killed_does_not_keep_its_table(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first checkpoint, or its directory: the run begins in the same folder."""
    whole = tiny("whole", **PLAN)
    for step in (vecfl.record.Keeper, "save"), (vecfl.record, "place_rows"):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(*step, lambda *_: 1 // 0)
            tiny("part", table="kept", **PLAN)
        with vecfl.record.letting_go(Path("part")):  # as the end of its process does
            shutil.rmtree("part")
    tiny("part", table="kept", **PLAN)
    same(whole, Path("part"), rows)


def test_a_start_that_was_killed_leaves_no_rows(
    tiny: Tiny, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is there and no checkpoint is: the run begins anew."""
    whole = tiny("whole", **PLAN)
    monkeypatch.setattr(vecfl.record, "LARGE", 100)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vecfl.record.Keeper, "save", killed)
        tiny("part", **PLAN)
    first = (Path("part") / "table" / "meta.json").read_text()
    (Path("part") / "table.0123").mkdir()  # of one that was killed while it was made
    with vecfl.record.letting_go(Path("part")):  # as the end of its process does
        pass
    tiny("part", resume="auto", **PLAN)
    same(whole, Path("part"), rows)
    assert (Path("part") / "table" / "meta.json").read_text() != first
    assert not (Path("part") / "table.0123").exists()


def test_many_rows_in_memory_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seven clients, 5 * 3 + 5 + 2 * 5 + 2 = 32 numbers of 4 bytes: 896."""
    sim = make_simulation(arguments(str(tmp_path / "run"), **PLAN))
    assert sim.tables.bytes == 896
    monkeypatch.setattr(vecfl.table.table, "LARGE", 896)
    sim.start()
    assert caplog.text == ""
    monkeypatch.setattr(vecfl.table.table, "LARGE", 895)
    sim.start()
    (line,) = caplog.messages
    assert line == (
        "the rows of 7 clients may take 0.0 GiB of memory, and so does a checkpoint; a folder "
        "keeps them on disk, table=FOLDER"
    )
