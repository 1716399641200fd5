"""What a user gets: a light import, the names that are promised, two source roots."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import vecfl

ROOT = Path(__file__).resolve().parents[1]

# Hides every top-level module that is not named on the command line, as if it were not installed.
ONLY = """
import sys
from importlib.machinery import PathFinder

class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.split(".")[0] in allowed
        return super().find_spec(name, path, target) if known else None

allowed = {*sys.stdlib_module_names, *sys.argv[1:]}
sys.meta_path = [Only if finder is PathFinder else finder for finder in sys.meta_path]
"""


def installed_with(*distributions: str) -> set[str]:
    """Top-level modules of these distributions and of all that they require."""
    todo, closure = list(distributions), set()
    while todo:
        name = re.sub("[-_.]+", "-", todo.pop()).lower()
        if name in closure:
            continue
        closure.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        todo += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    modules = importlib.metadata.packages_distributions()
    return {
        module
        for module, owners in modules.items()
        if any(re.sub("[-_.]+", "-", owner).lower() in closure for owner in owners)
    }


def child(code: str, *allowed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", ONLY + code, *allowed]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


def test_import_needs_torch_and_numpy_alone() -> None:
    allowed = installed_with("torch", "numpy") | {"vecfl", "vecfl_kernels"}
    assert {"torch", "numpy", "sympy"} <= allowed
    assert allowed.isdisjoint({"yaml", "tyro", "tqdm", "sklearn", "matplotlib"})
    done = child("import vecfl; print(sorted(vecfl.__all__))", *allowed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(vecfl.__all__))


def test_the_check_above_sees_another_import() -> None:
    done = child("import numpy; print('numpy'); import yaml", *installed_with("numpy"))
    assert done.stdout == "numpy\n"
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'yaml'")


def test_every_public_name_exists() -> None:
    assert len(set(vecfl.__all__)) == len(vecfl.__all__) > 0
    assert [name for name in vecfl.__all__ if not hasattr(vecfl, name)] == []


def test_the_name_kernels_is_left_free() -> None:
    assert (ROOT / "kernels/vecfl_kernels/__init__.py").exists()
    assert not (ROOT / "kernels/__init__.py").exists()
