"""The floors of the code: who may import whom, how long a file and a function may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From bottom to top. A unit is a module or a package; it imports itself and what stands on lower
# floors, and nothing else of this repository but the edges below.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"vecfl_kernels"}),
    frozenset({"vecfl.errors"}),
    frozenset(
        {"vecfl.layout", "vecfl.random", "vecfl.files", "vecfl.signals", "vecfl.settings"}
        | {"vecfl.schedules", "vecfl.rows"}
    ),
    frozenset(
        {"vecfl.work", "vecfl.within_round", "vecfl.delays"}
        | {"vecfl.schedule", "vecfl.tape", "vecfl.launch", "vecfl.mesh", "vecfl.optim"}
        | {"vecfl.checkpoint"}
        | {
            "vecfl.augment",
            "vecfl.losses",
            "vecfl.metrics",
            "vecfl.modules",
            "vecfl.trial",
            "vecfl.task",
            "vecfl.models",
            "vecfl.data",
        }
        | {"vecfl.server_optim", "vecfl.track", "vecfl.model_file", "vecfl.table", "vecfl.distinct"}
        | {"vecfl.privacy"}
    ),
    frozenset({"vecfl.engine"}),
    frozenset(
        {"vecfl.algorithms", "vecfl.transforms", "vecfl.aggregate", "vecfl.sampling"}
        | {"vecfl.aggregator", "vecfl.robust"}
        | {"vecfl.evaluate", "vecfl.participation", "vecfl.state", "vecfl.geometry"}
        | {"vecfl.gram"}
    ),
    frozenset(
        {
            "vecfl.job",
            "vecfl.one_batch",
            "vecfl.processes",
            "vecfl.arrangement",
            "vecfl.worker",
            "vecfl.trainer",
            "vecfl.choices",
            "vecfl.probe",
            "vecfl.arrange",
            "vecfl.precision",
        }
        | {"vecfl.replay", "vecfl.releases", "vecfl.promises"}
        | {"vecfl.feed", "vecfl.cohorts", "vecfl.tally", "vecfl.simulation"}
    ),
    frozenset(
        {"vecfl.report", "vecfl.record", "vecfl.cli", "vecfl.flags", "vecfl.rounds"}
        | {
            "vecfl.plugins",
            "vecfl.named",
            "vecfl.parts",
            "vecfl.evaluations",
            "vecfl.algorithm_flags",
        }
        | {"vecfl.privacy_flags", "vecfl.budget"}
        | {"vecfl.finish"}
        | {"vecfl.watch", "vecfl.changes", "vecfl.resume", "vecfl.keeper", "vecfl.load"}
        | {"vecfl.stop", "vecfl.compare", "vecfl.profile", "vecfl.roof"}
    ),
    frozenset({"vecfl"}),  # vecfl/__init__.py, which names what is public
    frozenset({"benchmarks.common"}),
    frozenset({"recipes", "benchmarks"}),
)
SAME_FLOOR = {
    ("vecfl.mesh", "vecfl.launch"),
    ("vecfl.schedule", "vecfl.work"),
    ("vecfl.delays", "vecfl.work"),
    ("vecfl.within_round", "vecfl.optim"),
    ("vecfl.within_round", "vecfl.work"),
    ("vecfl.server_optim", "vecfl.work"),
    ("vecfl.tape", "vecfl.schedule"),
    ("vecfl.task", "vecfl.augment"),
    ("vecfl.task", "vecfl.losses"),
    ("vecfl.metrics", "vecfl.losses"),
    ("vecfl.task", "vecfl.modules"),
    ("vecfl.task", "vecfl.trial"),
    ("vecfl.trial", "vecfl.losses"),
    ("vecfl.trial", "vecfl.modules"),
    ("vecfl.models", "vecfl.task"),
    ("vecfl.algorithms", "vecfl.aggregate"),
    ("vecfl.transforms", "vecfl.algorithms"),
    ("vecfl.transforms", "vecfl.aggregate"),
    ("vecfl.participation", "vecfl.sampling"),
    ("vecfl.state", "vecfl.algorithms"),
    ("vecfl.geometry", "vecfl.aggregate"),
    ("vecfl.geometry", "vecfl.gram"),
    ("vecfl.aggregator", "vecfl.aggregate"),
    ("vecfl.robust", "vecfl.algorithms"),
    ("vecfl.aggregator", "vecfl.algorithms"),
    ("vecfl.processes", "vecfl.job"),
    ("vecfl.one_batch", "vecfl.processes"),
    ("vecfl.trainer", "vecfl.processes"),
    ("vecfl.arrangement", "vecfl.processes"),
    ("vecfl.trainer", "vecfl.arrangement"),
    ("vecfl.probe", "vecfl.arrangement"),
    ("vecfl.arrange", "vecfl.arrangement"),
    ("vecfl.simulation", "vecfl.arrangement"),
    ("vecfl.worker", "vecfl.processes"),
    ("vecfl.one_batch", "vecfl.job"),
    ("vecfl.worker", "vecfl.one_batch"),
    ("vecfl.worker", "vecfl.job"),
    ("vecfl.trainer", "vecfl.job"),
    ("vecfl.trainer", "vecfl.worker"),
    ("vecfl.feed", "vecfl.trainer"),
    ("vecfl.replay", "vecfl.trainer"),
    ("vecfl.probe", "vecfl.choices"),
    ("vecfl.probe", "vecfl.feed"),
    ("vecfl.probe", "vecfl.trainer"),
    ("vecfl.probe", "vecfl.job"),
    ("vecfl.arrange", "vecfl.choices"),
    ("vecfl.arrange", "vecfl.probe"),
    ("vecfl.arrange", "vecfl.precision"),
    ("vecfl.trainer", "vecfl.precision"),
    ("vecfl.simulation", "vecfl.arrange"),
    ("vecfl.simulation", "vecfl.feed"),
    ("vecfl.simulation", "vecfl.probe"),
    ("vecfl.simulation", "vecfl.cohorts"),
    ("vecfl.promises", "vecfl.releases"),
    ("vecfl.simulation", "vecfl.promises"),
    ("vecfl.simulation", "vecfl.tally"),
    ("vecfl.tally", "vecfl.cohorts"),
    ("vecfl.tally", "vecfl.job"),
    ("vecfl.simulation", "vecfl.job"),
    ("vecfl.simulation", "vecfl.trainer"),
    ("vecfl.flags", "vecfl.cli"),
    ("vecfl.named", "vecfl.plugins"),
    ("vecfl.flags", "vecfl.named"),
    ("vecfl.flags", "vecfl.parts"),
    ("vecfl.parts", "vecfl.plugins"),
    ("vecfl.algorithm_flags", "vecfl.parts"),
    ("vecfl.algorithm_flags", "vecfl.plugins"),
    ("vecfl.algorithm_flags", "vecfl.flags"),
    ("vecfl.algorithm_flags", "vecfl.cli"),
    *(("vecfl.privacy_flags", f"vecfl.{name}") for name in ("cli", "named")),
    ("vecfl.flags", "vecfl.privacy_flags"),
    ("vecfl.report", "vecfl.budget"),
    ("vecfl.flags", "vecfl.evaluations"),
    ("vecfl.record", "vecfl.evaluations"),
    ("vecfl.record", "vecfl.profile"),
    ("vecfl.flags", "vecfl.profile"),
    ("vecfl.profile", "vecfl.roof"),
    ("vecfl.flags", "vecfl.report"),
    ("vecfl.flags", "vecfl.watch"),
    ("vecfl.stop", "vecfl.watch"),
    ("vecfl.flags", "vecfl.stop"),
    ("vecfl.resume", "vecfl.stop"),
    ("vecfl.record", "vecfl.stop"),
    ("vecfl.keeper", "vecfl.stop"),
    ("vecfl.resume", "vecfl.cli"),
    ("vecfl.resume", "vecfl.flags"),
    ("vecfl.load", "vecfl.report"),
    ("vecfl.load", "vecfl.resume"),
    ("vecfl.record", "vecfl.flags"),
    ("vecfl.record", "vecfl.report"),
    ("vecfl.record", "vecfl.resume"),
    ("vecfl.record", "vecfl.keeper"),
    ("vecfl.record", "vecfl.finish"),
    ("vecfl.finish", "vecfl.keeper"),
    ("vecfl.finish", "vecfl.report"),
    ("vecfl.keeper", "vecfl.flags"),
    ("vecfl.keeper", "vecfl.resume"),
    ("vecfl.keeper", "vecfl.watch"),
    *(("vecfl.compare", f"vecfl.{name}") for name in ("cli", "flags", "load")),
    ("vecfl.keeper", "vecfl.parts"),
    ("vecfl.record", "vecfl.plugins"),
    ("vecfl.changes", "vecfl.plugins"),
    ("vecfl.changes", "vecfl.cli"),
    ("vecfl.resume", "vecfl.changes"),
}
SCRIPTS = FLOORS[-1]  # nobody imports one, not even another script
COMMON = "benchmarks.common"  # what the benchmarks share; it serves them alone
PUBLIC_ONLY = SCRIPTS | {COMMON}  # they use public names only
OURS = {"vecfl", "vecfl_kernels", "kernels", "recipes", "benchmarks", "tests"}
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}

MAX_FILE, MAX_FUNCTION = 250, 50


def violations(sources: dict[str, str]) -> list[str]:
    """One line for each import that the floors forbid; `sources` maps path -> text."""
    found = []
    for path, text in sorted(sources.items()):
        importer = unit(module(path))
        if importer is None:
            found.append(f"{path}: unknown module, give it a floor")
            continue
        for line, name, member in imports(path, text):
            if sibling_script(path, name, sources):
                name = f"{importer}.{name}"
            if name.split(".")[0] in OURS and (why := forbidden(importer, name, member)):
                found.append(f"{path}:{line}: {importer} may not import {name}: {why}")
    return list(dict.fromkeys(found))


def forbidden(importer: str, name: str, member: str) -> str | None:
    """Why a file of `importer` may not say `from name import member` (or `import name`)."""
    imported = unit(name)
    if imported is None:
        return "unknown module"
    if imported in SCRIPTS:
        return "nobody imports a script"
    if imported == COMMON and importer not in {COMMON, "benchmarks"}:
        return "it serves the benchmarks alone"
    private = [part for part in (*name.split("."), member) if re.match("_[^_]", part)]
    if importer in PUBLIC_ONLY and private:
        return f"{private[0]} is not public"
    if importer == imported or (importer, imported) in SAME_FLOOR:
        return None
    if imported == "vecfl" and importer not in PUBLIC_ONLY:
        return "name the module, not the root package"
    if FLOOR[imported] >= FLOOR[importer]:
        return f"floor {FLOOR[imported]} is not below floor {FLOOR[importer]}"
    return None


def module(path: str) -> str:
    """`vecfl/data/__init__.py` -> `vecfl.data`; the source root `kernels/` is no part of a name."""
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(name: str) -> str | None:
    """The unit of FLOORS that a module belongs to."""
    parts = name.split(".")
    pair = ".".join(parts[:2])
    candidate = pair if parts[0] == "vecfl" or pair == COMMON else parts[0]
    return candidate if candidate in FLOOR else None


def sibling_script(path: str, name: str, sources: dict[str, str]) -> bool:
    """A script finds the files beside it by their bare names."""
    folder = PurePosixPath(path).parent
    return folder.parts[0] in SCRIPTS and f"{folder / name.split('.')[0]}.py" in sources


def imports(path: str, text: str) -> Iterator[tuple[int, str, str]]:
    """(line, absolute module, member) of every import, in functions and under conditions too."""
    name = module(path)
    package = name if path.endswith("/__init__.py") else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text, path)):
        match node:
            case ast.Import(names=aliases):
                yield from ((node.lineno, alias.name, "") for alias in aliases)
            case ast.ImportFrom(names=aliases, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                yield from ((node.lineno, source, alias.name) for alias in aliases)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str() as source), *_],
            ):
                yield node.lineno, source, ""


def too_long(sources: dict[str, str]) -> list[str]:
    """One line for each file over MAX_FILE lines and each function over MAX_FUNCTION."""
    found = []
    for path, text in sorted(sources.items()):
        if (lines := len(text.splitlines())) > MAX_FILE:
            found.append(f"{path}: {lines} lines, at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text, path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    return found


def read(*folders: str) -> dict[str, str]:
    """Every .py below these folders of the repository, by its path from the root."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in files}


def test_the_repository_keeps_its_floors() -> None:
    sources = read("vecfl", "kernels", "recipes", "benchmarks")
    assert {"vecfl/__init__.py", "kernels/vecfl_kernels/__init__.py"} <= set(sources)
    assert violations(sources) == []


def test_files_and_functions_are_short() -> None:
    assert too_long(read("vecfl", "kernels", "recipes", "benchmarks")) == []


PLANTED = {
    "upward": ("vecfl/optim.py", "from vecfl.engine import loop", "vecfl.engine"),
    "upward by one": ("vecfl/errors.py", "import vecfl.layout", "vecfl.layout"),
    "sideways": ("vecfl/transforms/clip.py", "from vecfl.sampling import uniform", "vecfl.sampl"),
    "against an edge": ("vecfl/aggregate.py", "import vecfl.algorithms.fedavg", "vecfl.algorithms"),
    "in a function": ("vecfl/task.py", "def f():\n    import vecfl.simulation", "vecfl.simulation"),
    "for types only": ("vecfl/data/a.py", "if 0:\n    from vecfl.task import Task", "vecfl.task"),
    "by name": ("vecfl/task.py", "importlib.import_module('vecfl.cli')", "vecfl.cli"),
    "relative, module": ("vecfl/layout.py", "from .simulation import run", "vecfl.simulation"),
    "relative, file": ("vecfl/engine/loop.py", "from ..evaluate import pool", "vecfl.evaluate"),
    "relative, package": ("vecfl/data/__init__.py", "from ..report import page", "vecfl.report"),
    "relative, root": ("vecfl/layout.py", "from . import simulation", "vecfl"),
    "root": ("vecfl/cli.py", "import vecfl", "vecfl"),
    "from root": ("vecfl/engine/loop.py", "from vecfl import Task", "vecfl"),
    "recipe": ("vecfl/cli.py", "from recipes.quickstart import Args", "recipes.quickstart"),
    "recipe by recipe": ("recipes/prox.py", "import recipes.quickstart", "recipes.quickstart"),
    "recipe beside": ("recipes/prox.py", "from quickstart import Args", "recipes.quickstart"),
    "benchmark": ("recipes/quickstart.py", "import benchmarks.speed", "benchmarks.speed"),
    "recipe by root": ("vecfl/__init__.py", "import recipes.quickstart", "recipes.quickstart"),
    "shared by recipe": ("recipes/a.py", "import benchmarks.common.rows", "benchmarks.common.rows"),
    "shared by vecfl": ("vecfl/cli.py", "from benchmarks.common import rows", "benchmarks.common"),
    "shared on script": ("benchmarks/common/a.py", "import benchmarks.speed", "benchmarks.speed"),
    "shared on recipe": ("benchmarks/common/a.py", "import recipes.prox", "recipes.prox"),
    "shared, private": ("benchmarks/common/a.py", "from vecfl.tape import _cut", "vecfl.tape"),
    "private name": ("recipes/prox.py", "from vecfl.engine import _step", "vecfl.engine"),
    "private module": ("recipes/prox.py", "import vecfl.engine._step as s", "vecfl.engine._step"),
    "kernels on vecfl": ("kernels/vecfl_kernels/a.py", "import vecfl.errors", "vecfl.errors"),
    "kernels by folder": ("vecfl/optim.py", "import kernels.vecfl_kernels", "kernels.vecfl_kern"),
    "tests": ("vecfl/optim.py", "from tests.oracles import loop", "tests.oracles"),
    "unknown": ("vecfl/optim.py", "import vecfl.nowhere", "vecfl.nowhere"),
}
LEGAL = {
    "vecfl/__init__.py": "from vecfl.simulation import run\nfrom . import errors",
    "vecfl/cli.py": "import vecfl.simulation, torch, vecfl_kernels",
    "vecfl/algorithms/fedprox.py": "from .fedavg import fedavg\nfrom ..aggregate import mean",
    "vecfl/models/mlp.py": "from vecfl.task import Task",
    "vecfl/task.py": "from vecfl.modules import check\nfrom .errors import InputError",
    "vecfl/data/__init__.py": "from . import digits\nfrom .digits import load",
    "vecfl/data/digits.py": "from ..errors import InputError\nimport numpy as np",
    "recipes/quickstart.py": "import vecfl\nfrom vecfl import __version__, Task\nimport yaml",
    "benchmarks/speed.py": "from vecfl.engine import loop\nfrom benchmarks.common import rows",
    "benchmarks/common/rows.py": "import vecfl, vecfl_kernels\nfrom . import workloads",
    "kernels/vecfl_kernels/__init__.py": "from .scale import scale\nimport torch",
}


@pytest.mark.parametrize(("path", "line", "named"), PLANTED.values(), ids=PLANTED)
def test_a_planted_import_is_found(path: str, line: str, named: str) -> None:
    (found,) = violations(LEGAL | {"recipes/quickstart.py": "", path: line})
    assert found.startswith(f"{path}:") and f"may not import {named}" in found


def test_legal_imports_pass() -> None:
    assert violations(LEGAL) == []


def test_a_file_without_a_floor_is_found() -> None:
    assert violations({"vecfl/misc.py": ""}) == ["vecfl/misc.py: unknown module, give it a floor"]


def test_length_limits_are_exact() -> None:
    function = "def f():\n" + "    pass\n" * 49
    assert too_long({"a.py": function, "b.py": "\n" * 250}) == []
    assert too_long({"a.py": function + "    pass\n", "b.py": "\n" * 251}) == [
        "a.py:1: f has 51 lines",
        "b.py: 251 lines, at most 250",
    ]
