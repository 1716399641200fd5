"""Files that appear whole, and the steps at which tests kill."""

import os
import signal
from pathlib import Path

import pytest

import vecfl.files as files
from vecfl.files import atomic_file, reached


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]
    with pytest.raises(OSError) as caught, atomic_file(path / "b"):
        pass
    assert caught.value.filename == str(path / "b")


def test_file_name_and_folder_reach_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync = os.fsync

    def fsync(file: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "reached", done.append)
    with atomic_file(tmp_path / "a.txt") as file:
        file.write(b"x")
    steps = ["txt written", "file", "txt synced", "txt renamed", "folder"]
    assert done == steps if Path("/proc/self/fd").exists() else done[-1:] == ["file"]


def test_a_kill_comes_at_its_step_and_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kills: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: kills.append(number))
    monkeypatch.setattr(files, "_seen", files.Counter())
    monkeypatch.setenv("VECFL_KILL_AT", "round trained:2")
    counts = []
    for step in ("round trained", "round logged", "round logged", "round trained", "round trained"):
        reached(step)
        counts.append(len(kills))
    assert (counts, kills) == ([0, 0, 0, 1, 1], [signal.SIGKILL])
