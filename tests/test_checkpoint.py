"""Checkpoint files: whole, or refused by name; folders of them."""

import hashlib
import io
import logging
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vecfl.checkpoint import Damaged, load, newest_good, path_of, prune, rewind, rounds_in, save
from vecfl.errors import InputError

CONTENT: dict[str, Any] = {
    "round": 3,
    "server": {"w": torch.tensor([1.5, -0.0, float("nan")]), "step": torch.tensor(7)},
    "config": {
        "lr": 0.1,
        "out": None,
        "track": "none",
        "on": True,
        "sizes": [1, 2],
        "pair": (1, 2),
    },
}


def folder_of(path: Path, *rounds: int) -> Path:
    for round in rounds:
        save(path_of(path, round), {"round": round})
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path / "a", CONTENT)
    found = load(tmp_path / "a")
    assert (found["round"], found["config"]) == (3, CONTENT["config"])
    w = found["server"]["w"]
    assert w.dtype == torch.float32
    assert w.numpy().tobytes() == CONTENT["server"]["w"].numpy().tobytes()
    assert found["server"]["step"].dtype == torch.int64
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_frame_of_a_file(tmp_path: Path) -> None:
    save(tmp_path / "a", CONTENT)
    data = (tmp_path / "a").read_bytes()
    magic, digest, length = struct.unpack("<8s32sQ", data[:48])
    assert (magic, length) == (b"vecflckp", len(data) - 48)
    assert digest == hashlib.blake2b(data[48:], digest_size=32).digest()
    assert struct.unpack("<I", data[48:52]) == (1,)


def test_views_of_one_tensor_are_written_once(tmp_path: Path) -> None:
    w = torch.zeros(100_000)
    save(tmp_path / "one", {"w": w})
    save(tmp_path / "views", {"w": w, "model": {"a": w[:5], "b": w[5:].view(-1, 5)}})
    one, views = ((tmp_path / name).stat().st_size for name in ("one", "views"))
    assert 400_000 < one < views < one + 2_000


def test_every_damage_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "round-000003.ckpt"
    save(path, {"round": 3})
    good = path.read_bytes()
    some = (*range(64), *range(64, len(good), 19))  # each byte of the header and of the version
    for size in some:
        path.write_bytes(good[:size])
        with pytest.raises(Damaged, match=r"^\S+round-000003.ckpt: damaged: it ends after \d+"):
            load(path)
    for at in some:
        path.write_bytes(good)
        flip(path, at)
        with pytest.raises(Damaged, match=r"round-000003.ckpt: (damaged|not a checkpoint)"):
            load(path)
    path.write_bytes(good + b"x")
    with pytest.raises(Damaged, match="its checksum differs"):
        load(path)
    path.write_bytes(good)
    assert load(path) == {"round": 3}


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"round": 3}, tmp_path / "model.pt")
    with pytest.raises(Damaged, match="model.pt: not a checkpoint of vecfl$"):
        load(tmp_path / "model.pt")
    with pytest.raises(InputError, match="none: No such file or directory; expected a checkpoint$"):
        load(tmp_path / "none")


def write(path: Path, version: int, content: bytes) -> None:
    """A whole file with this content, after the description of the format."""
    body = struct.pack("<I", version) + content
    digest = hashlib.blake2b(body, digest_size=32).digest()
    path.write_bytes(struct.pack("<8s32sQ", b"vecflckp", digest, len(body)) + body)


class Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save({"round": Planted()}, content)
    write(tmp_path / "a", 1, content.getvalue())
    with pytest.raises(InputError, match="a: holds more than tensors and plain values$"):
        load(tmp_path / "a")


def test_a_newer_version_is_refused_by_name_and_not_passed_over(tmp_path: Path) -> None:
    write(path_of(folder_of(tmp_path, 1), 2), 2, b"the future")
    said = r"round-000002.ckpt: written by a newer vecfl: version 2 of checkpoints, .* up to 1; "
    for read in (lambda: load(path_of(tmp_path, 2)), lambda: newest_good(tmp_path)):
        with pytest.raises(InputError, match=said) as caught:
            read()
        assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("value", [np.float64(1), {1, 2}, len, np.zeros(2)], ids=repr)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"^content\['a'\]\[1\]: a checkpoint holds no "):
        save(tmp_path / "a", {"a": [1, value]})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", {"round": 1})

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        save(tmp_path / "a", {"round": 2})
    assert caught.value.filename == str(tmp_path / "a")
    assert load(tmp_path / "a") == {"round": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_newest_good_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, 9, 10, 100, 2_000_000)
    assert rounds_in(tmp_path) == [9, 10, 100, 2_000_000]
    assert newest_good(tmp_path)[1] == {"round": 2_000_000}
    flip(path_of(tmp_path, 2_000_000), 60)
    path_of(tmp_path, 100).write_bytes(b"")
    assert caplog.records == []
    path, content = newest_good(tmp_path)
    assert (path.name, content) == ("round-000010.ckpt", {"round": 10})
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        f"{tmp_path}/round-2000000.ckpt: damaged: its checksum differs; taking round-000010.ckpt, "
        "the one before it",
        f"{tmp_path}/round-000100.ckpt: damaged: it ends after 0 bytes; taking round-000010.ckpt, "
        "the one before it",
    ]


def test_a_folder_without_a_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no checkpoint$"):
        newest_good(tmp_path / "none")
    for round in (1, 2):
        flip(path_of(folder_of(tmp_path, round), round), 0)
    with pytest.raises(
        InputError, match=r"000002.ckpt: not a .*; \S+000001.ckpt: not a checkpoint"
    ):
        newest_good(tmp_path)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    folder_of(tmp_path, 0, 2, 4, 6, 8)
    prune(tmp_path, 3, best=8)
    assert rounds_in(tmp_path) == [4, 6, 8]
    prune(tmp_path, 1, best=4)
    assert rounds_in(tmp_path) == [4, 8]
    prune(tmp_path, 5)
    assert rounds_in(tmp_path) == [4, 8]
    prune(tmp_path, 1)
    assert rounds_in(tmp_path) == [8]


def test_what_is_later_goes_and_what_is_half_written(tmp_path: Path) -> None:
    folder_of(tmp_path, 2, 4, 6)
    for name in (".round-000008.ckpt.77", "round-notes.txt", "notes"):
        (tmp_path / name).write_text("x")
    rewind(tmp_path, 4)
    names = ["notes", "round-000002.ckpt", "round-000004.ckpt", "round-notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
