"""Clients do not see each other: not through slots, not through padding, not through a NaN.

And what becomes of clients that have nothing to send: without examples, too short, not finite.
"""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import vecfl
from vecfl import Batches, FederatedDataset, Simulation, Task, fedavg, fedsgd
from vecfl.algorithms import Algorithm

from .oracles.bridge import dataset, run_vecfl
from .oracles.loop import Columns, Setting
from .oracles.tasks import LAYERED, PROBLEMS, SIZES, Cnn, Problem, classes, floats, integers
from .oracles.tiny import FAR, PLAIN, STEEP, Line, client, squared

C, LONGEST = len(SIZES), 3
PROBLEMS = PROBLEMS | LAYERED | {"floats": Problem(Cnn, classes, floats(1, 6, 6), integers(3))}
SEATS = [("loop", 1), ("loop", 3), ("vmap", 1), ("vmap", 2), ("vmap", C), ("vmap", C + 2)]
NAN, INF = client((math.nan, 0.0)), client((1.0, math.inf))


def other_values(columns: Columns) -> Columns:
    return {"x": columns["x"] * -3 + 1, "y": (columns["y"] + 1) % 3}


def first_is(value: float) -> Callable[[Columns], Columns]:
    def change(columns: Columns) -> Columns:
        x = columns["x"].clone()
        x[0] = value
        return columns | {"x": x}

    return change


def resized(n: int) -> Callable[[Columns], Columns]:
    return lambda columns: {name: c[torch.arange(n) % len(c)] for name, c in columns.items()}


CHANGES = {  # of which client, and how; the longest is first in its slot, and idle slots copy it
    "other values": (LONGEST, other_values),
    "nan": (LONGEST, first_is(math.nan)),
    "inf": (LONGEST, first_is(math.inf)),
    "shorter": (LONGEST, resized(2)),
    "longer": (LONGEST, resized(46)),
    "nan in the first example of all": (0, first_is(math.nan)),
}


WORK = {  # of plain SGD stacked layers step by themselves
    "momentum": {"optimizer": "momentum", "epochs": 2},
    "sgd": {"epochs": 2},
    "own work": {
        "optimizer": "rmsprop",
        "factor": lambda step: 0.9**step,
        "random_epochs": (1, 3, 0.8),
        "token_cap": 22,
    },
}


def run_changed(
    problem: str, backend: str, slots: int, optimizer: str, change: str | None = None
) -> tuple[dict[int, Tensor], dict]:
    """What each of the ragged clients sends, and metrics; run_vecfl asserts backend and slots."""
    p = PROBLEMS[problem]
    clients = p.clients()
    if change is not None:
        victim, changed = CHANGES[change]
        clients[victim] = changed(clients[victim])
    setting = Setting(rounds=1, seed=9, lr=0.05, **WORK[optimizer])
    run = run_vecfl(p.build(), p.loss, clients, setting, backend=backend, slots=slots)
    return {k: row for k, [(row, _)] in run.updates[0].items()}, run.metrics[0]


@pytest.mark.parametrize("optimizer", WORK)
@pytest.mark.parametrize(
    "problem, backend, slots",
    [("mlp", *seats) for seats in (*SEATS, ("stacked", 1), ("stacked", 3), ("stacked", C))]
    + [("floats", "loop", 3), ("floats", "vmap", 3), ("floats", "stacked-grouped", 3)]
    + [("mixed", "stacked", 3)],
)
def test_other_clients_keep_their_bits(
    problem: str, backend: str, slots: int, optimizer: str
) -> None:
    before, _ = run_changed(problem, backend, slots, optimizer)
    for change, (victim, _) in CHANGES.items():
        after, metrics = run_changed(problem, backend, slots, optimizer, change)
        same = {k: torch.equal(before[k], after[k]) for k in range(C)}
        assert same == {k: k != victim for k in range(C)}, change
        assert math.isfinite(metrics["train/loss"])
        lost = change.startswith(("nan", "inf"))
        assert (metrics["train/dropped_clients"], metrics["train/clients"]) == (lost, 6 - lost)


def run_some(
    clients: list[Columns] | FederatedDataset,
    cohort: Sequence[int],
    algorithm: Algorithm,
    *,
    backend: str = "vmap",
    slots: int = 2,
    problem: str | None = None,
    rounds: int = 1,
) -> tuple[dict[str, Tensor], dict]:
    """The model after rounds of the clients `cohort`, and the metrics of the last."""
    data = clients if isinstance(clients, FederatedDataset) else dataset(clients)
    module, loss = Line(), squared
    if problem is not None:
        module, loss = PROBLEMS[problem].build(), PROBLEMS[problem].loss
    sim = Simulation(
        Task(module, loss, example=data.examples(2)),
        data,
        algorithm,
        lambda eligible, seed, round: torch.tensor(cohort),
        backend=backend,
        slots=slots,
        dtype=torch.float64,
    )
    state = sim.start()
    for _ in range(rounds):
        state, metrics = sim.round(state)
        assert (metrics["system/backend"], metrics["system/slots"]) == (backend, slots)
    return sim.state_dict(state), metrics


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend, slots", SEATS)
def test_a_nan_outside_the_cohort_is_never_touched(backend: str, slots: int) -> None:
    p = PROBLEMS["mlp"]
    clients, algorithm = p.clients(), fedavg(lr=0.1, batches=Batches(4, epochs=2))
    kind = {"backend": backend, "slots": slots, "problem": "mlp"}
    clean, _ = run_some(clients, range(1, C), algorithm, **kind)
    clients[0] = first_is(math.nan)(clients[0])  # the very first example of the pool
    spoilt, metrics = run_some(clients, range(1, C), algorithm, **kind)
    same_bits(spoilt, clean)
    assert metrics["train/dropped_clients"] == 0


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("weights", [vecfl.by_examples, vecfl.uniform_weights])
def test_a_client_that_is_not_finite_counts_for_nothing(
    backend: str, bad: Columns, weights: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    # FAR goes from 1 to 1.5 and STEEP to -1: mean 0.25, losses (1/2 + 2) / 2. With a weight for
    # the bad client's zero row it would be (1.5 - 1 + 1) / 3 = 0.5.
    columns = {
        name: torch.cat([c[name] for c in (client(FAR), bad, client(STEEP))]) for name in bad
    }
    data = FederatedDataset(columns, torch.arange(4), ["ann", "bob", "eve"])
    algorithm = fedavg(lr=0.5, batches=Batches(1), weights=weights)
    model, metrics = run_some(data, range(3), algorithm, backend=backend)
    assert model["w"].tolist() == [0.25]
    assert metrics["train/loss"] == 1.25
    assert (metrics["train/clients"], metrics["train/dropped_clients"]) == (2, 1)
    assert caplog.messages == ["round 1: client bob dropped: not finite"]


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_clients_without_examples_have_no_effect_by_examples(backend: str) -> None:
    p = PROBLEMS["mlp"]
    clients = p.clients((3, 0, 9, 0, 0, 5))
    kind = {"backend": backend, "problem": "mlp", "rounds": 2}
    for weights in (vecfl.by_examples, vecfl.by_tokens, vecfl.capped(4)):
        algorithm = fedavg(lr=0.1, batches=Batches(4), weights=weights)
        with_empty, metrics = run_some(clients, range(6), algorithm, **kind)
        without, _ = run_some(clients, [0, 2, 5], algorithm, **kind)
        same_bits(with_empty, without)
        assert (metrics["train/clients"], metrics["train/dropped_clients"]) == (3, 0)


# FAR goes from 1 to 1.5, three clients stay at 1: the mean moves by a quarter of 0.5. FedSGD's mean
# gradient is a quarter of -1.
@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize(
    "algorithm",
    [
        fedavg(lr=0.5, batches=Batches(1), weights=vecfl.uniform_weights),
        fedsgd(lr=0.5, weights=vecfl.uniform_weights),
    ],
    ids=["fedavg", "fedsgd"],
)
def test_empty_clients_of_uniform_weight_pull_to_zero(algorithm: Algorithm, backend: str) -> None:
    clients = [client(), client(FAR), client(), client()]
    model, metrics = run_some(clients, range(4), algorithm, backend=backend)
    assert model["w"].tolist() == [1.125]
    assert (metrics["train/clients"], metrics["train/loss"]) == (4, 0.5)


# lr = 1/4, batches of 2, short ones dropped, one epoch. Two FAR go to 1.25 in one step. Five STEEP
# make two steps, to 0 and 0, and count as 4. One PLAIN makes no step: weight 0 by examples, 1
# uniformly. Losses: 2 * 1/2, then 2 * 2 + 2 * 0, over 2 + 4 examples.
@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize(
    "weights, w, count",
    [
        (vecfl.by_examples, (2 * 1.25 + 4 * 0) / 6, 2),
        (vecfl.uniform_weights, (1.25 + 0 + 1) / 3, 3),
    ],
)
def test_clients_too_short_for_a_batch(
    weights: Callable, w: float, count: int, backend: str
) -> None:
    clients = [client(FAR, FAR), client(PLAIN), client(*[STEEP] * 5)]
    algorithm = fedavg(lr=0.25, batches=Batches(2, last="drop"), weights=weights)
    model, metrics = run_some(clients, range(3), algorithm, backend=backend)
    assert model["w"].item() == pytest.approx(w, rel=1e-12)
    assert metrics["train/loss"] == pytest.approx(5 / 6, rel=1e-12)
    assert (metrics["train/clients"], metrics["train/dropped_clients"]) == (count, 0)


@pytest.mark.parametrize("backend", ["loop", "vmap"])
def test_a_weight_that_is_a_column_of_the_slots_outlives_the_next_client(backend: str) -> None:
    """Two FAR of loss weight 2 go to 1.25 in a slot that STEEP, without loss weight, takes next."""

    def loss(output: Tensor, batch: Columns) -> tuple[Tensor, Tensor]:
        return 0.5 * (output - batch["y"]) ** 2, (batch["y"] > 0).to(output)

    data = dataset([client(FAR, FAR), client(STEEP)])
    task = vecfl.Task(Line().double(), loss, example=data.examples(2))
    algorithm = fedavg(lr=0.25, batches=Batches(2), weights=lambda done: done.weight)
    kind = {"backend": backend, "slots": 1, "dtype": torch.float64}
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **kind)
    state, metrics = sim.round(sim.start())
    assert state.server["w"].tolist() == [1.25]
    assert metrics["train/clients"] == 1


DROPPED = "round 1: client {} dropped: not finite"
NOBODY = "round 1: no usable client; the model stays as it is"


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize(
    "cohort, weights, dropped, usable",
    [
        ([0], vecfl.by_examples, [0], 0),
        ([0, 3], vecfl.uniform_weights, [0, 3], 0),
        ([1, 4], vecfl.by_examples, [], 0),
        ([1, 4], vecfl.uniform_weights, [], 2),  # usable, but their updates are zero
        ([0, 1, 2, 3, 4], vecfl.by_examples, [0, 3], 0),
    ],
)
def test_a_cohort_without_an_update_leaves_the_model(
    cohort: list[int],
    weights: Callable,
    dropped: list[int],
    usable: int,
    backend: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clients = [NAN, client(), client(), INF, client()]
    algorithm = fedavg(lr=0.5, batches=Batches(1), weights=weights)
    model, metrics = run_some(clients, cohort, algorithm, backend=backend)
    assert model["w"].tolist() == [1.0]
    assert math.isnan(metrics["train/loss"])
    assert metrics["train/clients"] == usable
    assert metrics["train/dropped_clients"] == len(dropped)
    lost = [DROPPED.format(", ".join(map(str, dropped)))] if dropped else []
    expected = lost + [NOBODY] * (usable == 0)
    assert sorted(caplog.messages) == sorted(expected)


def overflowing(output: Tensor, batch: Columns) -> tuple[Tensor, None]:
    """y = w x is the loss itself: its gradient is x, however large."""
    return output, None


def infinite_where_told(output: Tensor, batch: Columns) -> tuple[Tensor, None]:
    """A loss of infinity whose gradient is that of the output."""
    return output + batch["y"], None


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize(
    "loss, bad",
    [
        (overflowing, (1e10, 0.0)),  # loss 1e10; lr 1e30 times gradient 1e10 is no float32
        (infinite_where_told, (1e-30, math.inf)),  # update lr * x = 1; loss infinite
    ],
    ids=["update", "loss"],
)
def test_either_a_bad_loss_or_a_bad_update_drops_a_client(
    loss: Callable, bad: tuple[float, float], backend: str
) -> None:
    data = dataset([client((1e-30, 0.0)), client(bad)])
    task = Task(Line(), loss, example=client((1.0, 0.0), (2.0, 0.0)))
    algorithm = fedavg(lr=1e30, batches=Batches(1))
    sim = Simulation(task, data, algorithm, vecfl.everyone(), backend=backend)
    state, metrics = sim.round(sim.start())
    assert metrics["train/dropped_clients"] == 1
    # Client 0 alone counts: w = 1 - 1e30 * 1e-30 = 0.
    assert state.server["w"].item() == pytest.approx(0, abs=1e-6)
