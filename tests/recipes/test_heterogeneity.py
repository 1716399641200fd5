"""The recipe that compares algorithms on few labels per client, on a few generated writers."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vecfl.data import FederatedDataset

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "heterogeneity.py"
ALGORITHMS = ["fedavg", "fedprox", "fedadam", "dga", "scaffold", "feddyn"]
Command = Callable[..., str]


def rows(folder: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def learned(folder: str) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("system/")}
        for row in rows(folder)
    ]


def test_all_algorithms_by_default(compare: Command) -> None:
    told = compare("--rounds=3", "--eval-every=2", "--seeds=2", "--seed=5", "--batch=1", "--out=a")
    folders = sorted(f"{name}-seed{seed}" for name in ALGORITHMS for seed in (5, 6))
    names = sorted(p.name for p in Path("a").iterdir())
    assert names == sorted([*folders, "heterogeneity.png"])
    assert Path("a/heterogeneity.png").read_bytes().startswith(b"\x89PNG")
    *table, last = told.splitlines()[-7:]
    assert last == "a/heterogeneity.png"
    for name, line in zip(ALGORITHMS, table, strict=True):
        runs = [rows(f"a/{name}-seed{seed}") for seed in (5, 6)]
        assert [[row["round"] for row in run if "eval/accuracy" in row] for run in runs] == [
            *([0, 2, 3],) * 2
        ]
        low, high = sorted(run[-1]["eval/accuracy"] for run in runs)
        expected = [name, f"{(low + high) / 2:.1%}", f"{low:.1%}", "to", f"{high:.1%}"]
        assert line.split() == expected
    # Of one seed all begin with the same model, and their first pairs have as many steps of one
    # example; then they differ.
    assert len({rows(f"a/{name}-seed5")[1]["system/client_steps"] for name in ALGORITHMS}) == 1
    assert len({rows(f"a/{name}-seed5")[0]["eval/loss"] for name in ALGORITHMS}) == 1
    assert len({rows(f"a/{name}-seed5")[3]["eval/loss"] for name in ALGORITHMS}) == 6
    assert learned("a/fedavg-seed5") != learned("a/fedavg-seed6")


def test_one_seed_has_no_range(compare: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Axes] = []
    ticks = [0.5, 0.525, 0.55]
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    flags = ("--rounds=1", "--seeds=1", "--algorithms", "fedavg", "--out=a")
    told = compare(*flags)
    assert re.search(r"^fedavg +[0-9.]+%$", told, re.MULTILINE)
    (axes,) = drawn
    assert axes.get_title() == "MNIST writers with 2 of 10 digits each: 1 seed"
    form = axes.yaxis.get_major_formatter()
    assert [form(tick, 0) for tick in ticks] == ["50%", "52.5%", "55%"]


def test_runs_that_are_there(compare: Command, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rounds=1", "--seeds=1", "--algorithms", "fedavg", "--out=a")
    compare(*flags)
    with pytest.raises(SystemExit):
        compare(*flags)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --out: expected a folder without runs, or --resume auto beside it to go on with "
        "them, got a"
    )
    compare(*flags, "--resume=auto")


def test_clients_keep_few_labels() -> None:
    few_labels = runpy.run_path(str(RECIPE))["few_labels"]
    y = torch.arange(10).repeat(40)
    columns = {"x": torch.arange(400), "y": y}
    data = FederatedDataset.from_arrays(columns, torch.arange(40).repeat_interleave(10))
    few = few_labels(data, 3, 1)
    assert few.sizes.tolist() == [3] * 40  # each client has every digit once
    owner = few.columns["x"] // 10
    assert owner.tolist() == torch.arange(40).repeat_interleave(3).tolist()
    assert torch.equal(few.columns["x"] % 10, few.columns["y"])
    assert few.columns["y"].bincount(minlength=10).min() > 0
    assert torch.equal(few_labels(data, 3, 1).columns["x"], few.columns["x"])
    assert not torch.equal(few_labels(data, 3, 2).columns["x"], few.columns["x"])
    assert torch.equal(few_labels(data, 10, 1).columns["x"], columns["x"])


def test_it_goes_on_after_an_interruption(
    compare: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rounds=4", "--eval-every=2", "--seeds=2", "--algorithms", "fedavg", "dga")
    whole = compare(*flags, "--out=whole")
    drawn: list[Path] = []

    def interrupted(run_dir: Path) -> None:
        drawn.append(run_dir)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        (run_dir / "curves.png").touch()

    monkeypatch.setattr("vecfl.finish.draw_curves", interrupted)
    with pytest.raises(SystemExit) as caught:
        compare(*flags, "--out=cut", "--resume=auto")
    assert caught.value.code == 130
    said = (
        "fedavg, seed 1, is not finished; to go on: the same command with --resume auto --out cut"
    )
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not Path("cut/dga-seed1").exists() and not Path("cut/heterogeneity.png").exists()
    again = compare(*flags, "--out=cut", "--resume=auto")
    assert len(drawn) == 5  # the third once more and the fourth; finished ones are left alone
    assert again.splitlines()[-3:-1] == whole.splitlines()[-3:-1]
    for name in ("fedavg-seed0", "dga-seed0", "fedavg-seed1", "dga-seed1"):
        assert learned(f"cut/{name}") == learned(f"whole/{name}")
    assert Path("cut/heterogeneity.png").exists()


def test_writers_are_held_out_for_validation(compare: Command) -> None:
    compare("--rounds=1", "--seeds=1", "--algorithms", "dga", "--validation=0.25", "--out=a")
    assert all({"validation/loss", "eval/loss"} <= row.keys() for row in rows("a/dga-seed0"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--algorithms fedavg sgd", "--algorithms: expected some of fedavg, fedprox, fedadam, dga"),
        ("--algorithms dga dga", "--algorithms: expected some of .*, each once, got"),
        ("--seeds 0", "--seeds: expected at least 1, got 0"),
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
        ("--labels 0", "--labels: expected 1 to 10, got 0"),
        ("--labels 11", "--labels: expected 1 to 10, got 11"),
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--cohort 5", r"--cohort: expected at most 4 \(training clients\), got 5"),
        ("--resume a", "--resume: expected none, or auto with --out, got a"),
        ("--resume auto", "--resume auto: needs --out"),
        ("--sample-seed 1", "--sample-seed: expected none: cohorts are drawn by the seed of a run"),
        ("--stop-at eval/loss<=1", "--stop-at: expected none: all runs have the same rounds"),
        ("--table none", "leave --table away: many rows lie in the directory of their run"),
        ("--data none", "no train-images-idx3-ubyte in the folder none; it should hold"),
    ],
)
def test_wrong_input_is_one_line(
    compare: Command, capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare(*flags.split())
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("INFO")]
    assert (caught.value.code, captured.out) == (2, "")
    assert len(lines) == 1 and re.match(f"error: {said}", lines[0]), captured.err
    assert not Path("runs").exists()
