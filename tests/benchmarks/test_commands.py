"""What a newcomer mistypes is one line on stderr and exit code 2, and leaves nothing behind."""

import runpy
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch

from benchmarks.common.command import Parser, command, positive
from benchmarks.common.rows import ROOT

SCRIPTS = sorted(
    path
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.parent.name == "benchmarks" or path.name == "compare.py"
)


def said(script: str, words: list[str], capsys: Any, code: int = 2) -> tuple[str, str]:
    """What a script prints to stdout and to stderr until it ends with `code`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", [script, *words])
        runpy.run_path(f"{ROOT}/benchmarks/{script}.py", run_name="__main__")
    assert ended.value.code == code
    return capsys.readouterr()


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        ("round_time", "--passes 0", "argument --passes: expected a whole number of at least 1"),
        ("round_time", "--workloads mlp-0", "argument --workloads: mlp-0: expected a model of"),
        ("scale", "--rounds 0", "argument --rounds: expected a whole number of at least 1, not 0"),
        ("scale", "--cohorts 1000 --clients 100", "--cohorts 1000: the store has 100 clients"),
        ("scaling", "--rounds -1", "argument --rounds: expected a whole number of at least 1"),
        ("limits", "--rounds 0.5", "argument --rounds: expected a whole number of at least 1"),
        ("bandwidth", "--numbers 0", "argument --numbers: expected a whole number of at least 1"),
        ("bandwidth", "--numbers many", "argument --numbers: expected a whole number of at least"),
        ("precision", "--clients 0", "argument --clients: expected a whole number of at least 1"),
        ("precision", "--backends nonsense --clients 1", "backend 'nonsense' is not known"),
        ("private_rounds", "--few 0", "argument --few: expected a whole number of at least 1"),
        ("table", "--rounds 1 --folder /dev/null/x", "/dev/null/x"),
        ("checkpoint", "--folder /dev/null/x", "/dev/null/x"),
        ("memory", "--out /dev/null/x/rows.jsonl", "/dev/null/x: Not a directory"),
        ("rivals/compare", "--repeats 0", "argument --repeats: expected a whole number of at"),
        ("page", "--results /dev/null/x", "/dev/null/x: no rows here; expected some of round_time"),
        pytest.param("bandwidth", "--device cuda", "there is no device cuda here", marks=NO_GPU),
        pytest.param("precision", "--device cuda", "there is no device cuda here", marks=NO_GPU),
    ],
)
def test_bad_input_is_one_line(
    script: str, flags: str, line: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "rows.jsonl"
    words = flags.split() if "--out" in flags else ["--out", str(out), *flags.split()]
    printed, error = said(script, words, capsys)
    assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert not printed and not out.exists()


@pytest.mark.parametrize(
    ("script", "flags"),
    [("bandwidth", "--numbers 8 --cells 8"), ("round_time", "--measure logistic-2 auto")],
)
def test_kernels_that_do_not_exist(
    script: str, flags: str, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("VECFL_KERNELS", "nonsense")
    words = [*flags.split(), "--out", str(tmp_path / "rows.jsonl")]
    _, error = said(script, words, capsys)
    assert error == "error: VECFL_KERNELS=nonsense: expected reference, triton or auto\n"


def test_a_process_that_said_why_is_not_told_of_again_and_bugs_are(capsys: Any) -> None:
    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command(lambda: fails(CalledProcessError(2, "child")))
    assert ended.value.code == 2 and capsys.readouterr().err == ""
    for bug in (CalledProcessError(1, "child"), ValueError("a bug"), OSError("no file")):
        with pytest.raises(type(bug)):
            command(lambda bug=bug: fails(bug))


def test_whole_numbers_may_be_written_as_powers() -> None:
    assert [positive(text) for text in ("1", "1e7", "20_000")] == [1, 10_000_000, 20_000]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_says_what_flags_mean(script: Path, monkeypatch: Any, capsys: Any) -> None:
    """Every flag has words, its default if it has one, and a script says how long it takes."""
    flags = []
    add = Parser.add_argument

    def seen(self: Parser, *names: str, **known: Any) -> Any:
        flags.append((names, known))
        return add(self, *names, **known)

    monkeypatch.setattr(Parser, "add_argument", seen)
    monkeypatch.setenv("COLUMNS", "100")
    name = str(script.relative_to(ROOT / "benchmarks").with_suffix(""))
    printed, _ = said(name, ["--help"], capsys, code=0)
    assert "Takes " in printed and all(known.get("help") for _, known in flags)
    defaults = [known["default"] for _, known in flags if isinstance(known.get("default"), int)]
    assert all(f"[{default}]" in " ".join(printed.split()) for default in defaults)
