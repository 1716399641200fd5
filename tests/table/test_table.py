"""The per-client table: rows in memory and on disk, rounds that fail, and the ways back."""

import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vecfl import InputError
from vecfl.table import Table, Tables

SHAPES = {"a": (2,), "b": ()}
N = 5
Make = Callable[..., Table]


def refused(line: str):
    return pytest.raises(InputError, match=f"^{re.escape(line)}$")


def tables(folder: Path | None, **changed: object) -> Tables:
    facts = {"shapes": SHAPES, "clients": N, "dtype": torch.float32} | changed
    return Tables(**facts, folder=folder)


def new(folder: Path | None, round: int = 0, content: dict | None = None, **changed) -> Table:
    """A table as a process that starts opens it."""
    table = tables(folder, **changed).at(round, content)
    assert table is not None
    return table


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "t" if request.param == "disk" else None


def play(table: Table, **rows: float) -> None:
    """One round, in which client k (`k3` is client 3) gets the row a = (value, 1), b = -value."""
    clients = torch.tensor([int(name[1:]) for name in rows], dtype=torch.int64)
    table.begin(table.round, clients)
    write(table, rows)
    table.end()


def write(table: Table, rows: dict[str, float]) -> None:
    clients = torch.tensor([int(name[1:]) for name in rows], dtype=torch.int64)
    value = torch.tensor(list(rows.values()))
    table.scatter(clients, {"a": torch.stack((value, value**0), 1), "b": -value})


def values(table: Table) -> list[float]:
    """The numbers of all clients; the columns agree."""
    rows = table.gather(torch.arange(N))
    torch.testing.assert_close(rows["a"][:, 0], -rows["b"], rtol=0, atol=0)
    assert rows["a"][:, 1].tolist() == [float(v != 0) for v in rows["b"].tolist()]
    return rows["a"][:, 0].tolist()


def test_rows_are_zero_and_then_what_was_written(folder: Path | None) -> None:
    table = new(folder)
    assert (values(table), table.round) == ([0, 0, 0, 0, 0], 0)
    play(table, k3=7, k1=5)
    play(table, k1=6)
    assert (values(table), table.round) == ([0, 6, 0, 7, 0], 2)
    rows = table.gather(torch.tensor([3, 1]))
    assert rows["a"].tolist() == [[7, 1], [6, 1]] and rows["b"].tolist() == [-7, -6]
    rows["a"].zero_()  # a copy
    assert values(table) == [0, 6, 0, 7, 0]


def test_rows_come_in_the_dtype_of_the_table(folder: Path | None) -> None:
    table = new(folder, dtype=torch.float64)
    table.begin(0, torch.tensor([2]))
    table.scatter(torch.tensor([2]), {"a": torch.full((1, 2), 0.1), "b": torch.ones(1).double()})
    rows = table.gather(torch.tensor([2]))
    assert (rows["a"].dtype, rows["b"].dtype) == (torch.float64, torch.float64)
    assert rows["a"][0, 0].item() == np.float64(np.float32(0.1))


def test_no_clients_are_no_rows(folder: Path | None) -> None:
    table = new(folder)
    play(table)
    assert (values(table), table.round) == ([0] * N, 1)


def test_rows_that_do_not_fit_are_refused(folder: Path | None) -> None:
    table, one = new(folder), torch.tensor([1])
    right = "expected {'a': (1, 2), 'b': (1,)}"
    with refused(f"rows for the table: {{'a': (1, 2)}}, {right}"):
        table.scatter(one, {"a": torch.ones(1, 2)})
    with refused(f"rows for the table: none, {right}"):
        table.scatter(one, {})
    with refused(f"rows for the table: {{'a': (1, 3), 'b': (1,)}}, {right}"):
        table.scatter(one, {"a": torch.ones(1, 3), "b": torch.ones(1)})
    assert values(table) == [0] * N


def test_a_round_that_did_not_end_is_taken_back(folder: Path | None) -> None:
    table = new(folder)
    play(table, k0=1, k1=2, k2=3)
    for _ in range(2):  # twice: the second time it finds what the first one left
        table.begin(1, torch.tensor([1, 2, 4]))
        write(table, {"k1": 20, "k4": 50})
    table.settle()
    assert (values(table), table.round) == ([1, 2, 3, 0, 0], 1)
    table.begin(1, torch.tensor([1, 2, 4]))
    write(table, {"k1": 20})
    table.begin(1, torch.tensor([2]))  # of other clients: they are taken back all the same
    write(table, {"k2": 30})
    table.end()
    assert (values(table), table.round) == ([1, 2, 30, 0, 0], 2)


def test_another_round_than_the_next_is_refused(folder: Path | None) -> None:
    table = new(folder)
    play(table, k0=1)
    line = (
        "{}: the table has one row for each client, and they are those after round 1; go on from "
        "the newest state, or start anew"
    )
    for round in (0, 2):
        with refused(line.format(f"round {round + 1} cannot be played")):
            table.begin(round, torch.tensor([0]))
        with refused(line.format(f"the state after round {round} cannot be saved")):
            table.content(round)
    assert values(table) == [1, 0, 0, 0, 0]


def test_a_checkpoint_brings_the_rows_back(folder: Path | None) -> None:
    table = new(folder)
    play(table, k0=1, k1=2)
    saved = {
        name: t.clone() if isinstance(t, torch.Tensor) else t
        for name, t in table.content(1).items()
    }
    table.checkpointed(1)
    play(table, k1=3, k4=4)
    table.begin(2, torch.tensor([4, 2]))
    write(table, {"k2": 9, "k4": 9})
    for _ in range(2):  # what comes after leaves the checkpoint as it is
        del table  # killed here
        table = new(folder, 1, saved)
        assert (values(table), table.round) == ([1, 2, 0, 0, 0], 1)
        play(table, k4=5)
        assert (values(table), table.round) == ([1, 2, 0, 0, 5], 2)


def test_a_round_that_did_not_end_is_not_saved(folder: Path | None) -> None:
    table = new(folder)
    play(table, k0=1)
    table.begin(1, torch.tensor([0, 1]))
    write(table, {"k0": 7})
    saved = table.content(1)
    if folder is None:
        assert saved["b"].tolist() == [-1, 0, 0, 0, 0]
    assert values(table) == [1, 0, 0, 0, 0]


def test_a_start_in_memory_is_a_table_of_its_own() -> None:
    both = tables(None)
    first, second = both.at(0), both.at(0)
    play(first, k0=1)
    assert (values(first), values(second)) == ([1, 0, 0, 0, 0], [0] * N)


def test_no_columns_are_no_table(tmp_path: Path) -> None:
    assert tables(None, shapes={}).at(0) is None
    with refused(f"--table {tmp_path}/t: clients of this algorithm keep nothing; leave it away"):
        tables(tmp_path / "t", shapes={})


def test_memory_refuses_the_rows_of_another_run() -> None:
    table = new(None)
    other = new(None, clients=4).content(0)
    right = "{'a': (5, 2, torch.float32), 'b': (5, torch.float32)}"
    with refused(
        "the checkpoint after round 3 holds {'a': (4, 2, torch.float32), 'b': (4, torch.float32)} "
        f"rows of clients, this run needs {right}"
    ):
        table.restore(3, other)
    with refused(
        "the checkpoint after round 3 belongs to rows of clients on disk: give their folder, "
        "--table or Simulation(table=...)"
    ):
        table.restore(3, {"table": "somewhere on disk"})


def test_what_memory_does_not_hold_is_sent_to_disk() -> None:
    with pytest.raises(
        InputError, match=r"rows of 9\d+ clients do not fit.*Simulation\(table=...\)"
    ):
        new(None, clients=9 * 10**15)


# The rest is on disk.


def test_a_million_clients_cost_nothing_at_first(tmp_path: Path) -> None:
    began = time.perf_counter()
    table = new(tmp_path / "t", shapes={"c": (7850,)}, clients=1_000_000)
    assert time.perf_counter() - began < 5
    path = tmp_path / "t" / "column_0.npy"
    assert path.stat().st_size > 31 * 10**9
    clients = torch.tensor([0, 999_999])
    table.begin(0, clients)
    table.scatter(clients, {"c": torch.arange(2 * 7850).view(2, -1)})
    table.end()
    assert table.gather(clients)["c"][:, -1].tolist() == [7849, 15699]
    assert table.gather(torch.tensor([999_998]))["c"].abs().sum() == 0
    assert path.stat().st_blocks * 512 < 1 << 20


def test_a_file_is_what_numpy_reads(tmp_path: Path) -> None:
    play(new(tmp_path / "t"), k2=3)
    assert np.load(tmp_path / "t" / "column_0.npy")[2].tolist() == [3, 1]
    assert np.load(tmp_path / "t" / "column_1.npy").tolist() == [0, 0, -3, 0, 0]


def test_each_checkpoint_that_is_kept_can_be_gone_back_to(tmp_path: Path) -> None:
    table, after = new(tmp_path / "t"), {}
    for rows in ({"k0": 1}, {"k0": 2, "k1": 2}, {"k1": 3, "k2": 3}, {"k0": 4}, {"k2": 5, "k4": 5}):
        play(table, **rows)
        after[table.round] = (values(table), table.content(table.round))
        table.checkpointed(max(0, table.round - 2))  # this one and the two before it
    play(table, k0=6, k3=6)
    for round in (5, 4, 3):  # the later ones are out of reach then
        table.restore(round, after[round][1])
        assert (values(table), table.round) == (after[round][0], round)
    for round in (5, 2):
        with refused(
            f"{tmp_path}/t: no way back to its rows after round {round}, only after round 3: "
            "resume from there, or give a new folder"
        ):
            table.restore(round, after[round][1])
    play(table, k0=7)  # a refusal touches nothing
    assert (values(table), table.round) == ([7, 3, 3, 0, 0], 4)
    table.restore(3, after[3][1])  # a second time, over what was written meanwhile
    assert values(table) == after[3][0]
    assert sorted(path.name for path in (tmp_path / "t").glob("*-*")) == ["lock-0", "undo-3"]


def test_rows_go_back_to_what_they_were_at_the_checkpoint_not_later(tmp_path: Path) -> None:
    """Three attempts at other clients leave records of many rounds: the earliest counts."""
    table = new(tmp_path / "t")
    play(table, k0=1, k1=1)
    saved = table.content(1)
    for rounds in (
        [{"k0": 5}, {"k0": 6, "k1": 6}],
        [{"k1": 7}, {"k0": 8}],
        [{"k2": 9}, {"k2": 10}],
    ):
        for rows in rounds:
            play(table, **rows)
        table.restore(1, saved)
        assert values(table) == [1, 1, 0, 0, 0]


def test_going_back_over_checkpoints_may_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client changed after another checkpoint; the way back stops at each write."""
    real = os.pwrite
    for stop in range(2 * N + 1):
        table, left = new(tmp_path / f"{stop}"), stop
        first = table.content(0)
        for round in range(4):
            play(table, k4=10 + round, **{f"k{round}": 1 + round})
            table.content(round + 1)
        play(table, k0=9, k4=14)

        def dies(*args) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", dies)
            if stop < 2 * N:  # two columns of the clients 0, 1, 2, 3 and 4
                with pytest.raises(KeyboardInterrupt):
                    table.restore(0, {})
            else:
                table.restore(0, {})
        del table
        with pytest.raises(InputError, match="only after round 0: resume"):
            new(tmp_path / f"{stop}", 2)
        assert values(new(tmp_path / f"{stop}", 0, first)) == [0] * N


def test_a_torn_end_is_cut_off_and_what_is_before_it_counts(tmp_path: Path) -> None:
    # A record of a row (a, b) has 8 + 8 + 3 * 4 + 4 bytes.
    table, path = new(tmp_path / "t"), tmp_path / "t" / "undo-0" / "0"
    play(table, k0=1)
    play(table, k1=2)
    whole = path.read_bytes()
    assert len(whole) == 2 * 32
    for torn in (whole[:31], whole[:31] + b"\xff", bytes(32), whole[5:30]):
        path.write_bytes(whole + torn + whole)  # what is behind a torn one never happened
        table.restore(0, {})
        assert path.read_bytes() == whole and values(table) == [0] * N
        play(table, k0=1)
        play(table, k1=2)
        path.write_bytes(whole)


def test_an_earlier_record_that_is_damaged_hides_the_later_ones(tmp_path: Path) -> None:
    """Whatever a record lost, one that fails its checksum is not written back."""
    table, path = new(tmp_path / "t"), tmp_path / "t" / "undo-0" / "0"
    play(table, k0=1)
    for bit in range(0, 32 * 8, 5):
        damaged = bytearray(path.read_bytes()[:32])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        table.restore(0, {})
        assert path.read_bytes() == b"" and values(table) == [1, 0, 0, 0, 0]
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)


def test_processes_share_a_folder_and_each_has_its_journal(tmp_path: Path) -> None:
    first = new(tmp_path / "t")
    second = tables(tmp_path / "t", writer=1).at(0)
    play(first, k0=1)
    play(second, k1=2)
    assert values(first) == values(second) == [1, 2, 0, 0, 0]  # one map
    saved = first.content(1)
    assert second.content(1) == saved
    first.checkpointed(1)
    second.checkpointed(1)
    play(first, k1=3)  # whom the other had before
    play(second, k0=4)
    play(first, k2=5)
    play(second, k1=6)
    names = sorted(str(p.relative_to(tmp_path / "t")) for p in (tmp_path / "t").rglob("undo-*/*"))
    assert names == ["undo-1/0", "undo-1/1"]
    del second
    first.restore(1, saved)  # one process goes on alone, with the journals of both
    assert values(first) == [1, 2, 0, 0, 0]


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    table = new(tmp_path / "t")
    with refused(f"{tmp_path}/t: in use by another run; give each run a folder of its own"):
        new(tmp_path / "t")
    del table
    assert values(new(tmp_path / "t")) == [0] * N


def test_a_start_goes_back_to_zero_where_a_journal_leads_there(tmp_path: Path) -> None:
    both = tables(tmp_path / "t")
    table = both.at(0)
    play(table, k0=1)
    assert both.at(0) is table and values(table) == [0] * N
    play(table, k0=2)
    table.content(1)
    table.checkpointed(1)
    with refused(
        f"{tmp_path}/t: no way back to its rows after round 0, only after round 1: resume from "
        "there, or give a new folder"
    ):
        both.at(0)


def test_the_table_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    other = new(tmp_path / "other").content(0)
    play(new(tmp_path / "t"), k0=1)
    wrong = (
        f"table {tmp_path}/t is not the table that this checkpoint belongs to; if it was moved, "
        "give --table NEWPLACE"
    )
    both = tables(tmp_path / "t")
    for _ in range(2):
        with refused(wrong):
            both.at(0, other)
    with refused(f"table {tmp_path}/t holds the rows of another run; give --table a new folder"):
        both.at(0)  # a refusal does not make it this run's
    with refused(
        f"table {tmp_path}/t: the checkpoint after round 0 holds its rows itself; leave --table "
        "away"
    ):
        new(tmp_path / "t", 0, new(None).content(0))


def test_another_run_does_not_take_a_table_over(tmp_path: Path) -> None:
    """While a way leads back to round 0, and behind it; the first run may start again."""
    both = tables(tmp_path / "t")
    play(both.at(0), k0=1)
    play(table := both.at(0), k0=2)
    line = f"table {tmp_path}/t holds the rows of another run; give --table a new folder"
    saved, name = table.content(1), (tmp_path / "t" / "meta.json").read_bytes()
    del both, table
    with refused(line):
        new(tmp_path / "t")
    table = new(tmp_path / "t", 1, saved)
    table.checkpointed(1)
    del table
    with refused(line):
        new(tmp_path / "t")
    assert (tmp_path / "t" / "meta.json").read_bytes() == name
    assert values(new(tmp_path / "t", 1, saved)) == [2, 0, 0, 0, 0]


def test_a_start_that_came_to_no_round_gives_its_table_away(tmp_path: Path) -> None:
    """Its checkpoint, if it has one, does not go on with the rows of the other."""
    first = tables(tmp_path / "t").at(0).content(0)
    both = tables(tmp_path / "t")
    assert both.at(0) is both.at(0)
    other = tables(tmp_path / "t", writer=1).at(0)  # of the same run: it asks not again
    assert other.content(0) == (second := both.at(0).content(0)) != first
    play(both.at(0), k0=1)
    del both, other
    with pytest.raises(InputError, match="t is not the table that this checkpoint belongs to"):
        new(tmp_path / "t", 0, first)
    assert values(new(tmp_path / "t", 0, second)) == [0] * N


@pytest.mark.parametrize("round", [0, 1])
def test_a_missing_table_is_not_made_again(tmp_path: Path, round: int) -> None:
    saved = new(tmp_path / "t").content(0)
    (tmp_path / "t").rename(tmp_path / "moved")
    with refused(f"table {tmp_path}/t is missing; if it was moved, give --table NEWPLACE"):
        new(tmp_path / "t", round, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    assert values(new(tmp_path / "moved", 0, saved)) == [0] * N


def test_a_table_that_cannot_be_made_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    remedy = "give --table a folder in a place with room to write"
    with refused(f"table {tmp_path}/file/t cannot be made: Not a directory; {remedy}"):
        new(tmp_path / "file" / "t")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refused(f"table {tmp_path}/t cannot be made: No space left on device; {remedy}"):
        new(tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_no_table_or_another_is_refused(tmp_path: Path) -> None:
    saved = new(tmp_path / "t").content(0)
    held = "columns a [5, 2], b [5] of float32"
    for changed, needed in (
        ({"clients": 6}, "columns a [6, 2], b [6] of float32"),
        ({"dtype": torch.float64}, "columns a [5, 2], b [5] of float64"),
        ({"shapes": {"a": (2,)}}, "columns a [5, 2] of float32"),
    ):
        line = f"table {tmp_path}/t has {held}, this run needs {needed}; "
        with refused(line + "give --table a new folder"):
            new(tmp_path / "t", **changed)
        with refused(line + "if it was moved, give --table NEWPLACE"):
            new(tmp_path / "t", 0, saved, **changed)
    meta = tmp_path / "t" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"vecfl_table": 2}))
    with refused(f"{tmp_path}/t: a table of version 2, this vecfl has 1"):
        new(tmp_path / "t")
    wrong = {"vecfl_table": 1, "name": "", "dtype": "float32", "columns": 7}
    for text in ("{}", "[1]", "{", json.dumps(wrong)):
        meta.write_text(text)
        with refused(
            f"{tmp_path}/t is no table of clients' rows (meta.json is damaged); give --table a new "
            "folder"
        ):
            new(tmp_path / "t")
    with refused(
        f"{tmp_path} is no table of clients' rows (meta.json: No such file or directory); give "
        "--table a new folder"
    ):
        new(tmp_path)


def test_a_column_that_is_cut_or_gone_ends_in_a_line(tmp_path: Path) -> None:
    table, path = new(tmp_path / "t"), tmp_path / "t" / "column_1.npy"
    play(table, k0=1)
    whole = path.stat().st_size
    os.truncate(path, 100)
    with refused(f"{path}: 100 bytes, expected {whole} bytes"):
        table.begin(1, torch.tensor([4]))
    path.unlink()
    with refused(f"{path}: missing, expected {whole} bytes"):
        table.begin(1, torch.tensor([4]))
    del table
    with pytest.raises(InputError, match=f"^{path}: no column of a table, or cut"):
        new(tmp_path / "t")
    np.save(path, np.zeros(4, np.float32))
    with refused(f"{path}: no column of a table, or cut: 144 bytes, expected 148"):
        new(tmp_path / "t")  # a map would have made it longer
    np.save(path, np.zeros(5, np.int32))
    with refused(f"{path}: int32 (5,), expected float32 (5,)"):
        new(tmp_path / "t")


@pytest.mark.parametrize("call", ["posix_fallocate", "write", "most of a write", "pwrite", "fsync"])
def test_a_full_disk_ends_the_round_and_not_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    table = new(tmp_path / "t")
    play(table, k0=1)
    play(table, k1=2)

    real = os.write

    def full(*args) -> None:
        if call == "most of a write":
            real(args[0], args[1][:-5])  # of its two records
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(os, call.rpartition(" ")[2], full)
            table.begin(2, torch.tensor([0, 3]))
            write(table, {"k3": 9})
        assert caught.value.errno == errno.ENOSPC
        where = "column_0.npy" if call in ("posix_fallocate", "pwrite") else "undo-0/0"
        assert caught.value.filename == str(tmp_path / "t" / where)
    table.settle()
    assert (values(table), table.round) == ([1, 2, 0, 0, 0], 2)
    play(table, k4=3)  # its record is not hidden by half of another
    table.restore(0, {})
    assert values(table) == [0] * N
