"""Lower precision of products: its error, what it leaves alone, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vecfl
from vecfl import Batches, FederatedDataset, Simulation, Task
from vecfl.changes import changes
from vecfl.errors import InputError
from vecfl.precision import products

with torch.random.fork_rng():
    torch.manual_seed(0)
    CNN = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 3 * 3, 10)
    )
    MLP = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
MODULES = {"mlp": MLP, "cnn": CNN}


def simulation(module: nn.Module, **how: object) -> Simulation:
    """Six clients of 20 images of 8 x 8, which take one step of 20; of two classes, so that what
    they have in common is no small difference of large gradients."""
    g = torch.Generator().manual_seed(3)
    columns = {"x": torch.rand(120, 1, 8, 8, generator=g), "y": torch.arange(120) % 2}
    data = FederatedDataset(columns, torch.arange(0, 121, 20))
    task = Task(module, vecfl.cross_entropy, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.1, batches=Batches(20))
    return Simulation(task, data, algorithm, vecfl.everyone(), slots=3, **how)


def change(module: nn.Module, **how: object) -> Tensor:
    """What a round changes in the model."""
    sim = simulation(module, **how)
    state = sim.start()
    return (sim.round(state)[0].server["w"] - state.server["w"]).double()


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_bf16_rounds_products_and_nothing_else(module: nn.Module, backend: str) -> None:
    right = change(module, backend=backend, dtype=torch.float64)
    plain, low = (
        change(module, backend=backend, precision=precision) for precision in ("float32", "bf16")
    )
    assert float((plain - right).norm() / right.norm()) < 5e-5
    # bfloat16 has 8 bits of mantissa: a factor is off by 2^-9 = 0.2 % at most. Sums in bfloat16, or
    # rows, would be off by more: an lr of 0.1 moves weights of 0.1 by less than they are rounded.
    error = float((low - right).norm() / right.norm())
    assert 1e-4 < error < 2e-2


def test_rows_gradients_losses_and_evaluation_stay_float32() -> None:
    seen: list[tuple[str, torch.dtype]] = []

    def loss(output: Tensor, batch: vecfl.losses.Batch) -> vecfl.losses.Pair:
        seen.append(("loss", output.dtype))
        return vecfl.cross_entropy(output, batch)

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x.flatten(1))
            seen.append(("train" if self.training else "eval", out.dtype))
            return out

    sim = simulation(Seen(), backend="loop", precision="bf16")
    sim.trainer.workers[0].backend.task.loss = loss
    seen.clear()
    state, metrics = sim.round(sim.start())
    assert set(seen) == {("train", torch.bfloat16), ("loss", torch.float32)}
    slots = sim.trainer.workers[0].slots
    assert slots.flat.dtype == state.server["w"].dtype == torch.float32
    assert metrics["system/precision"] == "bf16"
    seen.clear()
    sim.evaluate(state, sim.data.columns)
    assert set(seen) == {("eval", torch.float32)}


def test_what_cannot_be_had_is_refused() -> None:
    for how, what in (
        ({"precision": "fp8"}, "precision 'fp8' is not known; choose float32, tf32 or bf16"),
        ({"precision": "tf32"}, "precision tf32: needs a CUDA device, not cpu; choose float32"),
        (
            {"precision": "bf16", "dtype": torch.float64},
            "precision bf16: products of float32 numbers, not of torch.float64",
        ),
        (
            {"precision": "bf16", "backend": "stacked"},
            "the stacked backend has no bf16: use vmap or loop, or tf32 on a GPU",
        ),
    ):
        with pytest.raises(InputError) as caught:
            simulation(MLP, **how)
        assert str(caught.value) == what


def test_auto_leaves_stacked_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sim = simulation(MLP, backend="auto", precision="bf16")
    assert sim.arrangement.backend in ("loop", "vmap")
    assert sim.arrangement.precision == "bf16"
    assert str(sim.arrangement).startswith(f"{sim.arrangement.backend}, bf16, 1 worker")


def test_another_precision_is_another_run() -> None:
    sim = simulation(MLP, precision="bf16")
    kept = sim.save(sim.start())
    what = "the checkpoint is of another run: precision bf16 there, float32 here"
    with pytest.raises(InputError) as caught:
        simulation(MLP).load(kept)
    assert str(caught.value) == what
    older = simulation(MLP).save(sim.start())  # no checkpoint of before tells its precision
    del older["facts"]["precision"], older["facts"]["graphs"]
    assert simulation(MLP).load(older).round == 0
    with pytest.raises(InputError, match="precision float32 there, bf16 here"):
        sim.load(older)


def test_going_on_names_the_precision() -> None:
    there = {"lr": 0.1, "precision": "bf16"}
    assert changes(there, {"lr": 0.1, "precision": "float32"}) == [
        "precision bf16 there, float32 here"
    ]
    assert changes({"lr": 0.1}, {"lr": 0.1, "precision": "float32"}) == []  # of an older version
    assert changes({"lr": 0.1}, there) == ["precision float32 there, bf16 here"]


@pytest.fixture
def switches() -> Iterator[tuple[Any, Any]]:
    """Of products and of convolutions, which are in tf32 from the start."""
    both = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    was, both[1].fp32_precision = both[1].fp32_precision, "ieee"
    yield both
    both[1].fp32_precision = was


def test_tf32_holds_while_clients_train(
    monkeypatch: pytest.MonkeyPatch, switches: tuple[Any, Any]
) -> None:
    before = [s.fp32_precision for s in switches]
    with pytest.raises(KeyError), products("tf32"):
        assert [s.fp32_precision for s in switches] == ["tf32", "tf32"]
        raise KeyError
    assert [s.fp32_precision for s in switches] == before
    with products("float32"):
        assert [s.fp32_precision for s in switches] == before

    monkeypatch.setattr("vecfl.arrange.check_precision", lambda *_: None)
    sim, seen = simulation(MLP, precision="tf32"), []
    worker = sim.trainer.workers[0]
    plain = worker.train

    def train(*args: object) -> object:
        seen.append([s.fp32_precision for s in switches])
        return plain(*args)

    worker.train = train
    sim.round(sim.start())
    assert seen == [["tf32", "tf32"]]
    assert [s.fp32_precision for s in switches] == before
