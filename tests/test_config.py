"""Configuration files: --config and --print-config of every recipe."""

import contextlib
import dataclasses
import io
import runpy
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfl.cli import main

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Client:
    """How a client trains."""

    lr: float = 0.1
    """learning rate"""
    betas: tuple[float, float] = (0.9, 0.99)
    """decays"""
    clip: float | None = None
    """greatest norm"""


@dataclass
class Args:
    """What the tests run."""

    out: str | None = None
    """run directory"""
    rounds: int = 100
    """communication rounds"""
    tau: float = 1e-3
    """a bound"""
    sample_seed: int | None = None
    """seed of the cohorts"""
    backend: Literal["loop", "vmap"] = "vmap"
    """who trains"""
    verbose: bool = False
    """a switch"""
    client: Client = field(default_factory=Client)
    """how clients train"""


def parse(*flags: str, args_type: Any = Args) -> Any:
    """What main gives a recipe for these flags."""
    seen: list[Any] = []
    with mock.patch.object(sys, "argv", ["recipe.py", *flags]):
        main(seen.append, args_type)
    return seen[0]


def printed(*flags: str, args_type: Any = Args) -> str:
    """What --print-config prints, behind these flags; the recipe does not run."""
    out = io.StringIO()
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stdout(out):
        parse(*flags, "--print-config", args_type=args_type)
    assert caught.value.code in (None, 0)
    return out.getvalue()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda name, text: Path(name).write_text(text)


def test_defaults_then_files_in_order_then_flags(write: Any) -> None:
    write("a.yaml", "rounds: 3\nsample_seed: 4\nclient: {lr: 0.5, clip: 2}\n")
    write("b.yaml", "backend: loop\nrounds: 5\nclient:\n  lr: .25\n")
    expected = Args(rounds=5, sample_seed=4, backend="loop", client=Client(lr=0.25, clip=2.0))
    assert parse("--config", "a.yaml", "--config=b.yaml") == expected
    expected.rounds, expected.client.lr = 3, 0.5
    assert parse("--config=b.yaml", "--config=a.yaml") == expected
    expected.rounds, expected.client.clip = 7, None
    flags = ("--rounds=7", "--config", "b.yaml", "--client.clip", "None", "--config", "a.yaml")
    assert parse(*flags) == expected


def test_a_file_takes_null_and_what_a_flag_would_take(write: Any) -> None:
    write("a.yaml", "sample_seed: 4\nclient: {clip: 1.0, betas: [0.5, 1e-3]}\nverbose: true\n")
    write("b.yaml", "sample_seed: null\nclient: {clip: null}\n")
    args = parse("--config", "a.yaml", "--config", "b.yaml")
    assert args == Args(verbose=True, client=Client(betas=(0.5, 0.001)))
    assert isinstance(args.client.betas, tuple)


@pytest.mark.parametrize("text", ["1e-3", "'1e-3'", "1.0e-3", ".001", "0.001"])
def test_a_number_as_people_write_it(write: Any, text: str) -> None:
    write("a.yaml", f"tau: {text}\nclient: {{lr: {text}}}\n")
    assert parse("--config", "a.yaml") == Args(tau=0.001, client=Client(lr=0.001))


def test_a_string_stays_one(write: Any) -> None:
    write("a.yaml", "out: 1e-3\n")
    assert parse("--config", "a.yaml") == Args(out="1e-3")
    write("a.yaml", "out: 2026-11-22\n")  # a date to YAML, a folder to us
    assert parse("--config", "a.yaml") == Args(out="2026-11-22")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_changes_nothing(write: Any, text: str) -> None:
    write("a.yaml", text)
    assert parse("--config", "a.yaml") == Args()


WRONG = {
    "ronds: 3": "ronds: no option has this name; the nearest is rounds",
    "sample-seed: 3": "sample-seed: no option has this name; the nearest is sample_seed",
    "client: {clipp: 3}": "client.clipp: no option has this name; the nearest is client.clip",
    "3: 4": "3: no option has this name; the nearest is ",
    "rounds: many": "rounds: expected a valid integer, got 'many'",
    "rounds: '3'": "rounds: expected a valid integer, got '3'",
    "rounds: 3.0": "rounds: expected a valid integer, got 3.0",
    "rounds: true": "rounds: expected a valid integer, got True",
    "rounds: null": "rounds: expected a valid integer, got None",
    "rounds: [3]": "rounds: expected a valid integer, got [3]",
    "out: 3": "out: expected a valid string, got 3",
    "verbose: 1": "verbose: expected a valid boolean, got 1",
    "tau: fast": "tau: expected a valid number, got 'fast'",
    "tau: true": "tau: expected a valid number, got True",
    "client: {clip: true, lr: 1e-3}": "client.clip: expected a valid number, got True",
    "backend: gpu": "backend: expected 'loop' or 'vmap', got 'gpu'",
    "client: 3": "client: expected an object, got 3",
    "client: {betas: [0.9]}": "client.betas.1: ",
    "client: {betas: ema(0.9)}": "client.betas: expected a list, such as [ema(0.9)], got 'ema(0.9",
    "client: {lr: fast}": "client.lr: expected a valid number, got 'fast'",
    "- rounds": "expected lines 'name: value', got ['rounds']",
    "rounds": "expected lines 'name: value', got 'rounds'",
    "0": "expected lines 'name: value', got 0",
    "a: 1\nb: [": "not YAML in line 2: ",
    "a: 1\nb: c: d": "not YAML in line 2: mapping values are not allowed here",
}


@pytest.mark.parametrize(("text", "said"), WRONG.items(), ids=WRONG)
def test_a_wrong_file_is_one_line(
    write: Any, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    write("good.yaml", "rounds: 2\n")
    write("bad.yaml", text)
    with pytest.raises(SystemExit) as caught:
        parse("--config", "good.yaml", "--config", "bad.yaml", "--rounds", "3")
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert captured.err.startswith(f"error: --config bad.yaml: {said}"), captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bytes").write_bytes(b"out: \xff")
    for flags, said in {
        ("--config", f"{tmp_path}/none"): f"--config {tmp_path}/none: No such file or directory",
        ("--config", str(tmp_path)): f"--config {tmp_path}: Is a directory",
        ("--config", f"{tmp_path}/bytes"): f"--config {tmp_path}/bytes: not YAML: invalid start",
        ("--config",): "--config: expected one argument",
    }.items():
        with pytest.raises(SystemExit) as caught:
            parse(*flags)
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_help_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "--config FILE.yaml" in out and "--print-config" in out and "--rounds INT" in out


@pytest.mark.parametrize("name", ["yaml", "pydantic", "tyro"])
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit):
        parse()
    assert capsys.readouterr().err == f"error: the command line needs {name}: pip install {name}\n"


def test_print_config_is_yaml_of_all_values(write: Any) -> None:
    write("a.yaml", "rounds: 3\n")
    text = printed("--config", "a.yaml", "--client.lr=1e-5")
    assert yaml.safe_load(text) == {
        "out": None,
        "rounds": 3,
        "tau": 0.001,
        "sample_seed": None,
        "backend": "vmap",
        "verbose": False,
        "client": {"lr": 1e-05, "betas": [0.9, 0.99], "clip": None},
    }
    assert printed("--config=a.yaml", "--client.lr=1e-5", "--print_config") == text


# Any float but nan, which is not equal to itself; any text that a file in UTF-8 can hold.
FLOAT = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CLIENTS = st.builds(Client, FLOAT, st.tuples(FLOAT, FLOAT), st.none() | FLOAT)
ARGS = st.builds(
    Args,
    st.none() | TEXT | st.sampled_from(["1e-3", "null", "~", "on", "0x1f", "2026-11-22", "- a"]),
    st.integers(),
    FLOAT,
    st.none() | st.integers(),
    st.sampled_from(["loop", "vmap"]),
    st.booleans(),
    CLIENTS,
)


@settings(max_examples=60, deadline=None)
@given(ARGS)
def test_what_is_printed_gives_an_equal_object(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first.yaml"), Path(folder, "second.yaml")
        first.write_text(yaml.safe_dump(dataclasses.asdict(args)), "utf-8")
        assert parse("--config", str(first)) == args
        second.write_text(printed("--config", str(first)), "utf-8")
        assert parse("--config", str(second)) == args


@pytest.mark.parametrize("recipe", ["quickstart", "mnist_writers"])
def test_every_recipe_reads_what_it_prints(tmp_path: Path, recipe: str) -> None:
    args_type = runpy.run_path(str(ROOT / f"recipes/{recipe}.py"))["Args"]
    flags = ("--rounds=3", "--lr=1e-05", "--sample-seed=9", "--dtype=float64")
    path = tmp_path / "a.yaml"
    path.write_text(printed(*flags, args_type=args_type))
    args = parse("--config", str(path), args_type=args_type)
    assert args == parse(*flags, args_type=args_type) and args.lr == 1e-5
