"""The recipe that draws accuracy against epsilon, on a few generated writers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vecfl.compare
from vecfl.privacy import Event, Sampling, epsilon

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "dp_mnist_writers.py"
Command = Callable[..., str]
SHORT = ("--rounds=2", "--eval-every=1", "--seeds=1")


def rows(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_noise_against_none(compare: Command) -> None:
    """Two of four writers a round in the mean: rate 1/2. The cohorts of all runs are the same."""
    told = compare(*SHORT, "--out=a", "--noise-multipliers", "1", "4")
    without, one, four, last = told.splitlines()[-4:]
    assert last == "a/dp_mnist_writers.png"
    assert Path(last).read_bytes().startswith(b"\x89PNG")
    delta = 4**-1.1
    for line, z in ((one, 1), (four, 4)):
        run = rows(f"a/z={z}-seed0")
        spent = epsilon((Event("gaussian", z, Sampling("poisson", 0.5), 4, 2),), delta)
        assert run[-1]["privacy/epsilon"] == spent
        accuracy = f"{run[-1]['eval/accuracy']:.1%}"
        assert line.split() == [f"z={z}", "epsilon", f"{spent:.3g}", accuracy]
    plain = rows("a/no-privacy-seed0")
    assert without.split() == ["without", "privacy", f"{plain[-1]['eval/accuracy']:.1%}"]
    assert not any(name.startswith("privacy/") for name in plain[-1])
    of_all = [rows(f"a/{name}-seed0") for name in ("no-privacy", "z=1", "z=4")]
    assert len({run[0]["eval/loss"] for run in of_all}) == 1
    assert len({run[2]["eval/loss"] for run in of_all}) == 3
    for number in (1, 2):
        assert len({run[number]["train/cohort"] for run in of_all}) == 1


def test_it_stands_for_others_and_takes_more_noise_later(
    compare: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def draw(path: Path, curves: Any, title: str, x: str, **how: Any) -> Path:
        drawn.append((list(curves), title, x, how["level"][0]))
        return path

    monkeypatch.setattr(vecfl.compare, "draw", draw)
    flags = (*SHORT, "--out=a", "--resume=auto", "--stands-for", "1000", "100")
    first = compare(*flags, "--noise-multipliers", "1")
    again = compare(*flags, "--noise-multipliers", "1", "2")
    assert again.splitlines()[-4:-2] == first.splitlines()[-3:-1]
    last = rows("a/z=2-seed0")[-1]
    assert last["privacy/stands_for_clients"] == 1000
    names, title, x, level = drawn[1]
    assert names[1] == f"noise multiplier 2, epsilon {last['privacy/epsilon']:.2g}"
    assert title.splitlines() == [
        "Private FedAvg on 4 MNIST writers: clip_by_norm(0.3), 2 a round, 2 rounds",
        "Each line is a run from its first evaluation to its end: 1 seed",
        "SIMULATION: noise and epsilon of 100 clients a round out of 1,000",
    ]
    assert (
        x
        == f"epsilon that a writer has spent so far (less is more private; delta {1000**-1.1:.2g})"
    )
    assert level == "without privacy"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--noise-multipliers 1 1",
            "--noise-multipliers: expected some numbers above 0, each once",
        ),
        ("--noise-multipliers 0", "--noise-multipliers: expected some numbers above 0, each once"),
        ("--noise-multiplier 1", "--noise-multiplier: expected none: the noise is that of"),
        ("--epsilon 1", "--epsilon: expected none: the noise is that of --noise-multipliers"),
        ("--private-clip None", "--private-clip: expected a bound such as clip_by_norm"),
        ("--stop-at-epsilon 1", "--stop-at-epsilon: expected none: all runs have the same rounds"),
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
