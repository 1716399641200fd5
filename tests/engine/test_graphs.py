"""Captured steps, with a stand-in for the capture (`recorder.py`), give what plain steps give."""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, Simulation, Task
from vecfl.algorithms import Algorithm
from vecfl.engine import Graphs, graphs
from vecfl.errors import InputError
from vecfl.optim import ClientOptimizer
from vecfl.trainer import Trainer

from ..oracles import bridge
from ..oracles.tasks import (
    AUGMENTED,
    LAYERED,
    PROBLEMS,
    SIZES,
    Positions,
    Problem,
    floats,
    some_labels,
    tokens,
)
from ..oracles.toy import habit
from .recorder import ASKING, Recorder, drawn

POSITIONS = Problem(Positions, tokens, floats(6, 5), some_labels)
ALL = PROBLEMS | AUGMENTED | {"positions": POSITIONS}
FEW = tuple(name for name in ASKING if name != "aten::_local_scalar_dense")  # see `CrossEntropy`


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorder]]:
    """Those of the workers, in place of CUDA's; blocks and old models are spoiled after use."""
    made: list[Recorder] = []

    def recorder(device: torch.device) -> Recorder:
        made.append(Recorder(FEW))
        return made[-1]

    def train_(self: Graphs, rule: Any, update: Any, gather: Any, *block: Any) -> None:
        tensors = [None if t is None else t.clone() for t in block[:3]]
        plain(self, rule, update, gather, *tensors, *block[3:])
        for t in tensors:
            if t is not None:
                t.fill_(-1)

    plain = Graphs.train_
    monkeypatch.setattr(Graphs, "train_", train_)
    monkeypatch.setattr(graphs, "recorder", recorder)
    monkeypatch.setattr("vecfl.random.philox", drawn)
    monkeypatch.setattr("vecfl.arrange.require_cuda", lambda device: None)
    yield made


def falling(round: int) -> float:
    """A rate for each round; float32 holds them all, as Adam needs."""
    return (0.25, 0.0625, 0.125)[round % 3]


def rounds(
    algorithm: Algorithm,
    problem: str = "mlp",
    number: int = 3,
    sizes: tuple[int, ...] = SIZES,
    spoil: bool = True,
    **how: Any,
) -> tuple[list[Tensor], list[dict]]:
    """The models after each round, and the metrics; models of before are spoiled when used."""
    p = (ALL | LAYERED)[problem]
    data = bridge.dataset(p.clients(sizes))
    augment = bridge.transforms(p.augment)
    task = Task(p.build(), p.loss, example=data.examples(2), augment=augment)
    how = {"backend": "vmap", "slots": 3, "seed": 7, "dtype": torch.float64} | how
    sim = Simulation(task, data, algorithm, vecfl.everyone(), **how)
    state, models, metrics = sim.start(), [], []
    for _ in range(number):
        before = state
        state, found = sim.round(state)
        state = sim.observe(state, found)
        models.append(state.server["w"].clone())
        metrics.append(found)
        if spoil:
            before.server["w"].fill_(float("nan"))
    return models, metrics


RULES: dict[str, Callable[[Batches], Algorithm]] = {
    "sgd": lambda b: vecfl.fedavg(lr=falling, batches=b),
    "decay": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.sgd(0.1)),
    "momentum": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.momentum()),
    "nesterov": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.momentum(0.5, True)),
    "adam": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.adam()),
    "adamw": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.adamw()),
    "rmsprop": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.rmsprop()),
    "adagrad": lambda b: vecfl.fedavg(lr=falling, batches=b, optimizer=vecfl.adagrad()),
    "within a round": lambda b: vecfl.fedavg(
        lr=falling, batches=b, optimizer=vecfl.within_round(vecfl.adam(), lambda s: 0.5**s)
    ),
    "pull and clip": lambda b: vecfl.fedprox(lr=falling, batches=b, mu=0.25, clip=0.5),
    "adaptive pull": lambda b: vecfl.fedprox_adaptive(
        lr=falling, batches=b, start=0.25, step=0.25, patience=1
    ),
    "rows": lambda b: vecfl.scaffold(lr=falling, batches=b),
    "bias": lambda b: habit(lr=falling, batches=b),
    "tokens": lambda b: vecfl.fedavg(lr=falling, batches=b, weights=vecfl.by_tokens),
    "statistics": lambda b: vecfl.dga(
        lr=falling, batches=b, weighting="flute_loss", softmax_beta=0.5
    ),
}


def agree(ours: tuple[list[Tensor], list[dict]], plain: tuple[list[Tensor], list[dict]]) -> None:
    for found, right in zip(*(models for models, _ in (ours, plain)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
    for found, right in zip(*(metrics for _, metrics in (ours, plain)), strict=True):
        assert found["train/loss"] == pytest.approx(right["train/loss"], rel=1e-9)
        assert found["system/client_steps"] == right["system/client_steps"]
        # captured steps are of all slots, plain ones of those that have a client
        assert found["system/slot_efficiency"] <= right["system/slot_efficiency"]
        assert (found["system/graphs"], right["system/graphs"]) == (True, False)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_replayed_with_the_rates_of_its_rounds(
    rule: str, recorders: list[Recorder]
) -> None:
    plain = rounds(RULES[rule](Batches(4, epochs=2)), "mlp", spoil=False)
    assert not recorders
    agree(rounds(RULES[rule](Batches(4, epochs=2)), "mlp", graphs=True), plain)
    (recorder,) = (r for r in recorders if r.warmed)
    # Steps with a mask and steps without are kinds of their own, and mu is a number inside of them.
    if rule == "adaptive pull":
        assert recorder.recorded > 2
    else:
        assert (recorder.recorded, recorder.warmed) == (2, 2 * graphs.WARM)
    assert recorder.replayed > 20


@pytest.mark.parametrize("problem", ALL)
def test_every_module_is_replayed(problem: str, recorders: list[Recorder]) -> None:
    algorithm = vecfl.fedavg(lr=falling, batches=Batches(4, epochs=2))
    plain = rounds(algorithm, problem, spoil=False)
    agree(rounds(algorithm, problem, graphs=True), plain)
    assert [(r.recorded, r.replayed > 20) for r in recorders] == [(2, True)]


@pytest.mark.parametrize("optimizer", [vecfl.sgd(), vecfl.momentum()], ids=lambda o: o.name)
@pytest.mark.parametrize("problem", ["linear", "mlp", "images", "positions", "cnn", "lstm", "gru"])
def test_stacked_layers_move_their_weights_at_the_rate_on_the_device(
    problem: str, optimizer: ClientOptimizer, recorders: list[Recorder]
) -> None:
    algorithm = vecfl.fedavg(lr=falling, batches=Batches(4, epochs=2), optimizer=optimizer)
    how = {"backend": "stacked", "problem": problem}
    plain = rounds(algorithm, spoil=False, **how)
    agree(rounds(algorithm, graphs=True, **how), plain)
    assert [(r.recorded, r.replayed > 20) for r in recorders] == [(2, True)]


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_examples_may_lie_elsewhere_in_each_round(
    resident: bool, recorders: list[Recorder]
) -> None:
    algorithm = vecfl.fedavg(lr=0.125, batches=Batches(4, epochs=2))
    how = {"problem": "mlp", "number": 4, "resident": resident}
    agree(rounds(algorithm, graphs=True, **how), rounds(algorithm, spoil=False, **how))
    assert [r.recorded for r in recorders] == [2]


def test_a_sum_over_steps_and_slots_by_hand(recorders: list[Recorder]) -> None:
    # Two clients of nine examples 1 and of two examples 2, y = 0, w = 0 and no bias: every loss is
    # w x squared by half, the gradient w x^2 = 0, so the model stays, and every loss is 0. With
    # w = 1 and lr = 0: each of nine and of two losses is 1/2 and 2: mean (9/2 + 4) / 11.
    module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Flatten(0))
    torch.nn.init.ones_(module[0].weight)
    x = torch.tensor([1.0] * 9 + [2.0] * 2)[:, None]
    data = vecfl.FederatedDataset({"x": x, "y": torch.zeros(11)}, torch.tensor([0, 9, 11]))
    task = Task(module, vecfl.losses.squared_error, example=data.examples(2))
    algorithm = vecfl.fedavg(lr=0.0, batches=Batches(1))
    sim = Simulation(task, data, algorithm, vecfl.everyone(), slots=2, graphs=True)
    state, metrics = sim.round(sim.start())
    assert metrics["train/loss"] == 8.5 / 11
    assert metrics["system/client_steps"] == 11
    # Nine steps of one kind: three as they are, one capture, six replays.
    assert [(r.warmed, r.recorded, r.replayed) for r in recorders] == [(3, 1, 6)]


def test_graphs_are_freed_when_slots_are_halved(
    recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Graphs]] = []
    plain = Trainer.train

    def train(self: Trainer, job: Any) -> Any:
        fold = plain(self, job)
        found = self.workers[0].graphs
        assert found is not None and found.captured
        if not held:
            held.append(weakref.ref(found))
            raise torch.OutOfMemoryError("planted")
        assert held[0]() is None
        return fold

    monkeypatch.setattr(Trainer, "train", train)
    algorithm = vecfl.fedavg(lr=0.125, batches=Batches(4, epochs=2))
    _, metrics = rounds(algorithm, number=1, slots=4, graphs=True)
    assert metrics[0]["system/slots"] == 2
    assert len(recorders) == 2


def test_what_cannot_be_captured_is_refused() -> None:
    algorithm = vecfl.fedavg(lr=0.125, batches=Batches(4))
    with pytest.raises(InputError, match="^graphs: CUDA graphs need a CUDA device, not cpu$"):
        rounds(algorithm, graphs=True)


def test_the_loop_has_no_graphs(recorders: list[Recorder]) -> None:
    algorithm = vecfl.fedavg(lr=0.125, batches=Batches(4))
    what = "^graphs: the loop backend has no step of all slots; use vmap or stacked$"
    with pytest.raises(InputError, match=what):
        rounds(algorithm, backend="loop", graphs=True)


def test_auto_leaves_the_loop_out(
    recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    algorithm = vecfl.fedavg(lr=0.125, batches=Batches(4))
    _, metrics = rounds(algorithm, number=1, backend="auto", graphs=True)
    assert metrics[0]["system/backend"] != "loop"
    assert metrics[0]["system/graphs"] is True


def test_accumulated_gradients_are_not_captured(
    recorders: list[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    algorithm = vecfl.fedavg(lr=falling, batches=Batches(4, epochs=2, full=True))
    plain = rounds(algorithm, spoil=False)
    agree(rounds(algorithm, graphs=True), plain)
    assert not recorders
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said == ["graphs: gradients accumulate over an epoch: no step is captured"]


def test_the_stand_in_sees_a_step_that_asks_and_one_that_keeps(
    recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.tensor([2.0]), torch.tensor([3.0])
    with pytest.raises(RuntimeError, match="not permitted"):
        Recorder().record(lambda: y.add_(float(x)))
    kept: list[Tensor] = []
    run = Recorder().record(lambda: kept.append(y.mul_(x) + 1))
    assert y.tolist() == [3.0]  # recording runs nothing
    x.fill_(5.0)
    run()
    assert y.tolist() == [15.0]
    assert kept[0].isnan().all()


def test_what_is_said_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            self.name = "side" if device is not None else "main"

        def wait_stream(self, other: "Stream") -> None:
            said.append((self.name, "waits for", other.name))

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        said.append(f"on {of.name}")
        yield

    @contextmanager
    def graph(made: Graph, *, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        said.append((pool, stream.name, capture_error_mode))
        yield

    for name, stands_in in (
        ("Stream", Stream),
        ("graph_pool_handle", lambda: "pool"),
        ("current_stream", lambda device: Stream()),
        ("stream", stream),
        ("graph", graph),
        ("CUDAGraph", Graph),
    ):
        monkeypatch.setattr(torch.cuda, name, stands_in)
    cuda = graphs.Cuda(torch.device("cuda"))
    cuda.warm(lambda: said.append("step"))
    side, main = "side", "main"
    assert said == [(side, "waits for", main), "on side", "step", (main, "waits for", side)]
    said.clear()
    replay = cuda.record(lambda: said.append("step"))
    assert said == [("pool", side, "thread_local"), "step"]
    replay()
    assert said[2:] == ["replay"]

    def ask() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    def fill() -> None:
        raise torch.OutOfMemoryError("full")

    what = "graphs: the step cannot be captured: CUDA error: operation not permitted when stream is"
    with pytest.raises(InputError) as caught:
        cuda.record(ask)
    assert str(caught.value) == f"{what} capturing; leave out graphs"
    with pytest.raises(torch.OutOfMemoryError):  # slots are halved
        cuda.record(fill)
