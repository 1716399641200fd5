"""The command line: flags in, one line and an exit code out."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from vecfl.arrangement import has_device
from vecfl.cli import check, main
from vecfl.errors import InputError


@dataclass
class Args:
    """What the tests run."""

    rounds: int = 100
    """communication rounds"""
    lr: float = 0.1
    """learning rate"""
    sample_seed: int | None = None
    """seed of the cohorts"""
    backend: Literal["loop", "vmap"] = "vmap"
    """who trains"""
    verbose: bool = False
    """a switch"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Args]:
    """Runs main with these flags and returns what the recipe got."""

    def command(*flags: str, run: Callable[[Args], None] = lambda args: None) -> Args:
        monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
        seen = []
        main(lambda args: (seen.append(args), run(args))[1], Args)
        return seen[0]

    return command


@pytest.fixture
def failure(
    command: Callable[..., Args], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str]]:
    """Runs main and returns its exit code and what it said on stderr."""

    def failure(*flags: str, run: Callable[[Args], None] = lambda args: None) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as caught:
            command(*flags, run=run)
        captured = capsys.readouterr()
        assert captured.out == ""
        return caught.value.code, captured.err

    return failure


def raising(error: BaseException) -> Callable[[Args], None]:
    def run(args: Args) -> None:
        raise error

    return run


def test_flags_in_any_order_and_both_forms(command: Callable[..., Args]) -> None:
    assert command() == Args()
    expected = Args(rounds=3, lr=1e-3, sample_seed=7, backend="loop", verbose=True)
    assert expected == command(
        *("--rounds=3", "--lr", "1e-3", "--sample-seed=7", "--backend", "loop", "--verbose=True")
    )
    assert expected == command(
        *("--verbose", "True", "--backend=loop", "--sample_seed", "7", "--lr=.001", "--rounds", "3")
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ronds", "3"], ["--ronds", "--rounds INT"]),
        (["--rounds", "three"], ["--rounds", "INT", "'three'"]),
        (["--rounds"], ["--rounds", "Missing value"]),
        (["--lr=fast"], ["--lr", "FLOAT", "'fast'"]),
        (["--sample-seed", "2.5"], ["--sample-seed", "INT", "2.5"]),
        (["--backend", "gpu"], ["--backend", "'gpu'", "'loop'", "'vmap'"]),
        (["--verbose"], ["--verbose", "Missing value"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_flag_is_named_with_the_remedy(
    failure: Callable[..., tuple[Any, str]], flags: list[str], said: list[str]
) -> None:
    code, message = failure(*flags, run=lambda args: pytest.fail("the recipe ran"))
    assert code == 2
    assert [part for part in said if part not in message] == []


def test_bad_input_is_one_line(failure: Callable[..., tuple[Any, str]]) -> None:
    run = raising(InputError("column 'y': label 12 of client 3, expected 0..9"))
    assert failure(run=run) == (2, "error: column 'y': label 12 of client 3, expected 0..9\n")


def test_a_file_that_cannot_be_written_is_one_line(failure: Callable[..., tuple[Any, str]]) -> None:
    run = raising(OSError(28, "No space left on device", "runs/a/metrics.jsonl"))
    assert failure(run=run) == (2, "error: runs/a/metrics.jsonl: No space left on device\n")


def test_ctrl_c_is_one_line(failure: Callable[..., tuple[Any, str]]) -> None:
    run = raising(KeyboardInterrupt("interrupted after round 3 of 9"))
    assert failure(run=run) == (130, "interrupted after round 3 of 9\n")
    run = raising(KeyboardInterrupt())
    assert failure(run=run) == (130, "interrupted; the run is not finished\n")


@pytest.mark.parametrize("bug", [ZeroDivisionError(), ValueError("x"), OSError("no file")])
def test_a_bug_keeps_its_traceback(command: Callable[..., Args], bug: Exception) -> None:
    with pytest.raises(type(bug)) as caught:
        command(run=raising(bug))
    assert caught.value is bug


def test_without_tyro_it_is_named(
    failure: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert failure() == (2, "error: the command line needs tyro: pip install tyro\n")


def test_check_names_the_flag() -> None:
    args = Args(rounds=0, sample_seed=-1)
    with pytest.raises(InputError, match="^--rounds: expected at least 1, got 0$"):
        check(args, ("rounds",), lambda n: n >= 1, "at least 1")
    with pytest.raises(InputError, match="^--sample-seed: expected at least 0, got -1$"):
        check(args, ("lr", "sample_seed"), lambda n: n >= 0, "at least 0")
    check(Args(), ("rounds", "sample_seed"), lambda n: n >= 1, "at least 1")  # None passes


def test_has_device() -> None:
    assert has_device("cpu")
    assert [name for name in ("gpu", "", "meta", "cuda:99", "hpu:0") if has_device(name)] == []
