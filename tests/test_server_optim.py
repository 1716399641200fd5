"""Server optimizers: against numbers by hand, the printed algorithm, and torch.optim."""

import math

import pytest
import torch

import vecfl
from vecfl.errors import InputError
from vecfl.server_optim import (
    ServerOptimizer,
    fedopt_adagrad,
    fedopt_adam,
    fedopt_yogi,
    server_adam,
    server_momentum,
    server_sgd,
)

from .oracles.bridge import dataset
from .oracles.tasks import PROBLEMS

UPDATES = torch.tensor([[1.0, -2.0, 0.0], [0.5, 4.0, 0.0], [-1.5, 0.1, 3.0]], dtype=torch.float64)
START = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def run(optimizer: ServerOptimizer, updates: torch.Tensor = UPDATES) -> list[torch.Tensor]:
    w, models = START.clone(), []
    state = optimizer.init(w)
    for update in updates:
        w, state = optimizer.step(w, update, state)
        models.append(w)
    return models


def test_server_sgd() -> None:
    w, update = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
    assert server_sgd().init(w) == {}
    new, state = server_sgd(0.5).step(w, update, {})
    assert new.tolist() == [0.75, 2.5] and state == {}
    assert server_sgd().step(w, update, {})[0].tolist() == [0.5, 3.0]
    assert w.tolist() == [1, 2]


# One parameter, tau = 0.5, lr = 1, updates 1 and then 2. v starts at tau^2 = 1/4.
# Adagrad, beta1 = 0: m = 1, v = 1/4 + 1 = 5/4; then m = 2, v = 5/4 + 4 = 21/4.
# Adam, betas (1/2, 3/4): m = 1/2, v = 3/16 + 1/4 = 7/16; then m = 5/4, v = 21/64 + 1 = 85/64.
# Yogi, betas (1/2, 3/4): v = 1/4 - 1/4 * 1 * sign(1/4 - 1) = 1/2; then v = 1/2 + 1/4 * 4 = 3/2.
BY_HAND = {
    "adagrad": (fedopt_adagrad(1.0, 0.0, 0.5), [(1, 5 / 4), (2, 21 / 4)]),
    "adam": (fedopt_adam(1.0, (0.5, 0.75), 0.5), [(1 / 2, 7 / 16), (5 / 4, 85 / 64)]),
    "yogi": (fedopt_yogi(1.0, (0.5, 0.75), 0.5), [(1 / 2, 1 / 2), (5 / 4, 3 / 2)]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_adaptive_optimizers_by_hand(name: str) -> None:
    optimizer, moments = BY_HAND[name]
    w, state = torch.zeros(1, dtype=torch.float64), None
    state = optimizer.init(w)
    expected = 0.0
    for update, (m, v) in zip((1.0, 2.0), moments, strict=True):
        w, state = optimizer.step(w, torch.tensor([update], dtype=torch.float64), state)
        expected -= m / (math.sqrt(v) + 0.5)
        assert state["m"].item() == pytest.approx(m)
        assert state["v"].item() == pytest.approx(v)
        assert w.item() == pytest.approx(expected)


def test_yogi_lets_its_accumulator_fall_by_the_square_alone() -> None:
    # v = 4 and update 1: v - (1/4) * 1 * sign(4 - 1) = 3.75, where Adam's would be 3.25.
    optimizer = fedopt_yogi(1.0, (0.5, 0.75), 0.5, start=4.0)
    w = torch.zeros(1, dtype=torch.float64)
    _, state = optimizer.step(w, torch.ones(1, dtype=torch.float64), optimizer.init(w))
    assert state["v"].item() == 3.75


@pytest.mark.parametrize("make", [fedopt_adagrad, fedopt_adam, fedopt_yogi])
def test_first_accumulator_is_tau_squared_or_as_given(make) -> None:
    w = torch.zeros(2, dtype=torch.float64)
    assert make(1.0, tau=0.25).init(w)["v"].tolist() == [0.0625, 0.0625]
    assert make(1.0, tau=0.25, start=0.0).init(w)["v"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "ours,theirs",
    [
        (server_sgd(0.3), lambda p: torch.optim.SGD(p, 0.3)),
        (server_momentum(0.3, 0.8), lambda p: torch.optim.SGD(p, 0.3, 0.8)),
        (
            server_adam(0.3, (0.7, 0.95), 1e-4),
            lambda p: torch.optim.Adam(p, 0.3, (0.7, 0.95), 1e-4),
        ),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_as_torch_optim(ours: ServerOptimizer, theirs) -> None:
    p = torch.nn.Parameter(START.clone())
    optimizer = theirs([p])
    for update, w in zip(UPDATES, run(ours), strict=True):
        p.grad = update.clone()
        optimizer.step()
        torch.testing.assert_close(w, p.detach(), rtol=1e-12, atol=1e-12)


def test_corrected_adam_differs_from_fedadam() -> None:
    plain = fedopt_adam(0.3, (0.7, 0.95), 1e-4, start=0.0)
    assert not torch.allclose(run(plain)[0], run(server_adam(0.3, (0.7, 0.95), 1e-4))[0])


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: server_sgd(-1), "server_sgd(lr) must be at least 0, not -1"),
        (lambda: server_momentum(1, 1.0), "server_momentum(beta) must be in [0, 1), not 1.0"),
        (lambda: server_adam(1, (0.9, 1.5)), "server_adam(betas) must be in [0, 1), not 1.5"),
        (lambda: fedopt_adam(1, tau=0), "fedadam(tau) must be positive, not 0"),
        (lambda: fedopt_yogi(1, start=-1), "fedyogi(start) must be at least 0, not -1"),
        (lambda: fedopt_yogi(1, (0.9, 1)), "fedyogi(betas) must be in [0, 1), not 1"),
        (lambda: fedopt_adagrad(math.nan), "fedadagrad(lr) must be at least 0, not nan"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message


ALGORITHMS = {
    "fedavgm": (vecfl.fedavgm, server_momentum(0.5, 0.9), {"server_lr": 0.5}),
    "fedadagrad": (vecfl.fedadagrad, fedopt_adagrad(0.1), {"server_lr": 0.1}),
    "fedadam": (vecfl.fedadam, fedopt_adam(0.1), {"server_lr": 0.1}),
    "fedyogi": (vecfl.fedyogi, fedopt_yogi(0.1), {"server_lr": 0.1}),
}


@pytest.mark.parametrize("backend", ["loop", "vmap"])
@pytest.mark.parametrize("task", ["mlp", "buffers"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_step_the_server_by_the_mean_update(name: str, task: str, backend: str) -> None:
    """Three rounds: each model follows from the last one and FedAvg's from there."""
    make, optimizer, server = ALGORITHMS[name]
    problem = PROBLEMS[task]
    data = dataset(problem.clients())
    parts = vecfl.Task(problem.build(), problem.loss, example=data.examples(2)), data
    clients = {"lr": 0.1, "batches": vecfl.Batches(4)}

    def simulate(algorithm: vecfl.Algorithm) -> vecfl.Simulation:
        everyone = vecfl.everyone()
        return vecfl.Simulation(*parts, algorithm, everyone, backend=backend, dtype=torch.float64)

    sim, plain = simulate(make(**server, **clients)), simulate(vecfl.fedavg(**clients))
    assert sim.algorithm.name == name
    state, trainable = sim.start(), sim.task.layout.trainable
    memory = optimizer.init(state.server["w"][:trainable])
    for t in range(3):
        w = state.server["w"]
        mean, _ = plain.round(vecfl.State(t, plain.algorithm.init(w, sim.task.layout)))
        state, _ = sim.round(state)
        update = w - mean.server["w"]
        expected, memory = optimizer.step(w[:trainable], update[:trainable], memory)
        torch.testing.assert_close(state.server["w"][:trainable], expected, rtol=1e-9, atol=1e-12)
        buffers = mean.server["w"][trainable:]
        torch.testing.assert_close(state.server["w"][trainable:], buffers, rtol=1e-9, atol=1e-12)
