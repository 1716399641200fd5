"""docs/algorithms.md says of every builder what the code says."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import vecfl
from vecfl import algorithms, optim, server_optim, transforms
from vecfl.algorithms import Algorithm
from vecfl.algorithms.base import Aggregator
from vecfl.algorithms.dga import Weighting
from vecfl.delays import Delay
from vecfl.layout import Entry, Layout
from vecfl.optim import ClientOptimizer
from vecfl.server_optim import ServerOptimizer
from vecfl.transforms import Transform

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "algorithms.md").read_text("utf-8")
ROW = re.compile(r"^\| `(\w+)`, (.*), `(vecfl/\S+)` \| (.*) \|$", re.MULTILINE)
ROWS = {
    name: (paper, file, [cell.strip() for cell in rest.split("|")])
    for name, paper, file, rest in ROW.findall(TEXT)
}
MADE = (Aggregator, Algorithm, Delay, ServerOptimizer, ClientOptimizer, Transform)


def builders() -> dict[str, Callable[..., Any]]:
    """Public functions that make an algorithm or a part of one, where they are offered."""
    found = {}
    for module in (vecfl, algorithms, server_optim, optim, transforms):
        for name in getattr(module, "__all__", vars(module)):
            made = getattr(module, name)
            public = inspect.isfunction(made) and not name.startswith("_")
            if public and inspect.signature(made).return_annotation in MADE:
                found[name] = made
    return found


BUILDERS = builders()


def options(builder: Callable[..., Any]) -> str:
    """The parameters of a builder, as the tables write them."""
    said = []
    for p in inspect.signature(builder).parameters.values():
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = getattr(p.default, "__name__", repr(p.default))
        said.append(f"{stars}{p.name}" + ("" if p.default is p.empty else f"={default}"))
    return ", ".join(said)


def test_every_builder_stands_in_a_table() -> None:
    assert ROWS.keys() == BUILDERS.keys()
    assert len(ROW.findall(TEXT)) == len(ROWS) >= 39


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_row_has_the_options_and_the_file_of_its_builder(name: str) -> None:
    paper, file, cells = ROWS[name]
    assert cells[0].strip("`") == options(BUILDERS[name])
    source = inspect.getsourcefile(BUILDERS[name])
    assert source is not None and Path(source) == ROOT / file
    assert paper


def made_by(kind: type) -> list[str]:
    """Builders of this kind that need no other one."""
    return sorted(
        name
        for name, builder in BUILDERS.items()
        if (signature := inspect.signature(builder)).return_annotation is kind
        and not signature.parameters.keys() & {"optimizer", "second"}
    )


@pytest.mark.parametrize("name", made_by(ServerOptimizer))
def test_what_a_server_optimizer_keeps(name: str) -> None:
    needed = {"lr": 0.1} if options(BUILDERS[name]).startswith("lr, ") else {}
    kept = BUILDERS[name](**needed).init(torch.zeros(3, dtype=torch.float64))
    assert ROWS[name][2][1].strip("`") == ", ".join(kept)
    assert all(t.shape == (() if k == "t" else (3,)) for k, t in kept.items())


@pytest.mark.parametrize("name", made_by(ClientOptimizer))
def test_what_a_client_optimizer_keeps(name: str) -> None:
    optimizer, cell = BUILDERS[name](), ROWS[name][2][1]
    assert cell[0] == str(optimizer.states)
    assert ("and the step" in cell) == optimizer.counts


NEEDED: dict[str, tuple[Any, ...]] = {"error_feedback": (vecfl.top_k(1.0),)}
NEEDED |= {name: (1.0,) for name in ("clip_by_norm", "clip_by_layer", "top_k", "random_k")}
NEEDED |= {"clip_by_l1": (1.0,), "local_gaussian": (1.0, 1.0, 1e-5), "adaptive_clip": (1.0,)}
NEEDED |= {name: (1.0, 1.0) for name in ("local_laplace", "flute_local_dp", "privunit2")}


@pytest.mark.parametrize("name", made_by(Transform))
def test_what_transforms_keep(name: str) -> None:
    named = {"count_noise": 1.0} if name == "adaptive_clip" else {}
    made, cells = BUILDERS[name](*NEEDED.get(name, ()), **named), ROWS[name][2]
    layout = Layout((Entry("a", (2,), 0, torch.float64),))
    assert (", ".join(made.init(layout)) or "nothing") == cells[2].strip("`").replace(
        "as its codec", "nothing"
    )
    assert made.table(2) == ({"residual": (2,)} if cells[3] == "`residual` [M]" else {})
    assert cells[3] == ("`residual` [M]" if name == "error_feedback" else "nothing")


def test_algorithms_keep_no_rows_of_clients() -> None:
    clients = {"lr": 0.1, "batches": vecfl.Batches(4)}
    needed = {
        "fedavg": clients,
        "fedsgd": {"lr": 0.1},
        "fedprox": clients | {"mu": 0.1},
        "fedprox_adaptive": clients,
        "dga": clients,
        "fednova": clients,
        "fedavgm": clients,
        **{name: clients | {"server_lr": 0.1} for name in ("fedadagrad", "fedadam", "fedyogi")},
    }
    layout = Layout((Entry("a", (2,), 0, torch.float64),))
    for name, how in needed.items():
        made = BUILDERS[name](**how)
        assert made.table(2) == {}
        kept = ", ".join(made.init(torch.zeros(2), layout).keys() - {"w"})
        like = re.search(r"as `(\w+)`", ROWS[name][2][2])
        said = ROWS[like[1] if like else name][2][1 if like else 2]
        assert all(word in said for word in kept.split(", ")), name


@pytest.mark.parametrize(("name", "parts"), [("scaffold", 2), ("feddyn", 1)])
def test_what_clients_keep(name: str, parts: int) -> None:
    made = BUILDERS[name](
        lr=0.1, batches=vecfl.Batches(4), **({"alpha": 0.1} if name == "feddyn" else {})
    )
    layout = Layout((Entry("a", (2,), 0, torch.float64),), (Entry("calls", (), 2, torch.float64),))
    sends, server, rows = ROWS[name][2][1:4]
    (column,) = made.table(layout)
    assert made.table(layout) == {column: (2,)} and f"`{column}` [T]" in rows
    (kept,) = made.init(torch.zeros(3), layout).keys() - {"w"}
    assert f"`{kept}` [T]" in server
    assert len(made.messages) == parts and (": 2P" in sends) == (parts == 2)


def test_every_name_is_there() -> None:
    assert all(
        (ROOT / path).is_file() for path in re.findall(r"`([\w/]+\.\w+)`", TEXT) if "/" in path
    )
    for name in re.findall(r"`torch\.([\w.]+)`", TEXT):
        made: Any = torch
        for part in name.split("."):
            made = getattr(made, part)
    known = "".join(path.read_text("utf-8") for path in (ROOT / "vecfl").rglob("*.py"))
    for paper, _, _ in ROWS.values():
        for number in re.findall(r"\d{4}\.\d{4,5}", paper):
            assert f"arXiv:{number}" in known or number == "1211.5063", number


def test_the_measures_and_weights_are_all_named() -> None:
    weights = ("by_examples", "uniform_weights", "capped", "by_tokens")
    assert all(f"`{name}" in TEXT for name in (*get_args(Weighting), *weights))
    assert set(weights) <= set(algorithms.__all__)
