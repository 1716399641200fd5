"""`python -m vecfl.data`: what it prints, and one line with exit code 2 for what is wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.files import tff_file
from vecfl.data import FederatedDataset, open_dataset, save, text
from vecfl.data.__main__ import main
from vecfl.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = """\
clients            3
examples           5, columns x float32 [2], y int64 []
examples a client  min 1, 10 % 1, median 1, 90 % 3, max 3
label y            0: 1, 7: 4
"""


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Five examples of the clients a (3), b and c (1 each), in mixed order."""
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    client = np.array(["b", "a", "a", "c", "a"])
    np.savez(tmp_path / "data.npz", x=x, y=np.array([7, 0, 7, 7, 7]), client=client)
    return tmp_path / "data.npz"


def test_convert_describe_verify(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = npz.parent / "store"
    main(["convert", str(npz), str(folder)])
    assert capsys.readouterr().out == f"{folder}\n{SUMMARY}"
    data = open_dataset(folder)
    assert list(data.client_ids) == ["a", "b", "c"]
    assert data.client(0)["x"].tolist() == [[2, 3], [4, 5], [8, 9]]
    assert data.columns["y"].tolist() == [0, 7, 7, 7, 7]
    main(["describe", str(folder)])
    assert capsys.readouterr().out == SUMMARY
    main(["verify", str(folder)])
    assert capsys.readouterr().out == f"{folder}: undamaged\n"
    main(["convert", str(folder), str(folder) + "2"])
    assert open_dataset(str(folder) + "2").columns["x"].tolist() == data.columns["x"].tolist()


def test_many_labels_are_listed_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Labels 0..29 once each, but 29 three times: 29 is first, then 0..18, and 10 are left.
    y = torch.tensor([*range(30), 29, 29])
    save(FederatedDataset({"y": y}, torch.tensor([0, 32])), tmp_path / "s")
    main(["describe", str(tmp_path / "s")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("label y            29: 3, 0: 1, 1: 1") and line.endswith(
        "18: 1, 10 others"
    )


def test_without_labels_there_is_no_histogram(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(FederatedDataset({"y": torch.ones(2)}, torch.tensor([0, 2])), tmp_path / "s")
    main(["describe", str(tmp_path / "s")])
    assert "label" not in capsys.readouterr().out


def test_bad_sources_give_one_line(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, whole = npz.parent, npz.read_bytes()
    np.savez(folder / "bare.npz", y=np.array([1]))
    np.savez(folder / "nan.npz", x=np.array([np.nan]), y=np.array([1]), client=np.array([0]))
    np.savez(folder / "pickle.npz", y=np.array([{}]), client=np.array([0]))
    np.save(folder / "array.npy", np.arange(3))
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "array.npz").write_bytes((folder / "array.npy").read_bytes())
    cases = {
        "array.npz": "no data of a known format; understood are LEAF",
        "bare.npz": "NPZ needs the option 'client', the array with the client of each example: no",
        "nan.npz": "client 0, array 'x', row 0: NaN is a missing value; clean it, or give "
        "missing= a number to put there (vecfl.data convert: --missing 0)",
        "pickle.npz": "Object arrays cannot be loaded",
        "cut.npz": "File is not a zip file; expected a NumPy archive",
        "absent.npz": "no such file or directory; understood are LEAF",
        "absent": "no such file or directory; understood are LEAF",
    }
    for name, said in cases.items():
        with pytest.raises(SystemExit) as left:
            main(["convert", str(folder / name), str(folder / "out")])
        out, err = capsys.readouterr()
        assert left.value.code == 2 and out == "" and len(err.splitlines()) == 1
        assert re.match(re.escape(f"error: {folder / name}") + "[:,] " + re.escape(said), err)
        assert not (folder / "out").exists()


def test_damage_has_exit_code_2(npz: Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "vecfl.data", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": paths}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = call("convert", npz, npz.parent / "s")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{npz.parent / 's'}\n{SUMMARY}"
    column = npz.parent / "s" / "column_0.npy"
    column.write_bytes(column.read_bytes()[:-1] + b"\1")
    done = call("verify", npz.parent / "s")
    said = f"error: {column}: damaged: its bytes are not those that were written\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert call("verify").returncode == 2


def test_training_and_test_data_become_two_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, x in (("train", [[1.0], [2.0]]), ("test", [[3.0]])):
        (tmp_path / "leaf" / part).mkdir(parents=True)
        users = {"users": ["u"], "num_samples": [len(x)]}
        users["user_data"] = {"u": {"x": x, "y": [1] * len(x)}}
        (tmp_path / "leaf" / part / "all.json").write_text(json.dumps(users))
    main(["convert", str(tmp_path / "leaf"), str(tmp_path / "stores")])
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("/")] == [
        str(tmp_path / "stores" / part) for part in ("train", "test")
    ]
    train, test = (open_dataset(tmp_path / "stores" / part) for part in ("train", "test"))
    assert (train.columns["x"].tolist(), test.columns["x"].tolist()) == ([[1.0], [2.0]], [[3.0]])
    main(["describe", str(tmp_path / "stores")])
    assert capsys.readouterr().out.splitlines() == out
    main(["verify", str(tmp_path / "stores")])
    said = [f"{tmp_path}/stores/{part}: undamaged" for part in ("train", "test")]
    assert capsys.readouterr().out.splitlines() == said
    both = f"{tmp_path}/stores/train and {tmp_path}/stores/test"
    with pytest.raises(
        InputError, match=f"^{tmp_path}/stores: no store, but a folder of two: open {both}$"
    ):
        open_dataset(tmp_path / "stores")
    column = tmp_path / "stores" / "test" / "column_0.npy"
    column.write_bytes(column.read_bytes()[:-1] + b"\1")
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path / "stores")])
    captured = capsys.readouterr()
    assert captured.out == said[0] + "\n" and captured.err.startswith(f"error: {column}: damaged")
    (tmp_path / "stores" / "test").rename(tmp_path / "stores" / "test.part")
    (tmp_path / "stores" / "test.part" / "meta.json").unlink()
    with pytest.raises(SystemExit):
        main(["describe", str(tmp_path / "stores")])
    assert "stores/test.part: a half-written store: remove it" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["tff", "leaf"])
def test_shakespeare_is_converted(tmp_path: Path, form: str) -> None:
    if form == "tff":
        source = tff_file(tmp_path / "plays.h5", {"HAMLET": {"snippets": ["aye"]}})
    else:
        source = tmp_path / "plays.json"
        row = {"x": ["to be or no"], "y": ["t"]}
        source.write_text(
            json.dumps({"users": ["HAMLET"], "num_samples": [1], "user_data": {"HAMLET": row}})
        )
    main(["convert", str(source), str(tmp_path / "s"), "--text", form])
    columns = open_dataset(tmp_path / "s").columns
    if form == "leaf":
        characters = text.leaf_characters()
        assert characters.decode(columns["x"][0].tolist()) == list("to be or no")
        assert characters.decode(columns["y"].tolist()) == ["t"]
    else:
        characters = text.tff_characters()
        assert columns["x"].shape == (1, 80)
        assert characters.decode(columns["y"][0, :4].tolist()) == ["a", "y", "e", "<eos>"]


def test_missing_values_are_filled(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (npz.parent / "data.csv").write_text("who,a,y\nu,?,0\n")
    np.savez(npz.parent / "nan.npz", x=np.array([np.nan]), y=np.array([1]), who=np.array([0]))
    for k, name in enumerate(("data.csv", "nan.npz")):
        source, flags = str(npz.parent / name), ["--client", "who", *["--label", "y"][2 * k :]]
        main(["convert", source, str(npz.parent / f"{k}"), "--missing", "-2.5", *flags])
        assert open_dataset(npz.parent / f"{k}").columns["x"].flatten().tolist() == [-2.5]
        with pytest.raises(SystemExit):
            main(["convert", source, str(npz.parent / "none"), "--missing", "nan", *flags])
        assert capsys.readouterr().err == "error: missing: expected a finite number, got nan\n"


def test_the_help_is_true(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "column of the client, in CSV, NPZ and parquet" in words
    assert "column of the label, in CSV and parquet" in words
    assert "write_store(DIR, csv_clients(...)) in Python" in words


def test_columns_are_named_by_flags(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("who,a,class\nu,1.5,0\nv,2.5,1\nu,3.5,1\n")
    flags = ["--client", "who", "--label", "class"]
    main(["convert", str(tmp_path / "data.csv"), str(tmp_path / "s"), *flags])
    data = open_dataset(tmp_path / "s")
    assert list(data.client_ids) == ["u", "v"]
    assert (data.columns["x"].tolist(), data.columns["y"].tolist()) == (
        [[1.5], [3.5], [2.5]],
        [0, 1, 1],
    )
