"""docs/extending.md: its snippets are what it says, short, and run by the command that it shows."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.test_mnist_writers import command, settings  # noqa: F401

TEXT = (Path(__file__).resolve().parents[2] / "docs/extending.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
SHOWN = re.search(r"^```\n(python recipes.*?)^```", TEXT, re.M | re.S)


def test_every_part_is_one_function_in_less_than_twenty_lines() -> None:
    names = [re.findall(r"^def (\w+)", snippet, re.M) for snippet in SNIPPETS]
    parts = ["by_root", "drop_small", "geometric_median", "odd_rounds", "sure", "two_layers"]
    assert names == [[part] for part in parts]
    assert all(len(snippet.strip().splitlines()) < 20 for snippet in SNIPPETS)


def test_the_command_runs_with_all_of_them(command: Any) -> None:  # noqa: F811
    Path("mine.py").write_text("\n\n".join(SNIPPETS))
    assert SHOWN is not None
    shown = SHOWN[1].replace("\\\n", " ").replace("odd_rounds(20)", "odd_rounds(2)")
    _, recipe, *flags = shlex.split(shown)
    assert recipe == "recipes/mnist_writers.py"
    first, second = command("run", *flags)
    assert (first["train/cohort"], second["train/cohort"]) == (2, 0)
    # of two clients, of 784 * 32 + 32 + 32 * 10 + 10 numbers each, those that are not small
    assert 0 < first["train/sent"] < 2 * 25450 and second["train/sent"] == 0
    assert 0 <= second["eval/sure"] <= 1 and "client/sure_p50" in second
    model = torch.load("run/model.pt")
    assert [tuple(t.shape) for t in model.values()] == [(32, 784), (32,), (10, 32), (10,)]
    assert settings("run")["transforms"] == ["mine.py:drop_small(0.1)", "clip_by_norm(1.0)"]
    again = command("again", "--config=run/config.yaml")
    assert again[1]["eval/loss"] == second["eval/loss"]


def test_a_model_that_is_none(command: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    Path("mine.py").write_text("def two(classes):\n    return 2\n")
    with pytest.raises(SystemExit) as caught:
        command("run", "--model", "mine.py:two")
    assert caught.value.code == 2
    assert "error: --model: mine.py:two gives 2; expected an nn.Module" in capsys.readouterr().err
