"""The recipe that compares codecs by their bytes, on a few generated writers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "communication.py"
Command = Callable[..., str]
P = 784 * 100 + 100 + 100 * 10 + 10


def rows(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_five_codecs_by_default(compare: Command) -> None:
    """Bytes of a client, by tensors of 78,400, 100, 1,000 and 10 numbers. Top-k keeps 795 of them:
    positions of 17 bits. QSGD with 7 levels has 4 bits, signs one, and four scales."""
    told = compare("--rounds=2", "--eval-every=1", "--seeds=1", "--out=a")
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


def test_it_goes_on(compare: Command) -> None:
    flags = ("--rounds=2", "--eval-every=1", "--seeds=2", "--codecs", "sign")
    first = compare(*flags, "--out=a", "--resume=auto")
    again = compare(*flags, "--out=a", "--resume=auto")
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
    compare: Command, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare(*flags.split())
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert re.match(f"error: {said}", captured.err.splitlines()[-1]), captured.err
