"""DGA: weights in logs, who counts, and settings that must not matter."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

import vecfl
from vecfl.algorithms import Algorithm, Finished, Upload
from vecfl.algorithms.dga import MEASURES, Weighting
from vecfl.errors import InputError

from ..oracles.bridge import dataset
from ..oracles.loop import Columns
from ..oracles.tasks import PROBLEMS
from ..oracles.tiny import FAR, SETTLED, STEEP, Line, client, squared

B = vecfl.Batches(4)
HOW = [
    {"backend": "loop", "slots": 1},
    {"backend": "loop", "slots": 1, "workers": 3},
    {"backend": "vmap", "slots": 2},
    {"backend": "vmap", "slots": 3},
]


def lines(clients: list[Columns], algorithm: Algorithm, **kind: Any) -> tuple[float, dict]:
    """w after a round, from 1, and the metrics."""
    data = dataset(clients)
    task = vecfl.Task(Line(), squared, example=data.examples(2))
    how = {"dtype": torch.float64} | kind
    sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **how)
    state, metrics = sim.round(sim.start())
    return state.server["w"].item(), metrics


def dga(**kind: Any) -> Algorithm:
    return vecfl.dga(**{"lr": 0.25, "batches": B} | kind)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_weights_that_no_float_holds(how: dict[str, Any], order: Sequence[int]) -> None:
    """Losses of 1000.5, 1000 and 1001, beta 2: weights exp(-2001), exp(-2000), exp(-2002) come to
    e^-1, 1 and e^-2 by the largest, not to 0. y = x with w = 1 has loss (1 - y)^2 / 2, and the
    gradient 1 - y moves w by (y - 1) / 4."""
    losses = [1000.5, 1000.0, 1001.0]
    far = [1 + math.sqrt(2 * loss) for loss in losses]
    clients = [client((1.0, y), (1.0, y)) for y in far]
    for c in clients:
        c["x"], c["y"] = c["x"].double(), c["y"].double()
    shares = [math.exp(-2 * (loss - 1000)) for loss in losses]
    ys = [float(c["y"][0]) for c in clients]
    right = 1 + sum(a * (y - 1) / 4 for a, y in zip(shares, ys, strict=True)) / sum(shares)
    w, metrics = lines([clients[i] for i in order], dga(softmax_beta=2.0), **how)
    assert w == pytest.approx(right, rel=1e-4)  # y is of float32
    assert metrics["train/clients"] == 3


def test_one_client_alone_counts_whatever_its_loss() -> None:
    """FAR at beta 1e6: exp(-500,000) of itself. STEEP beside it, of three times the loss, is 0."""
    assert lines([client(FAR, FAR)], dga(softmax_beta=1e6))[0] == 1.25
    assert lines([client(FAR, FAR), client(STEEP)], dga(softmax_beta=1e6))[0] == 1.25


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_beta_0_is_uniform_fedavg(weighting: Weighting) -> None:
    """Bit for bit, for clients that all have examples."""
    problem, models = PROBLEMS["mlp"], []
    data = dataset(problem.clients((5, 1, 23, 8)))
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    for algorithm in (
        vecfl.fedavg(lr=0.25, batches=B, weights=vecfl.uniform_weights),
        dga(softmax_beta=0.0, weighting=weighting),
        dga(softmax_beta=50.0, weighting=weighting),
    ):
        sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), slots=2)
        models.append(sim.round(sim.start())[0].server["w"])
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2]) == (weighting == "uniform")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_who_has_nothing_to_send_counts_for_nothing(weighting: Weighting, exact: bool) -> None:
    """No examples, or a loss that is not finite: FAR and SETTLED are as if they were alone."""
    some = [client(FAR), client(SETTLED)]
    others = [client(), client((1e200, 1.0)), client((math.nan, 1.0))]
    for c in others[1:]:
        c["x"] = c["x"].double() * 1e100
    kind = {"backend": "loop", "exact_sums": exact}
    algorithm = dga(softmax_beta=0.5, weighting=weighting)
    alone, _ = lines(some, algorithm, **kind)
    w, metrics = lines([others[0], some[0], others[1], some[1], others[2]], algorithm, **kind)
    assert w == pytest.approx(alone, rel=1e-12) and alone != 1
    assert (metrics["train/clients"], metrics["train/dropped_clients"]) == (2, 2)


@pytest.mark.parametrize("log", [math.nan, math.inf, -math.inf])
def test_a_log_that_is_not_finite_drops_its_client(log: float) -> None:
    """Its update and its loss are finite; FAR alone goes to 1.25."""
    inner = dga(weighting="uniform")

    def upload(server: dict, done: Finished) -> Upload:
        sent = inner.upload(server, done)
        assert sent.log_weight is not None
        return replace(sent, log_weight=sent.log_weight.where(done.client != 1, log))

    algorithm = replace(inner, upload=upload)
    for exact in (False, True):
        w, metrics = lines([client(FAR), client(STEEP)], algorithm, exact_sums=exact, slots=2)
        assert w == pytest.approx(1.25, rel=1e-9)
        assert (metrics["train/clients"], metrics["train/dropped_clients"]) == (1, 1)


def test_a_cohort_of_nobody_leaves_the_model() -> None:
    nobody = [client(), client((math.nan, 0.0), (math.nan, 0.0))]
    for how in HOW:
        w, metrics = lines(nobody, dga(), **how)
        assert w == 1 and metrics["train/clients"] == 0


def test_exact_sums_have_the_same_bits_and_the_same_mean() -> None:
    problem, found = PROBLEMS["mlp"], []
    data = dataset(problem.clients())
    task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
    for how in ({"slots": 1}, {"slots": 2, "workers": 3}, {"slots": 3, "workers": 2}):
        for exact in (True, False):
            kind = {"backend": "loop", "dtype": torch.float64, "exact_sums": exact} | how
            algorithm = dga(weighting="rms", softmax_beta=3.0)
            sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), **kind)
            found.append(sim.round(sim.start())[0].server["w"])
    assert all(torch.equal(found[0], w) for w in found[::2])
    for w in found[1:]:
        torch.testing.assert_close(w, found[0], rtol=1e-9, atol=1e-12)


def test_exact_sums_of_weights_that_are_too_small() -> None:
    """FAR counts exp(-20 / 2) = 4.5e-5 beside a step of 2^-43: fine. exp(-1000 / 2) is refused."""
    kind: dict[str, Any] = {"exact_sums": True, "backend": "loop"}
    assert lines([client(FAR, FAR)], dga(softmax_beta=20.0), **kind)[0] == pytest.approx(1.25)
    with pytest.raises(InputError, match="^exact_sums: weights add up to 0, too little for sums"):
        lines([client(FAR, FAR)], dga(softmax_beta=1000.0), **kind)


@pytest.mark.parametrize("weighting", ["uniform", "update_mean", "update_variance", "update_rms"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_steps_without_loss_weight_count_for_nothing(
    weighting: Weighting, how: dict[str, Any]
) -> None:
    """A client of tokens that are all padding takes steps, sees examples and stays where it is: it
    must not pull the mean to zero."""
    problem, models = PROBLEMS["tokens"], []
    some = problem.clients((5, 3))
    (padding,) = problem.clients((4,))
    padding = padding | {"y": torch.full_like(padding["y"], -100)}
    for clients in (some, [some[0], padding, some[1]]):
        data = dataset(clients)
        task = vecfl.Task(problem.build(), problem.loss, example=data.examples(2))
        algorithm = dga(weighting=weighting, softmax_beta=0.5)
        sim = vecfl.Simulation(task, data, algorithm, vecfl.everyone(), dtype=torch.float64, **how)
        state, metrics = sim.round(sim.start())
        assert metrics["train/clients"] == 2
        models.append(state.server["w"])
    torch.testing.assert_close(models[0], models[1], rtol=1e-12, atol=1e-14)
    assert not torch.equal(models[0], sim.start().server["w"])


def test_the_server_and_the_client_optimizer() -> None:
    """FAR alone: lr 1/4 twice with momentum 1/2: v = -1, w = 1.25; v = -1.25, w = 1.5625. Half of
    the way by the server."""
    algorithm = dga(
        batches=vecfl.Batches(4, epochs=2),
        optimizer=vecfl.momentum(0.5),
        server=vecfl.server_sgd(0.5),
    )
    assert lines([client(FAR, FAR)], algorithm)[0] == 1.28125


def test_statistics_are_collected_only_where_they_are_asked_for() -> None:
    collected = {name for name in MEASURES if dga(weighting=name).rule.statistics}
    assert collected == {"flute_loss", "variance", "mean", "rms"}
    assert set(MEASURES) == set(get_args(Weighting))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            {"weighting": "los"},
            "dga(weighting='los'): choose from loss, flute_loss, variance, mean, rms, "
            "update_variance, update_mean, update_rms, uniform",
        ),
        ({"softmax_beta": -1}, "dga(softmax_beta=-1): must be at least 0 and finite"),
        ({"softmax_beta": math.inf}, "dga(softmax_beta=inf): must be at least 0 and finite"),
        ({"softmax_beta": math.nan}, "dga(softmax_beta=nan): must be at least 0 and finite"),
    ],
)
def test_bad_arguments(kind: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        dga(**kind)
    assert str(caught.value) == said
