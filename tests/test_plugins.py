"""Parts by name, from vecfl and from files of one's own."""

import re
from pathlib import Path

import pytest
import torch

from vecfl import sampling
from vecfl.errors import InputError
from vecfl.participation import separated
from vecfl.plugins import function, part

KNOWN = {"uniform": sampling.uniform, "poisson": sampling.poisson, "separated": separated}
MINE = """
def odd(eligible, seed, round):
    return eligible.nonzero().flatten()[1::2]


def every(k, start=0):
    return lambda eligible, seed, round: eligible.nonzero().flatten()[start::k]


number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "wrong.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)


def drawn(text: str) -> list[int]:
    sampler = part("--sampler", text, KNOWN)
    found: list[int] = sampler(torch.ones(10, dtype=torch.bool), 3, 0).tolist()
    return found


def test_parts_of_vecfl() -> None:
    direct = sampling.uniform(4)(torch.ones(10, dtype=torch.bool), 3, 0).tolist()
    assert drawn("uniform(4)") == drawn(" uniform( size = 4 )") == direct
    inside = separated(sampling.poisson(0.5), 2)(torch.ones(10, dtype=torch.bool), 3, 0)
    assert drawn("separated(poisson(0.5), rounds=2)") == inside.tolist()


def test_parts_of_ones_own() -> None:
    assert drawn("mine.py:odd") == drawn("mine:odd") == [1, 3, 5, 7, 9]
    assert drawn("mine.py:every(4)") == [0, 4, 8]
    assert drawn("mine:every(k=4, start=-1)") == [9]
    assert drawn(f"{Path.cwd()}/mine.py:every(3)") == [0, 3, 6, 9]


def test_a_function_with_its_options() -> None:
    made, options = function("--algorithm", "mine.py:every(start=2)", KNOWN)
    assert options == {"start": 2} and made(k=5, **options)(torch.ones(9) > 0, 0, 0).tolist() == [
        *(2, 7),
    ]
    assert function("--algorithm", "uniform", KNOWN) == (sampling.uniform, {})
    with pytest.raises(InputError, match=re.escape("give arguments by name, every(k, start=0)")):
        function("--algorithm", "mine.py:every(2)", KNOWN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("uniform", "uniform takes arguments, or (): uniform(size)"),
        ("unifrom(4)", "no unifrom here; is it uniform? Your own is file.py:unifrom"),
        ("uniform(sizes=4)", "uniform: missing a required argument: 'size'; it is uniform(size)"),
        ("uniform(4, 5)", "uniform: too many positional arguments; it is uniform(size)"),
        ("uniform(4", "uniform(4: expected name(arguments), file.py:name or module:name"),
        ("4", "4: expected name(arguments), file.py:name or module:name"),
        ("a.b(4)", "a.b(4): expected name(arguments), file.py:name or module:name"),
        ("uniform(size=x)", "x: expected a number, a text or a list"),
        ("uniform(open('x'))", "no open here; is it"),
        ("uniform(__import__('os').getcwd())", "__import__('os').getcwd(): expected a number"),
        ("none.py:odd", f"no file none.py in {Path.cwd().root}"),
        ("none.at.all:odd", "no module none.at.all; a file is file.py:odd"),
        ("mine.py:even", "mine.py has no even; it has every, odd"),
    ],
)
def test_what_cannot_be_is_one_line(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        part("--sampler", text, KNOWN)
    assert str(caught.value).startswith(f"--sampler: {said}")


def test_an_error_inside_of_a_file_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        part("--sampler", "wrong.py:odd", KNOWN)
