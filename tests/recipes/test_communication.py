"""The recipe that compares codecs by their bytes, on a few generated writers."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .test_heterogeneity import data, no_curves

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "communication.py"
Command = Callable[..., str]
P = 784 * 100 + 100 + 100 * 10 + 10
__all__ = ["data"]  # the fixture


@pytest.fixture
def command(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Runs the recipe, two clients a round on the loop, and gives what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vecfl.finish.draw_curves", no_curves)
    fixed = ["--cohort=2", "--backend=loop", "--workers=1", "--threads=1", "--slots=1"]
    fixed += ["--track=none", f"--data={data}"]

    def command(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *fixed, *flags])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return capsys.readouterr().out

    return command


def rows(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_five_codecs_by_default(command: Command) -> None:
    """Bytes of a client, by tensors of 78,400, 100, 1,000 and 10 numbers. Top-k keeps 795 of them:
    positions of 17 bits. QSGD with 7 levels has 4 bits, signs one, and four scales."""
    told = command("--rounds=2", "--eval-every=1", "--seeds=1", "--out=a")
    *table, last = told.splitlines()[-6:]
    assert last == "a/communication.png"
    assert Path(last).read_bytes().startswith(b"\x89PNG")
    top_k = (795 * (17 + 32) + 7) // 8
    bytes = {"none": 4 * P, "flute": None, "qsgd": P // 2 + 16, "top-k": top_k}
    bytes |= {"sign": (P + 7) // 8 + 16}
    for (name, size), line in zip(bytes.items(), table, strict=True):
        run = rows(f"a/{name}-seed0")
        sent, accuracy = run[-1]["comm/total_up_bytes"], run[-1]["eval/accuracy"]
        assert size is None or sent == 2 * 2 * size, name
        assert line.split()[:4] == [name, f"{sent / 1e6:.1f}", "MB", f"{accuracy:.1%}"]
        assert run[-1]["comm/total_down_bytes"] == 2 * 2 * 4 * P
    flute = rows("a/flute-seed0")[-1]["comm/total_up_bytes"]
    assert 2 * 2 * P // 8 < flute < 2 * 2 * P // 3
    assert len({rows(f"a/{name}-seed0")[0]["eval/loss"] for name in bytes}) == 1
    assert len({rows(f"a/{name}-seed0")[2]["eval/loss"] for name in bytes}) == 5


def test_it_goes_on(command: Command) -> None:
    flags = ("--rounds=2", "--eval-every=1", "--seeds=2", "--codecs", "sign")
    first = command(*flags, "--out=a", "--resume=auto")
    again = command(*flags, "--out=a", "--resume=auto")
    assert again.splitlines()[-2:] == first.splitlines()[-2:]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--codecs none zip", "--codecs: expected some of none, flute, qsgd, top-k, sign, each"),
        ("--lr 0", "--lr: expected a positive number, got 0"),
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_line(
    command: Command, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*flags.split())
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert re.match(f"error: {said}", captured.err.splitlines()[-1]), captured.err
